//! Bearer tokens: signed here, checked here, with scopes as the contract lists them.

use axum::http::{HeaderMap, StatusCode, header};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

use super::ApiError;

/// One right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    InstanceRead,
    InstanceWrite,
    InstanceDelete,
    ImageRead,
    ImageWrite,
    ImageDelete,
    VolumeRead,
    VolumeWrite,
    VolumeDelete,
    SnapshotRead,
    SnapshotWrite,
    SnapshotDelete,
    BuildRead,
    BuildWrite,
    BuildDelete,
    DeviceRead,
    DeviceWrite,
    DeviceDelete,
    IngressRead,
    IngressWrite,
    IngressDelete,
    ResourceRead,
}

impl Scope {
    /// All of them, in the contract's order.
    pub const ALL: [Self; 22] = [
        Self::InstanceRead,
        Self::InstanceWrite,
        Self::InstanceDelete,
        Self::ImageRead,
        Self::ImageWrite,
        Self::ImageDelete,
        Self::VolumeRead,
        Self::VolumeWrite,
        Self::VolumeDelete,
        Self::SnapshotRead,
        Self::SnapshotWrite,
        Self::SnapshotDelete,
        Self::BuildRead,
        Self::BuildWrite,
        Self::BuildDelete,
        Self::DeviceRead,
        Self::DeviceWrite,
        Self::DeviceDelete,
        Self::IngressRead,
        Self::IngressWrite,
        Self::IngressDelete,
        Self::ResourceRead,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InstanceRead => "instance:read",
            Self::InstanceWrite => "instance:write",
            Self::InstanceDelete => "instance:delete",
            Self::ImageRead => "image:read",
            Self::ImageWrite => "image:write",
            Self::ImageDelete => "image:delete",
            Self::VolumeRead => "volume:read",
            Self::VolumeWrite => "volume:write",
            Self::VolumeDelete => "volume:delete",
            Self::SnapshotRead => "snapshot:read",
            Self::SnapshotWrite => "snapshot:write",
            Self::SnapshotDelete => "snapshot:delete",
            Self::BuildRead => "build:read",
            Self::BuildWrite => "build:write",
            Self::BuildDelete => "build:delete",
            Self::DeviceRead => "device:read",
            Self::DeviceWrite => "device:write",
            Self::DeviceDelete => "device:delete",
            Self::IngressRead => "ingress:read",
            Self::IngressWrite => "ingress:write",
            Self::IngressDelete => "ingress:delete",
            Self::ResourceRead => "resource:read",
        }
    }
}

/// What a token says.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    sub: String,
    /// Seconds since the epoch.
    exp: i64,
    iat: i64,
    /// Absent means everything, as the wire has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    permissions: Option<Vec<String>>,
    /// Claims of registry tokens, which are no good here.
    #[serde(default, skip_serializing)]
    repos: Option<serde_json::Value>,
    #[serde(default, skip_serializing)]
    scope: Option<serde_json::Value>,
    #[serde(default, skip_serializing)]
    build_id: Option<serde_json::Value>,
}

/// The signing key in both its forms.
#[derive(Clone)]
pub struct Keys {
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(***)")
    }
}

impl Keys {
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        Self { encoding: EncodingKey::from_secret(secret), decoding: DecodingKey::from_secret(secret) }
    }

    /// Signs a token for `scopes` (`*` for all) that ends at `expires_at`.
    ///
    /// # Errors
    /// Names the first scope that does not exist.
    pub fn mint(
        &self,
        subject: &str,
        scopes: &[String],
        issued_at: jiff::Timestamp,
        expires_at: jiff::Timestamp,
    ) -> Result<String, String> {
        let is_known =
            |scope: &String| scope == "*" || Scope::ALL.iter().any(|known| known.as_str() == scope);
        if let Some(unknown) = scopes.iter().find(|scope| !is_known(scope)) {
            return Err(format!("there is no scope {unknown:?}"));
        }
        let claims = Claims {
            sub: subject.to_owned(),
            exp: expires_at.as_second(),
            iat: issued_at.as_second(),
            permissions: Some(scopes.to_vec()),
            repos: None,
            scope: None,
            build_id: None,
        };
        encode(&Header::new(Algorithm::HS256), &claims, &self.encoding).map_err(|error| error.to_string())
    }

    /// Checks the request's token and its rights, all of which it needs.
    pub(super) fn authorize(&self, headers: &HeaderMap, scopes: &[Scope]) -> Result<(), ApiError> {
        let unauthorized = |message: &str| ApiError::refused(StatusCode::UNAUTHORIZED, message);
        let header = headers
            .get(header::AUTHORIZATION)
            .ok_or_else(|| unauthorized("authorization header required"))?;
        let text = header.to_str().map_err(|_| unauthorized("invalid authorization header"))?;
        let token = match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(unauthorized("invalid authorization header: expected a bearer token")),
        };
        let mut validation = Validation::new(Algorithm::HS256);
        validation.algorithms = vec![Algorithm::HS256, Algorithm::HS384, Algorithm::HS512];
        validation.leeway = 5;
        let claims = decode::<Claims>(token, &self.decoding, &validation);
        let claims = claims.map_err(|_| unauthorized("invalid or expired token"))?.claims;
        let is_registry_token = claims.repos.is_some() || claims.scope.is_some() || claims.build_id.is_some();
        if is_registry_token || claims.sub.starts_with("builder-") {
            return Err(unauthorized("this token is for the registry only"));
        }
        let Some(permissions) = claims.permissions else { return Ok(()) };
        let has = |scope: &&Scope| {
            permissions.iter().any(|permission| permission == "*" || permission == scope.as_str())
        };
        match scopes.iter().find(|scope| !has(scope)) {
            None => Ok(()),
            Some(scope) => {
                let message = format!("missing required scope: {}", scope.as_str());
                Err(ApiError::refused(StatusCode::FORBIDDEN, message))
            }
        }
    }
}
