//! Connections in the kernel's tracking table, read over netlink.
//!
//! The table is read for an answer, once for all callers that wait before the reading begins. Between answers
//! [`Conntrack::monitor`] reads it from time to time, often enough that no connection comes and goes unseen, because
//! the table shows ended connections for a while. A report of the monitor is only a reason to read the table.
//! Never: answers with a reading that is older than the caller accepts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use stead_controllers::host::{Age, Flow, FlowState, Flows, HostError, HostErrorKind, Inbound};
use stead_schemas::limits::FLOWS_AGE_MAX;
use tokio::sync::mpsc;
use tracing::warn;

/// Time limit for reading the whole table. A quarter of a million entries take half a second.
const DUMP_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two polls. It is shorter if the table forgets sooner, or a caller has less patience.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
const POLL_INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Difference between two polls from which a clock was set. Slewing changes clocks by less.
const STEP_MIN: Duration = Duration::from_millis(500);
/// Limit on reports that wait for the reader, which is fast.
const REPORTS_MAX: usize = 64;

/// The kernel's numbers of TCP states (`nf_conntrack_tcp.h`).
const SYN_SENT: u8 = 1;
const TIME_WAIT: u8 = 7;
const CLOSE: u8 = 8;
const EPERM: i32 = 1;
/// Time for which an unanswered first packet counts. It is repeated after a second, and then after twice as long. A
/// client that is silent for longer may have given up, which is not reported. When it tries again, the connection
/// counts again.
const ASKING: Duration = Duration::from_secs(3);

/// The adapter. Clones share their readings.
#[derive(Debug, Clone)]
pub struct Conntrack(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    watch: Mutex<Watch>,
    latest: Mutex<Option<Arc<Reading>>>,
    /// Lock of the reading task. Callers that wait meanwhile share the next reading.
    reading: tokio::sync::Mutex<()>,
    /// Number of readings so far.
    readings: AtomicUsize,
}

/// The table at a moment.
#[derive(Debug)]
struct Reading {
    begun: Instant,
    watched_since: Timestamp,
    /// Connections by their destination address.
    flows: BTreeMap<IpAddr, Vec<Flow>>,
}

/// The values that reveal a gap between polls.
#[derive(Debug, Clone, Copy)]
struct Watch {
    since: Timestamp,
    /// Time of the last poll: the time since boot, which cannot be set, and the clock.
    last: Option<(Duration, Timestamp)>,
}

/// The subject of monitoring.
#[derive(Debug, Clone, Default)]
pub struct Interest {
    pub addresses: BTreeSet<Ipv4Addr>,
    /// Shortest time within which a change must be noticed.
    pub patience: Option<Duration>,
}

/// A report of a monitor: connections changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moved {
    At(Ipv4Addr),
    /// The table became unreadable, or readable again.
    Anywhere,
}

/// The time for which the table shows an ended connection, by its last state.
#[derive(Debug, Clone, Copy)]
struct Memory {
    time_wait: Duration,
    close: Duration,
    /// Time for which an entry is shown after the last unanswered first packet.
    syn_sent: Duration,
}

impl Memory {
    fn read() -> Self {
        let read = |name: &str, default| {
            let path = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{name}");
            let text = fs::read_to_string(path).unwrap_or_default();
            Duration::from_secs(text.trim().parse().unwrap_or(default))
        };
        Self { time_wait: read("time_wait", 120), close: read("close", 10), syn_sent: read("syn_sent", 120) }
    }

    fn shortest(self) -> Duration {
        self.time_wait.min(self.close)
    }
}

impl Default for Conntrack {
    fn default() -> Self {
        Self::new()
    }
}

impl Conntrack {
    #[must_use]
    pub fn new() -> Self {
        let watch = Mutex::new(Watch { since: Timestamp::now(), last: None });
        let (latest, reading, readings) = Default::default();
        Self(Arc::new(Inner { watch, latest, reading, readings }))
    }

    /// Reports where connections came or went, as far as callers are interested: polls only while there are addresses
    /// to watch. Runs until the receiver is dropped.
    pub fn monitor(&self, interest: impl Fn() -> Interest + Send + 'static) -> mpsc::Receiver<Moved> {
        let (reports, receiver) = mpsc::channel(REPORTS_MAX);
        let conntrack = self.clone();
        tokio::spawn(async move {
            let mut before = Some(BTreeMap::new());
            loop {
                tokio::time::sleep(poll_interval(Memory::read(), interest().patience)).await;
                let wanted = interest().addresses;
                if wanted.is_empty() {
                    // A large table is not kept in memory without need.
                    *conntrack.0.latest.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    before = Some(BTreeMap::new());
                    continue;
                }
                let after = conntrack.poll_for(&wanted).await;
                for moved in moves(before.as_ref(), after.as_ref()) {
                    if reports.send(moved).await.is_err() {
                        return;
                    }
                }
                before = after;
            }
        });
        receiver
    }

