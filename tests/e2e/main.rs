//! Real VMs: each test boots one or two, looks at them from outside, and leaves nothing.

#![cfg(test)]

mod machines;
mod stage;
