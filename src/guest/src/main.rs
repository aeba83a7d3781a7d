//! PID 1 and agent inside a Stead VM.

fn main() {}
