//! The nouns of Stead: stored objects, wire types, the guest protocol and every limit.
//!
//! Guarantees: a value of these types was parsed once, at the edge, and stays valid; all problems of one
//! input are reported together, each with its field's path.
//! Never: performs I/O, reads a clock, draws a random number, or depends on another crate of this project.

pub mod addresses;
#[cfg(feature = "wire")]
pub mod api;
pub mod budget;
pub mod capabilities;
pub mod compression;
pub mod condition;
pub mod confinement;
mod content;
pub mod disk;
pub mod egress;
pub mod goal;
pub mod guest;
pub mod health;
pub mod image;
pub mod ingress;
pub mod instance;
mod instance_kind;
pub mod limits;
pub mod mediation;
pub mod meta;
pub mod names;
pub mod network;
pub mod node;
pub mod numbers;
pub mod pending;
pub mod policy;
pub mod quantity;
pub mod references;
pub mod resource;
pub mod root_image;
pub mod schedule;
pub mod signal;
pub mod snapshot;
pub mod validate;
pub mod volume;
