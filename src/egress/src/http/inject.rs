//! Injection of credentials into requests, and detection of placeholders that go elsewhere.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::Request;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use stead_schemas::egress::{Host, Policy, Reason, placeholders_in, select};

use crate::upstream::Verified;

/// The credentials that were injected into a request.
#[derive(Debug, Default)]
pub(super) struct Injected {
    /// Names of the credentials.
    pub(super) names: Vec<String>,
    /// Headers that carry them.
    pub(super) headers: Vec<HeaderName>,
}

impl Verified {
    /// Sets the headers of the credentials for this host. Values that the guest put into these headers are
    /// removed, whatever they are.
    ///
    /// # Errors
    /// Fails for a value that no header can carry, which admission refuses.
    pub(super) fn inject(&self, policy: &Policy, fields: &mut HeaderMap) -> Result<Injected, Reason> {
        let mut injected = Injected::default();
        for selected in select(policy, self.host(), |header| joined(fields, header)) {
            let value =
                selected.target.format.apply(&selected.credential.value).map_err(|_| Reason::Internal)?;
            let name = HeaderName::from_bytes(selected.target.header.as_str().as_bytes());
            let (Ok(name), Ok(mut value)) = (name, HeaderValue::from_str(&value.0)) else {
                return Err(Reason::Internal);
            };
            // No table of HPACK keeps it, and no debug output shows it.
            value.set_sensitive(true);
            fields.insert(&name, value);
            injected.names.push(selected.name.to_owned());
            injected.headers.push(name);
        }
        Ok(injected)
    }
}

/// Returns the values of a header, joined by blanks.
fn joined(fields: &HeaderMap, header: &str) -> Vec<u8> {
    let values = fields.get_all(header).iter().map(|value| readable(header == AUTHORIZATION, value));
    values.collect::<Vec<_>>().join(&b' ')
}

/// Returns a value, and for the scheme Basic also what it encodes.
fn readable(is_authorization: bool, value: &HeaderValue) -> Vec<u8> {
    let mut bytes = value.as_bytes().to_vec();
    let scheme = b"basic ";
    if is_authorization && bytes.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)) {
        let decoded = STANDARD.decode(bytes[scheme.len()..].trim_ascii()).unwrap_or_default();
        bytes.push(b' ');
        bytes.extend(decoded);
    }
    bytes
}

/// Returns `true` if the head of a request contains the placeholder of a credential that is not for the host.
pub(super) fn has_foreign_placeholder<T>(policy: &Policy, host: &Host, request: &Request<T>) -> bool {
    let own: Vec<&str> = policy.credentials_for(host).collect();
    let foreign: Vec<&str> =
        policy.credentials.keys().map(String::as_str).filter(|name| !own.contains(name)).collect();
    let has_any = |text: &[u8]| placeholders_in(text, foreign.iter().copied()).next().is_some();
    let path = request.uri().path_and_query().map(|path| path.as_str().as_bytes());
    !foreign.is_empty()
        && (path.is_some_and(has_any)
            || request
                .headers()
                .iter()
                .any(|(name, value)| has_any(&readable(*name == AUTHORIZATION, value))))
}
