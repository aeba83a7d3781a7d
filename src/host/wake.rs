//! Wake listeners: this process reads the TAPs of VMs in standby.
//!
//! Guarantees: requests for a VM's hardware address (ARP) are answered. The first packet of a connection is kept,
//! within bounds, until the VM runs; everything else is dropped. When this process ends, its descriptors close: the
//! TAP is then like that of a stopped VM, and nothing is left over.
//! Assumes: frames sent to a TAP have passed the bridge and the filter. They are parsed as untrusted input.
//! Cancel/crash: kept packets are lost, and their senders repeat them.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use etherparse::{
    ArpEthIpv4Packet, ArpOperation, ArpPacket, EtherType, Ethernet2Header, NetSlice, SlicedPacket,
    TransportSlice,
};
use rustix::fs::{OFlags, fcntl_setfl};
use stead_controllers::host::{
    HostError, HostErrorKind, NetworkCard, PendingConnection, WakeListener, WakeListeners,
};
use stead_schemas::limits::{PENDING_CONNECTIONS_MAX, PENDING_KEPT_MAX, PENDING_PACKET_BYTES_MAX};
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::Mac;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::process::register;
use super::tap::Frames;
use super::{packet, tap};

/// Size of the virtio header before each frame, in bytes.
const VNET_HEADER: usize = Frames::PLAIN.header as usize;
/// Length of the longest frame that a TAP delivers, in bytes.
const FRAME_MAX: usize = 65_536;

/// Callback that gets the owner for which something may have changed.
pub type Changed = Arc<dyn Fn(&Uid) + Send + Sync>;

/// The adapter. Clones share their wake listeners.
#[derive(Clone)]
pub struct TapWakeListeners {
    posts: Arc<Mutex<BTreeMap<Uid, Post>>>,
    changed: Changed,
}

impl std::fmt::Debug for TapWakeListeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TapDoors").field("posts", &self.lock().len()).finish_non_exhaustive()
    }
}

/// A wake listener.
#[derive(Debug)]
struct Post {
    tap: LinkName,
    /// Task that reads the TAP; it holds the TAP while it runs.
    watch: Option<Watch>,
    kept: Vec<Kept>,
}

#[derive(Debug)]
struct Watch {
    task: JoinHandle<()>,
    tap: Arc<AsyncFd<OwnedFd>>,
    /// True if the TAP could not be read.
    is_lost: Arc<AtomicBool>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The first packet of a pending connection.
#[derive(Debug)]
struct Kept {
    pending: PendingConnection,
    frame: Vec<u8>,
    since: Instant,
}

impl Post {
    fn is_watched(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| {
            !watch.is_lost.load(Ordering::Acquire) && tap::is_attached(watch.tap.get_ref())
        })
    }

    /// Keeps a packet. Returns `true` if its connection is new.
    fn keep(&mut self, pending: PendingConnection, frame: &[u8]) -> bool {
        let (frame, since) = (frame.to_vec(), Instant::now());
        if let Some(kept) = self.kept.iter_mut().find(|kept| kept.pending == pending) {
            // The packet was repeated, so the connection is still wanted.
            (kept.frame, kept.since) = (frame, since);
            return false;
        }
        if self.kept.len() == PENDING_CONNECTIONS_MAX {
            self.kept.remove(0);
        }
        self.kept.push(Kept { pending, frame, since });
        true
    }
}

impl TapWakeListeners {
    #[must_use]
    pub fn new(changed: Changed) -> Self {
        Self { posts: Arc::default(), changed }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Post>> {
        self.posts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the TAP until the TAP disappears.
    async fn stand(self, owner: Uid, card: NetworkCard, fd: Arc<AsyncFd<OwnedFd>>, is_lost: Arc<AtomicBool>) {
        let mut buffer = vec![0; VNET_HEADER + FRAME_MAX];
        while let Ok(length) = read(&fd, &mut buffer).await {
            let frame = buffer.get(VNET_HEADER..length).unwrap_or_default();
            match received(frame, card.mac, card.address) {
                Some(Received::Asked(answer)) => {
                    let bytes = [&[0; VNET_HEADER][..], &answer].concat();
                    // If there is no room for the answer, the request is repeated.
                    let _ = rustix::io::write(fd.get_ref(), &bytes);
                }
                Some(Received::Pending(pending)) => {
                    let is_new = self.lock().get_mut(&owner).is_some_and(|post| post.keep(pending, frame));
                    if is_new {
                        (self.changed)(&owner);
                    }
                }
                None => {}
            }
        }
        is_lost.store(true, Ordering::Release);
        (self.changed)(&owner);
    }
}

async fn read(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = fd.readable().await?;
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?)) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(read) => return read,
            // The TAP was not ready after all.
            Err(_) => {}
        }
    }
}

