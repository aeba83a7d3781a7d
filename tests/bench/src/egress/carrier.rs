//! Stead's process of egress, started in the namespace of the proxies as a program of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use stead_egress::{ProcessArguments, SocketNumbers, ask, generate_authority, run};
use stead_schemas::egress::{
    ControlReply, ControlRequest, EgressMode, Injection, MediatorPorts, MediatorSettings, Policy,
    PolicyCredential, Target,
};
use stead_schemas::instance::Secret;
use stead_schemas::names::Uid;
use stead_schemas::network::Cidr;

use super::world::{CLIENT_ADDRESS, INJECTED, PROXY_ADDRESS, Program, SERVER, Side, World, wait};

/// The first argument of the program when it is this process.
pub(crate) const ARGUMENT: &str = "--egress-carrier";
pub(super) const CAPTURED: u16 = 9100;
const EXPLICIT: u16 = 9101;
const NAMES: u16 = 9102;

/// Carries egress until it is ended.
pub(crate) fn carry(dir: &Path) {
    let at = |port| SocketAddrV4::new(PROXY_ADDRESS.into(), port);
    let control = UnixListener::bind(dir.join("control")).expect("bound");
    let [captured, explicit, names_tcp] =
        [CAPTURED, EXPLICIT, NAMES].map(|port| TcpListener::bind(at(port)).expect("bound"));
    let names_udp = UdpSocket::bind(at(NAMES)).expect("bound");
    let settings = MediatorSettings {
        address: PROXY_ADDRESS.into(),
        ports: MediatorPorts { captured: CAPTURED, explicit: EXPLICIT, names: NAMES },
        subnet: Cidr { address: PROXY_ADDRESS.into(), prefix: 24 },
        dns: vec![SERVER.parse().expect("an address")],
        open: BTreeSet::from(["10.77.2.0/24".parse().expect("a network")]),
    };
    let arguments = ProcessArguments {
        settings: serde_json::to_string(&settings).expect("text"),
        sockets: SocketNumbers {
            control: control.as_raw_fd(),
            captured: captured.as_raw_fd(),
            explicit: explicit.as_raw_fd(),
            names_udp: names_udp.as_raw_fd(),
            names_tcp: names_tcp.as_raw_fd(),
        },
        daemon_uid: 0,
        roots: vec![dir.join("ca.pem")],
    };
    let ended = run(arguments);
    panic!("{ended:?}");
}

/// The process, and how it is spoken to.
pub(super) struct Carrier {
    pub(super) pid: u32,
    control: PathBuf,
}

impl Carrier {
    /// Starts the process and sets the policy of the client.
    pub(super) async fn start(world: &mut World) -> Self {
        let mut command = Side::Proxy.command(&std::env::current_exe().expect("known").display().to_string());
        let program = command.arg(ARGUMENT).arg(world.path("")).spawn().expect("this program runs");
        let (pid, control) = (program.id(), world.path("control"));
        world.keep(Program(program));
        wait("egress", || std::os::unix::net::UnixStream::connect(&control).is_ok());
        let carrier = Self { pid, control };
        carrier.put(0, CLIENT_ADDRESS.into()).await;
        carrier
    }

    /// Sets a policy that injects a credential. Its owner has this number.
    pub(super) async fn put(&self, number: u32, address: Ipv4Addr) {
        let (header, format) = ("authorization".parse(), "Bearer ${value}".parse());
        let target = Target { header: header.expect("a header"), format: format.expect("a format") };
        let hosts = vec![INJECTED.parse().expect("a pattern")];
        let injection = Injection { hosts: Some(hosts), target };
        let credential = PolicyCredential { value: Secret("real".to_owned()), inject: vec![injection] };
        let owner: Uid = format!("a{number:023}").parse().expect("a uid");
        let policy = Policy {
            owner,
            address: address.into(),
            mode: EgressMode::All,
            is_observing: false,
            allow_hosts: None,
            credentials: BTreeMap::from([("KEY".to_owned(), credential)]),
            authority: generate_authority().expect("made"),
            fingerprint: "1".to_owned(),
        };
        let file = || tempfile::tempfile().expect("a file").into();
        let request = ControlRequest::Put(Box::new(policy));
        let reply = ask(&self.control, &request, Some([file(), file()])).await.expect("a reply");
        assert_eq!(reply, ControlReply::Done);
    }
}

/// Returns the memory of a process alone, in KiB.
pub(super) fn memory_of(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
