//! Headers that are forwarded, and those that the proxy adds.
//!
//! Guarantees: nothing that is meant only for the next hop reaches the one after it; a client's claims about
//! who forwarded its request are not believed; a secret that lets a request in is not forwarded.

use std::net::IpAddr;

use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header};
use stead_schemas::ingress::HeaderAuth;
use subtle::ConstantTimeEq;

use super::error_response::Refusal;

/// Headers for the next hop only, besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers in which proxies describe clients, besides those that begin with `x-forwarded-`.
const FORWARDED: [HeaderName; 2] = [header::FORWARDED, HeaderName::from_static("x-real-ip")];

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Returns the host and port that a request is for, from its target or from a single `Host` header.
pub(super) fn authority<Body>(request: &Request<Body>) -> Result<HeaderValue, Refusal> {
    const WRONG: Refusal = Refusal::BadRequest("a request must name one host");
    if *request.method() == Method::CONNECT {
        return Err(Refusal::BadRequest("this is no proxy to elsewhere"));
    }
    let named = match request.uri().authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).map_err(|_| WRONG)?,
        None => {
            let mut hosts = request.headers().get_all(header::HOST).iter();
            match (hosts.next(), hosts.next()) {
                (Some(host), None) => host.clone(),
                _ => return Err(WRONG),
            }
        }
    };
    if has_port(named.as_bytes()) { Ok(named) } else { Err(Refusal::BadRequest("the host has no such port")) }
}

/// True if the host name is followed by nothing or by a valid port: a guest builds links from it.
fn has_port(authority: &[u8]) -> bool {
    let Some(at) = authority.iter().rposition(|&byte| byte == b':') else { return true };
    let port = &authority[at + 1..];
    // The colons of an IPv6 address, which no rule is for, do not separate a port.
    port.ends_with(b"]")
        || (port.iter().all(u8::is_ascii_digit)
            && std::str::from_utf8(port).is_ok_and(|port| port.parse::<u16>().is_ok_and(|port| port > 0)))
}

/// True if the header that lets a request in occurs once and has the right value. The comparison takes
/// constant time, so its duration does not reveal how much of the value is right.
pub(super) fn is_let_in(headers: &HeaderMap, auth: &HeaderAuth) -> bool {
    let mut values = headers.get_all(auth.header.as_str()).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.as_bytes().ct_eq(auth.value.0.as_bytes()).into(),
        _ => false,
    }
}

/// Returns the protocol that a client or a guest asks to switch to. HTTP itself is excluded: its requests
/// would bypass every rule here.
pub(super) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let is_asked = named(headers).any(|name| name.eq_ignore_ascii_case("upgrade"));
    let is_http = |value: &HeaderValue| {
        let protocols = value.as_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii);
        protocols
            .map(<[u8]>::to_ascii_lowercase)
            .any(|one| one.starts_with(b"h2") || one.starts_with(b"http"))
    };
    headers.get(header::UPGRADE).filter(|value| is_asked && !is_http(value)).cloned()
}

/// Returns the names in `Connection`.
fn named(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Removes headers that are meant for the next hop only.
pub(super) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let also: Vec<HeaderName> = named(headers).filter_map(|name| name.parse().ok()).collect();
    // A length in addition to a transfer coding is ambiguous.
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    for name in HOP_BY_HOP.iter().chain(&also) {
        headers.remove(name);
    }
}

/// Sets the headers that announce a switch to another protocol.
pub(super) fn set_upgrade(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol);
}

