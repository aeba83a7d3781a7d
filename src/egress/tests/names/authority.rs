//! An authoritative server for tests, which does what a script makes of each question and keeps what it has seen.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A question as the server received it.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) message: Message,
    /// The name in lower case, with the last dot.
    pub(crate) name: String,
    pub(crate) record_type: RecordType,
    pub(crate) is_tcp: bool,
    /// The number of earlier questions for the name. One that was sent again, with the same id, is not counted.
    pub(crate) earlier: usize,
    pub(crate) source: SocketAddr,
}

impl Asked {
    /// Returns a response to the question with these records.
    pub(crate) fn answer(&self, records: Vec<Record>) -> Message {
        let mut message = Message::response(self.message.metadata.id, OpCode::Query);
        message.add_queries(self.message.queries.iter().cloned());
        message.add_answers(records);
        message
    }

    /// Returns a response with this code.
    pub(crate) fn refusal(&self, code: ResponseCode) -> Message {
        let mut message = self.answer(Vec::new());
        message.metadata.response_code = code;
        message
    }
}

/// A thing that the server does with a question.
pub(crate) enum Act {
    Send(Message),
    /// Sends the message from a port at which the server was not asked.
    SendFromElsewhere(Message),
    /// Does what follows when the gate is open.
    WaitFor(watch::Receiver<bool>),
}

pub(crate) type Script = dyn Fn(&Asked) -> Vec<Act> + Send + Sync;

/// A running server; it ends when this is dropped.
pub(crate) struct Authority {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Asked>>>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Authority {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

#[derive(Clone)]
struct Served {
    script: Arc<Script>,
    seen: Arc<Mutex<Vec<Asked>>>,
}

impl Authority {
    pub(crate) async fn start(script: impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let (udp, tcp) = sockets().await;
        let address = tcp.local_addr().expect("it is bound");
        let served = Served { script: Arc::new(script), seen: Arc::default() };
        let seen = served.seen.clone();
        let tasks = [tokio::spawn(serve_udp(served.clone(), udp)), tokio::spawn(serve_tcp(served, tcp))];
        Self { address, seen, tasks }
    }

    /// Returns all questions, those that were sent again included.
    pub(crate) fn seen(&self) -> Vec<Asked> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the number of questions for a name, each counted once.
    pub(crate) fn count(&self, name: &str) -> usize {
        let ids = self.seen().into_iter().filter(|asked| asked.name == name);
        ids.map(|asked| asked.message.metadata.id).collect::<BTreeSet<_>>().len()
    }
}

/// Binds both sockets to one port.
async fn sockets() -> (UdpSocket, TcpListener) {
    loop {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().expect("it is bound")).await {
            return (udp, tcp);
        }
    }
}

impl Served {
    fn receive(&self, bytes: &[u8], source: SocketAddr, is_tcp: bool) -> Vec<Act> {
        let message = Message::from_vec(bytes).expect("the resolver asks well-formed questions");
        let query = message.queries.first().expect("it has a question").clone();
        let name = query.name().to_lowercase().to_ascii();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let ids = seen.iter().filter(|asked| asked.name == name).map(|asked| asked.message.metadata.id);
        let earlier = ids.filter(|id| *id != message.metadata.id).collect::<BTreeSet<_>>().len();
        let asked = Asked { record_type: query.query_type(), message, name, is_tcp, earlier, source };
        seen.push(asked.clone());
        drop(seen);
        (self.script)(&asked)
    }
}

async fn serve_udp(served: Served, socket: UdpSocket) {
    let (socket, mut buffer) = (Arc::new(socket), [0; 4096]);
    while let Ok((length, source)) = socket.recv_from(&mut buffer).await {
        let (acts, socket) = (served.receive(&buffer[..length], source, false), socket.clone());
        tokio::spawn(async move {
            for act in acts {
                match act {
                    Act::Send(message) => {
                        let bytes = message.to_vec().expect("it can be written");
                        // The resolver may have gone.
                        let _ = socket.send_to(&bytes, source).await;
                    }
                    Act::SendFromElsewhere(message) => {
                        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
                        let _ = other.send_to(&message.to_vec().expect("it can be written"), source).await;
                    }
                    Act::WaitFor(gate) => wait(gate).await,
                }
            }
        });
    }
}

async fn wait(mut gate: watch::Receiver<bool>) {
    // A gate that is dropped never opens; neither does what is behind it happen.
    if gate.wait_for(|is_open| *is_open).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn serve_tcp(served: Served, listener: TcpListener) {
    while let Ok((stream, source)) = listener.accept().await {
        tokio::spawn(connection(served.clone(), stream, source));
    }
}

async fn connection(served: Served, mut stream: TcpStream, source: SocketAddr) {
    while let Ok(length) = stream.read_u16().await {
        let mut bytes = vec![0; usize::from(length)];
        if stream.read_exact(&mut bytes).await.is_err() {
            return;
        }
        for act in served.receive(&bytes, source, true) {
            match act {
                Act::Send(message) => {
                    let bytes = message.to_vec().expect("it can be written");
                    let length = u16::try_from(bytes.len()).expect("short").to_be_bytes();
                    if stream.write_all(&[&length[..], &bytes].concat()).await.is_err() {
                        return;
                    }
                }
                Act::SendFromElsewhere(_) => {}
                Act::WaitFor(gate) => wait(gate).await,
            }
        }
    }
}

/// A name of these labels; a question mark stands for a byte that no host has.
pub(crate) fn name(text: &str) -> Name {
    let labels = text.split('.').filter(|label| !label.is_empty());
    let mut name =
        Name::from_labels(labels.map(|label| label.replace('?', "\0").into_bytes())).expect("short");
    name.set_fqdn(true);
    name
}

pub(crate) fn host(owner: &str, address: &str, ttl: u32) -> Record {
    Record::from_rdata(name(owner), ttl, RData::A(A(address.parse().expect("an address"))))
}

pub(crate) fn alias(owner: &str, target: &str) -> Record {
    Record::from_rdata(name(owner), 60, RData::CNAME(CNAME(name(target))))
}
