//! Mediated egress: the proxy, and the resolver of names.

pub mod names;
