//! The single place where errors become HTTP responses.

use axum::Json;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_controllers::refused::{Refused, RefusedKind};
use stead_controllers::store::{KvError, StoreError, TransactError, TxError};
use stead_schemas::api::ErrorBody;
use stead_schemas::limits::{HOSTNAME_BYTES_MAX, MESSAGE_CHARS_MAX};
use stead_schemas::validate::{FieldErrors, printable};

use super::backend::PrepareError;
use crate::guest_channel::AgentError;
use crate::peers::TooSlow;

/// Name of the header that asks SDKs not to repeat a request that a repeat cannot fix.
static SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// An error response.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    retry: Retry,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// The status alone decides.
    Unsaid,
    Never,
    After(u32),
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let message = printable(&message.into(), MESSAGE_CHARS_MAX * 4);
        Self { status, body: ErrorBody::new(code, message), retry: Retry::Unsaid }
    }
    pub(super) fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }
    /// Makes the error for an object that does not exist.
    pub(super) fn absent(kind: &str, word: &str) -> Self {
        let word = printable(word, HOSTNAME_BYTES_MAX);
        Self::not_found(format!("there is no {kind} {word:?}"))
    }
    /// Makes the error for a conflict that the same request would meet again.
    pub(super) fn conflict(code: &str, message: impl Into<String>) -> Self {
        Self { retry: Retry::Never, ..Self::new(StatusCode::CONFLICT, code, message) }
    }
    pub(super) fn not_supported(what: &str) -> Self {
        let message = format!("{what} is not supported by this server yet");
        Self { retry: Retry::Never, ..Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported", message) }
    }
    pub(super) fn internal() -> Self {
        let error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "internal error");
        Self { retry: Retry::Never, ..error }
    }
    pub(super) fn overloaded(message: &str) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", message);
        Self { retry: Retry::After(1), ..error }
    }
    pub(super) fn insufficient_storage(message: String) -> Self {
        let error = Self::new(StatusCode::INSUFFICIENT_STORAGE, "insufficient_storage", message);
        Self { retry: Retry::After(5), ..error }
    }
    /// Makes a refusal before any handler: the code is the status' own text.
    pub(super) fn refused(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, status.canonical_reason().unwrap_or("Error"), message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        let headers = response.headers_mut();
        match self.retry {
            Retry::Unsaid => {}
            Retry::Never => drop(headers.insert(&SHOULD_RETRY, HeaderValue::from_static("false"))),
            Retry::After(seconds) => drop(headers.insert(header::RETRY_AFTER, seconds.into())),
        }
        response
    }
}

impl From<FieldErrors> for ApiError {
    fn from(errors: FieldErrors) -> Self {
        let body = ErrorBody::from(&errors);
        // This is the contract's only validation error that is not a 400.
        let status = if body.code == "platform_not_available" {
            StatusCode::NOT_FOUND
        } else {
            StatusCode::BAD_REQUEST
        };
        Self { status, body, retry: Retry::Unsaid }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full => Self::insufficient_storage(error.to_string()),
            StoreError::Overloaded => Self::overloaded("too many writes are waiting"),
            StoreError::Closed => Self::overloaded("the server is shutting down"),
            StoreError::Database(KvError::Io(_)) => {
                tracing::error!(%error, "the store failed");
                let message = "the store cannot write now; see the daemon's log and its disk";
                let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", message);
                Self { retry: Retry::After(5), ..error }
            }
            _ => {
                tracing::error!(%error, "the store failed");
                Self::internal()
            }
        }
    }
}

