//! Reports of what was refused, and counts of everything.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The reason why a guest did not get what it asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The bytes are no well-formed question.
    Malformed,
    /// The class, operation or type is one that nobody is answered.
    Unsupported,
    /// The type is not answered for mediated guests.
    TypeNotAllowed,
    /// The host is not in the list of the guest's policy.
    HostNotAllowed,
    /// The name is longer than a mediated guest may ask for.
    NameTooLong,
    /// The name cannot be the name of a host.
    NotAHost,
    /// The name has one label, and no instance has it.
    SingleLabel,
    /// No instance that the guest may know has this name or address.
    UnknownInstance,
    /// All addresses of the answer are ones that the guest must not reach by this name.
    Rebinding,
    /// Some addresses of the answer were such, and were removed.
    RebindingInPart,
    /// The guest asks too often.
    TooManyQuestions,
    /// The guest, or all guests together, have too many questions that wait for an upstream resolver.
    TooManyWaiting,
}

impl Reason {
    /// Returns the word for logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Unsupported => "unsupported",
            Self::TypeNotAllowed => "type_not_allowed",
            Self::HostNotAllowed => "host_not_allowed",
            Self::NameTooLong => "name_too_long",
            Self::NotAHost => "not_a_host",
            Self::SingleLabel => "single_label",
            Self::UnknownInstance => "unknown_instance",
            Self::Rebinding => "rebinding",
            Self::RebindingInPart => "rebinding_in_part",
            Self::TooManyQuestions => "too_many_questions",
            Self::TooManyWaiting => "too_many_waiting",
        }
    }
}

/// A question that was refused, or whose answer was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub guest: IpAddr,
    /// The name that was asked for, with escapes for bytes that cannot be printed; empty if it could not be read.
    pub name: String,
    /// The type that was asked for, empty if it could not be read.
    pub record_type: String,
    pub reason: Reason,
    /// The first address that was removed, for reasons of rebinding.
    pub address: Option<IpAddr>,
}

/// A receiver of events. It is called in the middle of an answer and must not block: a full queue drops the event.
pub type OnEvent = Arc<dyn Fn(Event) + Send + Sync>;

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of a resolver.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: Counter,)* }

        /// The counts since the start of a resolver.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counts { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Returns the counts; they are read one after another.
            #[must_use]
            pub(crate) fn counts(&self) -> Counts {
                Counts { $($name: self.$name.value(),)* }
            }
        }
    };
}

counters! {
    /// Messages from guests.
    questions,
    /// Messages and connections from addresses of no guest; they are dropped.
    from_nobody,
    /// Messages that were answered with an error of the format, or not at all.
    malformed,
    /// Questions that were refused by a rule.
    refused,
    /// Names that do not exist by a rule.
    denied_names,
    /// Questions that were answered from the tables, or with nothing by a rule.
    answered_here,
    /// Questions that were answered from the cache.
    answered_from_cache,
    /// Questions to upstream resolvers.
    forwarded,
    /// Questions that waited for the answer to an equal one.
    shared,
    /// Questions that no upstream resolver answered.
    upstream_failures,
    /// Answers from which addresses were removed.
    rebinding,
    /// Questions above the rate.
    too_many_questions,
    /// Questions for which there was no room to wait.
    too_many_waiting,
    /// Answers by UDP that the kernel did not take.
    unsent,
    /// Errors of the sockets themselves, for a lack of descriptors or memory.
    socket_errors,
    /// TCP connections that were closed because there were too many.
    connections_refused,
    /// Hosts that the proxy resolves.
    resolutions,
}
