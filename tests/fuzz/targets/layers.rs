//! Layers: archives, compressed or not, merged and written out again.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::layers(data));