impl<E: Into<Self>> From<TransactError<E>> for ApiError {
    fn from(error: TransactError<E>) -> Self {
        match error {
            TransactError::Refused(refused) => refused.into(),
            TransactError::Store(error) => error.into(),
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let (status, code) = answer_to(refused.kind);
        let retry = match status {
            StatusCode::CONFLICT | StatusCode::NOT_IMPLEMENTED => Retry::Never,
            StatusCode::SERVICE_UNAVAILABLE => Retry::After(1),
            _ => Retry::Unsaid,
        };
        if refused.fields.is_empty() {
            return Self { retry, ..Self::new(status, code, refused.message) };
        }
        Self { status, body: ErrorBody { code: code.to_owned(), ..ErrorBody::from(&refused.fields) }, retry }
    }
}

/// The table of refusals: HTTP status and error code of each kind. A conflict, and a verb that is not
/// supported, would be met again by the same request.
fn answer_to(kind: RefusedKind) -> (StatusCode, &'static str) {
    match kind {
        RefusedKind::Invalid => (StatusCode::BAD_REQUEST, "invalid_request"),
        RefusedKind::InvalidExpiry => (StatusCode::BAD_REQUEST, "invalid_expires_at"),
        RefusedKind::InvalidHealthCheck => (StatusCode::BAD_REQUEST, "invalid_health_check"),
        RefusedKind::InvalidDownload => (StatusCode::BAD_REQUEST, "invalid_bandwidth_download"),
        RefusedKind::InvalidUpload => (StatusCode::BAD_REQUEST, "invalid_bandwidth_upload"),
        RefusedKind::ImageNotReady => (StatusCode::BAD_REQUEST, "image_not_ready"),
        RefusedKind::InstanceNotFound => (StatusCode::BAD_REQUEST, "instance_not_found"),
        RefusedKind::UnsupportedField => (StatusCode::BAD_REQUEST, "not_supported"),
        RefusedKind::UnsupportedVerb => (StatusCode::NOT_IMPLEMENTED, "not_supported"),
        RefusedKind::NotFound => (StatusCode::NOT_FOUND, "not_found"),
        RefusedKind::NameTaken => (StatusCode::CONFLICT, "name_conflict"),
        RefusedKind::AlreadyExists => (StatusCode::CONFLICT, "already_exists"),
        RefusedKind::HostnameInUse => (StatusCode::CONFLICT, "hostname_in_use"),
        RefusedKind::PortInUse => (StatusCode::CONFLICT, "port_in_use"),
        RefusedKind::InvalidState { .. } => (StatusCode::CONFLICT, "invalid_state"),
        RefusedKind::InStandby => (StatusCode::CONFLICT, "instance_in_standby"),
        RefusedKind::Expired => (StatusCode::CONFLICT, "instance_expired"),
        RefusedKind::Conflict => (StatusCode::CONFLICT, "conflict"),
        RefusedKind::NoRoom | RefusedKind::Quota => (StatusCode::CONFLICT, "insufficient_resources"),
        RefusedKind::NotObserved => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
    }
}

impl From<TxError> for ApiError {
    fn from(error: TxError) -> Self {
        Refused::from(error).into()
    }
}

impl From<HostError> for ApiError {
    /// Converts only errors that the request's own content caused; others are reported in conditions.
    fn from(error: HostError) -> Self {
        match error.kind {
            HostErrorKind::Permanent | HostErrorKind::Unsupported => {
                Self::bad_request("invalid_request", error.chain())
            }
            HostErrorKind::Exhausted => Self::insufficient_storage(error.chain()),
            // The host is busy, late or interrupted: the same request may succeed in a moment.
            HostErrorKind::Transient => {
                tracing::warn!(error = error.chain(), "the host could not do it now");
                Self::overloaded(&error.chain())
            }
            _ => {
                tracing::error!(error = error.chain(), "the host failed");
                Self::internal()
            }
        }
    }
}

impl From<PrepareError> for ApiError {
    fn from(error: PrepareError) -> Self {
        match error {
            PrepareError::TooLarge(why) => Self::bad_request("archive_too_large", why),
            PrepareError::Host(error) => error.into(),
        }
    }
}

impl From<AgentError> for ApiError {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::NotReady => Self::conflict("invalid_state", error.to_string()),
            AgentError::Unresponsive => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "agent_unreachable", error.to_string())
            }
            AgentError::Lost | AgentError::TooMany => Self::overloaded(&error.to_string()),
        }
    }
}

impl From<WebSocketUpgradeRejection> for ApiError {
    fn from(rejection: WebSocketUpgradeRejection) -> Self {
        Self::bad_request("invalid_request", rejection.body_text())
    }
}

/// Makes the error for a body that could not be read whole: it came too slowly, or broke off.
pub(super) fn of_body(error: &axum::Error) -> ApiError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.is::<TooSlow>() {
            return ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body came too slowly");
        }
        cause = error.source();
    }
    ApiError::refused(StatusCode::BAD_REQUEST, "the body could not be read")
}

