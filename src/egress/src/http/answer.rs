//! Answers of the proxy itself.

use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode, Version};
use serde_json::json;
use stead_schemas::egress::Reason;

use super::body::Body;

/// Returns the status of a refusal.
fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::BadRequest | Reason::BadHost | Reason::UpgradeNotAllowed => StatusCode::BAD_REQUEST,
        Reason::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        Reason::Misdirected | Reason::NameMismatch => StatusCode::MISDIRECTED_REQUEST,
        Reason::HostNotAllowed
        | Reason::AddressDenied
        | Reason::PlaceholderElsewhere
        | Reason::PolicyChanged
        | Reason::Loop => StatusCode::FORBIDDEN,
        Reason::TooManyConnections | Reason::TooManyHandshakes => StatusCode::SERVICE_UNAVAILABLE,
        Reason::UpstreamTimeout => StatusCode::GATEWAY_TIMEOUT,
        Reason::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::BAD_GATEWAY,
    }
}

/// Returns the answer to a request that is refused. A connection of HTTP/1 is closed after it, except after a
/// request that merely came over the wrong connection.
pub(crate) fn refusal(reason: Reason, version: Version) -> Response<Body> {
    let text =
        json!({"code": "egress_refused", "reason": reason.as_str(), "message": reason.text()}).to_string();
    let mut response = Response::new(Body::text(text + "\n"));
    *response.status_mut() = status(reason);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if version < Version::HTTP_2 && reason != Reason::Misdirected {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
