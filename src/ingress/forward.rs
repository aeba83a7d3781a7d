//! The way of one request: from a client to its instance, and the response back.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use stead_controllers::ingress::{Found, Reach};
use stead_schemas::ingress::host;
use stead_schemas::instance::State;
use stead_schemas::names::Uid;

use super::error_response::Refusal;
use super::headers;
use super::progress::Progress;
use super::server::Proxy;
use super::upstream::{Hold, connect, send, tunnel};

/// An instance that may be connected to.
struct Target {
    instance: Uid,
    address: Ipv4Addr,
    state: State,
}

impl Proxy {
    pub(super) async fn forward(
        &self,
        client: IpAddr,
        mut request: Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        let authority = headers::authority(&request)?;
        let named = String::from_utf8_lossy(authority.as_bytes());
        let unknown = || Refusal::UnknownHost(named.clone().into_owned());
        let name = host(&named).ok_or_else(unknown)?;
        let (found, cut) = self.served.find(&name).ok_or_else(unknown)?;
        let auth = found.rule.auth.as_ref();
        if !auth.is_none_or(|auth| headers::is_let_in(request.headers(), auth)) {
            return Err(Refusal::Forbidden);
        }
        let target = self.resolve(&found)?;
        let permit = self.permits.take(&target.instance, &found.owner, client);
        let permit = Arc::new(permit.ok_or(Refusal::Overloaded)?);
        let hold = Hold { cut, permit, progress: Progress::default() };
        let protocol = headers::upgrade(request.headers());
        let on_client = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        headers::prepare(&mut request, client, authority.clone(), auth, protocol)?;
        let sender = self.connect(&found, &target, &hold).await?;
        let mut response = send(sender, request).await?;
        let protocol = headers::upgrade(response.headers());
        headers::remove_hop_by_hop(response.headers_mut());
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Neither side can continue with a protocol that the client did not ask for.
            let (Some(on_client), Some(protocol)) = (on_client, protocol) else {
                return Err(Refusal::BadAnswer);
            };
            headers::set_upgrade(response.headers_mut(), protocol);
            tokio::spawn(tunnel(on_client, hyper::upgrade::on(&mut response), hold));
        }
        Ok(response.map(Body::new))
    }

    fn resolve(&self, found: &Found) -> Result<Target, Refusal> {
        match (self.reach)(&found.instance, found.rule.target.port) {
            Reach::At { instance, address, state } => Ok(Target { instance, address, state }),
            Reach::Down(state) => Err(Refusal::Down(state)),
            Reach::Nowhere => Err(Refusal::Nowhere),
            Reach::Unknown => Err(Refusal::UnknownInstance(found.instance.clone())),
        }
    }

    /// Connects to the target, and looks the instance up again: connecting may take so long that another
    /// instance has the address by then.
    async fn connect(
        &self,
        found: &Found,
        target: &Target,
        hold: &Hold,
    ) -> Result<SendRequest<Body>, Refusal> {
        let connected = connect(target.address, found.rule.target.port, hold).await;
        match (connected, self.resolve(found)) {
            (Ok(sender), Ok(now)) if (&now.instance, now.address) == (&target.instance, target.address) => {
                Ok(sender)
            }
            (Ok(_), Ok(_)) => Err(Refusal::UnknownInstance(found.instance.clone())),
            // It accepts connections, whatever its recorded state is.
            (Ok(sender), Err(Refusal::Down(_))) => Ok(sender),
            // Report the instance's current state instead of a generic connect error.
            (Err(Refusal::Unreachable), Ok(now)) if now.state != State::Running => {
                Err(Refusal::Down(now.state))
            }
            (Err(refusal), Ok(_)) | (_, Err(refusal)) => Err(refusal),
        }
    }
}
