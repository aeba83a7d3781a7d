//! Fields that are for the next hop only, upgrades, and trailers.

use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};

/// Fields for the next hop only, besides those that `Connection` names. `Trailer` announces fields that reach
/// the other end.
const HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Fields that have a meaning only in a head: in trailers, a program that merges both could be deceived.
const NOT_IN_TRAILERS: [HeaderName; 7] =
    [HOST, CONTENT_LENGTH, AUTHORIZATION, COOKIE, SET_COOKIE, TRAILER, EXPECT];

/// The field with settings of an upgrade to HTTP/2.
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Returns the names in `Connection`.
fn named(fields: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = fields.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Removes the fields that are for the next hop only.
pub(super) fn remove_hop_by_hop(fields: &mut HeaderMap) {
    let also: Vec<HeaderName> = named(fields).filter_map(|name| name.parse().ok()).collect();
    // A length in addition to a transfer coding is ambiguous.
    if fields.contains_key(TRANSFER_ENCODING) {
        fields.remove(CONTENT_LENGTH);
    }
    for name in HOP_BY_HOP.iter().chain(&also) {
        // The proxy checks and sets the host itself, and the length frames the message.
        if *name != HOST && *name != CONTENT_LENGTH {
            fields.remove(name);
        }
    }
}

/// Returns `true` if the end of a response's body is found in one way only: a transfer coding that is not
/// known here could be known to the guest.
pub(super) fn is_framed(fields: &HeaderMap) -> bool {
    let mut codings = fields.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => true,
        (Some(coding), None) => coding.as_bytes().eq_ignore_ascii_case(b"chunked"),
        (Some(_), Some(_)) => false,
    }
}

/// Returns `true` if a client accepts trailers.
pub(super) fn accepts_trailers(fields: &HeaderMap) -> bool {
    let values = fields.get_all(TE).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|one| one.trim().eq_ignore_ascii_case("trailers"))
}

/// Removes the fields that trailers must not have.
pub(super) fn clean_trailers(trailers: &mut HeaderMap) {
    remove_hop_by_hop(trailers);
    for name in &NOT_IN_TRAILERS {
        trailers.remove(name);
    }
}

/// Returns the protocol that a request or a response switches to, or `None` for a message that does not.
pub(super) fn upgrade(fields: &HeaderMap) -> Option<HeaderValue> {
    let is_asked = named(fields).any(|name| name.eq_ignore_ascii_case("upgrade"));
    fields.get(UPGRADE).filter(|_| is_asked).cloned()
}

/// Returns `true` if a request asks to switch to another version of HTTP: the requests over it would be read
/// by nobody here.
pub(super) fn asks_for_http2(fields: &HeaderMap) -> bool {
    let is_http = |value: &HeaderValue| {
        let protocols = value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        protocols
            .map(<[u8]>::to_ascii_lowercase)
            .any(|one| one.starts_with(b"h2") || one.starts_with(b"http"))
    };
    fields.contains_key(HTTP2_SETTINGS) || fields.get_all(UPGRADE).iter().any(is_http)
}

/// Sets the fields that announce a switch to another protocol.
pub(super) fn set_upgrade(fields: &mut HeaderMap, protocol: HeaderValue) {
    fields.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    fields.insert(UPGRADE, protocol);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut fields = HeaderMap::new();
        for (name, value) in list {
            fields.append(*name, HeaderValue::from_static(value));
        }
        fields
    }

    #[test]
    fn what_connection_names_is_removed_and_the_host_stays() {
        let mut given = fields(&[
            ("connection", "close, X-Hop, Host, Content-Length"),
            ("connection", "authorization"),
            ("x-hop", "1"),
            ("host", "a.example"),
            ("content-length", "3"),
            ("authorization", "Basic x"),
            ("te", "trailers"),
            ("proxy-authorization", "Basic x"),
            ("x-other", "2"),
        ]);
        remove_hop_by_hop(&mut given);
        assert_eq!(given, fields(&[("host", "a.example"), ("content-length", "3"), ("x-other", "2")]));
    }

    #[test]
    fn only_a_response_with_one_known_coding_is_framed() {
        assert!(is_framed(&fields(&[("content-length", "3")])));
        assert!(is_framed(&fields(&[("transfer-encoding", "Chunked")])));
        for coding in ["gzip, chunked", "xchunked", "identity", ""] {
            assert!(!is_framed(&fields(&[("transfer-encoding", coding)])), "{coding}");
        }
        assert!(!is_framed(&fields(&[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")])));
    }

    #[test]
    fn trailers_carry_no_field_of_a_head() {
        let mut given = fields(&[
            ("host", "evil.example"),
            ("authorization", "x"),
            ("transfer-encoding", "chunked"),
            ("content-length", "1"),
            ("grpc-status", "0"),
        ]);
        clean_trailers(&mut given);
        assert_eq!(given, fields(&[("grpc-status", "0")]));
    }

    #[test]
    fn an_upgrade_to_another_version_of_http_is_recognised() {
        assert!(asks_for_http2(&fields(&[("upgrade", "websocket, H2C")])));
        assert!(asks_for_http2(&fields(&[("upgrade", "HTTP/2.0")])));
        assert!(asks_for_http2(&fields(&[("http2-settings", "x")])));
        let websocket = fields(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert!(!asks_for_http2(&websocket));
        assert_eq!(upgrade(&websocket), Some(HeaderValue::from_static("websocket")));
        assert_eq!(upgrade(&fields(&[("upgrade", "websocket")])), None);
    }
}
