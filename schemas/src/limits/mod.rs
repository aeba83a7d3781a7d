//! The limits, each with its reason. A limit is enforced at one edge, and tested at the limit and one beyond.

mod egress;
mod health;
mod ingress;
mod network;
mod runtime;
mod store;
mod vm;
mod wire;

pub use egress::*;
pub use health::*;
pub use ingress::*;
pub use network::*;
pub use runtime::*;
pub use store::*;
pub use vm::*;
pub use wire::*;
