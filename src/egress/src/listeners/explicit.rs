//! Clients that know the proxy: requests with absolute URIs, and CONNECT.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use stead_schemas::egress::{Authority, Host, Reason, TlsUse};
use tokio::net::TcpStream;

use crate::audit::Record;
use crate::connection::{self, Target};
use crate::guest::Guest;
use crate::http::{Body, Exchange, Expected, Life, Plain, Scope, describe, refusal, serve_http1};
use crate::stream::GuestStream;

/// Serves one connection.
pub(super) async fn serve(guest: Arc<Guest>, stream: TcpStream) {
    let Some(active) = guest.lease.current() else { return };
    let stream = GuestStream::new(stream);
    let progress = stream.progress.clone();
    let exchange = Arc::new(Exchange {
        guest: guest.clone(),
        expected: Expected::Absolute,
        scope: Scope::Plain(Plain::new(None)),
        life: Life::new(),
        progress: progress.clone(),
        active,
    });
    let service = |request| answer(exchange.clone(), request);
    let cut = guest.lease.until_not(|active| exchange.is_allowed(active));
    if let Err(reason) = serve_http1(stream, service, &progress, cut, std::future::pending()).await {
        exchange.life.end();
        guest.note_end(reason, TlsUse::None);
    }
}

async fn answer(exchange: Arc<Exchange>, request: Request<Incoming>) -> Response<Body> {
    if *request.method() == Method::CONNECT {
        connect(exchange, request).await
    } else {
        exchange.answer(request).await
    }
}

/// Answers CONNECT. The tunnel begins when the answer is sent.
async fn connect(exchange: Arc<Exchange>, mut request: Request<Incoming>) -> Response<Body> {
    let guest = exchange.guest.clone();
    guest.settle();
    exchange.progress.set_busy();
    let version = request.version();
    let mut record = guest.record();
    describe(&mut record, &request);
    record.line().path = None;
    match target(&guest, &request, &mut record).await {
        Ok(target) => {
            record.discard();
            tokio::spawn(tunnel(guest, hyper::upgrade::on(&mut request), target));
            Response::new(Body::empty())
        }
        Err(reason) => {
            record.refuse(reason);
            let response = refusal(reason, version);
            record.line().status = Some(response.status().as_u16());
            exchange.progress.set_idle();
            response
        }
    }
}

/// Checks the target of CONNECT, and connects to it when it is a name.
async fn target(guest: &Guest, request: &Request<Incoming>, record: &mut Record) -> Result<Target, Reason> {
    let uri = request.uri();
    // An absolute URI has an authority too, and is no target of CONNECT.
    let named = uri.authority().filter(|_| uri.scheme().is_none() && uri.path_and_query().is_none());
    let text = named.ok_or(Reason::BadHost)?.as_str();
    let authority = Authority::of_connect(text).map_err(|_| Reason::BadHost)?;
    record.set_destination(&authority.host, authority.port);
    let active = guest.lease.current().ok_or(Reason::PolicyChanged)?;
    if !active.policy.allows(&authority.host) {
        return Err(Reason::HostNotAllowed);
    }
    let dialed = match &authority.host {
        Host::Name(_) => Some(guest.dial(&authority.host, authority.port).await?),
        // A server name in the tunnel may name another server, which is connected to instead.
        Host::Address(address) => {
            guest.proxy.dialer.check(*address, authority.port)?;
            None
        }
    };
    guest.unsettle()?;
    Ok(Target::Connect(authority, dialed))
}

/// Serves the connection within a tunnel.
async fn tunnel(guest: Arc<Guest>, upgrade: OnUpgrade, target: Target) {
    let Ok(upgraded) = upgrade.await else { return };
    let Ok(parts) = upgraded.downcast::<TokioIo<GuestStream>>() else { return };
    let mut stream = parts.io.into_inner();
    stream.put_back(parts.read_buf);
    stream.progress.set_idle();
    connection::serve(guest, stream, target).await;
}
