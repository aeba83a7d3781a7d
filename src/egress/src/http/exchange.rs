//! The exchange of one request and its response.
//!
//! Guarantees: a request uses one policy, as it was when its head arrived; a credential is set only on a
//! verified connection, after the fields of the guest were cleaned; each request is one line of the audit log.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Incoming;
use hyper::ext::ReasonPhrase;
use hyper::header::{ALT_SVC, CONNECTION, EXPECT, HOST, HeaderName, HeaderValue, TE};
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use stead_schemas::egress::{Authority, Host, Reason, Route, TlsUse};
use stead_schemas::limits::EGRESS_TUNNEL_IDLE_MAX;

use super::body::{Body, End};
use super::check::{Checked, Expected, check};
use super::sender::{Life, Sender};
use super::{answer, fields, inject};
use crate::audit::Record;
use crate::guest::Guest;
use crate::policies::Active;
use crate::progress::Progress;
use crate::tunnel;
use crate::upstream::{Dialed, Protocol, Verified};

/// The server's end of the exchanges of a connection.
#[derive(Debug)]
pub(crate) enum Scope {
    /// A verified connection, to one host.
    Secured { verified: Verified, sender: Sender, address: IpAddr },
    /// Connections that are not encrypted, made as the requests need them.
    Plain(Plain),
}

/// The latest unencrypted connection to a server.
#[derive(Debug, Default)]
pub(crate) struct Plain {
    /// A connection that was made before the first request.
    dialed: Mutex<Option<Dialed>>,
    kept: tokio::sync::Mutex<Option<Kept>>,
    /// The host of the latest request, whose permission is watched.
    host: Mutex<Option<Host>>,
}

#[derive(Debug, Clone)]
struct Kept {
    authority: Authority,
    sender: Arc<Sender>,
    address: IpAddr,
}

impl Plain {
    /// Begins with a connection that was made before, if any.
    pub(crate) fn new(dialed: Option<Dialed>) -> Self {
        Self { dialed: Mutex::new(dialed), ..Self::default() }
    }
}

/// The exchanges of one connection of a guest.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) guest: Arc<Guest>,
    pub(crate) expected: Expected,
    pub(crate) scope: Scope,
    pub(crate) life: Life,
    pub(crate) progress: Progress,
    /// The policy at the beginning of the connection.
    pub(crate) active: Arc<Active>,
}

/// A response that is passed on.
enum Forwarded {
    Response(Response<Incoming>, Arc<Active>),
    /// A switch of both sides to another protocol.
    Switched(Response<Body>, OnUpgrade, OnUpgrade),
}

