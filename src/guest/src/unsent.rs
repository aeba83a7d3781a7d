//! Reads and writes of the control port: what one read brought, and the frame that is written at present.

use std::fs::File;
use std::io::{self, Write};

/// The result of one read.
#[derive(Default)]
pub(crate) struct Taken {
    pub(crate) bytes: usize,
    /// True if nothing is left to be read for now.
    pub(crate) is_drained: bool,
    pub(crate) must_report: bool,
}

/// A frame that is being written. No other frame interrupts it.
#[derive(Default)]
pub(crate) struct Unsent {
    bytes: Vec<u8>,
    sent: usize,
}

impl Unsent {
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0 }
    }

    pub(crate) fn is_some(&self) -> bool {
        self.sent < self.bytes.len()
    }

    /// Returns the bytes that the port has not taken yet.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Returns the buffer for another use.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Writes as much as the port takes. Returns `true` if it may take more.
    pub(crate) fn write(&mut self, port: &mut File) -> bool {
        match port.write(self.rest()) {
            Ok(count) => {
                self.sent += count;
                true
            }
            Err(error) if is_passing(&error) => false,
            Err(_) => {
                *self = Self::default();
                false
            }
        }
    }
}

/// True if the port takes or has bytes again later.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
