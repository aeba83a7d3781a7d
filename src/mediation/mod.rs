//! The host's side of mediated egress: the process that carries it, and the policies that it is given.
//!
//! ```text
//! config     the keys of the configuration
//! carrier    the process: its sockets, its walls, its identity and its end
//! policies   what the daemon asks of the process by its control socket
//! logs       the files of audit logs
//! audit_lines  the lines of one, also while it is written
//! ```
//! Guarantees: the process is found again by its command line, its user and its start time. It gets its sockets and the
//! files of logs as descriptors, and credentials by its control socket only.

mod audit_lines;
mod carrier;
mod config;
mod logs;
mod policies;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use stead_schemas::names::Uid;

pub use self::audit_lines::AuditLines;
pub use self::config::EgressConfig;
pub(crate) use self::config::{gate, settings};
pub use self::logs::AuditFiles;
use crate::host::cgroup::Cgroups;
use crate::host::process::Identity;
use crate::hypervisor::Jails;

/// Name of the control socket in the directory of sockets.
pub(crate) const CONTROL_SOCKET: &str = "egress.sock";

/// A function that passes on the object whose process has ended.
pub(crate) type Ended = Arc<dyn Fn(Uid) + Send + Sync>;

/// The parts that the adapter is made of.
pub struct CarrierConfig {
    pub jails: Jails,
    pub cgroups: Cgroups,
    pub run_dir: PathBuf,
    pub data_dir: PathBuf,
    /// The file with the authorities that servers are verified by.
    pub roots: PathBuf,
    pub ended: Ended,
}

impl std::fmt::Debug for CarrierConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CarrierConfig").field("run_dir", &self.run_dir).finish_non_exhaustive()
    }
}

/// The adapter. Clones share its state.
#[derive(Clone)]
pub struct Carriers(Arc<Inner>);

struct Inner {
    config: CarrierConfig,
    logs: AuditFiles,
    known: Mutex<Known>,
}

/// The knowledge of the process.
#[derive(Default)]
struct Known {
    /// The process that was seen last, and the object that it runs for.
    process: Option<(Uid, Identity)>,
    /// True if the processes of this host were searched for one that an earlier daemon started. Later ones are this
    /// daemon's own.
    is_searched: bool,
}

impl std::fmt::Debug for Carriers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carriers").field("run_dir", &self.0.config.run_dir).finish_non_exhaustive()
    }
}

impl Carriers {
    #[must_use]
    pub fn new(config: CarrierConfig) -> Self {
        let logs = AuditFiles::new(&config.data_dir);
        Self(Arc::new(Inner { config, logs, known: Mutex::default() }))
    }

    /// Returns the files of the audit logs.
    #[must_use]
    pub fn logs(&self) -> &AuditFiles {
        &self.0.logs
    }

    fn socket(&self) -> PathBuf {
        self.0.config.run_dir.join(CONTROL_SOCKET)
    }
}
