//! Builds the guest program that `stead` embeds.

fn main() {}
