//! Changes that other parties make to the host without the daemon.

use stead_schemas::names::{LinkName, Uid};
use stead_schemas::quantity::Bytes;

use super::World;
use crate::host::{Forwarding, LinkKind, VmmLimits, VmmState};

/// Steps of the wall clock, in seconds, in both directions: some longer than every grace, some about as
/// long.
const CLOCK_STEPS: [i64; 6] = [-3600, 3600, -300, 300, -20, 20];

/// An action of a foreign program, an operator or a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    KillVmm,
    /// The kernel ends a VMM because memory is short.
    RunOutOfMemory,
    /// The limits of a VMM are taken away.
    Unlimit,
    PauseVmm,
    DeleteTap,
    /// A limit, the way to it, or the link that it is at is removed.
    DeleteLimit,
    DeleteBridge,
    DamageTable,
    DeleteTable,
    DropNicRules,
    DeleteDisk,
    DeleteImage,
    StopForwarding,
    /// The host is turned into a router.
    ForwardAll,
    /// A guest's agent ends, and its system starts another.
    KillAgent,
    /// A foreign program starts to listen at a free port.
    TakePort,
    /// All such programs end.
    LeavePorts,
    /// A socket of ours is closed by another program.
    LoseListener,
    /// The wall clock is set, forward or back.
    SetClock,
    /// The process that carries mediated egress ends.
    KillMediator,
    /// The process that carries mediated egress stops and does not answer any more.
    StopMediator,
    /// The program of the daemon is replaced, and not that of the process.
    OutdateMediator,
    Reboot,
}

impl Drift {
    pub const ALL: [Self; 23] = [
        Self::KillVmm,
        Self::RunOutOfMemory,
        Self::Unlimit,
        Self::PauseVmm,
        Self::DeleteTap,
        Self::DeleteLimit,
        Self::DeleteBridge,
        Self::DamageTable,
        Self::DeleteTable,
        Self::DropNicRules,
        Self::DeleteDisk,
        Self::DeleteImage,
        Self::StopForwarding,
        Self::ForwardAll,
        Self::KillAgent,
        Self::TakePort,
        Self::LeavePorts,
        Self::LoseListener,
        Self::SetClock,
        Self::KillMediator,
        Self::StopMediator,
        Self::OutdateMediator,
        Self::Reboot,
    ];
}

impl World {
    /// Adds an interface of another program, which must stay as it is.
    pub fn add_foreign_link(&self, name: LinkName) {
        self.lock().foreign_links.insert(name);
    }

    /// Simulates the death of the daemon: its own threads and tasks end with it.
    pub fn daemon_died(&self) {
        let now = self.time();
        let mut state = self.lock();
        state.drop_jobs();
        state.probes.clear();
        state.wake_listeners.clear();
        state.listeners.clear();
        // The next daemon starts to watch now.
        state.watched_since = now;
    }

    /// Performs one action, on an object picked by the seed. Chance also decides whether it is announced: a
    /// monitor may miss it, and the resync must then find it.
    pub fn drift(&self, drift: Drift) {
        let now = self.time();
        let mut state = self.lock();
        let pick = usize::try_from(state.rng.below(1 << 16)).unwrap_or(0);
        let mut steps_clock_by = None;
        match drift {
            Drift::KillVmm | Drift::RunOutOfMemory | Drift::Unlimit | Drift::PauseVmm | Drift::KillAgent => {
                let count = state.machines.len().max(1);
                let Some(vmm) = state.machines.values_mut().nth(pick % count) else { return };
                match (&vmm.state, drift) {
                    (VmmState::Dead, _) => {}
                    (_, Drift::KillVmm) => vmm.state = VmmState::Dead,
                    (_, Drift::RunOutOfMemory) => {
                        (vmm.state, vmm.is_out_of_memory) = (VmmState::Dead, true);
                    }
                    (_, Drift::Unlimit) => {
                        vmm.limits = VmmLimits { vcpus: u32::MAX, memory: Bytes(u64::MAX) };
                    }
                    (VmmState::Running, Drift::PauseVmm) => vmm.state = VmmState::Paused,
                    (VmmState::Running, Drift::KillAgent) => vmm.forget(now),
                    _ => {}
                }
            }
            Drift::DeleteTap | Drift::DeleteBridge => {
                let kind = if drift == Drift::DeleteTap { LinkKind::Tap } else { LinkKind::Bridge };
                let names: Vec<LinkName> = state
                    .links
                    .values()
                    .filter(|link| link.kind == kind)
                    .map(|link| link.name.clone())
                    .collect();
                if let Some(name) = names.get(pick % names.len().max(1)) {
                    state.remove_link(name);
                }
            }
            Drift::DeleteLimit => state.lose_limit(pick),
            Drift::DamageTable => state.tables.values_mut().for_each(|table| table.is_intact = false),
            Drift::DeleteTable => state.tables.clear(),
            Drift::DropNicRules => state.tables.values_mut().for_each(|table| table.nics.clear()),
            Drift::DeleteDisk => {
                let owners: Vec<Uid> = state.disks.keys().cloned().collect();
                if let Some(owner) = owners.get(pick % owners.len().max(1)) {
                    state.disks.remove(owner);
                }
            }
            Drift::DeleteImage => {
                state.stored.clear();
                state.manifests.clear();
            }
            Drift::StopForwarding => state.forwarding = Forwarding::Off,
            Drift::ForwardAll => state.forwarding = Forwarding::ByHost,
            Drift::TakePort => state.take_port(pick),
            Drift::LeavePorts => state.taken_ports.clear(),
            Drift::LoseListener => state.lose_listener(pick),
            Drift::SetClock => steps_clock_by = CLOCK_STEPS.get(pick % CLOCK_STEPS.len()).copied(),
            Drift::KillMediator => state.kill_mediator(),
            Drift::StopMediator => state.stop_mediator(),
            Drift::OutdateMediator => state.outdate_mediator(),
            Drift::Reboot => state.reboot(),
        }
        let is_announced = state.rng.chance(700);
        let owners: Vec<Uid> = state.owners();
        drop(state);
        if let Some(seconds) = steps_clock_by {
            self.set_clock(seconds);
        }
        if is_announced {
            owners.iter().for_each(|owner| self.announce(owner));
        }
    }
}

impl super::State {
    /// Reboots the host: processes, links, tables and runtime directories are removed, disks stay.
    fn reboot(&mut self) {
        self.machines.clear();
        self.mediators.clear();
        self.taken_ports.clear();
        self.links.clear();
        self.shaping.clear();
        self.tables.clear();
        self.forwarding = Forwarding::Off;
    }

    fn owners(&self) -> Vec<Uid> {
        let links = self.links.values().map(|link| &link.owner);
        self.machines
            .keys()
            .chain(self.mediators.keys())
            .chain(self.disks.keys())
            .chain(links)
            .cloned()
            .collect()
    }
}
