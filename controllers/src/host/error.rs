//! One error for all ports: what was tried, on what, and of which kind the failure is.
//!
//! The kind alone decides the retry (`runtime`), so adapters choose it with care.

use std::error::Error;
use std::fmt;

/// What a failure means for the next try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostErrorKind {
    /// Will likely pass: busy, interrupted, connection refused, time-out.
    Transient,
    /// Something not ours is in the way.
    Conflict,
    /// What the step needs is not there (any more).
    Missing,
    /// Permission, authentication.
    Denied,
    /// Out of space, descriptors, addresses, quota, rate.
    Exhausted,
    /// This host or backend cannot do it.
    Unsupported,
    /// The request itself can never succeed as it is.
    Permanent,
}

/// A failed verb. `Display` gives operation and subject; the cause is the source, never repeated.
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

    /// The kind that an I/O error means.
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

    /// An I/O error with its context.
    pub fn io(operation: &'static str, subject: impl Into<String>, error: std::io::Error) -> Self {
        Self::new(Self::kind_of_io(&error), operation, subject).because(error)
    }

    /// Operation, subject and the whole chain of causes in one line, for conditions and logs.
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
