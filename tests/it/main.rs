//! Tests of the daemon and its parts in process.

mod api;
mod auto_standby;
mod bad_input;
mod cli;
mod ingress;
mod load;
#[path = "../sdk/node.rs"]
mod node;
#[path = "../sdk/python.rs"]
mod python;
mod rights;
mod sdk;
mod server;
mod store;
