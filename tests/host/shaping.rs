//! Limits of traffic: the promises of the port on real interfaces, and the rates at which frames really pass.

use std::time::{Duration, Instant};

use stead::host::netlink::Netlink;
use stead_controllers::host::{
    Detour, HostErrorKind, Limit, LinkChange, LinkKind, LinkPlan, Links, Shapers, Shaping,
};
use stead_schemas::names::LinkName;
use stead_schemas::quantity::Rate;

use crate::guest::{GATEWAY, Network, PORT, host_socket};
use crate::namespace::{PATIENCE, in_namespace, link_name, netlink, shell, uid};

/// Length of the text of a datagram, and of its frame with the headers of Ethernet, IPv4 and UDP, in bytes.
const TEXT: usize = 1200;
const FRAME: usize = TEXT + 14 + 20 + 8;
/// Number of frames on the way at once. They have room in the queue of the lowest rate.
const WINDOW: usize = 32;

fn rate(text: &str) -> Rate {
    text.parse().expect("valid")
}

async fn make(links: &Netlink, name: &LinkName, kind: LinkKind, has_queues: bool) {
    let plan = LinkPlan { name: name.clone(), owner: uid('t'), kind, has_queues };
    links.create(&plan).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    links.create(&plan).await.expect("making it again is nothing");
}

