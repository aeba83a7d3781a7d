//! Tests of the daemon and its parts in process.

mod api;
mod bad_input;
mod sdk;
mod server;
mod store;
