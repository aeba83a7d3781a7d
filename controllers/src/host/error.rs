//! The error type of all ports: the operation, its subject, and the kind of the failure.
//!
//! The kind alone decides the retry (`runtime`), so adapters choose it with care.

use std::error::Error;
use std::fmt;

/// The meaning of a failure for the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostErrorKind {
    /// The failure will likely pass: busy, interrupted, connection refused, time-out.
    Transient,
    /// An object that is not ours is in the way.
    Conflict,
    /// An object that the step needs does not exist (any more).
    Missing,
    /// Permission or authentication failed.
    Denied,
    /// The host is out of space, descriptors or addresses, or a quota or rate limit is reached.
    Exhausted,
    /// This host or backend cannot do the operation.
    Unsupported,
    /// The request itself can never succeed in its present form.
    Permanent,
}

/// A failed verb. `Display` gives operation and subject; the cause is the `source` and is never repeated.
#[derive(Debug)]
pub struct HostError {
    pub kind: HostErrorKind,
    pub operation: &'static str,
    pub subject: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl HostError {
    pub fn new(kind: HostErrorKind, operation: &'static str, subject: impl Into<String>) -> Self {
        Self { kind, operation, subject: subject.into(), source: None }
    }

    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Returns the kind that corresponds to an I/O error.
    #[must_use]
    pub fn kind_of_io(error: &std::io::Error) -> HostErrorKind {
        use std::io::ErrorKind as Io;
        match error.kind() {
            Io::NotFound => HostErrorKind::Missing,
            Io::PermissionDenied => HostErrorKind::Denied,
            Io::AlreadyExists | Io::AddrInUse => HostErrorKind::Conflict,
            Io::StorageFull | Io::QuotaExceeded | Io::OutOfMemory | Io::FileTooLarge => {
                HostErrorKind::Exhausted
            }
            Io::Unsupported => HostErrorKind::Unsupported,
            Io::InvalidInput | Io::InvalidData | Io::InvalidFilename => HostErrorKind::Permanent,
            _ => HostErrorKind::Transient,
        }
    }

    /// Creates an error from an I/O error and its context.
    pub fn io(operation: &'static str, subject: impl Into<String>, error: std::io::Error) -> Self {
        Self::new(Self::kind_of_io(&error), operation, subject).because(error)
    }

    /// Returns operation, subject and the whole chain of causes in one line, for conditions and logs.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}", self.operation, self.subject)
    }
}

impl Error for HostError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}
