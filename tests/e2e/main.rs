//! Real VMs and real daemons: each test boots one or two VMs, looks at them from outside, and leaves
//! nothing.

#![cfg(test)]

mod crash;
mod drift;
mod judge;
mod life;
mod machines;
mod namespace;
mod programs;
mod site;
mod stage;
