//! Images on the wire.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fields::Fields;
use super::schema::{TagMap, Time};
use crate::condition::Condition;
use crate::image::{Image as Kind, ImagePhase, Progress};
use crate::instance::Secret;
use crate::meta::{Object, Tags};
use crate::names::{ImageRef, Platform};
use crate::numbers::Generation;
use crate::validate::{FieldErrors, tags as check_tags};

const INVALID: &str = "invalid_request";

/// A create request that was read without a problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageCreate {
    pub reference: ImageRef,
    pub platform: Platform,
    pub tags: Option<Tags>,
    pub credentials: Option<PushCredentials>,
}

/// Registry credentials of one request; never stored.
#[derive(Clone, PartialEq, Eq)]
pub struct PushCredentials {
    pub username: Option<String>,
    pub password: Option<Secret>,
    pub registry_token: Option<Secret>,
}

impl fmt::Debug for PushCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PushCredentials(***)")
    }
}

impl ImageCreate {
    /// Reads the body of `POST /images`.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value, default: Platform) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let name = fields.required_text("name", &mut errors);
        let reference = name.and_then(|text| errors.take("name", "invalid_name", text.parse()));
        let platform = fields.parsed("platform", "invalid_platform", &mut errors).unwrap_or(default);
        let tags = fields.map("tags", &mut errors);
        check_tags(&mut errors, "tags", tags.as_ref().unwrap_or(&Tags::new()));
        let credentials = fields.object("credentials", &mut errors).map(|mut given| {
            let username = given.text("username", &mut errors);
            let password = given.text("password", &mut errors).map(Secret);
            let registry_token = given.text("registry_token", &mut errors).map(Secret);
            if username.is_some() != password.is_some() {
                errors.push(given.path("password"), INVALID, "and username go together");
            }
            given.finish(&mut errors);
            PushCredentials { username, password, registry_token }
        });
        fields.finish(&mut errors);
        match reference {
            Some(reference) if errors.is_empty() => Ok(Self { reference, platform, tags, credentials }),
            _ => Err(errors),
        }
    }
}

/// The body of `POST /images/{name}/tag`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageTag {
    pub target: ImageRef,
}

impl ImageTag {
    /// Reads the body; the target must be a tagged reference.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let text = fields.required_text("target", &mut errors);
        let target: Option<ImageRef> =
            text.and_then(|text| errors.take("target", "invalid_name", text.parse()));
        fields.finish(&mut errors);
        if target.as_ref().is_some_and(|target| target.digest.is_some()) {
            errors.push("target", "invalid_name", "must be a tagged reference, not a digest");
        }
        match target {
            Some(target) if errors.is_empty() => Ok(Self { target }),
            _ => Err(errors),
        }
    }
}

/// An image as clients read it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Image {
    /// Id of the image.
    pub id: String,
    /// Normalised reference of the image.
    pub name: String,
    /// The digest of the manifest; empty until the reference was resolved.
    pub digest: String,
    /// Phase of the image.
    pub status: ImagePhase,
    /// Time of the creation.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// Platform of the image.
    pub platform: Platform,
    /// Size of the root file system in bytes; null until the image is ready.
    pub size_bytes: Option<u64>,
    /// Position in the queue of pulls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u32>,
    /// Reason why the image failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Entrypoint of the image's configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Command of the image's configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Environment variables of the image's configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Working directory of the image's configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Tags of the image.
    #[schemars(with = "TagMap")]
    pub tags: Tags,
    /// An addition to Hypeman's API: bytes fetched and bytes in total, while the image is being pulled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// An addition to Hypeman's API: conditions that report how far the host is from the spec.
    pub conditions: Vec<Condition>,
    /// Version of the spec; it grows with every change.
    pub generation: Generation,
    /// Version of the spec that the status is about.
    pub observed_generation: Generation,
    /// Version of the whole object.
    pub resource_version: u64,
}

impl Image {
    /// Converts a record to its wire form.
    #[must_use]
    pub fn of(object: &Object<Kind>) -> Self {
        let Object { meta, spec, status } = object;
        let config = status.config.as_ref();
        Self {
            id: meta.uid.to_string(),
            name: meta.name.to_string(),
            digest: status.digest.as_ref().map(ToString::to_string).unwrap_or_default(),
            status: status.phase,
            created_at: meta.created_at,
            platform: spec.platform,
            size_bytes: status.size.map(|size| size.0),
            queue_position: status.queue_position,
            error: status.error.clone(),
            entrypoint: config.map(|config| config.entrypoint.clone()),
            cmd: config.map(|config| config.cmd.clone()),
            env: config.map(|config| config.env.clone()),
            working_dir: config.map(|config| config.working_dir.clone()),
            tags: meta.tags.clone(),
            progress: status.progress,
            conditions: status.conditions.clone(),
            generation: meta.generation,
            observed_generation: status.observed_generation,
            resource_version: meta.resource_version,
        }
    }
}
