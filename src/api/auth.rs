//! Bearer tokens: signed and checked here, valid as long as their key is trusted and they are not revoked. Users of
//! this host whom the Unix socket lets in need none.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::client::Client;
use super::local::Peer;
pub use super::scope::Scope;
use super::token_signing;
use super::{ApiError, ApiState};

/// The audience that a token must name, if it names any.
const AUDIENCE: &str = "stead";
/// Allowed difference between the clocks of a signer and of this host, in seconds.
const LEEWAY: u64 = 5;
/// Longest time between two checks of the clock, which may be set, while a stream is open.
const EXPIRY_POLL_INTERVAL: Duration = Duration::from_secs(30);
/// Number of bytes of a key's digest that name the key.
const KEY_ID_BYTES: usize = 8;

/// The claims of a token.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    sub: String,
    /// Time of expiry, in seconds since the epoch.
    exp: i64,
    iat: i64,
    /// The token's own id, by which it is revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    jti: Option<String>,
    /// Scopes of the token; absent means everything, as on the wire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    permissions: Option<Vec<String>>,
    /// Claims of registry tokens, which are not valid here.
    #[serde(default, skip_serializing)]
    repos: Option<serde_json::Value>,
    #[serde(default, skip_serializing)]
    scope: Option<serde_json::Value>,
    #[serde(default, skip_serializing)]
    build_id: Option<serde_json::Value>,
}

/// A signing key in both its forms.
struct Key {
    id: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
}

impl Key {
    fn new(secret: &[u8]) -> Self {
        token_signing::install();
        let id = hex::encode(&Sha256::digest(secret)[..KEY_ID_BYTES]);
        Self { id, encoding: EncodingKey::from_secret(secret), decoding: DecodingKey::from_secret(secret) }
    }
}

/// The keys that are trusted now, and the tokens that were revoked.
struct Trust {
    /// The trusted keys; the first signs.
    keys: Vec<Key>,
    revoked: BTreeSet<String>,
}

/// The keys of a server; clones share the trusted keys.
#[derive(Clone)]
pub struct Keys(Arc<watch::Sender<Trust>>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(***)")
    }
}

/// The contents of a token to sign.
#[derive(Debug, Clone)]
pub struct Grant<'a> {
    pub subject: &'a str,
    /// The token's own id.
    pub id: &'a str,
    /// Scopes of the token; `*` means all.
    pub scopes: &'a [String],
    pub issued_at: jiff::Timestamp,
    pub expires_at: jiff::Timestamp,
}

impl Keys {
    /// Makes a set of one key, with no token revoked.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        let keys = vec![Key::new(secret)];
        Self(Arc::new(watch::Sender::new(Trust { keys, revoked: BTreeSet::new() })))
    }

    /// Trusts these keys, the first of which signs, and all of their tokens except those with the revoked
    /// ids. Requests in progress with a token that is no longer trusted end.
    pub fn trust(&self, secrets: &[impl AsRef<[u8]>], revoked: BTreeSet<String>) {
        let keys = secrets.iter().map(|secret| Key::new(secret.as_ref())).collect();
        self.0.send_replace(Trust { keys, revoked });
    }

    /// Signs a token.
    ///
    /// # Errors
    /// Returns a sentence that names the first scope that does not exist.
    pub fn mint(&self, grant: &Grant<'_>) -> Result<String, String> {
        let is_known =
            |scope: &String| scope == "*" || Scope::ALL.iter().any(|known| known.as_str() == scope);
        if let Some(unknown) = grant.scopes.iter().find(|scope| !is_known(scope)) {
            return Err(format!("there is no scope {unknown:?}"));
        }
        let claims = Claims {
            sub: grant.subject.to_owned(),
            exp: grant.expires_at.as_second(),
            iat: grant.issued_at.as_second(),
            jti: Some(grant.id.to_owned()),
            permissions: Some(grant.scopes.to_vec()),
            repos: None,
            scope: None,
            build_id: None,
        };
        let trust = self.0.borrow();
        let key = trust.keys.first().ok_or("there is no key")?;
        let header = Header { kid: Some(key.id.clone()), ..Header::new(Algorithm::HS256) };
        encode(&header, &claims, &key.encoding).map_err(|error| error.to_string())
    }

    /// Finds the sender of a request: by its token, or, where it has none, by the user of this host who sent it.
    pub(super) fn authenticate(
        &self,
        headers: &HeaderMap,
        client: Option<&Client>,
    ) -> Result<Bearer, ApiError> {
        match client {
            Some(Client::Local(peer)) if !headers.contains_key(header::AUTHORIZATION) => self.local(peer),
            _ => self.authorize(headers),
        }
    }

    /// Returns the rights of a process of this host that sent no token.
    fn local(&self, peer: &Peer) -> Result<Bearer, ApiError> {
        let Peer { uid, scopes, .. } = peer;
        let no_rights = || {
            ApiError::refused(StatusCode::UNAUTHORIZED, format!("user {uid} needs a token at this socket"))
        };
        Ok(Bearer {
            subject: format!("uid:{uid}").into(),
            token: None,
            permissions: Some(scopes.clone().ok_or_else(no_rights)?),
            proof: None,
            sees_secrets: false,
            keys: self.clone(),
        })
    }

    /// Checks the request's token.
    fn authorize(&self, headers: &HeaderMap) -> Result<Bearer, ApiError> {
        let unauthorized = |message: &str| ApiError::refused(StatusCode::UNAUTHORIZED, message);
        let header = headers
            .get(header::AUTHORIZATION)
            .ok_or_else(|| unauthorized("authorization header required"))?;
        let text = header.to_str().map_err(|_| unauthorized("invalid authorization header"))?;
        let token = match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(unauthorized("invalid authorization header: expected a bearer token")),
        };
        let (claims, key) = self.read(token).map_err(unauthorized)?;
        let is_registry_token = claims.repos.is_some() || claims.scope.is_some() || claims.build_id.is_some();
        if is_registry_token || claims.sub.starts_with("builder-") {
            return Err(unauthorized("this token is for the registry only"));
        }
        Ok(Bearer {
            subject: claims.sub.into(),
            token: claims.jti.map(Into::into),
            permissions: claims.permissions.map(Into::into),
            proof: Some(Proof { expires_at: claims.exp, key: key.into() }),
            sees_secrets: false,
            keys: self.clone(),
        })
    }

    /// Returns the claims of a token, and the id of the key that signed it.
    fn read(&self, token: &str) -> Result<(Claims, String), &'static str> {
        const INVALID: &str = "the token is invalid";
        let header = decode_header(token).map_err(|_| INVALID)?;
        // A signer that names a critical extension wants servers that do not know it to reject the token.
        if header.crit.is_some() {
            return Err("the token has critical extensions, of which this server knows none");
        }
        let mut validation = Validation::new(Algorithm::HS256);
        validation.algorithms = vec![Algorithm::HS256, Algorithm::HS384, Algorithm::HS512];
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_audience(&[AUDIENCE]);
        let trust = self.0.borrow();
        let mut why = "the token is not signed by this server";
        let is_named = |key: &&Key| header.kid.as_ref().is_none_or(|kid| *kid == key.id);
        for key in trust.keys.iter().filter(is_named) {
            match decode::<Claims>(token, &key.decoding, &validation) {
                Ok(read) => {
                    let is_revoked = |id: &String| trust.revoked.contains(id);
                    if read.claims.jti.as_ref().is_some_and(is_revoked) {
                        return Err("the token was revoked");
                    }
                    return Ok((read.claims, key.id.clone()));
                }
                Err(error) => {
                    why = match error.kind() {
                        ErrorKind::InvalidSignature => why,
                        ErrorKind::ExpiredSignature => "the token has expired",
                        ErrorKind::ImmatureSignature => "the token is not valid yet",
                        ErrorKind::InvalidAudience => "the token is for somebody else",
                        _ => INVALID,
                    }
                }
            }
        }
        Err(why)
    }
}

