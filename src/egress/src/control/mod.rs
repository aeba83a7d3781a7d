//! The socket by which the daemon controls the process: policies come in, and the state goes out.
//!
//! Guarantees: only root and the user of the daemon are answered; an exchange ends within a bounded time and has a bounded
//! size; the value of a credential is in no error and no event, and the bytes of a message with it are cleared.

mod answer;
mod client;
mod server;
mod wire;

pub(crate) use answer::Control;
pub use client::{ControlError, ask};
pub(crate) use server::serve as serve_control;
