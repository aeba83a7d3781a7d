//! The network of a VM, guest to host and back: against the same VM started by hand with its card at a TAP of its own,
//! and with the card behind a hub, as earlier daemons had it.
//!
//! The three VMs run side by side, and rounds are interleaved. Packets of our VM pass bridge and filter besides.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use stead_schemas::guest::NetworkConfig;

use crate::daemon::{DEADLINE, Daemon};
use crate::hand::{self, Hand, Tap};
use crate::{Figure, median};

const ROUNDS: usize = 9;
/// Ports of the guest: one that sends, one that takes, one that answers each byte, and one that counts frames.
const SENDS: u16 = 7000;
const TAKES: u16 = 7001;
const ANSWERS: u16 = 7002;
const COUNTS: u16 = 7003;
/// Bytes of one measurement in each direction.
const BYTES: usize = 48 << 20;
/// Exchanges of one byte in one measurement.
const EXCHANGES: usize = 300;
/// Time in which datagrams are sent, and length of each in bytes.
const FLOOD: Duration = Duration::from_millis(700);
const DATAGRAM: [u8; 64] = [0; 64];

/// A VM and its figures, one for each round.
struct Peer {
    address: String,
    down: Vec<f64>,
    up: Vec<f64>,
    packets: Vec<f64>,
    latency: Vec<f64>,
}

fn program() -> String {
    let block = 64 << 10;
    let sends = format!("dd if=/dev/zero bs={block} count={}", BYTES / block);
    let counter = "cat /sys/class/net/eth0/statistics/rx_packets";
    // Without a look at each byte, which would be what is measured. The answer shows that all were taken.
    let takes = format!("sh -c '$b dd of=/dev/null bs={block} 2>/dev/null; $b echo {BYTES}'");
    let servers = [(TAKES, takes.as_str()), (SENDS, sends.as_str()), (ANSWERS, "cat"), (COUNTS, counter)];
    let servers = servers.map(|(port, line)| format!("$b nc -ll -p {port} -e $b {line} 2>/dev/null &"));
    format!("export b=/bin/busybox; {} while true; do $b sleep 1; done", servers.join(" "))
}

impl Peer {
    fn new(address: &str) -> Self {
        let peer = Self {
            address: address.to_owned(),
            down: Vec::new(),
            up: Vec::new(),
            packets: Vec::new(),
            latency: Vec::new(),
        };
        let start = Instant::now();
        while TcpStream::connect((address, COUNTS)).is_err() {
            assert!(start.elapsed() < DEADLINE, "{address} does not listen");
            std::thread::sleep(Duration::from_millis(100));
        }
        peer
    }

    fn connect(&self, port: u16) -> TcpStream {
        let connection = TcpStream::connect((self.address.as_str(), port)).expect("connected");
        connection.set_nodelay(true).expect("set");
        connection
    }

    fn text(mut connection: TcpStream) -> f64 {
        let mut text = String::new();
        connection.read_to_string(&mut text).expect("read");
        text.trim().parse().expect("a number")
    }

    fn measure(&mut self) {
        let megabits = |start: Instant| 48.0 * 8.0 * 1.048_576 / start.elapsed().as_secs_f64();
        let mut connection = self.connect(TAKES);
        let start = Instant::now();
        connection.write_all(&vec![0; BYTES]).expect("sent");
        connection.shutdown(std::net::Shutdown::Write).expect("ended");
        assert!((Self::text(connection) - 48.0 * 1_048_576.0).abs() < 1.0, "all bytes arrive");
        self.down.push(megabits(start));

        let (mut connection, mut buffer, mut all) = (self.connect(SENDS), vec![0; 1 << 20], 0);
        let start = Instant::now();
        while all < BYTES {
            let count = connection.read(&mut buffer).expect("read");
            assert!(count > 0, "the guest sends all bytes");
            all += count;
        }
        self.up.push(megabits(start));

        let (mut connection, mut byte) = (self.connect(ANSWERS), [0]);
        let mut exchange = || {
            connection.write_all(&byte).and_then(|()| connection.read_exact(&mut byte)).expect("answered");
        };
        exchange();
        let start = Instant::now();
        (0..EXCHANGES).for_each(|_| exchange());
        self.latency.push(start.elapsed().as_secs_f64() * 1e6 / 300.0);

        let socket = UdpSocket::bind("0.0.0.0:0").expect("bound");
        let before = Self::text(self.connect(COUNTS));
        let start = Instant::now();
        while start.elapsed() < FLOOD {
            // A full queue of the TAP loses datagrams, which are not counted. Nobody listens on the port.
            let _ = socket.send_to(&DATAGRAM, (self.address.as_str(), 9));
        }
        let seconds = start.elapsed().as_secs_f64();
        self.packets.push((Self::text(self.connect(COUNTS)) - before) / seconds);
    }
}

