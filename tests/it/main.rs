//! Tests of the daemon and its parts in process.

mod api;
mod auto_standby;
mod backup;
mod bad_input;
mod bandwidth;
mod changes;
mod cli;
mod daemon;
mod generated;
mod ingress;
mod load;
#[expect(dead_code, reason = "other tests need the rest")]
mod loop_disk;
mod no_host;
#[path = "../sdk/node.rs"]
mod node;
mod openapi;
mod own_mounts;
mod power_loss;
#[path = "../sdk/python.rs"]
mod python;
mod renewal;
mod resources;
mod rights;
mod sdk;
mod server;
mod socket;
mod store;
mod store_start;
mod terminal;
mod tls;
mod upgrade;
