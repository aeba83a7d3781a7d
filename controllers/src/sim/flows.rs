//! Simulated clients, and the table of connections that shows them. Clients try to connect until they are
//! accepted, stay for a while, and leave.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::limits::FLOWS_AGE_MAX;
use stead_schemas::names::Uid;
use stead_schemas::numbers::StandbyNo;
use tokio::time::sleep;

use super::{State, World};
use crate::host::{Age, Flow, FlowState, Flows, GuestPhase, HostError, Inbound, PendingConnection, VmmState};

/// Time for which the table shows that a client left, as in kernels.
const REMEMBERED: SignedDuration = SignedDuration::from_secs(120);
/// Share of pauses before which a client connects, in thousandths.
const ARRIVALS: u64 = 200;
const MOMENT: SignedDuration = SignedDuration::from_millis(1);
const STAY: Duration = Duration::from_secs(3);
/// Number of attempts of a client, each after twice as long; then it gives up.
const TRIES: u32 = 7;

/// A client's connection.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    address: Ipv4Addr,
    pending: PendingConnection,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The connection is not in the table: nothing receives its packets.
    Nowhere,
    Pending,
    Open(Timestamp),
    Closed(Timestamp),
}

/// A VM whose memory was saved although a client had been connected since before it was paused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SleptOn {
    pub owner: Uid,
    /// Number of the standby.
    pub standby: StandbyNo,
    pub port: u16,
}

impl World {
    /// Connects a client to a port of an address; it stays for a while once accepted. Returns its number.
    pub fn connect(&self, address: Ipv4Addr, port: u16, lasts: Duration) -> u64 {
        let number = {
            let mut state = self.lock();
            state.connected += 1;
            let number = state.connected;
            let source_port = u16::try_from(number % 60_000 + 1024).expect("small");
            let pending = PendingConnection { source: Ipv4Addr::new(192, 0, 2, 1), source_port, port };
            state.connections.insert(number, Connection { address, pending, stage: Stage::Nowhere });
            number
        };
        let world = self.clone();
        tokio::spawn(async move {
            for attempt in 0..TRIES {
                world.pending(number);
                sleep(Duration::from_secs(1 << attempt)).await;
                if world.is_let_in(number) {
                    sleep(lasts).await;
                    return world.leave(number);
                }
            }
            world.lock().connections.remove(&number);
        });
        number
    }

    /// True if the client of this number was accepted.
    #[must_use]
    pub fn is_let_in(&self, number: u64) -> bool {
        let state = self.lock();
        let stage = state.connections.get(&number).map(|connection| connection.stage);
        matches!(stage, Some(Stage::Open(_) | Stage::Closed(_)))
    }

    /// Sometimes connects a client in the last moment before a VM is paused.
    pub(super) fn arrive_by_chance(&self, owner: &Uid) {
        let now = self.time();
        let number = {
            let mut state = self.lock();
            // This happens only while a scenario injects faults, so that the scenario can settle afterwards.
            let chance = if state.faults.before > 0 { ARRIVALS } else { 0 };
            let address = state.machines.get(owner).and_then(|vmm| vmm.address);
            let Some(address) = address.filter(|_| state.rng.chance(chance)) else { return };
            state.connected += 1;
            let number = state.connected;
            let source_port = u16::try_from(number % 60_000 + 1024).expect("small");
            let pending = PendingConnection { source: Ipv4Addr::new(192, 0, 2, 2), source_port, port: 80 };
            let stage = Stage::Open(now.saturating_sub(MOMENT).unwrap_or(now));
            state.connections.insert(number, Connection { address, pending, stage });
            number
        };
        let world = self.clone();
        tokio::spawn(async move {
            sleep(STAY).await;
            world.leave(number);
        });
    }

    /// Returns every VM that was put to standby in spite of a connection.
    #[must_use]
    pub fn slept_on(&self) -> Vec<SleptOn> {
        self.lock().slept_on.clone()
    }

