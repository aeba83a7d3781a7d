//! Answers of a VMM on its monitor.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::qmp(data));
