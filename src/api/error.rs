//! The single place where errors become HTTP responses.

use axum::Json;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_controllers::ingress::admission::IngressRefused;
use stead_controllers::snapshot::admission::SnapshotRefused;
use stead_controllers::store::{KvError, StoreError, TransactError, TxError};
use stead_controllers::vm::admission::Refused;
use stead_controllers::volume::admission::VolumeRefused;
use stead_schemas::api::ErrorBody;
use stead_schemas::limits::{HOSTNAME_BYTES_MAX, MESSAGE_CHARS_MAX};
use stead_schemas::validate::{FieldErrors, printable};

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
    /// Makes the error for a conflict, with all fields that are part of it.
    pub(super) fn conflict_of(errors: &FieldErrors) -> Self {
        Self { status: StatusCode::CONFLICT, body: ErrorBody::from(errors), retry: Retry::Never }
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
        let message = refused.to_string();
        match refused {
            Refused::NameTaken(_) => Self::conflict("name_conflict", message),
            Refused::InsufficientResources(_) => Self::conflict("insufficient_resources", message),
            Refused::InvalidState { .. } => Self::conflict("invalid_state", message),
            Refused::Conflict(_) => Self::conflict("conflict", message),
            Refused::ImageNotReady(_) => Self::bad_request("image_not_ready", message),
            Refused::NotFound(_) => Self::not_found(message),
            Refused::InvalidExpiry => Self::bad_request("invalid_expires_at", message),
            Refused::InvalidRequest(_) => Self::bad_request("invalid_request", message),
            Refused::Snapshot(refused) => refused.into(),
            Refused::Volume(refused) => refused.into(),
            Refused::InvalidHealthCheck(_) => Self::bad_request("invalid_health_check", message),
            Refused::InStandby => Self::conflict("instance_in_standby", message),
            Refused::Expired => Self::conflict("instance_expired", message),
        }
    }
}

impl From<SnapshotRefused> for ApiError {
    fn from(refused: SnapshotRefused) -> Self {
        let message = refused.to_string();
        match refused {
            SnapshotRefused::NotFound(_) => Self::not_found(message),
            SnapshotRefused::NameTaken(_) => Self::conflict("name_conflict", message),
            SnapshotRefused::InvalidState { .. } => Self::conflict("invalid_state", message),
            SnapshotRefused::InsufficientResources(_) => Self::conflict("insufficient_resources", message),
            SnapshotRefused::Conflict(_) => Self::conflict("conflict", message),
        }
    }
}

impl From<VolumeRefused> for ApiError {
    fn from(refused: VolumeRefused) -> Self {
        let message = refused.to_string();
        match refused {
            VolumeRefused::NotFound(_) | VolumeRefused::NoSuchVolume(_) => Self::not_found(message),
            VolumeRefused::NameTaken(_) | VolumeRefused::IdTaken(_) => {
                Self::conflict("already_exists", message)
            }
            VolumeRefused::InsufficientResources(_) => Self::conflict("insufficient_resources", message),
            VolumeRefused::Conflict(_) => Self::conflict("conflict", message),
        }
    }
}

impl From<IngressRefused> for ApiError {
    fn from(refused: IngressRefused) -> Self {
        let message = refused.to_string();
        match refused {
            IngressRefused::NotFound(_) => Self::not_found(message),
            IngressRefused::NameTaken(_) => Self::conflict("already_exists", message),
            IngressRefused::InstanceNotFound(errors) => errors.into(),
            IngressRefused::HostnameInUse(errors) => Self::conflict_of(&errors),
            IngressRefused::InsufficientResources(_) => Self::conflict("insufficient_resources", message),
            IngressRefused::Conflict(_) => Self::conflict("conflict", message),
        }
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

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_comes_is_told_as_a_timeout_and_one_that_breaks_off_is_not() {
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
