//! The way of a connection whose destination is known, from its first bytes on.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use stead_schemas::egress::{Authority, Host, Reason, Route, TlsUse};
use stead_schemas::limits::{EGRESS_HELLO_TIMEOUT, EGRESS_TUNNEL_IDLE_MAX};
use tokio::io::AsyncWriteExt;

use crate::audit::Record;
use crate::guest::Guest;
use crate::http::{Exchange, Expected, Life, Plain, Scope, serve_http1};
use crate::peek::{First, Hello, first};
use crate::policies::Active;
use crate::stream::GuestStream;
use crate::upstream::Dialed;
use crate::{alert, intercept, tunnel};

/// The destination of a connection.
#[derive(Debug)]
pub(crate) enum Target {
    /// The destination that a captured connection was made to.
    Captured(SocketAddr),
    /// The target of CONNECT, with the connection to it when it is a name.
    Connect(Authority, Option<Dialed>),
}

/// The server of a TLS connection.
struct Server {
    host: Host,
    port: u16,
    /// A connection that was made to it before.
    dialed: Option<Dialed>,
    /// True if the server name is not the host of CONNECT.
    is_mismatch: bool,
}

/// Serves a connection to its end.
pub(crate) async fn serve(guest: Arc<Guest>, mut stream: GuestStream, target: Target) {
    let first = tokio::select! {
        biased;
        () = guest.lease.until_not(|_| true) => Err(Reason::PolicyChanged),
        kind = kind(&mut stream, &target) => kind,
    };
    match (first, target) {
        (Ok(First::Closed), _) => {}
        (Ok(First::Tls(hello)), target) => tls(guest, stream, *hello, target).await,
        (Ok(First::Http), target) => plain(guest, stream, target).await,
        (Ok(First::Other | First::Silent), Target::Connect(authority, dialed)) => {
            opaque(&guest, stream, authority, dialed).await;
        }
        (Ok(First::Other), Target::Captured(address)) => {
            note_refusal(&guest, address.ip(), address.port(), Reason::UnknownProtocol);
        }
        (Ok(First::Silent), Target::Captured(address)) => {
            note_refusal(&guest, address.ip(), address.port(), Reason::HelloTimeout);
        }
        (Err(reason), Target::Captured(address)) => {
            note_refusal(&guest, address.ip(), address.port(), reason);
            alert::send(&mut stream, reason).await;
        }
        (Err(reason), Target::Connect(authority, _)) => {
            let mut record = guest.record();
            record.set_destination(&authority.host, authority.port);
            record.refuse(reason);
            alert::send(&mut stream, reason).await;
        }
    }
}

/// Returns the kind of a connection: what the guest sends first, unless the server speaks before it.
async fn kind(stream: &mut GuestStream, target: &Target) -> Result<First, Reason> {
    if let Target::Connect(_, Some(dialed)) = target {
        tokio::select! {
            biased;
            () = stream.readable() => {}
            _ = dialed.stream.readable() => return Ok(First::Silent),
            () = tokio::time::sleep(EGRESS_HELLO_TIMEOUT) => return Ok(First::Silent),
        }
    }
    first(stream).await
}

fn note_refusal(guest: &Guest, address: IpAddr, port: u16, reason: Reason) {
    let mut record = guest.record();
    record.set_destination(&address.into(), port);
    record.refuse(reason);
}

/// Returns the server that a ClientHello and the destination name.
fn server(hello: &Hello, target: Target) -> Server {
    let name = hello.name.clone().map(Host::Name);
    let new = |host, port| Server { host, port, dialed: None, is_mismatch: false };
    match target {
        Target::Captured(address) => new(name.unwrap_or(address.ip().into()), address.port()),
        Target::Connect(Authority { host: Host::Address(address), port }, _) => {
            new(name.unwrap_or(Host::Address(address)), port)
        }
        Target::Connect(Authority { host, port }, dialed) => {
            let is_mismatch = name.is_some_and(|name| name != host);
            Server { host, port, dialed, is_mismatch }
        }
    }
}