    /// Sends the first packet of a connection, or repeats it.
    fn pending(&self, number: u64) {
        let now = self.time();
        let mut state = self.lock();
        let Some(connection) = state.connections.get(&number).cloned() else { return };
        if matches!(connection.stage, Stage::Open(_) | Stage::Closed(_)) {
            return;
        }
        let Connection { address, pending, .. } = connection;
        let at_card = state.machines.iter().find(|(_, vmm)| vmm.is_alive() && vmm.address == Some(address));
        let (owner, is_announced) = match at_card.map(|(owner, _)| owner.clone()) {
            Some(owner) => {
                let stage = if state.answers(&owner, now) { Stage::Open(now) } else { Stage::Pending };
                state.set_stage(number, stage);
                // Notifications of the table are hints, which come late or never.
                (Some(owner), state.rng.chance(700))
            }
            None => {
                let owner = state.keep_pending(address, &pending);
                state.set_stage(number, if owner.is_some() { Stage::Pending } else { Stage::Nowhere });
                (owner, true)
            }
        };
        drop(state);
        if let Some(owner) = owner.filter(|_| is_announced) {
            self.announce(&owner);
        }
    }

    fn leave(&self, number: u64) {
        let now = self.time();
        self.lock().set_stage(number, Stage::Closed(now));
        // The owner is not announced: a table that is polled does not name it.
        let _ = self.changes.send(None);
    }
}

impl State {
    fn set_stage(&mut self, number: u64, stage: Stage) {
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.stage = stage;
        }
    }

    /// Returns the table of connections, or its recent reading if that is enough.
    fn table(&mut self, age: Age, now: Timestamp) -> Vec<Connection> {
        let is_fit = |(at, _): &&(Timestamp, Vec<Connection>)| {
            age == Age::Recent && now.duration_since(*at).unsigned_abs() <= FLOWS_AGE_MAX
        };
        if let Some((_, kept)) = self.table_read.as_ref().filter(is_fit) {
            return kept.clone();
        }
        let table: Vec<Connection> = self.connections.values().cloned().collect();
        self.table_read = Some((now, table.clone()));
        table
    }

    /// True if a guest is connected to its card and accepts connections.
    fn answers(&self, owner: &Uid, now: Timestamp) -> bool {
        self.machines.get(owner).is_some_and(|vmm| {
            let is_up = vmm.state == VmmState::Running && !vmm.is_network_cut;
            is_up && vmm.seen(owner, now).guest.phase == GuestPhase::Ready
        })
    }

    /// Accepts the kept connections whose clients still wait.
    pub(super) fn let_in(&mut self, owner: &Uid, all_pending: &[PendingConnection], now: Timestamp) {
        if !self.answers(owner, now) {
            return;
        }
        for connection in self.connections.values_mut() {
            if connection.stage == Stage::Pending && all_pending.contains(&connection.pending) {
                connection.stage = Stage::Open(now);
            }
        }
    }

    /// Records the connections that a save ignores.
    pub(super) fn note_save(&mut self, owner: &Uid, standby: StandbyNo) {
        let Some(vmm) = self.machines.get(owner) else { return };
        let (address, paused_at) = (vmm.address, vmm.paused_at);
        let is_over = |connection: &&Connection| match connection.stage {
            Stage::Open(since) => Some(connection.address) == address && Some(since) < paused_at,
            Stage::Nowhere | Stage::Pending | Stage::Closed(_) => false,
        };
        let ports = self.connections.values().filter(is_over).map(|connection| connection.pending.port);
        let slept_on = ports.map(|port| SleptOn { owner: owner.clone(), standby, port });
        let slept_on: Vec<SleptOn> = slept_on.collect();
        self.slept_on.extend(slept_on);
    }
}

impl Flows for World {
    async fn inbound(&self, address: Ipv4Addr, age: Age) -> Result<Inbound, HostError> {
        let now = self.time();
        self.verb("read connections of", &address.to_string(), |state| {
            let connections = state.table(age, now);
            let flow = |connection: &Connection| {
                let flow_state = match connection.stage {
                    Stage::Pending | Stage::Open(_) => FlowState::Open,
                    Stage::Closed(at) if now.duration_since(at) < REMEMBERED => {
                        FlowState::Closed(self.shown(at))
                    }
                    Stage::Nowhere | Stage::Closed(_) => return None,
                };
                let PendingConnection { source, source_port, port } = connection.pending;
                let source = IpAddr::V4(source);
                (connection.address == address).then_some(Flow {
                    source,
                    source_port,
                    port,
                    state: flow_state,
                })
            };
            let flows = connections.iter().filter_map(flow).collect();
            Ok(Inbound { watched_since: self.shown(state.watched_since), flows })
        })
        .await
    }
}
