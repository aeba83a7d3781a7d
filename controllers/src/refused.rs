//! The refusal of a request: one type for every kind of object.
//!
//! A refusal has a kind, a sentence for the client and, where fields of the request are the reason, their paths.
//! `src/api` has the table from kinds to statuses and codes of the wire.

use std::fmt::Debug;

use stead_schemas::instance::{Instance, State};
use stead_schemas::meta::Kind;
use stead_schemas::validate::FieldErrors;

use crate::store::{TxError, absent};

/// A request that admission refused. Nothing of it is staged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub kind: RefusedKind,
    /// The sentence for the client. It names the field too, where a field is the reason.
    pub message: String,
    /// Path of the field that is the reason, for example `volumes`; `None` if the request as a whole is.
    pub path: Option<String>,
    /// The fields that are the reason, where several can be; the answer lists them.
    pub fields: FieldErrors,
}

/// The kind of a refusal. Each kind has a status and a code on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedKind {
    /// A value of the request cannot be carried out.
    Invalid,
    InvalidExpiry,
    InvalidHealthCheck,
    /// The limit of the traffic to an instance.
    InvalidDownload,
    /// The limit of the traffic from an instance.
    InvalidUpload,
    /// The image is known and failed permanently.
    ImageNotReady,
    /// The request refers to an instance that does not exist and that is not the object of its path.
    InstanceNotFound,
    /// A field asks for something that the hypervisor does not declare.
    UnsupportedField,
    /// The hypervisor of the object does not declare the verb.
    UnsupportedVerb,
    NotFound,
    NameTaken,
    /// The name or the id is taken, for kinds whose wire has one code for both.
    AlreadyExists,
    HostnameInUse,
    PortInUse,
    /// The object is in a state that the verb is not legal in.
    InvalidState {
        state: State,
        /// The states in which the verb is legal.
        legal: &'static str,
    },
    /// The instance is in standby.
    InStandby,
    /// The instance has expired and is being deleted.
    Expired,
    /// The record cannot be read, or another object is in the way.
    Conflict,
    /// The host or its network has no room for the request.
    NoRoom,
    /// The number of objects is at its limit.
    Quota,
    /// The host was not observed yet.
    NotObserved,
}

impl Refused {
    #[must_use]
    pub fn new(kind: RefusedKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), path: None, fields: FieldErrors::default() }
    }

    /// Refuses because of one field. The sentence is complete: it names the field.
    #[must_use]
    pub fn at(kind: RefusedKind, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: Some(path.into()), ..Self::new(kind, message) }
    }

    /// Refuses because of these fields, which must not be empty.
    #[must_use]
    pub fn fields(kind: RefusedKind, fields: FieldErrors) -> Self {
        let path = fields.iter().next().map(|error| error.path.clone());
        Self { kind, message: fields.to_string(), path, fields }
    }

    /// Refuses a field that asks for something that a hypervisor does not declare. The message continues the
    /// path: "is not supported by ...".
    #[must_use]
    pub fn unsupported(path: &str, message: impl std::fmt::Display) -> Self {
        let mut fields = FieldErrors::default();
        fields.push(path, "not_supported", message);
        Self::fields(RefusedKind::UnsupportedField, fields)
    }

    /// Refuses a verb on an instance in its present state.
    #[must_use]
    pub fn state(verb: &str, state: State, legal: &'static str) -> Self {
        let message = format!("cannot {verb} an instance that is {state:?}: it must be {legal}");
        Self::new(RefusedKind::InvalidState { state, legal }, message)
    }

    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(RefusedKind::NotFound, message)
    }

    /// Refuses a request for an object that does not exist.
    #[must_use]
    pub fn absent<K: Kind>(word: impl std::fmt::Display) -> Self {
        Self::not_found(absent(K::NAME, word))
    }

    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(RefusedKind::Invalid, message)
    }

    #[must_use]
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(RefusedKind::Conflict, message)
    }

    #[must_use]
    pub fn no_room(message: impl Into<String>) -> Self {
        Self::new(RefusedKind::NoRoom, message)
    }

    #[must_use]
    pub fn quota(message: impl Into<String>) -> Self {
        Self::new(RefusedKind::Quota, message)
    }
}

impl From<TxError> for Refused {
    fn from(error: TxError) -> Self {
        match error {
            TxError::NameTaken { kind, name, .. } => {
                let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
                let message = format!("{article} {kind} named {name} exists already");
                let is_instance = kind == Instance::NAME;
                let kind = if is_instance { RefusedKind::NameTaken } else { RefusedKind::AlreadyExists };
                Self::new(kind, message)
            }
            TxError::UidTaken { uid, .. } => {
                Self::new(RefusedKind::AlreadyExists, format!("the id {uid} is taken"))
            }
            TxError::NotFound { kind, uid } | TxError::Deleting { kind, uid } => {
                Self::not_found(absent(kind, uid))
            }
            TxError::TooMany { .. } => Self::quota(error.to_string()),
            TxError::Stale { .. } | TxError::Unreadable { .. } => Self::conflict(error.to_string()),
        }
    }
}