/// The sender of a request, and its permissions.
#[derive(Clone)]
pub(super) struct Bearer {
    pub(super) subject: Arc<str>,
    /// The token's own id; tokens of other signers may have none.
    pub(super) token: Option<Arc<str>>,
    permissions: Option<Arc<[String]>>,
    /// Properties of the token by which it ends; `None` for a user of this host, who needs none.
    proof: Option<Proof>,
    sees_secrets: bool,
    keys: Keys,
}

/// The properties of a token by which it ends.
#[derive(Clone)]
struct Proof {
    /// Time of expiry, in seconds since the epoch.
    expires_at: i64,
    /// Id of the key that signed it.
    key: Arc<str>,
}

impl Bearer {
    fn has(&self, scope: Scope) -> bool {
        let Some(permissions) = &self.permissions else { return true };
        permissions.iter().any(|permission| permission == "*" || permission == scope.as_str())
    }

    /// Checks a scope that depends on the content of a request.
    pub(super) fn needs(&self, scope: Scope) -> Result<(), ApiError> {
        if self.has(scope) {
            return Ok(());
        }
        let message = format!("missing required scope: {}", scope.as_str());
        Err(ApiError::refused(StatusCode::FORBIDDEN, message))
    }

    /// Refuses a token that names no permissions: a token service that forgot them did not mean all of them.
    pub(super) fn names_permissions(&self) -> Result<(), ApiError> {
        match self.permissions {
            Some(_) => Ok(()),
            None => Err(ApiError::refused(StatusCode::FORBIDDEN, "the token names no permissions")),
        }
    }

    /// Lets the bearer see secrets, whatever the token's scopes are.
    pub(super) fn let_see_secrets(&mut self) {
        self.sees_secrets = true;
    }

    /// True if responses contain the secrets that this scope is for.
    pub(super) fn sees(&self, scope: Scope) -> bool {
        self.sees_secrets || self.has(scope)
    }

    /// Waits until the token ends: it expired, was revoked, or its key is no longer trusted. The rights of users of
    /// this host last as long as the daemon runs.
    pub(super) async fn ends(self) {
        let Some(Proof { expires_at, key }) = self.proof else { return std::future::pending().await };
        let mut trust = self.keys.0.subscribe();
        loop {
            {
                let trust = trust.borrow_and_update();
                let is_revoked = |id: &Arc<str>| trust.revoked.contains(&**id);
                let has_key = trust.keys.iter().any(|trusted| *trusted.id == *key);
                if !has_key || self.token.as_ref().is_some_and(is_revoked) {
                    return;
                }
            }
            let left = expires_at.saturating_sub(jiff::Timestamp::now().as_second());
            let Ok(left @ 1..) = u64::try_from(left) else { return };
            tokio::select! {
                biased;
                changed = trust.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(EXPIRY_POLL_INTERVAL.min(Duration::from_secs(left))) => {}
            }
        }
    }
}

impl FromRequestParts<ApiState> for Bearer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &ApiState) -> Result<Self, ApiError> {
        // The bearer is missing only when a public route asks for it.
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}