impl WakeListeners for TapWakeListeners {
    async fn inspect(&self, owner: &Uid) -> Result<Option<WakeListener>, HostError> {
        let mut posts = self.lock();
        let Some(post) = posts.get_mut(owner) else { return Ok(None) };
        post.kept.retain(|kept| kept.since.elapsed() < PENDING_KEPT_MAX);
        let all_pending: Vec<PendingConnection> = post.kept.iter().map(|kept| kept.pending.clone()).collect();
        let listener = WakeListener { is_watched: post.is_watched(), all_pending };
        if !listener.is_watched && listener.all_pending.is_empty() {
            posts.remove(owner);
            return Ok(None);
        }
        Ok(Some(listener))
    }

    async fn watch(&self, owner: &Uid, card: &NetworkCard) -> Result<(), HostError> {
        if self.lock().get(owner).is_some_and(Post::is_watched) {
            return Ok(());
        }
        let failed = |error| HostError::io("watch the wake listener of", owner.as_str(), error);
        let tap = Arc::new(register(attach(&card.tap).map_err(failed)?).map_err(failed)?);
        let is_lost = Arc::new(AtomicBool::new(false));
        // The lock is taken before the first packet can arrive.
        let mut posts = self.lock();
        let post = posts.entry(owner.clone()).or_insert_with(|| Post {
            tap: card.tap.clone(),
            watch: None,
            kept: Vec::new(),
        });
        post.tap = card.tap.clone();
        let stand = self.clone().stand(owner.clone(), card.clone(), tap.clone(), is_lost.clone());
        post.watch = Some(Watch { task: tokio::spawn(stand), tap, is_lost });
        Ok(())
    }

    async fn unwatch(&self, owner: &Uid) -> Result<(), HostError> {
        let watch = self.lock().get_mut(owner).and_then(|post| post.watch.take());
        if let Some(mut watch) = watch {
            watch.task.abort();
            // The result of the task is irrelevant. The descriptor closes with the task and this value.
            let _ = (&mut watch.task).await;
        }
        Ok(())
    }

    async fn hand_over(&self, owner: &Uid) -> Result<(), HostError> {
        let Some(post) = self.lock().remove(owner) else { return Ok(()) };
        let failed = |error| HostError::io("hand over to", owner.as_str(), error);
        let index = packet::index_of(&post.tap).ok_or_else(|| {
            HostError::new(HostErrorKind::Missing, "hand over to", owner.as_str()).because("its TAP is gone")
        })?;
        let socket = packet::open().map_err(failed)?;
        for kept in post.kept.iter().filter(|kept| kept.since.elapsed() < PENDING_KEPT_MAX) {
            packet::send(&socket, index, &kept.frame).map_err(failed)?;
        }
        Ok(())
    }
}

/// Attaches to an existing TAP. Never creates the TAP by asking for it.
fn attach(name: &LinkName) -> io::Result<OwnedFd> {
    let before = packet::index_of(name).ok_or(io::ErrorKind::NotFound)?;
    let file = tap::attach(name).map_err(|error| match error.kind() {
        // The TAP is in use by its VM.
        io::ErrorKind::ResourceBusy => io::ErrorKind::AlreadyExists.into(),
        _ => error,
    })?;
    if packet::index_of(name) != Some(before) {
        return Err(io::ErrorKind::NotFound.into());
    }
    // The device has the form of its last reader, a VMM.
    tap::set_frames(&file, Frames::PLAIN)?;
    fcntl_setfl(&file, OFlags::NONBLOCK)?;
    Ok(file.into())
}

/// A frame to a VM that matters to its wake listener.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// Request for the VM's hardware address, with the frame that answers it.
    Asked(Vec<u8>),
    Pending(PendingConnection),
}

pub(super) fn received(frame: &[u8], mac: Mac, address: Ipv4Addr) -> Option<Received> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    match (packet.net?, packet.transport) {
        (NetSlice::Arp(arp), _) => {
            let asked = arp.to_packet().try_eth_ipv4().ok()?;
            let is_for_it = asked.operation == ArpOperation::REQUEST && asked.target_ipv4 == address.octets();
            is_for_it.then(|| Received::Asked(answer(&asked, mac)))
        }
        (NetSlice::Ipv4(ip), Some(TransportSlice::Tcp(tcp))) => {
            let header = ip.header();
            let is_first = tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin();
            let is_kept = is_first
                && header.destination_addr() == address
                && !header.is_fragmenting_payload()
                && frame.len() <= PENDING_PACKET_BYTES_MAX;
            is_kept.then(|| {
                Received::Pending(PendingConnection {
                    source: header.source_addr(),
                    source_port: tcp.source_port(),
                    port: tcp.destination_port(),
                })
            })
        }
        _ => None,
    }
}