/// Starts a copy of a VM by hand at a TAP of its own, whose network has this number.
fn by_hand(
    pid: u64,
    dir: &Path,
    (name, number, is_behind_hub): (&'static str, u8, bool),
) -> (Hand, Tap, Peer) {
    let (tap, directory, overlay) = (Tap::make(name), dir.join(name), dir.join(format!("{name}.ext4")));
    let [host, guest] = [1, 2].map(|last| Ipv4Addr::new(10, 239, number, last));
    let added = Command::new("ip").args(["addr", "add", &format!("{host}/24"), "dev", name]).status();
    assert!(added.is_ok_and(|status| status.success()), "an address for {name}");
    hand::make_overlay(&overlay);
    let mut arguments = hand::arguments(pid, &overlay, &directory, Some(&tap));
    if is_behind_hub {
        hand::move_behind_hub(&mut arguments);
    }
    let network = NetworkConfig {
        address: guest,
        prefix: 24,
        mac: None,
        gateway: host,
        dns: Vec::new(),
        resolver: Default::default(),
        mtu: None,
    };
    let program = program();
    let program = ["/bin/busybox", "sh", "-c", program.as_str()];
    let hand = Hand::boot_with(&arguments, &directory, &program, Some(network));
    (hand, tap, Peer::new(&guest.to_string()))
}

pub(crate) async fn network() -> Vec<Figure> {
    let daemon = Daemon::start("stbench6", "10.239.246.1/24").await;
    daemon.import().await;
    let body = json!({
        "name": "w", "image": "bench.test/busybox:v1", "size": "256MB", "vcpus": 1, "overlay_size": "256MB",
        "cmd": ["/bin/busybox", "sh", "-c", program()],
    });
    daemon.verb("/instances", &body).await;
    let running = daemon.get("/instances/w/wait?state=Running&timeout=60s").await;
    assert_eq!(running["state"], "Running", "{running}");
    let seen = daemon.get("/instances/w").await;
    let pid = seen["vmm_pid"].as_u64().expect("a process");
    let mut peers = vec![Peer::new(seen["network"]["ip"].as_str().expect("an address"))];
    let mut hands = Vec::new();
    for copy in [("stb-direct", 244, false), ("stb-hub", 245, true)] {
        let (hand, tap, peer) = by_hand(pid, daemon.dir.path(), copy);
        hands.push((hand, tap));
        peers.push(peer);
    }
    for _ in 0..ROUNDS {
        peers.iter_mut().for_each(Peer::measure);
    }
    drop(hands);
    daemon.delete("w").await;
    let [ours, direct, hub] = peers.try_into().unwrap_or_else(|_| unreachable!("there are three"));
    let mut figures = Vec::new();
    for (peer, name, goal) in [(&direct, "a TAP directly", ">= 0.95"), (&hub, "a hub", "")] {
        let figure = |what: &str, ours: &[f64], peer: &[f64], unit, goal| Figure {
            what: format!("network: {what} (peer: by hand at {name})"),
            ours: median(ours.to_vec()),
            peer: Some(median(peer.to_vec())),
            unit,
            goal,
        };
        figures.extend([
            figure("TCP, host to guest", &ours.down, &peer.down, "Mbit/s", goal),
            figure("TCP, guest to host", &ours.up, &peer.up, "Mbit/s", goal),
            figure("64-byte datagrams that arrive in the guest", &ours.packets, &peer.packets, "1/s", goal),
            figure("answer to one byte", &ours.latency, &peer.latency, "us", "<= 1.05"),
        ]);
    }
    figures
}
