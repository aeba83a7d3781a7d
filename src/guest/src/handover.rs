//! The state of the control channel that a process hands over to the next one.

use serde::{Deserialize, Serialize};
use stead_schemas::guest::{Config, Token};

/// The state that the next process serving the port needs.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Handover {
    pub(crate) nonce: u64,
    pub(crate) token: Option<Token>,
    pub(crate) config: Option<Config>,
    pub(crate) is_stopping: bool,
    /// Received bytes of a frame that is incomplete.
    pub(crate) received: Vec<u8>,
    /// Unsent bytes of a frame that was begun.
    pub(crate) unsent: Vec<u8>,
}
