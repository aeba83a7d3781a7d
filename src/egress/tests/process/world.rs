//! A process in a thread of the test, the sockets that it inherits, its daemon and its guests.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use stead_egress::{
    Destinations, ProcessArguments, ProcessError, SocketNumbers, Surroundings, ask, generate_authority,
    run_in,
};
use stead_schemas::egress::{
    AuditLine, CertificateAuthority, ControlReply, ControlRequest, EgressMode, Injection, MediatorPorts,
    MediatorSettings, MediatorState, Policy, PolicyCredential, Target,
};
use stead_schemas::instance::Secret;
use stead_schemas::names::Uid;
use stead_schemas::network::Cidr;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::servers::{NameServer, TestAuthority};

/// Address of the guest of most tests.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// Address of another guest.
pub(crate) const OTHER_GUEST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 12);
/// A host that the name server knows, at 127.0.0.1.
pub(crate) const API: &str = "api.example.com";
/// Time after which a test that waits has failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// The destination that all captured connections were made to.
struct Original(Mutex<SocketAddr>);

impl Destinations for Original {
    fn original(&self, _: &TcpStream) -> io::Result<SocketAddr> {
        Ok(*self.0.lock().expect("not poisoned"))
    }
}

/// A process, which ends when this is dropped.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) name_server: NameServer,
    pub(crate) servers: TestAuthority,
    pub(crate) authority: CertificateAuthority,
    pub(crate) captured: SocketAddr,
    pub(crate) explicit: SocketAddr,
    pub(crate) names: SocketAddr,
    original: Arc<Original>,
    listener: TcpListener,
    _sockets: (UnixListener, TcpListener, TcpListener, UdpSocket),
    process: Option<JoinHandle<Result<(), ProcessError>>>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.lose_socket();
    }
}

/// Binds the sockets of names to one port.
fn names_sockets() -> (UdpSocket, TcpListener) {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bound");
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().expect("bound")) {
            return (udp, tcp);
        }
    }
}

impl World {
    /// Starts a process whose guests may reach the networks that are opened.
    pub(crate) async fn new(open: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (name_server, servers) = (NameServer::start().await, TestAuthority::new());
        name_server.set(API, "127.0.0.1");
        let roots = dir.path().join("roots.pem");
        std::fs::write(&roots, servers.pem()).expect("written");
        let control = UnixListener::bind(dir.path().join("socket")).expect("bound");
        let bind = || TcpListener::bind("127.0.0.1:0").expect("bound");
        let (captured, explicit, (names_udp, names_tcp)) = (bind(), bind(), names_sockets());
        let at = |listener: &TcpListener| listener.local_addr().expect("bound");
        let addresses = (at(&captured), at(&explicit), at(&names_tcp));
        let original = Arc::new(Original(Mutex::new(SocketAddr::from(([198, 51, 100, 1], 443)))));
        let ports = MediatorPorts {
            captured: addresses.0.port(),
            explicit: addresses.1.port(),
            names: addresses.2.port(),
        };
        let settings = MediatorSettings {
            address: Ipv4Addr::LOCALHOST,
            ports,
            subnet: Cidr { address: [10, 100, 0, 1].into(), prefix: 16 },
            dns: vec![name_server.address.ip()],
            open: open.iter().map(|net| net.parse().expect("a network")).collect(),
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
            roots: vec![roots],
        };
        let surroundings =
            Surroundings { destinations: original.clone(), dns_port: name_server.address.port() };
        let process = std::thread::spawn(move || run_in(arguments, surroundings));
        Self {
            dir,
            name_server,
            servers,
            authority: generate_authority().expect("made"),
            captured: addresses.0,
            explicit: addresses.1,
            names: addresses.2,
            original,
            listener: captured,
            _sockets: (control, explicit, names_tcp, names_udp),
            process: Some(process),
        }
    }