fn answer(asked: &ArpEthIpv4Packet, mac: Mac) -> Vec<u8> {
    let answer = ArpEthIpv4Packet {
        operation: ArpOperation::REPLY,
        sender_mac: mac.0,
        sender_ipv4: asked.target_ipv4,
        target_mac: asked.sender_mac,
        target_ipv4: asked.sender_ipv4,
    };
    let header = Ethernet2Header { source: mac.0, destination: asked.sender_mac, ether_type: EtherType::ARP };
    [&header.to_bytes()[..], &ArpPacket::from(answer).to_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

    fn tcp(to: Ipv4Addr, flags: &str) -> Vec<u8> {
        let mut builder = PacketBuilder::ethernet2([2; 6], Mac::of_address(ADDRESS).0)
            .ipv4([10, 9, 0, 1], to.octets(), 64)
            .tcp(4000, 80, 1, 1000);
        for flag in flags.chars() {
            builder = match flag {
                's' => builder.syn(),
                'a' => builder.ack(1),
                'r' => builder.rst(),
                _ => builder.fin(),
            };
        }
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"").expect("in memory");
        bytes
    }

    fn receives(frame: &[u8]) -> Option<Received> {
        received(frame, Mac::of_address(ADDRESS), ADDRESS)
    }

    #[test]
    fn only_the_first_packet_of_a_connection_to_the_vm_is_pending() {
        let pending = PendingConnection { source: Ipv4Addr::new(10, 9, 0, 1), source_port: 4000, port: 80 };
        assert_eq!(receives(&tcp(ADDRESS, "s")), Some(Received::Pending(pending)));
        for flags in ["sa", "a", "r", "f", "sf", "sr", ""] {
            assert_eq!(receives(&tcp(ADDRESS, flags)), None, "{flags}");
        }
        assert_eq!(receives(&tcp(Ipv4Addr::new(10, 9, 0, 3), "s")), None);
        let mut long = tcp(ADDRESS, "s");
        long.resize(PENDING_PACKET_BYTES_MAX + 1, 0);
        assert_eq!(receives(&long), None);
        let mut udp = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [2; 6]).ipv4([10, 9, 0, 1], ADDRESS.octets(), 64);
        builder.udp(1, 2).write(&mut udp, b"").expect("in memory");
        assert_eq!(receives(&udp), None);
    }

    #[test]
    fn only_requests_for_the_vm_are_answered_with_its_hardware_address() {
        let asked = |target: Ipv4Addr, operation| {
            let packet = ArpEthIpv4Packet {
                operation,
                sender_mac: [6; 6],
                sender_ipv4: [10, 9, 0, 1],
                target_mac: [0; 6],
                target_ipv4: target.octets(),
            };
            let header =
                Ethernet2Header { source: [6; 6], destination: [0xff; 6], ether_type: EtherType::ARP };
            [&header.to_bytes()[..], &ArpPacket::from(packet).to_bytes()].concat()
        };
        let Some(Received::Asked(answer)) = receives(&asked(ADDRESS, ArpOperation::REQUEST)) else {
            panic!("an answer")
        };
        let mac = Mac::of_address(ADDRESS).0;
        assert_eq!((&answer[..6], &answer[6..12]), (&[6; 6][..], &mac[..]));
        assert_eq!(answer[20..22], [0, 2]);
        assert_eq!((&answer[22..28], &answer[28..32]), (&mac[..], &ADDRESS.octets()[..]));
        assert_eq!(receives(&asked(Ipv4Addr::new(10, 9, 0, 3), ArpOperation::REQUEST)), None);
        assert_eq!(receives(&asked(ADDRESS, ArpOperation::REPLY)), None);
    }

    #[test]
    fn as_many_as_allowed_are_kept_the_latest_of_them_and_a_repetition_is_not_a_new_one() {
        let mut post = Post { tap: "tap".parse().expect("valid"), watch: None, kept: Vec::new() };
        let pending = |port| PendingConnection { source: ADDRESS, source_port: port, port: 80 };
        let ports = 0..u16::try_from(PENDING_CONNECTIONS_MAX).expect("small");
        assert!(ports.clone().all(|port| post.keep(pending(port), b"x")));
        assert!(!post.keep(pending(0), b"again"));
        assert!(post.keep(pending(1000), b"x"));
        assert_eq!(post.kept.len(), PENDING_CONNECTIONS_MAX);
        assert!(post.kept.iter().all(|kept| kept.pending != pending(0)), "the oldest made room");
    }

    proptest! {
        #[test]
        fn any_frame_is_taken_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120), kind: bool) {
            let mut frame = vec![0; 12];
            frame.extend(if kind { [8, 0] } else { [8, 6] });
            frame.extend(&bytes);
            receives(&frame);
            receives(&bytes);
        }
    }
}
