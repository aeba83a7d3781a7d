//! References: the things that an object points at, so that a thing can be asked who points at it.
//!
//! Each kind declares its references (`Kind::references`); the store keeps them in an index in both
//! directions. A role says what the reference is for, so that a look-up finds those that matter and no others.

use std::net::Ipv4Addr;

use crate::meta::Kind;
use crate::names::{Digest, Uid};

/// One reference of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ref {
    pub role: Role,
    pub target: Target,
}

/// The thing that a reference points at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    Object {
        kind: &'static str,
        uid: Uid,
    },
    /// An object of any kind: uids are unique over all kinds.
    Owner(Uid),
    /// Content of an image.
    Content(Digest),
    /// An address of a subnet.
    Address(Ipv4Addr),
    /// A port of the host.
    HostPort(u16),
    /// The host's table of connections.
    Connections,
}

/// The purpose of a reference. Those that say that something is waited for end when it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// To the owner of the object, from any kind.
    Owner,
    /// From an instance to its image.
    Image,
    /// From an image, an instance or a snapshot to the content that must not be removed.
    Content,
    /// From an instance to the snapshot whose memory it still has to take over.
    AwaitsMemory,
    /// From a disk to the snapshot that it still has to be copied from.
    AwaitsCopy,
    /// From an instance or a snapshot of one to a volume that it writes to.
    Writes,
    /// From an instance or a snapshot of one to a volume that it reads, with or without an overlay.
    Reads,
    /// From a snapshot that is being taken to a volume that is copied for it.
    Copies,
    /// From a snapshot that is being taken to the instance that it is taken of.
    Captures,
    /// From a snapshot to the instance that it was taken of.
    Source,
    /// From a snapshot to the schedule that took it.
    Schedule,
    /// From a port to its network.
    Network,
    /// From a port to its address.
    Address,
    /// From an instance to the connections that keep it from standby.
    Counts,
    /// From an ingress to a port that its rules are served at.
    Serves,
}

impl Ref {
    /// A reference to an object of kind `K`.
    #[must_use]
    pub fn to<K: Kind>(role: Role, uid: &Uid) -> Self {
        Self { role, target: Target::Object { kind: K::NAME, uid: uid.clone() } }
    }

    /// The reference of an owned object to its owner.
    #[must_use]
    pub fn to_owner(owner: &Uid) -> Self {
        Self { role: Role::Owner, target: Target::Owner(owner.clone()) }
    }

    #[must_use]
    pub fn to_content(digest: &Digest) -> Self {
        Self { role: Role::Content, target: Target::Content(digest.clone()) }
    }

    /// The uid that the reference points at, if that is an object of kind `K`.
    #[must_use]
    pub fn uid_of<K: Kind>(&self) -> Option<&Uid> {
        match &self.target {
            Target::Object { kind, uid } if *kind == K::NAME => Some(uid),
            _ => None,
        }
    }
}
