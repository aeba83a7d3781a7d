//! The simulated machine: an in-memory host with faults, a clock and crashes behind the same ports.
