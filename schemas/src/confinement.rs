//! The walls around VMMs: what keeps a guest that takes over its VMM from the host.

use serde::{Deserialize, Serialize};

/// A wall around a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wall {
    /// A user and a group of its own.
    User,
    /// No capability in any set.
    Capabilities,
    /// No program can give it rights.
    NoNewPrivileges,
    /// A filter of system calls.
    SystemCalls,
    /// A file system with only what it was given.
    Files,
    /// Processes of the host are not there.
    Processes,
    /// The host's network is not there.
    Network,
    /// Shared memory and queues of the host are not there.
    Ipc,
    /// A host name of its own.
    HostName,
    /// Control groups of the host are not there.
    ControlGroups,
    /// Rules of landlock on files, ports and signals.
    Landlock,
}

impl Wall {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivileges => "no_new_privileges",
            Self::SystemCalls => "system_calls",
            Self::Files => "files",
            Self::Processes => "processes",
            Self::Network => "network",
            Self::Ipc => "ipc",
            Self::HostName => "host_name",
            Self::ControlGroups => "control_groups",
            Self::Landlock => "landlock",
        }
    }
}