impl Exchange {
    /// Answers a request.
    pub(crate) async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        self.guest.settle();
        let version = request.version();
        let is_http1 = version < Version::HTTP_2;
        self.progress.set_busy();
        let progress = is_http1.then(|| self.progress.clone());
        let mut end = End { record: self.guest.record(), is_complete: false, progress };
        describe(&mut end.record, &request);
        end.record.line().tls = match self.scope {
            Scope::Secured { .. } => TlsUse::Intercept,
            Scope::Plain(_) => TlsUse::None,
        };
        match self.forward(request, &mut end.record).await {
            Ok(Forwarded::Response(response, active)) => {
                end.record.line().status = Some(response.status().as_u16());
                response.map(|incoming| Body::response(incoming, active, end))
            }
            Ok(Forwarded::Switched(response, client, server)) => {
                end.record.line().status = Some(response.status().as_u16());
                end.is_complete = true;
                end.progress = None;
                tokio::spawn(self.tunnel(client, server, end));
                response
            }
            Err(reason) => {
                end.record.refuse(reason);
                end.is_complete = true;
                let response = answer::refusal(reason, version);
                end.record.line().status = Some(response.status().as_u16());
                response
            }
        }
    }

    async fn forward(
        &self,
        mut request: Request<Incoming>,
        record: &mut Record,
    ) -> Result<Forwarded, Reason> {
        let active = self.guest.lease.current().ok_or(Reason::PolicyChanged)?;
        let checked = check(&request, &self.expected)?;
        record.set_destination(&checked.authority.host, checked.authority.port);
        self.permit(&active, &checked.authority.host, &request, record)?;
        let on_client = fields::upgrade(request.headers()).map(|_| hyper::upgrade::on(&mut request));
        let injected = self.prepare(&mut request, &checked, &active, record)?;
        let counts = record.counts.clone();
        let request = request.map(|incoming| Body::request(incoming, counts, injected));
        let mut response = match &self.scope {
            Scope::Secured { sender, address, .. } => {
                record.line().address = Some(*address);
                sender.send(request).await?
            }
            Scope::Plain(plain) => {
                let kept = self.connect(plain, &checked.authority).await?;
                record.line().address = Some(kept.address);
                kept.sender.send(request).await?
            }
        };
        if !fields::is_framed(response.headers()) {
            return Err(Reason::UpstreamProtocol);
        }
        let protocol = fields::upgrade(response.headers());
        self.clean(&mut response, &active);
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Forwarded::Response(response, active));
        }
        // Neither side can go on with a protocol that the client did not ask for.
        let (Some(on_client), Some(protocol)) = (on_client, protocol) else {
            return Err(Reason::UpstreamProtocol);
        };
        fields::set_upgrade(response.headers_mut(), protocol);
        let on_server = hyper::upgrade::on(&mut response);
        Ok(Forwarded::Switched(response.map(|_| Body::empty()), on_client, on_server))
    }

    /// Decides by the policy whether the request may be sent.
    fn permit(
        &self,
        active: &Active,
        host: &Host,
        request: &Request<Incoming>,
        record: &mut Record,
    ) -> Result<(), Reason> {
        let policy = &active.policy;
        record.line().credentials = policy.credentials_for(host).map(str::to_owned).collect();
        let mut refuse = |reason| {
            if policy.is_observing {
                record.observe(reason);
                Ok(())
            } else {
                Err(reason)
            }
        };
        if !policy.lists(host) {
            refuse(Reason::HostNotAllowed)?;
        }
        if inject::has_foreign_placeholder(policy, host, request) {
            refuse(Reason::PlaceholderElsewhere)?;
        }
        if matches!(self.scope, Scope::Plain(_)) && !record.line().credentials.is_empty() {
            record.note(Reason::CredentialNeedsTls);
        }
        Ok(())
    }

    /// Rewrites a request to the form that the server gets. Returns the headers with credentials.
    fn prepare(
        &self,
        request: &mut Request<Incoming>,
        checked: &Checked,
        active: &Active,
        record: &mut Record,
    ) -> Result<Vec<HeaderName>, Reason> {
        let protocol = fields::upgrade(request.headers());
        let has_trailers = fields::accepts_trailers(request.headers());
        let host = HeaderValue::from_str(&checked.host_field).map_err(|_| Reason::BadHost)?;
        let headers = request.headers_mut();
        fields::remove_hop_by_hop(headers);
        // The proxy itself answers an expectation when it reads the body.
        headers.remove(EXPECT);
        if has_trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        if request.version() == Version::HTTP_2 {
            request.headers_mut().remove(HOST);
            let parts = (checked.host_field.as_str(), checked.path.clone());
            let uri = Uri::builder().scheme("https").authority(parts.0).path_and_query(parts.1).build();
            *request.uri_mut() = uri.map_err(|_| Reason::BadHost)?;
        } else {
            let headers = request.headers_mut();
            headers.insert(HOST, host);
            match protocol {
                Some(protocol) => fields::set_upgrade(headers, protocol),
                None if has_trailers => drop(headers.insert(CONNECTION, HeaderValue::from_static("te"))),
                None => {}
            }
            *request.uri_mut() = Uri::from(checked.path.clone());
            *request.version_mut() = Version::HTTP_11;
        }
        match &self.scope {
            Scope::Secured { verified, .. } if !active.policy.is_observing => {
                let injected = verified.inject(&active.policy, request.headers_mut())?;
                record.line().injected = !injected.names.is_empty();
                record.line().credentials = injected.names;
                Ok(injected.headers)
            }
            Scope::Secured { .. } | Scope::Plain(_) => Ok(Vec::new()),
        }
    }

    /// Removes from a response what is not for the guest.
    fn clean(&self, response: &mut Response<Incoming>, active: &Active) {
        // The text after the status could repeat a value, and no client reads it.
        response.extensions_mut().remove::<ReasonPhrase>();
        let headers = response.headers_mut();
        fields::remove_hop_by_hop(headers);
        if matches!(self.scope, Scope::Secured { .. }) {
            // Another protocol or host would not be mediated.
            headers.remove(ALT_SVC);
            active.mask.apply(headers);
        }
    }

    /// Returns an unencrypted connection to the authority, the latest one if it is still open.
    async fn connect(&self, plain: &Plain, authority: &Authority) -> Result<Kept, Reason> {
        *plain.host.lock().unwrap_or_else(PoisonError::into_inner) = Some(authority.host.clone());
        let mut kept = plain.kept.lock().await;
        if let Some(kept) = kept.as_ref().filter(|kept| kept.authority == *authority)
            && kept.sender.is_open().await
        {
            return Ok(kept.clone());
        }
        let dialed = plain.dialed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let dialed = match dialed {
            Some(dialed) => dialed,
            None => self.guest.dial(&authority.host, authority.port).await?,
        };
        let (sender, _) = Sender::open(dialed.stream, Protocol::Http1, &self.life).await?;
        let new = Kept { authority: authority.clone(), sender: Arc::new(sender), address: dialed.address };
        *kept = Some(new.clone());
        Ok(new)
    }

    /// Returns `true` while the policy allows the connection to go on as it is.
    pub(crate) fn is_allowed(&self, active: &Active) -> bool {
        match &self.scope {
            Scope::Secured { verified, .. } => {
                active.policy.route(verified.host()) == Route::Intercept
                    && Arc::ptr_eq(&active.authority, &self.active.authority)
            }
            Scope::Plain(plain) => {
                let host = plain.host.lock().unwrap_or_else(PoisonError::into_inner).clone();
                host.is_none_or(|host| active.policy.allows(&host))
            }
        }
    }

    /// Copies bytes after both sides have switched to another protocol.
    async fn tunnel(self: Arc<Self>, client: OnUpgrade, server: OnUpgrade, mut end: End) {
        let counts = end.record.counts.clone();
        let copied = async {
            let (client, server) = tokio::try_join!(client, server).map_err(|_| Reason::Broken)?;
            let copied = tunnel::copy(TokioIo::new(client), TokioIo::new(server), &counts).await;
            copied.map_err(|_| Reason::Broken)
        };
        let ended = tokio::select! {
            biased;
            () = self.guest.lease.until_not(|active| self.is_allowed(active)) => Err(Reason::PolicyChanged),
            () = self.progress.stalled(EGRESS_TUNNEL_IDLE_MAX) => Err(Reason::Idle),
            ended = copied => ended,
        };
        if let Err(reason) = ended {
            end.record.note(reason);
        }
    }
}

/// Notes the head of a request.
pub(crate) fn describe<T>(record: &mut Record, request: &Request<T>) {
    record.set_path(request.uri().path());
    let line = record.line();
    line.method = Some(request.method().as_str().to_owned());
    line.version = match request.version() {
        Version::HTTP_10 => Some("1.0".to_owned()),
        Version::HTTP_11 => Some("1.1".to_owned()),
        Version::HTTP_2 => Some("2".to_owned()),
        _ => None,
    };
}
