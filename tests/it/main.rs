//! Tests of the daemon and its parts in process.

mod store;