    /// Takes the socket of captured connections away from the process.
    fn lose_socket(&self) {
        // A second time it is not connected.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    /// Takes a socket away from the process, and returns the result of the process.
    pub(crate) fn end(mut self) -> Result<(), ProcessError> {
        self.lose_socket();
        self.process.take().expect("it runs").join().expect("it does not panic")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub(crate) async fn ask(&self, request: ControlRequest) -> ControlReply {
        patiently(ask(&self.socket(), &request, None)).await.expect("a reply")
    }

    pub(crate) async fn state(&self) -> MediatorState {
        match self.ask(ControlRequest::State).await {
            ControlReply::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    /// Sets a policy and returns its audit log.
    pub(crate) async fn put(&self, policy: Policy) -> Log {
        let file = || tempfile::tempfile().expect("a file");
        let (one, other) = (file(), file());
        let log = Log(one.try_clone().expect("cloned"));
        let request = ControlRequest::Put(Box::new(policy));
        let files = Some([one.into(), other.into()]);
        let reply = patiently(ask(&self.socket(), &request, files)).await.expect("a reply");
        assert_eq!(reply, ControlReply::Done);
        log
    }

    /// Returns a policy that allows every host; the letter is that of the owner's id.
    pub(crate) fn policy(&self, letter: char, address: Ipv4Addr) -> Policy {
        Policy {
            owner: uid(letter),
            address: address.into(),
            mode: EgressMode::All,
            is_observing: false,
            allow_hosts: None,
            credentials: BTreeMap::new(),
            authority: self.authority.clone(),
            fingerprint: "1".to_owned(),
        }
    }

    /// Returns a policy that injects a value into requests to [`API`].
    pub(crate) fn injecting(&self, value: &str, fingerprint: &str) -> Policy {
        let (header, format) = ("authorization".parse(), "Bearer ${value}".parse());
        let target = Target { header: header.expect("a header"), format: format.expect("a format") };
        let injection = Injection { hosts: Some(vec![API.parse().expect("a pattern")]), target };
        let credential = PolicyCredential { value: Secret(value.to_owned()), inject: vec![injection] };
        let credentials = BTreeMap::from([("KEY".to_owned(), credential)]);
        Policy { credentials, fingerprint: fingerprint.to_owned(), ..self.policy('a', GUEST) }
    }

    /// Sets the port that captured connections were made to. Their address leads nowhere.
    pub(crate) fn capture(&self, port: u16) {
        *self.original.0.lock().expect("not poisoned") = SocketAddr::from(([198, 51, 100, 1], port));
    }

    /// Returns the authority that the guest trusts.
    pub(crate) fn guest_roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from_pem_slice(self.authority.certificate.as_bytes());
        roots.add(certificate.expect("a certificate")).expect("added");
        roots
    }
}

/// The first file of an audit log.
pub(crate) struct Log(std::fs::File);

impl Log {
    fn lines(&self) -> Vec<AuditLine> {
        let length = usize::try_from(self.0.metadata().expect("known").len()).expect("small");
        let mut bytes = vec![0; length];
        // The process shares the position, which must stay as it is.
        self.0.read_exact_at(&mut bytes, 0).expect("read");
        let text = String::from_utf8(bytes).expect("text");
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).expect("a line")).collect()
    }

    /// Waits for a line that meets the condition.
    pub(crate) async fn line(&self, is_met: impl Fn(&AuditLine) -> bool) -> AuditLine {
        patiently(async {
            loop {
                if let Some(line) = self.lines().into_iter().find(&is_met) {
                    return line;
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }
}

/// Returns an id that begins with this letter.
pub(crate) fn uid(letter: char) -> Uid {
    format!("{letter}{:023}", 0).parse().expect("a uid")
}

/// Makes a connection from an address of loopback.
pub(crate) async fn connect_from(address: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(IpAddr::V4(address), 0)).expect("bound");
    patiently(socket.connect(to)).await.expect("connected")
}

/// Waits for something that must happen.
pub(crate) async fn patiently<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it takes too long")
}
