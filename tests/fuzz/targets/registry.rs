//! Answers of registries: challenges, tokens, redirects.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::registry(data));
