//! The network card: the work that its guest leaves to the host, and what is left of that when its TAP is replaced.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;
use stead::host::tap::has_vhost_net;

use crate::fixtures::{accelerator, patience, until};
use crate::harness::{Harness, MOMENT, image};
use crate::invariants::settles;
use crate::machine_types::{is_on, verb};
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Ports of the guest: one that sends, and one that takes.
const SENDS: u16 = 7000;
const TAKES: u16 = 7001;
/// Processors of the guest, each of which has a pair of queues of a card that can have several.
const VCPUS: u32 = 2;
/// Bytes of one measurement in each direction.
const BYTES: usize = 16 << 20;
/// Average length in bytes from which frames were not cut to the MTU of Ethernet.
const LONG: u64 = 3000;

/// Program that serves both ports.
fn program() -> String {
    let block = 64 << 10;
    let sends = format!("dd if=/dev/zero bs={block} count={} 2>/dev/null", BYTES / block);
    format!("nc -ll -p {TAKES} -e wc -c & nc -ll -p {SENDS} -e {sends} & while true; do sleep 1; done")
}

/// Returns a count of the only TAP.
fn count(site: &Harness, name: &str) -> u64 {
    let text = site.shell(&format!("cat /sys/class/net/$TAP/statistics/{name}"));
    text.trim().parse().expect("a number")
}

/// Returns the average length of frames while `work` is done, in the direction that the host names so.
fn average(site: &Harness, direction: &str, work: impl FnOnce() -> std::io::Result<()>) -> Option<u64> {
    let counts = || ["bytes", "packets"].map(|unit| count(site, &format!("{direction}_{unit}")));
    let [bytes, packets] = counts();
    work().ok()?;
    let [bytes_after, packets_after] = counts();
    assert!(bytes_after - bytes >= BYTES as u64, "other frames were counted");
    Some((bytes_after - bytes) / (packets_after - packets).max(1))
}

fn connect(address: &str, port: u16) -> std::io::Result<TcpStream> {
    let address = format!("{address}:{port}").parse().map_err(std::io::Error::other)?;
    let connection = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    connection.set_read_timeout(Some(patience(MOMENT)))?;
    Ok(connection)
}

fn receive(address: &str) -> std::io::Result<()> {
    let mut all = Vec::new();
    connect(address, SENDS)?.read_to_end(&mut all)?;
    if all.len() == BYTES { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

fn send(address: &str) -> std::io::Result<()> {
    let mut connection = connect(address, TAKES)?;
    connection.write_all(&vec![0; BYTES])?;
    connection.shutdown(std::net::Shutdown::Write)?;
    // The guest answers with the number of bytes that it took.
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    if answer.trim() == BYTES.to_string() { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

/// Checks that frames longer than the MTU pass in both directions, whole: the sender leaves it to the receiver to cut
/// them, so nobody does.
async fn has_offloads(site: &Harness, address: &str, when: &str) {
    // The guest's program may not listen yet.
    let sent = until("bytes from the host", MOMENT, async || average(site, "tx", || send(address))).await;
    let received =
        until("bytes from the guest", MOMENT, async || average(site, "rx", || receive(address))).await;
    assert!(sent > LONG && received > LONG, "{when}: frames of {sent} and {received} bytes");
}

#[test]
fn a_card_has_its_offloads_also_after_its_tap_was_replaced_while_the_guest_ran() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        for hypervisor in ["qemu", "qemu-microvm"] {
            let body = json!({
                "size": "128MB", "vcpus": VCPUS, "hypervisor": hypervisor, "cmd": ["sh", "-c", program()],
            });
            site.create("box", &image("busybox"), body).await;
            site.until_state("box", "Running").await;
            is_on(&site, "box", hypervisor).await;
            let has_queues = accelerator() == "kvm" && hypervisor == "qemu";
            let queues = shell(&site, "box", "ls -d /sys/class/net/eth0/queues/tx-* | wc -l").await;
            assert_eq!(queues, if has_queues { VCPUS } else { 1 }.to_string(), "{hypervisor}");
            let seen = site.get("box").await;
            let address = seen["network"]["ip"].as_str().expect("an address").to_owned();
            // Where the processor is the host's own, the kernel moves the frames.
            let line = std::fs::read(format!("/proc/{}/cmdline", seen["vmm_pid"])).expect("its VMM runs");
            let is_moved_by_kernel = String::from_utf8_lossy(&line).contains("vhost=on");
            assert_eq!(is_moved_by_kernel, accelerator() == "kvm" && has_vhost_net(), "{hypervisor}");
            has_offloads(&site, &address, "at first").await;
            site.shell("ip link del $TAP");
            until("another TAP", MOMENT, async || (site.taps() == 1).then_some(())).await;
            has_offloads(&site, &address, "with another TAP").await;
            assert_eq!(site.get("box").await["vmm_pid"], seen["vmm_pid"], "{hypervisor}");
            // A restored guest goes on with what it negotiated.
            verb(&site, "box", "standby").await;
            verb(&site, "box", "restore").await;
            has_offloads(&site, &address, "after a restore").await;
            site.shell("ip link del $TAP");
            until("another TAP", MOMENT, async || (site.taps() == 1).then_some(())).await;
            has_offloads(&site, &address, "with another TAP after a restore").await;
            site.delete("box").await;
        }
        settles(&mut site, "replaced TAPs").await;
    });
}
