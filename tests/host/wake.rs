//! Wake listeners and flows: a VM's TAP without the VM, and the kernel's real table of connections.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stead::host::flows::{Conntrack, Interest, Moved};
use stead::host::wake::TapWakeListeners;
use stead_controllers::host::{
    Age, FlowState, Flows, HostErrorKind, NetworkCard, PendingConnection, WakeListener, WakeListeners,
};
use stead_schemas::names::Uid;
use tokio::sync::mpsc;

use crate::guest::{GATEWAY, Network, Wire};
use crate::namespace::{PATIENCE, in_namespace, shell, uid};

const TCP: u8 = 6;
const ARP: [u8; 2] = [8, 6];

fn taps() -> (TapWakeListeners, mpsc::UnboundedReceiver<Uid>) {
    let (changed, changes) = mpsc::unbounded_channel();
    let changed = Arc::new(move |owner: &Uid| {
        // The receiver of a finished test is gone.
        let _ = changed.send(owner.clone());
    });
    (TapWakeListeners::new(changed), changes)
}

async fn until_listener(
    taps: &TapWakeListeners,
    what: &str,
    is_so: impl Fn(&WakeListener) -> bool,
) -> WakeListener {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let state = taps.inspect(&uid('o')).await.expect("looked at").unwrap_or_default();
        if is_so(&state) {
            return state;
        }
        assert!(Instant::now() < deadline, "not {what}: {state:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Starts a client on the host that keeps trying.
fn client(address: Ipv4Addr, port: u16) -> std::thread::JoinHandle<std::io::Result<TcpStream>> {
    std::thread::spawn(move || TcpStream::connect_timeout(&(address, port).into(), PATIENCE))
}

#[test]
fn a_wake_listener_answers_for_the_vm_keeps_the_first_packet_and_hands_it_over() {
    in_namespace(async || {
        let network = Network::new().await;
        let guest = network.guest(2, true).await;
        let (address, tap) = (guest.rule.address, guest.rule.tap.clone());
        let card = NetworkCard { tap: tap.clone(), mac: guest.rule.mac, address, has_queues: false };
        let (taps, mut changes) = taps();
        let owner = uid('o');
        let in_use = taps.watch(&owner, &card).await.expect_err("the guest is at its card");
        assert_eq!(in_use.kind, HostErrorKind::Conflict, "{}", in_use.chain());
        // A VMM leaves its TAP with a longer header and its guest's offloads.
        guest.wire.takes_long_frames();
        drop(guest.wire);
        // The guest's ARP entry is removed, as it would be after a while.
        shell("ip neigh flush dev st-br nud all");
        assert_eq!(taps.inspect(&owner).await.expect("looked at"), None);
        taps.watch(&owner, &card).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        taps.watch(&owner, &card).await.expect("watched already");
        let waits = client(address, 80);
        let state = until_listener(&taps, "knocked at", |state| !state.all_pending.is_empty()).await;
        assert!(state.is_watched);
        assert!(
            matches!(state.all_pending[..], [PendingConnection { source: GATEWAY, port: 80, .. }]),
            "{state:?}"
        );
        assert_eq!(changes.recv().await, Some(owner.clone()));
        // The table shows the pending connection.
        let seen = Conntrack::new()
            .inbound(address, Age::New)
            .await
            .unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(seen.flows.len(), 1, "{seen:?}");
        assert_eq!((seen.flows[0].port, seen.flows[0].state), (80, FlowState::Open));

        taps.unwatch(&owner).await.expect("left");
        let state = taps.inspect(&owner).await.expect("looked at").expect("somebody knocked");
        assert!(!state.is_watched && state.all_pending.len() == 1, "{state:?}");
        // The VM is back: the very first packet reaches it before its client repeats it.
        let mut wire = Wire::attach(&tap);
        taps.hand_over(&owner).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(taps.inspect(&owner).await.expect("looked at"), None);
        let is_syn = |frame: &[u8]| frame.get(23) == Some(&TCP) && frame.get(47) == Some(&0x02);
        let mut first = None;
        while first.is_none() {
            first = wire.receive(PATIENCE).filter(|frame| is_syn(frame));
        }
        let first = first.expect("found");
        // The connection is refused, so that the client need not wait. The answer is its packet with the directions
        // swapped.
        wire.send(&refusal(&first));
        while !waits.is_finished() {
            // The host may have to request the guest's hardware address first.
            let frame = wire.receive(Duration::from_millis(20));
            if let Some(frame) = frame.filter(|frame| frame[12..14] == ARP) {
                wire.send(&arp_answer(&frame, card.mac.0));
            }
        }
        let refused = waits.join().expect("joined").expect_err("refused");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{refused}");
        // The removal of a TAP is noticed, and a request for an absent TAP creates none.
        drop(wire);
        taps.watch(&owner, &card).await.expect("watched");
        shell(&format!("ip link del {tap}"));
        until_listener(&taps, "left", |state| !state.is_watched).await;
        let gone = taps.watch(&owner, &card).await.expect_err("there is no TAP");
        assert_eq!(gone.kind, HostErrorKind::Missing, "{}", gone.chain());
        assert!(!shell("ip -br link").contains(tap.as_str()));
    });
}

/// Returns the refusal of a host without a listener on the port.
fn refusal(syn: &[u8]) -> Vec<u8> {
    let packet = etherparse::SlicedPacket::from_ethernet(syn).expect("a frame");
    let Some(etherparse::NetSlice::Ipv4(ip)) = packet.net else { panic!("IPv4") };
    let Some(etherparse::TransportSlice::Tcp(tcp)) = packet.transport else { panic!("TCP") };
    let (to, from): ([u8; 6], [u8; 6]) = (syn[..6].try_into().expect("6"), syn[6..12].try_into().expect("6"));
    let header = ip.header();
    let builder = etherparse::PacketBuilder::ethernet2(to, from)
        .ipv4(header.destination(), header.source(), 64)
        .tcp(tcp.destination_port(), tcp.source_port(), 0, 0)
        .rst()
        .ack(tcp.sequence_number().wrapping_add(1));
    let mut bytes = Vec::new();
    builder.write(&mut bytes, b"").expect("in memory");
    bytes
}

fn arp_answer(asked: &[u8], mac: [u8; 6]) -> Vec<u8> {
    let mut bytes = [&asked[6..12], &mac, &asked[12..20], &[0, 2], &mac].concat();
    bytes.extend_from_slice(&asked[38..42]);
    bytes.extend_from_slice(&asked[22..32]);
    bytes
}

#[test]
fn connections_are_seen_while_they_are_open_and_after_they_closed() {
    in_namespace(async || {
        // The kernel keeps the table only if a firewall uses it.
        let _network = Network::new().await;
        let here = Ipv4Addr::LOCALHOST;
        let flows = Conntrack::new();
        let interest = Interest { addresses: [here].into(), patience: Some(Duration::from_secs(2)) };
        let mut moves = flows.monitor(move || interest.clone());
        let listener = TcpListener::bind((here, 8000)).expect("free");
        let before = flows.inbound(here, Age::New).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(before.flows, []);
        let client = TcpStream::connect((here, 8000)).expect("connected");
        let (server, _) = listener.accept().expect("accepted");
        let open = flows.inbound(here, Age::New).await.expect("read");
        assert_eq!(open.watched_since, before.watched_since, "nothing was missed between");
        let [flow] = &open.flows[..] else { panic!("{open:?}") };
        let port = client.local_addr().expect("bound").port();
        assert_eq!((flow.source, flow.source_port, flow.port), (here.into(), port, 8000));
        assert_eq!(flow.state, FlowState::Open);
        assert_eq!(moves.recv().await, Some(Moved::At(here)));
        assert_eq!(flows.inbound(Ipv4Addr::new(127, 0, 0, 2), Age::New).await.expect("read").flows, []);
        drop((client, server));
        assert_eq!(moves.recv().await, Some(Moved::At(here)));
        let closed = flows.inbound(here, Age::New).await.expect("read");
        let now = jiff::Timestamp::now();
        let [flow] = &closed.flows[..] else { panic!("{closed:?}") };
        let FlowState::Closed(at) = flow.state else { panic!("{closed:?}") };
        let ago = now.duration_since(at).as_secs();
        assert!((0..PATIENCE.as_secs().try_into().expect("small")).contains(&ago), "closed {ago} s ago");
    });
}

#[test]
fn those_who_ask_at_one_moment_share_a_reading_of_the_connections() {
    in_namespace(async || {
        let _network = Network::new().await;
        let flows = Conntrack::new();
        let all = (0..200).map(|at| {
            let flows = &flows;
            let age = if at % 2 == 0 { Age::New } else { Age::Recent };
            async move { flows.inbound(Ipv4Addr::new(127, 0, 0, at), age).await }
        });
        for answer in futures::future::join_all(all).await {
            assert_eq!(answer.expect("read").flows, []);
        }
        assert!(flows.readings() <= 2, "{} readings for those who ask at once", flows.readings());
        let before = flows.readings();
        flows.inbound(Ipv4Addr::LOCALHOST, Age::New).await.expect("read");
        assert_eq!(flows.readings(), before + 1, "a new answer is read for");
    });
}