async fn shaping_of(links: &Netlink, link: &LinkName) -> Shaping {
    Shapers::inspect(links, link).await.unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// Limits what is sent through the TAP by a new IFB.
async fn limit_upload(links: &Netlink, tap: &LinkName, limit: Rate) {
    let ifb = tap.with_other_first_case();
    make(links, &ifb, LinkKind::Ifb, false).await;
    links.limit(&ifb, limit).await.expect("limited");
    links.change(&ifb, &LinkChange::Up).await.expect("raised");
    links.divert(tap, &ifb).await.unwrap_or_else(|error| panic!("{}", error.chain()));
}

#[test]
fn a_limit_is_set_read_changed_and_removed_with_one_queue_and_with_several() {
    in_namespace(async || {
        let (links, tap) = (netlink("test"), link_name("st-tap"));
        for has_queues in [false, true] {
            make(&links, &tap, LinkKind::Tap, has_queues).await;
            links.change(&tap, &LinkChange::Up).await.expect("raised");
            let default = shell("tc qdisc show dev st-tap");
            let limit = async || shaping_of(&links, &tap).await.limit;
            assert_eq!(limit().await, Limit::None);
            links.limit(&tap, rate("10Mbps")).await.unwrap_or_else(|error| panic!("{}", error.chain()));
            assert_eq!(limit().await, Limit::At(rate("10Mbps")));
            let shown = shell("tc qdisc show dev st-tap");
            assert!(shown.contains("tbf 5ead: root") && shown.contains("rate 10Mbit burst 32Kb"), "{shown}");
            for faster in ["64kbps", "1Gbps", "400Gbps", "100Mbps"] {
                links.limit(&tap, rate(faster)).await.unwrap_or_else(|error| panic!("{}", error.chain()));
                assert_eq!(limit().await, Limit::At(rate(faster)), "{faster}");
            }
            shell("tc qdisc change dev st-tap root handle 5ead: tbf rate 100mbit burst 200kb latency 5ms");
            assert_eq!(limit().await, Limit::Altered);
            links.limit(&tap, rate("100Mbps")).await.expect("limited");
            assert_eq!(limit().await, Limit::At(rate("100Mbps")));
            shell("ip link set st-tap down");
            assert_eq!(limit().await, Limit::At(rate("100Mbps")));
            shell("ip link set st-tap up");
            links.unlimit(&tap).await.expect("removed");
            links.unlimit(&tap).await.expect("removing it again is nothing");
            assert_eq!((limit().await, shell("tc qdisc show dev st-tap")), (Limit::None, default));
            links.remove(&tap).await.expect("removed");
        }
    });
}

#[test]
fn what_arrives_is_led_through_another_link_until_that_is_gone() {
    in_namespace(async || {
        let (links, tap, ifb) = (netlink("test"), link_name("st-tap"), link_name("St-tap"));
        make(&links, &tap, LinkKind::Tap, false).await;
        let default = shell("tc qdisc show dev st-tap");
        for _ in 0..2 {
            limit_upload(&links, &tap, rate("10Mbps")).await;
            let shaping = shaping_of(&links, &tap).await;
            assert_eq!(shaping, Shaping { limit: Limit::None, detour: Detour::Through(ifb.clone()) });
            assert_eq!(shaping_of(&links, &ifb).await.limit, Limit::At(rate("10Mbps")));
            let seen = Links::inspect(&links, &ifb).await.expect("read").expect("there");
            assert_eq!((seen.kind, seen.is_up, seen.owner), (LinkKind::Ifb, true, uid('t')));
        }
        links.undivert(&tap).await.expect("removed");
        links.undivert(&tap).await.expect("removing it again is nothing");
        assert_eq!(shaping_of(&links, &tap).await, Shaping::default());
        assert_eq!(shell("tc qdisc show dev st-tap"), default);
        links.divert(&tap, &ifb).await.expect("led again");
        links.remove(&ifb).await.expect("removed");
        assert_eq!(shaping_of(&links, &tap).await.detour, Detour::Broken);
        limit_upload(&links, &tap, rate("10Mbps")).await;
        assert_eq!(shaping_of(&links, &tap).await.detour, Detour::Through(ifb.clone()));
        links.remove(&tap).await.expect("removed");
        links.remove(&ifb).await.expect("removed");
        assert_eq!(shell("ip -o link | wc -l").trim(), "1", "only lo is left");
    });
}

#[test]
fn rules_of_others_and_links_of_others_stay() {
    in_namespace(async || {
        let (links, tap, ifb) = (netlink("test"), link_name("st-tap"), link_name("St-tap"));
        make(&links, &tap, LinkKind::Tap, false).await;
        shell("tc qdisc replace dev st-tap root handle 7: pfifo limit 9; tc qdisc add dev st-tap clsact");
        shell(
            "tc filter add dev st-tap ingress pref 7 protocol all u32 match u8 0 0 action mirred egress redirect \
             dev lo",
        );
        let foreign = || shell("tc qdisc show dev st-tap; tc filter show dev st-tap ingress");
        let before = foreign();
        assert_eq!(shaping_of(&links, &tap).await, Shaping::default());
        links.unlimit(&tap).await.expect("there is none");
        links.undivert(&tap).await.expect("there is none");
        assert_eq!(foreign(), before);
        limit_upload(&links, &tap, rate("10Mbps")).await;
        links.undivert(&tap).await.expect("removed");
        assert_eq!(foreign(), before);
        // A limit is in force in place of every other rule for what the link sends.
        links.limit(&tap, rate("10Mbps")).await.expect("limited");
        assert_eq!(shaping_of(&links, &tap).await.limit, Limit::At(rate("10Mbps")));

        let theirs = netlink("test2");
        assert_eq!(shaping_of(&theirs, &tap).await, Shaping::default());
        let none = link_name("none");
        for (link, kind) in [(&tap, HostErrorKind::Conflict), (&none, HostErrorKind::Missing)] {
            assert_eq!(theirs.limit(link, rate("1Mbps")).await.expect_err("not ours").kind, kind);
            assert_eq!(theirs.divert(link, &ifb).await.expect_err("not ours").kind, kind);
        }
        assert_eq!(theirs.unlimit(&tap).await.expect_err("not ours").kind, HostErrorKind::Conflict);
        assert_eq!(theirs.undivert(&tap).await.expect_err("not ours").kind, HostErrorKind::Conflict);
        theirs.unlimit(&none).await.expect("there is no link");
        theirs.undivert(&none).await.expect("there is no link");
        assert_eq!(shaping_of(&links, &tap).await.limit, Limit::At(rate("10Mbps")));
    });
}

/// Sends frames with a bounded number on the way until all have arrived. Returns the time that they took.
fn transfer(frames: usize, mut send: impl FnMut(), mut receive: impl FnMut() -> bool) -> Duration {
    let (start, mut sent, mut received) = (Instant::now(), 0, 0);
    while received < frames {
        while sent < frames && sent - received < WINDOW {
            send();
            sent += 1;
        }
        received += usize::from(receive());
    }
    start.elapsed()
}

/// Checks that frames did not pass faster than the limit allows, whatever the speed of the machine is. The limiter has
/// tokens for a burst at first, and gets new ones at its rate.
fn check(way: &str, limit: Rate, frames: usize, took: Duration) {
    let rate = limit.0 as f64;
    let burst = f64::max(32_768.0, rate / 100.0);
    let (bytes, seconds) = ((frames * FRAME) as f64, took.as_secs_f64());
    eprintln!("{way} at {:.0} Mbit/s: {:.1} Mbit/s", rate / 125_000.0, bytes / seconds / 125_000.0);
    let allowed = burst + rate * seconds;
    assert!(bytes <= allowed * 1.01, "{way} at {limit}: {bytes} bytes in {took:?}, {allowed} were allowed");
}

#[test]
fn frames_pass_at_the_limit_in_both_directions_and_none_is_lost_when_it_changes() {
    in_namespace(async || {
        let network = Network::new().await;
        let mut guest = network.guest(2, true).await;
        let host = host_socket();
        guest.greet(&host);
        host.set_read_timeout(Some(PATIENCE)).expect("set");
        let (links, tap) = (&network.links, guest.rule.tap.clone());
        let text = "x".repeat(TEXT);
        let to_guest = (guest.rule.address, PORT);
        let from_guest = guest.datagram(GATEWAY, &text);
        let has_text = |frame: &[u8]| frame.ends_with(text.as_bytes());
        for limit in ["10Mbps", "100Mbps"].map(rate) {
            let frames = usize::try_from(limit.0).expect("small") / 2 / FRAME;
            links.limit(&tap, limit).await.expect("limited");
            let send = || {
                host.send_to(text.as_bytes(), to_guest).expect("sent");
            };
            let took =
                transfer(frames, send, || has_text(&guest.wire.receive(PATIENCE).expect("all arrive")));
            check("down", limit, frames, took);

            limit_upload(links, &tap, limit).await;
            let mut buffer = [0; 2048];
            let receive = || {
                let (length, _) = host.recv_from(&mut buffer).expect("all arrive");
                has_text(&buffer[..length])
            };
            let took = transfer(frames, || guest.send(&from_guest), receive);
            check("up", limit, frames, took);
        }

        // The tokens are used up, so that the last of these frames wait while the limit changes.
        links.limit(&tap, rate("10Mbps")).await.expect("limited");
        for next in ["1Mbps", "1Gbps", "10Mbps", "100Mbps"] {
            for _ in 0..WINDOW {
                host.send_to(text.as_bytes(), to_guest).expect("sent");
            }
            links.limit(&tap, rate(next)).await.expect("changed");
            let mut received = 0;
            while received < WINDOW {
                received += usize::from(has_text(&guest.wire.receive(PATIENCE).expect("all arrive")));
            }
        }
    });
}