    /// Polls the wanted addresses. Returns `None` when the table cannot be read.
    async fn poll_for(&self, wanted: &BTreeSet<Ipv4Addr>) -> Option<Seen> {
        let reading = self.read(Duration::ZERO).await;
        let reading =
            reading.inspect_err(|error| warn!(error = error.chain(), "connections are not seen")).ok()?;
        let mut seen = Seen::new();
        for address in wanted {
            let flows = reading.flows.get(&IpAddr::V4(*address)).into_iter().flatten();
            let keys =
                flows.map(|flow| (flow.source, flow.source_port, flow.port, flow.state == FlowState::Open));
            let keys: BTreeSet<Key> = keys.collect();
            if !keys.is_empty() {
                seen.insert(*address, keys);
            }
        }
        Some(seen)
    }

    /// Returns the number of times that the table was read.
    #[must_use]
    pub fn readings(&self) -> usize {
        self.0.readings.load(Ordering::Relaxed)
    }

    /// Returns a reading that began at most `age` ago. Another caller may have made it.
    async fn read(&self, age: Duration) -> Result<Arc<Reading>, HostError> {
        let asked = Instant::now();
        let latest = || {
            let latest = self.0.latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
            latest.filter(|reading| reading.begun + age >= asked)
        };
        if let Some(reading) = latest() {
            return Ok(reading);
        }
        let _reading = self.0.reading.lock().await;
        if let Some(reading) = latest() {
            return Ok(reading);
        }
        let reading = Arc::new(self.poll().await?);
        *self.0.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(reading.clone());
        Ok(reading)
    }

    /// Reads all TCP connections of the table, and the time since which no connection was missed.
    async fn poll(&self) -> Result<Reading, HostError> {
        self.0.readings.fetch_add(1, Ordering::Relaxed);
        let (memory, begun, now, boot) = (Memory::read(), Instant::now(), Timestamp::now(), since_boot());
        let read = tokio::time::timeout(DUMP_DEADLINE, dump(memory, now)).await;
        let entries = read.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(failed)?;
        let mut flows = BTreeMap::<_, Vec<Flow>>::new();
        for Entry { address, flow } in entries {
            flows.entry(address).or_default().push(flow);
        }
        let mut watch = self.0.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if !watch.last.is_some_and(|last| is_gapless(last, (boot, now), memory.shortest())) {
            watch.since = now;
        }
        watch.last = Some((boot, now));
        Ok(Reading { begun, watched_since: watch.since, flows })
    }
}

impl Flows for Conntrack {
    async fn inbound(&self, address: Ipv4Addr, age: Age) -> Result<Inbound, HostError> {
        let age = match age {
            Age::New => Duration::ZERO,
            Age::Recent => FLOWS_AGE_MAX,
        };
        let reading = self.read(age).await?;
        let flows = reading.flows.get(&IpAddr::V4(address)).cloned().unwrap_or_default();
        Ok(Inbound { watched_since: reading.watched_since, flows })
    }
}

/// Returns `true` if no connection that ended between two polls can have been forgotten, and the clock was not set.
fn is_gapless(before: (Duration, Timestamp), after: (Duration, Timestamp), memory: Duration) -> bool {
    let elapsed = after.0.saturating_sub(before.0);
    let shown = after.1.duration_since(before.1);
    let step = (shown - SignedDuration::try_from(elapsed).unwrap_or(SignedDuration::MAX)).unsigned_abs();
    elapsed < memory && step < STEP_MIN
}

fn poll_interval(memory: Memory, patience: Option<Duration>) -> Duration {
    let longest = patience.map_or(memory.shortest(), |patience| patience.min(memory.shortest()));
    (longest / 2).clamp(POLL_INTERVAL_MIN, POLL_INTERVAL)
}

fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

type Key = (IpAddr, u16, u16, bool);
type Seen = BTreeMap<Ipv4Addr, BTreeSet<Key>>;

