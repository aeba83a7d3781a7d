//! A resolver with its guests and their upstream server, all on addresses of loopback.
//!
//! The clock stands still unless a test sets it, so that answers stay in the cache and rates are not refilled.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use stead_egress::names::{
    AllowedHosts, Directory, Event, Guest, Parts, Reason, Resolver, Upstream, UpstreamTimes, serve,
};
use stead_schemas::addresses::AddressRules;
use stead_schemas::egress::HostName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::authority::{Act, Asked, Authority, name};

/// A mediated guest that may use `*.example.com`.
pub(crate) const LISTED: Ipv4Addr = Ipv4Addr::new(127, 10, 0, 7);
/// A mediated guest that may use every host.
pub(crate) const MEDIATED: Ipv4Addr = Ipv4Addr::new(127, 10, 0, 8);
pub(crate) const DIRECT: Ipv4Addr = Ipv4Addr::new(127, 10, 0, 9);
pub(crate) const NOBODY: Ipv4Addr = Ipv4Addr::new(127, 10, 0, 66);

/// Time after which a test that waits has failed.
const PATIENCE: Duration = Duration::from_secs(60);

struct Hosts(&'static str);

impl AllowedHosts for Hosts {
    fn allows(&self, host: &HostName) -> bool {
        host.as_str().ends_with(self.0)
    }
}

struct Tables;

impl Directory for Tables {
    fn guest(&self, address: IpAddr) -> Option<Guest> {
        match address {
            IpAddr::V4(LISTED) => Some(Guest::Mediated(Arc::new(Hosts(".example.com")))),
            IpAddr::V4(MEDIATED) => Some(Guest::Mediated(Arc::new(Hosts("")))),
            IpAddr::V4(DIRECT) => Some(Guest::Direct),
            _ => None,
        }
    }

    fn instance_address(&self, _: IpAddr, name: &str) -> Option<Ipv4Addr> {
        (name == "web").then_some(MEDIATED)
    }

    fn instance_name(&self, _: IpAddr, address: Ipv4Addr) -> Option<String> {
        (address == MEDIATED).then(|| "web".to_owned())
    }

    fn is_in_subnet(&self, address: Ipv4Addr) -> bool {
        address.octets()[..2] == [10, 100]
    }
}

/// A resolver that runs until this is dropped.
pub(crate) struct Fixture {
    pub(crate) resolver: Arc<Resolver>,
    pub(crate) authority: Authority,
    pub(crate) udp: SocketAddr,
    pub(crate) tcp: SocketAddr,
    events: Arc<Mutex<Vec<Event>>>,
    time: Arc<Mutex<Duration>>,
    server: JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fixture {
    /// Starts a resolver whose upstream server does what the script requires.
    pub(crate) async fn start(script: impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static) -> Self {
        // A machine may be so busy that an answer takes seconds.
        let times = UpstreamTimes { attempt: PATIENCE, answer: PATIENCE };
        Self::start_with(times, script).await
    }

    pub(crate) async fn start_with(
        times: UpstreamTimes,
        script: impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static,
    ) -> Self {
        let authority = Authority::start(script).await;
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let own = [udp.local_addr().expect("bound"), tcp.local_addr().expect("bound")];
        let (events, time) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Duration::ZERO)));
        let (reported, clock, start) = (events.clone(), time.clone(), Instant::now());
        let parts = Parts {
            directory: Arc::new(Tables),
            addresses: Arc::new(AddressRules::default()),
            upstream: Upstream::new(&[authority.address], &own, times).expect("it is another server"),
            on_event: Arc::new(move |event| lock(&reported).push(event)),
            clock: Arc::new(move || start + *lock(&clock)),
        };
        let resolver = Resolver::new(parts);
        let server = tokio::spawn(serve(resolver.clone(), udp, tcp));
        Self { resolver, authority, udp: own[0], tcp: own[1], events, time, server }
    }

    /// Starts a resolver whose upstream server answers every question for addresses with 203.0.113.1.
    pub(crate) async fn with_hosts() -> Self {
        Self::start(|asked| {
            let records = if asked.record_type == RecordType::A {
                vec![super::authority::host(&asked.name, "203.0.113.1", 60)]
            } else {
                Vec::new()
            };
            vec![Act::Send(asked.answer(records))]
        })
        .await
    }

    pub(crate) fn advance(&self, by: Duration) {
        *lock(&self.time) += by;
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        lock(&self.events).clone()
    }

    /// Returns the reasons of the events so far, and forgets the events.
    pub(crate) fn take_reasons(&self) -> Vec<Reason> {
        std::mem::take(&mut *lock(&self.events)).into_iter().map(|event| event.reason).collect()
    }

    /// Asks by UDP from the address of a guest.
    pub(crate) async fn ask(&self, guest: Ipv4Addr, host: &str, record_type: RecordType) -> Message {
        let client = self.client(guest).await;
        client.send(&written(1, host, record_type)).await;
        client.receive().await
    }

    /// Asks for addresses by UDP; returns the code and the addresses.
    pub(crate) async fn addresses(&self, guest: Ipv4Addr, host: &str) -> (ResponseCode, Vec<IpAddr>) {
        let answer = self.ask(guest, host, RecordType::A).await;
        (answer.metadata.response_code, addresses(&answer))
    }

    pub(crate) async fn client(&self, guest: Ipv4Addr) -> Client {
        let socket = UdpSocket::bind((guest, 0)).await.expect("an address of loopback");
        socket.connect(self.udp).await.expect("an address of loopback");
        Client { socket }
    }

    pub(crate) async fn connect(&self, guest: Ipv4Addr) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind((guest, 0).into()).expect("an address of loopback");
        patiently(socket.connect(self.tcp)).await.expect("the resolver listens")
    }

    /// Waits until the condition is met.
    pub(crate) async fn until(&self, is_met: impl Fn(&Self) -> bool) {
        patiently(async {
            while !is_met(self) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

/// A guest's socket.
pub(crate) struct Client {
    socket: UdpSocket,
}

impl Client {
    pub(crate) async fn send(&self, bytes: &[u8]) {
        self.socket.send(bytes).await.expect("it is sent");
    }

    pub(crate) async fn receive_bytes(&self) -> Vec<u8> {
        let mut buffer = vec![0; 65_536];
        let length = patiently(self.socket.recv(&mut buffer)).await.expect("an answer");
        buffer.truncate(length);
        buffer
    }

    pub(crate) async fn receive(&self) -> Message {
        Message::from_vec(&self.receive_bytes().await).expect("a well-formed answer")
    }
}

/// Waits for something that must happen.
pub(crate) async fn patiently<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it takes too long")
}

/// Returns a question without EDNS.
pub(crate) fn question(id: u16, host: &str, record_type: RecordType) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(host), record_type));
    message
}

/// Returns the bytes of a question with EDNS, which allows answers of 1,232 bytes.
pub(crate) fn written(id: u16, host: &str, record_type: RecordType) -> Vec<u8> {
    let mut message = question(id, host, record_type);
    let mut edns = Edns::new();
    edns.set_max_payload(1232);
    message.set_edns(edns);
    message.to_vec().expect("it can be written")
}

pub(crate) fn addresses(answer: &Message) -> Vec<IpAddr> {
    let address = |data: &RData| data.ip_addr();
    answer.answers.iter().filter_map(|record| address(&record.data)).collect()
}

pub(crate) async fn send_tcp(stream: &mut TcpStream, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).expect("short").to_be_bytes();
    stream.write_all(&[&length[..], bytes].concat()).await.expect("it is sent");
}

/// Receives a message; returns `None` when the connection was closed.
pub(crate) async fn receive_tcp(stream: &mut TcpStream) -> Option<Message> {
    patiently(async {
        let length = stream.read_u16().await.ok()?;
        let mut bytes = vec![0; usize::from(length)];
        stream.read_exact(&mut bytes).await.ok()?;
        Some(Message::from_vec(&bytes).expect("a well-formed answer"))
    })
    .await
}
