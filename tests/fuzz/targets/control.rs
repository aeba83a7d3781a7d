//! States and notes of a guest, as its control channel takes them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::control(data));
