//! Packets to VMs in standby, and messages of the kernel.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stead::fuzzing::packets(data));
