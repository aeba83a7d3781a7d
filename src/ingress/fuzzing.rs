//! The fuzzer of heads of clients' requests and of instances' responses.

use std::net::{IpAddr, Ipv4Addr};

use axum::http::{HeaderName, HeaderValue, Method, Request, Uri, header};
use stead_schemas::ingress::{HeaderAuth, Hostname, TargetName, host};
use stead_schemas::instance::Secret;

use super::headers;

/// Reads the first line as a method and a target and the others as headers, and forwards them.
pub fn heads(data: &[u8]) {
    let Some(mut request) = head(data) else { return };
    let Ok(authority) = headers::authority(&request) else { return };
    let named = String::from_utf8_lossy(authority.as_bytes()).into_owned();
    if let (Some(host), Ok(pattern)) = (host(&named), "{instance}.example.com".parse::<Hostname>()) {
        let _ = pattern.matched(&host);
    }
    let auth = HeaderAuth { header: "x-key".to_owned(), value: Secret("secret".to_owned()) };
    headers::is_let_in(request.headers(), &auth);
    let protocol = headers::upgrade(request.headers());
    let is_upgrade = protocol.is_some();
    let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
    if headers::prepare(&mut request, client, authority, Some(&auth), protocol).is_err() {
        return;
    }
    let passed = request.headers();
    assert_eq!(passed.get_all(header::HOST).iter().count(), 1, "one host is passed on");
    for name in [header::TRANSFER_ENCODING, header::CONTENT_LENGTH, header::TE, header::TRAILER] {
        assert!(!passed.contains_key(name), "what is for this hop only was passed on");
    }
    assert!(!passed.contains_key("x-key"), "the secret was passed on");
    assert_eq!(passed.contains_key(header::UPGRADE), is_upgrade);
    assert!(passed.keys().all(|name| !name.as_str().contains('_')), "an ambiguous name was passed on");
    // The same head is then treated as a response of an instance.
    headers::remove_hop_by_hop(request.headers_mut());
}

fn head(data: &[u8]) -> Option<Request<()>> {
    let mut lines = data.split(|&byte| byte == b'\n');
    let mut words = lines.next()?.split(|&byte| byte == b' ');
    let target = words.next_back()?;
    let mut request = Request::new(());
    *request.method_mut() =
        words.next().and_then(|word| Method::from_bytes(word).ok()).unwrap_or(Method::GET);
    *request.uri_mut() = Uri::try_from(target).ok()?;
    for line in lines {
        let colon = line.iter().position(|&byte| byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        request.headers_mut().append(name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = (text.parse::<Hostname>(), text.parse::<TargetName>());
    }
    Some(request)
}