fn moves(before: Option<&Seen>, after: Option<&Seen>) -> Vec<Moved> {
    match (before, after) {
        (Some(before), Some(after)) => {
            let addresses: BTreeSet<&Ipv4Addr> = before.keys().chain(after.keys()).collect();
            let is_moved = |address: &&&Ipv4Addr| before.get(**address) != after.get(**address);
            addresses.iter().filter(is_moved).map(|address| Moved::At(**address)).collect()
        }
        (None, None) => Vec::new(),
        _ => vec![Moved::Anywhere],
    }
}

/// A connection with its destination address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    address: IpAddr,
    flow: Flow,
}

fn failed(error: io::Error) -> HostError {
    let kind = match error.raw_os_error() {
        Some(EPERM) => HostErrorKind::Denied,
        // A kernel without connection tracking does not know the request.
        Some(22 | 93 | 95) => HostErrorKind::Unsupported,
        _ => HostError::kind_of_io(&error),
    };
    HostError::new(kind, "read", "the table of connections").because(error)
}

/// Reads the whole table, of both address families.
async fn dump(memory: Memory, now: Timestamp) -> io::Result<Vec<Entry>> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let both_header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let body = NetfilterMessage::new(both_header, ConntrackMessage::Get(Vec::new()));
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(body));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(0, 0)).await?;
    let mut entries = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full().await?;
        if read(&datagram, memory, now, &mut entries)? {
            return Ok(entries);
        }
    }
}

/// Parses a datagram of the answer. Returns `true` if it was the last one. An unreadable message is an error, because
/// it may describe an open connection.
fn read(datagram: &[u8], memory: Memory, now: Timestamp, entries: &mut Vec<Entry>) -> io::Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = super::ctnetlink::first(rest)?;
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) => return Err(super::ctnetlink::error_of(&error)),
            NetlinkPayload::Overrun(_) => return Err(io::ErrorKind::Interrupted.into()),
            NetlinkPayload::InnerMessage(NetfilterMessage {
                inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                ..
            }) => entries.extend(entry(&attributes, memory, now)),
            _ => {}
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(datagram: &[u8]) {
    let second = Duration::from_secs(1);
    let memory = Memory { time_wait: second * 120, close: second * 10, syn_sent: second * 120 };
    let _ = read(datagram, memory, Timestamp::UNIX_EPOCH, &mut Vec::new());
}

/// A direction of a connection: source and destination.
#[derive(Debug, Default)]
struct Side {
    source: Option<IpAddr>,
    source_port: Option<u16>,
    is_tcp: bool,
}

impl Side {
    fn of(tuples: &[Tuple]) -> Self {
        let mut side = Self::default();
        for tuple in tuples {
            match tuple {
                Tuple::Ip(parts) => parts.iter().for_each(|part| {
                    if let IPTuple::SourceAddress(address) = part {
                        side.source = Some(*address);
                    }
                }),
                Tuple::Proto(parts) => parts.iter().for_each(|part| match part {
                    ProtoTuple::Protocol(protocol) => side.is_tcp = *protocol == Protocol::Tcp,
                    ProtoTuple::SourcePort(port) => side.source_port = Some(*port),
                    _ => {}
                }),
                _ => {}
            }
        }
        side
    }
}

/// Parses an entry. Returns `None` if it is not a TCP connection.
fn entry(attributes: &[ConntrackAttribute], memory: Memory, now: Timestamp) -> Option<Entry> {
    let (mut asked, mut answered) = (Side::default(), Side::default());
    let (mut state, mut left) = (None, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuples) => asked = Side::of(tuples),
            // With address translation, the actual destination is the source of the reply.
            ConntrackAttribute::CtaTupleReply(tuples) => answered = Side::of(tuples),
            ConntrackAttribute::CtaTimeout(seconds) => left = Some(u64::from(*seconds)),
            ConntrackAttribute::CtaProtoInfo(infos) => state = tcp_state(infos),
            _ => {}
        }
    }
    // The remaining time is in whole seconds, rounded down. A later end is safer than an earlier one.
    let ago = |memory: Duration| memory.saturating_sub(Duration::from_secs(left.unwrap_or(0) + 1));
    let closed = |memory: Duration| FlowState::Closed(now.saturating_sub(ago(memory)).unwrap_or(now));
    let flow = Flow {
        source: asked.source?,
        source_port: asked.source_port?,
        port: answered.source_port?,
        state: match state {
            Some(TIME_WAIT) => closed(memory.time_wait),
            Some(CLOSE) => closed(memory.close),
            Some(SYN_SENT) if ago(memory.syn_sent) >= ASKING => closed(memory.syn_sent),
            // A connection without a state may well be open.
            _ => FlowState::Open,
        },
    };
    Some(Entry { address: answered.source?, flow }).filter(|_| asked.is_tcp)
}

