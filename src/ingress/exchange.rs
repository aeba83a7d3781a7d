//! One request: from a client to the instance that it is for, and the answer back.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use stead_controllers::ingress::Reach;
use stead_schemas::ingress::host;
use stead_schemas::instance::State;

use super::answers::Refusal;
use super::headers;
use super::progress::Progress;
use super::server::Proxy;
use super::upstream::{Hold, connect, send, tunnel};

impl Proxy {
    pub(super) async fn exchange(
        &self,
        client: IpAddr,
        mut request: Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        let authority = headers::authority(&request)?;
        let named = String::from_utf8_lossy(authority.as_bytes());
        let unknown = || Refusal::UnknownHost(named.clone().into_owned());
        let name = host(&named).ok_or_else(unknown)?;
        let (found, cut) = self.served.find(&name).ok_or_else(unknown)?;
        let (auth, port) = (found.rule.auth.as_ref(), found.rule.target.port);
        if !auth.is_none_or(|auth| headers::is_let_in(request.headers(), auth)) {
            return Err(Refusal::Forbidden);
        }
        let (instance, address) = match (self.reach)(&found.instance, port) {
            Reach::At { instance, address, state: _ } => (instance, address),
            Reach::Down(state) => return Err(Refusal::Down(state)),
            Reach::Nowhere => return Err(Refusal::Nowhere),
            Reach::Unknown => return Err(Refusal::UnknownInstance(found.instance)),
        };
        let place = Arc::new(self.places.take(&instance).ok_or(Refusal::Overloaded)?);
        let hold = Hold { cut, place, progress: Progress::default() };
        let protocol = headers::upgrade(request.headers());
        let on_client = protocol.is_some().then(|| hyper::upgrade::on(&mut request));
        headers::prepare(&mut request, client, authority.clone(), auth, protocol)?;
        let sender = connect(address, port, &hold).await.map_err(|refusal| {
            // It may have gone down meanwhile, or not be up yet, which says more.
            match ((self.reach)(&found.instance, port), &refusal) {
                (Reach::Down(state), _) => Refusal::Down(state),
                (Reach::At { state, .. }, Refusal::Unreachable) if state != State::Running => {
                    Refusal::Down(state)
                }
                _ => refusal,
            }
        })?;
        let mut response = send(sender, request).await?;
        let protocol = headers::upgrade(response.headers());
        headers::remove_hop_by_hop(response.headers_mut());
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // To what nobody asked for, nobody can go on.
            let (Some(on_client), Some(protocol)) = (on_client, protocol) else {
                return Err(Refusal::BadAnswer);
            };
            headers::set_upgrade(response.headers_mut(), protocol);
            tokio::spawn(tunnel(on_client, hyper::upgrade::on(&mut response), hold));
        }
        Ok(response.map(Body::new))
    }
}