/// Serves a TLS connection: its bytes pass, or TLS ends here.
async fn tls(guest: Arc<Guest>, mut stream: GuestStream, hello: Hello, target: Target) {
    let server = server(&hello, target);
    let mut record = guest.record();
    record.line().tls = TlsUse::Passthrough;
    record.set_destination(&server.host, server.port);
    let (active, route) = match decide(&guest, &server, &mut record) {
        Ok(decided) => decided,
        Err(reason) => {
            record.refuse(reason);
            return alert::send(&mut stream, reason).await;
        }
    };
    let dialed = match server.dialed {
        Some(dialed) => Ok(dialed),
        None => guest.dial(&server.host, server.port).await,
    };
    let dialed = match dialed {
        Ok(dialed) => dialed,
        Err(reason) => {
            record.refuse(reason);
            return alert::send(&mut stream, reason).await;
        }
    };
    record.line().address = Some(dialed.address);
    if route == Route::Intercept {
        let authority = Authority { host: server.host, port: server.port };
        return intercept::serve(guest, stream, hello, authority, dialed, active, record).await;
    }
    let is_allowed = |active: &Active| active.policy.route(&server.host) == Route::Pass;
    let bytes = hello.bytes;
    carry(&guest, stream, dialed, &bytes, record, is_allowed).await;
}

/// Decides about a TLS connection.
fn decide(guest: &Guest, server: &Server, record: &mut Record) -> Result<(Arc<Active>, Route), Reason> {
    let active = guest.lease.current().ok_or(Reason::PolicyChanged)?;
    let policy = &active.policy;
    record.line().credentials = policy.credentials_for(&server.host).map(str::to_owned).collect();
    if server.is_mismatch && !policy.is_observing {
        return Err(Reason::NameMismatch);
    }
    if server.is_mismatch {
        record.observe(Reason::NameMismatch);
    } else if policy.is_observing && !policy.lists(&server.host) {
        record.observe(Reason::HostNotAllowed);
    }
    match policy.route(&server.host) {
        Route::Refuse(reason) => Err(reason),
        route => Ok((active, route)),
    }
}

/// Serves HTTP that is not encrypted.
async fn plain(guest: Arc<Guest>, stream: GuestStream, target: Target) {
    let (expected, dialed) = match target {
        Target::Captured(address) => (Expected::AnyHost { port: address.port() }, None),
        Target::Connect(authority, dialed) => (Expected::Connection(authority), dialed),
    };
    let Some(active) = guest.lease.current() else { return };
    let progress = stream.progress.clone();
    let exchange = Arc::new(Exchange {
        guest: guest.clone(),
        expected,
        scope: Scope::Plain(Plain::new(dialed)),
        life: Life::new(),
        progress: progress.clone(),
        active,
    });
    let service = |request| exchange.clone().answer(request);
    let cut = guest.lease.until_not(|active| exchange.is_allowed(active));
    if let Err(reason) = serve_http1(stream, service, &progress, cut, std::future::pending()).await {
        exchange.life.end();
        guest.note_end(reason, TlsUse::None);
    }
}

/// Carries a protocol that is neither TLS nor HTTP, to a host that CONNECT named.
async fn opaque(guest: &Guest, mut stream: GuestStream, authority: Authority, dialed: Option<Dialed>) {
    let mut record = guest.record();
    record.set_destination(&authority.host, authority.port);
    let dialed = match dialed {
        Some(dialed) => Ok(dialed),
        None => guest.dial(&authority.host, authority.port).await,
    };
    match dialed {
        Ok(dialed) => {
            record.line().address = Some(dialed.address);
            record.note(Reason::Opaque);
            carry(guest, stream, dialed, &[], record, |active| active.policy.allows(&authority.host)).await;
        }
        Err(reason) => {
            record.refuse(reason);
            let _ = stream.shutdown().await;
        }
    }
}

/// Carries the bytes of a tunnel, those that were read ahead first.
async fn carry(
    guest: &Guest,
    stream: GuestStream,
    dialed: Dialed,
    ahead: &[u8],
    mut record: Record,
    is_allowed: impl Fn(&Active) -> bool + Send,
) {
    guest.settle();
    let progress = stream.progress.clone();
    progress.set_busy();
    let counts = record.counts.clone();
    let copied = async {
        let mut server = dialed.stream;
        server.write_all(ahead).await?;
        counts
            .up
            .fetch_add(u64::try_from(ahead.len()).unwrap_or(u64::MAX), std::sync::atomic::Ordering::Relaxed);
        tunnel::copy(stream, server, &counts).await
    };
    let ended = tokio::select! {
        biased;
        () = guest.lease.until_not(is_allowed) => Err(Reason::PolicyChanged),
        () = progress.stalled(EGRESS_TUNNEL_IDLE_MAX) => Err(Reason::Idle),
        ended = copied => ended.map_err(|_| Reason::Broken),
    };
    if let Err(reason) = ended {
        record.note(reason);
    }
}
