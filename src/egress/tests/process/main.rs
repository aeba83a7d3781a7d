//! The whole process, run in a thread, as the daemon and guests on loopback see it.
//!
//! Numbers of rows are those of the table of attacks.

mod clients;
mod control;
mod names;
mod servers;
mod traffic;
mod world;
