//! Heads of requests to ingresses.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::heads(data));
