//! Responses to requests that are not forwarded, or whose forwarding failed; they have the shape of the
//! API's errors.

use axum::Json;
use axum::body::Body;
use axum::http::{Response, StatusCode, header};
use axum::response::IntoResponse;
use stead_schemas::api::ErrorBody;
use stead_schemas::instance::State;
use stead_schemas::limits::{HOSTNAME_BYTES_MAX, INGRESS_RETRY_AFTER};
use stead_schemas::validate::printable;

/// The reason of a refusal; text from clients is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    BadRequest(&'static str),
    UnknownHost(String),
    /// The required header is missing or has a wrong value; the response does not say which header it is.
    Forbidden,
    UnknownInstance(String),
    /// The instance has no network.
    Nowhere,
    Down(State),
    Overloaded,
    Unreachable,
    BadAnswer,
    /// The client was too slow to send its body.
    TooSlow,
    TimedOut(&'static str),
}

impl Refusal {
    fn parts(&self) -> (StatusCode, &'static str, String) {
        let cut = |text: &str| printable(text, HOSTNAME_BYTES_MAX);
        match self {
            Self::BadRequest(why) => (StatusCode::BAD_REQUEST, "bad_request", (*why).to_owned()),
            Self::UnknownHost(host) => {
                (StatusCode::NOT_FOUND, "not_found", format!("no ingress is for the host {:?}", cut(host)))
            }
            Self::Forbidden => {
                let message = "a header that this host asks for is missing or wrong".to_owned();
                (StatusCode::FORBIDDEN, "forbidden", message)
            }
            Self::UnknownInstance(word) => {
                (StatusCode::NOT_FOUND, "instance_not_found", format!("there is no instance {:?}", cut(word)))
            }
            Self::Nowhere => {
                let message = "the instance has no network".to_owned();
                (StatusCode::BAD_GATEWAY, "bad_gateway", message)
            }
            Self::Down(state) => {
                let message = format!("the instance is {state:?}");
                (StatusCode::SERVICE_UNAVAILABLE, "instance_unavailable", message)
            }
            Self::Overloaded => {
                let message = "too many requests at once".to_owned();
                (StatusCode::SERVICE_UNAVAILABLE, "overloaded", message)
            }
            Self::Unreachable => {
                let message = "the instance does not take connections at the port".to_owned();
                (StatusCode::BAD_GATEWAY, "bad_gateway", message)
            }
            Self::BadAnswer => {
                let message = "the instance hung up, or answered with something other than HTTP".to_owned();
                (StatusCode::BAD_GATEWAY, "bad_gateway", message)
            }
            Self::TooSlow => {
                let message = "the body came too slowly".to_owned();
                (StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
            }
            Self::TimedOut(what) => (
                StatusCode::GATEWAY_TIMEOUT,
                "gateway_timeout",
                format!("the instance did not {what} in time"),
            ),
        }
    }
}

impl From<&Refusal> for Response<Body> {
    fn from(refusal: &Refusal) -> Self {
        let (status, code, message) = refusal.parts();
        let mut response = (status, Json(ErrorBody::new(code, message))).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, INGRESS_RETRY_AFTER.as_secs().into());
        }
        response
    }
}