/// Rewrites a request to the form that the instance gets, over a connection of its own.
pub(super) fn prepare<Body>(
    request: &mut Request<Body>,
    client: IpAddr,
    authority: HeaderValue,
    auth: Option<&HeaderAuth>,
    protocol: Option<HeaderValue>,
) -> Result<(), Refusal> {
    let path = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    remove_hop_by_hop(headers);
    // The body carries its own length, and an expectation was answered here.
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::EXPECT);
    let is_forwarded =
        |name: &HeaderName| name.as_str().starts_with("x-forwarded-") || FORWARDED.contains(name);
    // Common programs make `X_FORWARDED_FOR` of both `x-forwarded-for` and `x_forwarded_for`: a name that
    // could be mistaken for one of the proxy's, or for the header that lets a request in, is not forwarded.
    let is_ambiguous = |name: &HeaderName| name.as_str().contains('_');
    let reported: Vec<HeaderName> =
        headers.keys().filter(|name| is_forwarded(name) || is_ambiguous(name)).cloned().collect();
    for name in &reported {
        headers.remove(name);
    }
    if let Some(auth) = auth {
        headers.remove(auth.header.as_str());
    }
    let client = HeaderValue::try_from(client.to_string());
    headers.insert(FORWARDED_FOR, client.map_err(|_| Refusal::BadRequest("a client has an address"))?);
    headers.insert(FORWARDED_HOST, authority.clone());
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    headers.insert(header::HOST, authority);
    match protocol {
        Some(protocol) => set_upgrade(headers, protocol),
        None => drop(headers.insert(header::CONNECTION, HeaderValue::from_static("close"))),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stead_schemas::instance::Secret;

    use super::*;

    fn request(uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).expect("valid")
    }

    fn lines<Body>(request: &Request<Body>) -> Vec<String> {
        let headers = request.headers().iter();
        let mut lines: Vec<String> =
            headers.map(|(name, value)| format!("{name}: {}", value.to_str().expect("text"))).collect();
        lines.sort();
        lines
    }

    #[test]
    fn headers_for_the_proxy_and_claims_of_the_client_are_not_forwarded() {
        let auth = HeaderAuth { header: "X-Key".to_owned(), value: Secret("s".repeat(32)) };
        let mut sent = request(
            "http://web.test:81/a?b=c",
            &[
                ("host", "other.test"),
                ("connection", "close, X-Hop"),
                ("connection", "keep-alive"),
                ("x-hop", "1"),
                ("keep-alive", "timeout=5"),
                ("transfer-encoding", "chunked"),
                ("content-length", "5"),
                ("te", "trailers"),
                ("proxy-authorization", "x"),
                ("x-forwarded-for", "1.2.3.4"),
                ("x-forwarded-port", "1"),
                ("forwarded", "for=1.2.3.4"),
                ("x-real-ip", "1.2.3.4"),
                ("x_forwarded_for", "1.2.3.4"),
                ("x_key", "s"),
                ("x-key", "s"),
                ("expect", "100-continue"),
                ("accept", "*/*"),
            ],
        );
        let authority = authority(&sent).expect("named");
        let client = "10.0.0.9".parse().expect("valid");
        prepare(&mut sent, client, authority, Some(&auth), None).expect("passed on");
        assert_eq!(sent.uri(), "/a?b=c");
        let expected = [
            "accept: */*",
            "connection: close",
            "host: web.test:81",
            "x-forwarded-for: 10.0.0.9",
            "x-forwarded-host: web.test:81",
            "x-forwarded-proto: http",
        ];
        assert_eq!(lines(&sent), expected);
    }

    #[test]
    fn an_upgrade_is_passed_on_only_when_it_is_asked_for() {
        let asked = |connection: &str| {
            upgrade(request("/", &[("connection", connection), ("upgrade", "x")]).headers())
        };
        assert!(asked("keep-alive, Upgrade").is_some());
        assert!(asked("keep-alive").is_none());
        assert!(upgrade(request("/", &[("connection", "upgrade")]).headers()).is_none());
        for protocol in ["h2c", "websocket, H2C", "HTTP/2.0"] {
            let asked = request("/", &[("connection", "upgrade"), ("upgrade", protocol)]);
            assert!(upgrade(asked.headers()).is_none(), "{protocol}");
        }
        let mut sent =
            request("/chat", &[("host", "a"), ("connection", "Upgrade"), ("upgrade", "websocket")]);
        let protocol = upgrade(sent.headers());
        prepare(&mut sent, "::1".parse().expect("valid"), HeaderValue::from_static("a"), None, protocol)
            .expect("fine");
        assert!(lines(&sent).contains(&"connection: upgrade".to_owned()));
        assert!(lines(&sent).contains(&"upgrade: websocket".to_owned()));
    }

    #[test]
    fn a_request_names_one_host() {
        let named = |uri: &str, hosts: &[&str]| {
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            authority(&request(uri, &headers)).map(|value| value.to_str().expect("text").to_owned()).ok()
        };
        assert_eq!(named("/", &["a.test"]).as_deref(), Some("a.test"));
        assert_eq!(named("http://b.test/x", &["a.test"]).as_deref(), Some("b.test"));
        assert_eq!(named("/", &[]), None);
        assert_eq!(named("/", &["a.test", "a.test"]), None);
        assert_eq!(named("/", &["a.test:80"]).as_deref(), Some("a.test:80"));
        for port in ["99999", "0", "", "x", "+80", "80 "] {
            assert_eq!(named("/", &[&format!("a.test:{port}")]), None, "{port:?}");
        }
    }

    #[test]
    fn only_the_one_right_value_lets_in() {
        let auth = HeaderAuth { header: "X-Key".to_owned(), value: Secret("s".repeat(32)) };
        let right = "s".repeat(32);
        let wrong = format!("{}t", "s".repeat(31));
        for (values, is_right) in [
            (vec![right.as_str()], true),
            (vec![wrong.as_str()], false),
            (vec![&right[1..]], false),
            (vec![right.as_str(), right.as_str()], false),
            (vec![], false),
        ] {
            let headers: Vec<_> = values.iter().map(|value| ("x-key", *value)).collect();
            assert_eq!(is_let_in(request("/", &headers).headers(), &auth), is_right, "{values:?}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(values in proptest::collection::vec("[ -~]{0,30}", 0..6)) {
            let mut sent = request("/", &[("host", "a")]);
            for value in &values {
                if let Ok(value) = HeaderValue::from_str(value) {
                    sent.headers_mut().append(header::CONNECTION, value.clone());
                    sent.headers_mut().append(header::UPGRADE, value);
                }
            }
            let protocol = upgrade(sent.headers());
            prepare(&mut sent, "::1".parse().expect("valid"), HeaderValue::from_static("a"), None, protocol).expect("passed on");
            prop_assert!(sent.headers().get_all(header::CONNECTION).iter().count() == 1);
        }
    }
}
