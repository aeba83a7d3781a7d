//! Indexes, manifests and configurations of images.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::manifests(data));
