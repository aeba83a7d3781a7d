//! Image: a reference that should be present on this host as a read-only root file system.
//!
//! The object's name is the normalised reference. The tag table of the wire is the set of image objects, and
//! moving a tag is one status write.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::meta::{Kind, Object};
use crate::names::{Digest, ImageRef, Platform};
use crate::numbers::Generation;
use crate::quantity::Bytes;
use crate::references::Ref;

/// The kind of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {}

impl Kind for Image {
    const NAME: &'static str = "image";
    const FINALIZER: &'static str = "image";
    type Spec = ImageSpec;
    type Status = ImageStatus;

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }

    /// Lists the content that the image refers to. An image that is being deleted keeps no content.
    fn references(object: &Object<Self>) -> Vec<Ref> {
        object.content().filter(|_| !object.meta.is_deleting()).map(Ref::to_content).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    pub reference: ImageRef,
    pub platform: Platform,
    /// The source of the image's content.
    pub source: ImageSource,
    /// Number of pull requests, raised by every POST of the same reference: "ask the registry again, and
    /// retry now".
    pub pull: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageSource {
    /// The registry that the reference names.
    Registry,
    /// Content that is already on the host: a local alias (`POST /images/{name}/tag`) or an import.
    Local { digest: Digest },
}

impl Object<Image> {
    /// Returns the content that the image means, or meant last.
    pub fn content(&self) -> impl Iterator<Item = &Digest> {
        let local = match &self.spec.source {
            ImageSource::Local { digest } => Some(digest),
            ImageSource::Registry => None,
        };
        local.into_iter().chain(&self.status.digest)
    }
}

/// The phases of an image: the wire's five words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "wire", schemars(rename = "ImageStatus"))]
pub enum ImagePhase {
    #[default]
    Pending,
    Pulling,
    Converting,
    Ready,
    Failed,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageStatus {
    pub phase: ImagePhase,
    /// Digest of the manifest that the reference was resolved to, for `spec.pull` = `resolved_pull`.
    pub digest: Option<Digest>,
    pub resolved_pull: u64,
    /// The configuration that the image declares; present when ready.
    pub config: Option<ImageConfig>,
    /// Size of the root file system image on this host.
    pub size: Option<Bytes>,
    /// Bytes of layers fetched, and bytes in total; present while pulling.
    pub progress: Option<Progress>,
    /// Position among the images that wait for a conversion permit, from 1.
    pub queue_position: Option<u32>,
    /// A sentence for the user; present only with [`ImagePhase::Failed`].
    pub error: Option<String>,
    /// Number of failed attempts in a row.
    pub attempts: u32,
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

/// The progress of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "wire", schemars(rename = "PullProgress"))]
pub struct Progress {
    /// Bytes that were fetched.
    pub done: Bytes,
    /// Bytes in total.
    pub total: Bytes,
}

/// The run parameters of an image's configuration, as the OCI image specification defines them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// The working directory; empty means `/`.
    pub working_dir: String,
    /// The user: `user`, `uid`, `user:group`...; empty means root.
    pub user: String,
    pub stop_signal: Option<String>,
}
