//! References: the things that an object points at. The store can list the objects that point at a thing.
//!
//! Each kind declares its references (`Kind::references`); the store keeps them in an index in both
//! directions. A role states the purpose of the reference, so that a lookup finds only the relevant ones. Each
//! kind also declares which changes of other objects wake its reconciler, in terms of these roles.

use std::net::Ipv4Addr;

use crate::names::{Digest, Uid};

/// A reference of an object.
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
    /// The processors and the memory of the host.
    Room,
}

/// The purpose of a reference. References that express a wait end when the wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A reference to the owner of the object, from any kind.
    Owner,
    /// A reference from an instance to its image, and to the image that it starts with later.
    Image,
    /// A reference from an instance to its port, while a VM is behind the port or should be.
    Attaches,
    /// A reference from an image, an instance or a snapshot to content that must not be removed.
    Content,
    /// A reference from an instance to the snapshot whose memory it still has to take over.
    AwaitsMemory,
    /// A reference from a disk to the snapshot that it still has to be copied from.
    AwaitsCopy,
    /// A reference from an instance, or a snapshot of an instance, to a volume that it writes to.
    Writes,
    /// A reference from an instance, or a snapshot of an instance, to a volume that it reads, with or
    /// without an overlay.
    Reads,
    /// A reference from a snapshot that is being taken to a volume that is copied for it.
    Copies,
    /// A reference from a snapshot that is being taken to its source instance.
    Captures,
    /// A reference from a snapshot to its source instance.
    Source,
    /// A reference from a snapshot to the schedule that took it.
    Schedule,
    /// A reference from a port to its network.
    Network,
    /// A reference from a port to its address.
    Address,
    /// A reference from an instance to the connections that keep it from standby.
    Counts,
    /// A reference from an instance to the room of the host that it holds.
    Holds,
    /// A reference from an instance to the room of the host, while it waits for some.
    AwaitsRoom,
    /// A reference from an ingress to a port that its rules are served at.
    Serves,
    /// A reference from a policy of mediated egress to its instance.
    Mediates,
    /// A reference from a policy of mediated egress to the process that applies it.
    MediatedBy,
}

/// A change of one object that wakes another. Each kind declares which changes wake its objects
/// (`Kind::WOKEN_BY`), and the index of references gives the objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WokenBy {
    /// A change of the object that this object refers to in a role.
    Target(Role),
    /// A change of the owner of this object.
    Owner,
    /// A change of an object that refers to this object in a role.
    Referrer(Role),
    /// The beginning of another object's reference to this object in a role.
    Gain(Role),
    /// The end of another object's reference to this object in a role.
    Release(Role),
    /// The end of another object's reference `left` to a thing that this object refers to as `waits`: it may
    /// have waited for that.
    Departure { left: Role, waits: Role },
}

impl Ref {
    /// Makes the reference of an owned object to its owner.
    #[must_use]
    pub fn to_owner(owner: &Uid) -> Self {
        Self { role: Role::Owner, target: Target::Owner(owner.clone()) }
    }

    #[must_use]
    pub fn to_content(digest: &Digest) -> Self {
        Self { role: Role::Content, target: Target::Content(digest.clone()) }
    }
}