fn tcp_state(infos: &[ProtoInfo]) -> Option<u8> {
    infos.iter().find_map(|info| match info {
        ProtoInfo::TCP(parts) => parts.iter().find_map(|part| match part {
            ProtoInfoTCP::State(state) => Some(*state),
            _ => None,
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEMORY: Memory = Memory {
        time_wait: Duration::from_secs(120),
        close: Duration::from_secs(10),
        syn_sent: Duration::from_secs(120),
    };

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).expect("in range")
    }

    #[test]
    fn readings_are_gapless_while_nothing_was_forgotten_and_the_clock_was_not_set() {
        let boot = Duration::from_secs;
        let table = [
            ((boot(100), at(0)), (boot(105), at(5)), true),
            ((boot(100), at(0)), (boot(109), at(9)), true),
            ((boot(100), at(0)), (boot(110), at(10)), false),
            // The clock is set forward, and back.
            ((boot(100), at(0)), (boot(101), at(3601)), false),
            ((boot(100), at(0)), (boot(101), at(-3599)), false),
        ];
        for (before, after, expected) in table {
            assert_eq!(is_gapless(before, after, MEMORY.shortest()), expected, "{before:?} {after:?}");
        }
        assert_eq!(poll_interval(MEMORY, None), Duration::from_secs(5));
        assert_eq!(poll_interval(MEMORY, Some(Duration::from_secs(600))), Duration::from_secs(5));
        assert_eq!(poll_interval(MEMORY, Some(Duration::from_secs(4))), Duration::from_secs(2));
        let short = Memory { close: Duration::from_secs(1), ..MEMORY };
        assert_eq!(poll_interval(short, None), POLL_INTERVAL_MIN);
    }

    #[test]
    fn only_changes_are_reported_and_blindness_once() {
        let address = Ipv4Addr::new(10, 9, 0, 2);
        let of = |is_open| Seen::from([(address, BTreeSet::from([(address.into(), 1, 80, is_open)]))]);
        let none = Seen::new();
        assert_eq!(moves(Some(&none), Some(&of(true))), [Moved::At(address)]);
        assert_eq!(moves(Some(&of(true)), Some(&of(true))), []);
        assert_eq!(moves(Some(&of(true)), Some(&of(false))), [Moved::At(address)]);
        assert_eq!(moves(Some(&of(false)), Some(&none)), [Moved::At(address)]);
        assert_eq!(moves(Some(&none), None), [Moved::Anywhere]);
        assert_eq!(moves(None, Some(&none)), [Moved::Anywhere]);
        assert_eq!(moves(None, None), []);
    }

    #[test]
    fn a_closed_connection_shows_its_end_and_a_translated_connection_its_instance() {
        let side = |source: [u8; 4], port| {
            let address = IPTuple::SourceAddress(IpAddr::from(source));
            let proto = vec![ProtoTuple::Protocol(Protocol::Tcp), ProtoTuple::SourcePort(port)];
            vec![Tuple::Ip(vec![address]), Tuple::Proto(proto)]
        };
        let of = |state, left| {
            let attributes = [
                ConntrackAttribute::CtaTupleOrig(side([192, 0, 2, 1], 4000)),
                ConntrackAttribute::CtaTupleReply(side([10, 9, 0, 2], 80)),
                ConntrackAttribute::CtaTimeout(left),
                ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![ProtoInfoTCP::State(state)])]),
            ];
            entry(&attributes, MEMORY, at(0)).expect("it is TCP")
        };
        let open = of(3, 432_000);
        assert_eq!(open.address, IpAddr::from([10, 9, 0, 2]));
        assert_eq!((open.flow.port, open.flow.state), (80, FlowState::Open));
        assert_eq!(of(TIME_WAIT, 100).flow.state, FlowState::Closed(at(-19)));
        assert_eq!(of(CLOSE, 10).flow.state, FlowState::Closed(at(0)));
        // A client sends requests, and then stops.
        assert_eq!(of(SYN_SENT, 118).flow.state, FlowState::Open);
        assert_eq!(of(SYN_SENT, 109).flow.state, FlowState::Closed(at(-10)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes, MEMORY, at(0), &mut Vec::new());
        }
    }
}
