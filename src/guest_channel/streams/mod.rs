//! Streams to the agent of a guest, as the host uses them.
//!
//! Guarantees: memory of a stream is bounded by its window whatever the guest sends; a consumer that does
//! not read stops the guest's side of this stream and nothing else; dropping a stream closes it in the
//! guest.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod inbox;
mod mux;

use bytes::Bytes;
use stead_schemas::guest::FromStream;

pub use mux::{AgentStream, StreamReceiver, StreamSender};
pub(crate) use mux::{Mux, Outgoing};

/// The reason why an agent cannot be used now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// The VM does not exist, its guest is not ready yet, or its program has ended.
    #[error("the guest's agent is not there")]
    NotReady,
    /// The connection was cut, or the daemon has more of them than it can serve.
    #[error("the connection to the guest's agent was lost")]
    Lost,
    /// The agent was there, and has not answered the host for half a minute.
    #[error("the guest does not answer")]
    Unresponsive,
    #[error("too many streams to this guest at once")]
    TooMany,
}

/// An event that the guest sent on a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Data(Bytes),
    ErrorData(Bytes),
    Message(FromStream),
}