pub(super) fn too_large() -> ApiError {
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", "the body is larger than 1 MiB")
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => too_large(),
            status => Self::refused(status, "the body could not be read"),
        }
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request("invalid_request", rejection.body_text())
    }
}

impl From<PathRejection> for ApiError {
    fn from(_: PathRejection) -> Self {
        Self::not_found("there is no such path")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::body::{Body, Bytes};
    use futures::StreamExt;

    use super::*;
    use crate::peers::{Patience, Patient};

    #[test]
    fn each_kind_of_refusal_has_its_status_code_and_advice_on_repeats() {
        use RefusedKind::{
            AlreadyExists, Conflict, Expired, HostnameInUse, ImageNotReady, InStandby, InstanceNotFound,
            Invalid, InvalidDownload, InvalidExpiry, InvalidHealthCheck, InvalidUpload, NameTaken, NoRoom,
            NotFound, NotObserved, PortInUse, Quota, UnsupportedField, UnsupportedVerb,
        };
        let state = stead_schemas::instance::State::Running;
        let table = [
            (Invalid, 400, "invalid_request"),
            (InvalidExpiry, 400, "invalid_expires_at"),
            (InvalidHealthCheck, 400, "invalid_health_check"),
            (InvalidDownload, 400, "invalid_bandwidth_download"),
            (InvalidUpload, 400, "invalid_bandwidth_upload"),
            (ImageNotReady, 400, "image_not_ready"),
            (InstanceNotFound, 400, "instance_not_found"),
            (UnsupportedField, 400, "not_supported"),
            (UnsupportedVerb, 501, "not_supported"),
            (NotFound, 404, "not_found"),
            (NameTaken, 409, "name_conflict"),
            (AlreadyExists, 409, "already_exists"),
            (HostnameInUse, 409, "hostname_in_use"),
            (PortInUse, 409, "port_in_use"),
            (RefusedKind::InvalidState { state, legal: "Stopped" }, 409, "invalid_state"),
            (InStandby, 409, "instance_in_standby"),
            (Expired, 409, "instance_expired"),
            (Conflict, 409, "conflict"),
            (NoRoom, 409, "insufficient_resources"),
            (Quota, 409, "insufficient_resources"),
            (NotObserved, 503, "overloaded"),
        ];
        for (kind, status, code) in table {
            let error = ApiError::from(Refused::new(kind, "why"));
            assert_eq!((error.status.as_u16(), error.body.code.as_str()), (status, code), "{kind:?}");
            assert_eq!((error.body.message.as_str(), error.body.details.len()), ("why", 0));
            let expected = match status {
                409 | 501 => Retry::Never,
                503 => Retry::After(1),
                _ => Retry::Unsaid,
            };
            assert_eq!(error.retry, expected, "{kind:?}");
        }
    }

    #[test]
    fn refused_fields_are_listed_and_the_message_has_all_of_them() {
        let mut fields = FieldErrors::default();
        fields.push("rules[0].match.port", "port_in_use", "is 80");
        fields.push("rules[1].match.port", "port_in_use", "is 81");
        let error = ApiError::from(Refused::fields(RefusedKind::PortInUse, fields));
        assert_eq!((error.status, error.body.code.as_str()), (StatusCode::CONFLICT, "port_in_use"));
        assert_eq!(error.body.message, "rules[0].match.port is 80; rules[1].match.port is 81");
        assert_eq!(error.body.details.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_comes_is_reported_as_a_timeout_and_a_cut_body_is_not() {
        let status = async |body: Body| {
            let body = Body::new(Patient::new(body, Patience::in_all(Duration::from_secs(30))));
            let error = body.into_data_stream().next().await.expect("an end").expect_err("not a good one");
            of_body(&error).status
        };
        let never = futures::stream::pending::<std::io::Result<Bytes>>();
        assert_eq!(status(Body::from_stream(never)).await, StatusCode::REQUEST_TIMEOUT);
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let broken = futures::stream::iter([Err::<Bytes, _>(broken)]);
        assert_eq!(status(Body::from_stream(broken)).await, StatusCode::BAD_REQUEST);
    }
}
