//! Bodies of requests about images.

use schemars::JsonSchema;

use crate::api::schema::{ImageReference, TagMap};
use crate::names::Platform;

/// The body of `POST /images`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ImageCreate {
    /// Reference of the image.
    pub name: ImageReference,
    /// Platform of the image; this host's by default.
    pub platform: Option<Platform>,
    /// Key-value pairs for filters of lists.
    pub tags: Option<TagMap>,
    /// Credentials for the registry. They are kept in memory only.
    pub credentials: Option<RegistryCredentials>,
}

/// Credentials for a registry.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields, extend("dependentRequired" = {"username": ["password"], "password": ["username"]}))]
pub struct RegistryCredentials {
    /// Name of the user; it goes together with `password`.
    pub username: Option<String>,
    /// Password of the user.
    pub password: Option<String>,
    /// Bearer token of the registry.
    pub registry_token: Option<String>,
}

/// The body of `POST /images/{name}/tag`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ImageTag {
    /// New name of the content: a reference with a tag, not with a digest.
    pub target: ImageReference,
}
