//! The channel between the host and a guest, whatever VMM carries it.
//!
//! ```text
//! transport    how the host reaches the guest's end
//! channel      one task per VM: asks for the guest's state, sends requests, carries streams
//! tokens       which messages of the guest are believed
//! heartbeat    whether the guest still answers
//! log_lines    lines for the log of the instance, bounded
//! streams      streams to the agent in the guest
//! ```
//! The guest is not trusted. Nothing here knows a VMM.

mod channel;
mod heartbeat;
#[cfg(test)]
mod hostile_guest;
mod log_lines;
mod reported;
mod streams;
mod tokens;
mod transport;

use std::sync::Arc;

use stead_schemas::names::Uid;

pub(crate) use self::channel::{GuestChannel, clock, silent};
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    pub use super::channel::fuzzing::control;
    pub use super::streams::fuzzing::frames;
}
#[cfg(test)]
pub(crate) use self::streams::Mux;
pub use self::streams::{AgentError, AgentStream, Event, StreamReceiver, StreamSender};
pub(crate) use self::tokens::{Known, NewToken, Tokens, new_token, random};
pub use self::transport::Transport;

/// Notified whenever a VM or its guest may have changed. It says only that the VM should be observed.
pub type Changed = Arc<dyn Fn(&Uid) + Send + Sync>;

/// Receives a line that a guest wrote for people: not cleaned, but bounded in length and in number.
pub type Noted = Arc<dyn Fn(&Uid, &str) + Send + Sync>;
