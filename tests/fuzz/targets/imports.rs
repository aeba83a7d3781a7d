//! Archives of images that a client uploads.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::imports(data));
