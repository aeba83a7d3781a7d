//! The resolver as guests see it: real questions on loopback, and an authoritative server that keeps what it has seen.
//!
//! Numbers of rows are those of the table of attacks.

mod abuse;
mod answers;
mod authority;
mod descriptors;
mod fixtures;
mod limits;
mod rebinding;
mod spoofing;
