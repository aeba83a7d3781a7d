//! Observations of the image reconciler: the digest of the reference, and how much of its content is on disk.

use stead_schemas::image::{Image, ImageSource};
use stead_schemas::meta::Object;
use stead_schemas::names::{Digest, Uid};
use stead_schemas::references::Ref;

use super::ImageReconciler;
use crate::host::{Host, HostError, HostErrorKind, ImageJobs, Images, Job, Resolved, StoredImage};

/// An observation of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The content of the reference: as recorded, else as the registry reports it now.
    pub digest: Option<Digest>,
    /// The manifest of the content, if it was needed.
    pub manifest: Option<Resolved>,
    /// The complete root file system. While the registry is asked, it is that of the content before.
    pub stored: Option<StoredImage>,
    pub job: Option<Job>,
    /// Content that no image, instance or snapshot refers to and that this pass has to remove.
    pub unreferenced: Vec<Digest>,
    /// The image for which work runs or data is kept, although it is deleted or refers to other content.
    pub left_over: Option<Uid>,
}

pub(super) async fn observe<H: Host>(
    reconciler: &ImageReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Image>>,
) -> Result<Observed, HostError> {
    let (images, jobs) = (reconciler.host.images(), reconciler.host.image_jobs());
    let Some(object) = object.filter(|object| !object.meta.is_deleting()) else {
        let unreferenced = left_by(reconciler, object).await?;
        let left_over = jobs.is_busy(uid).await.then(|| uid.clone());
        return Ok(Observed { unreferenced, left_over, ..Observed::default() });
    };
    let seen = Observed::default();
    let (spec, reference) = (&object.spec, &object.spec.reference);
    let (digest, manifest) = match (&spec.source, recorded(object)) {
        (ImageSource::Local { digest }, _) => {
            // The content was requested before the name was pointed at something else.
            let left_over = jobs.is_busy(uid).await.then(|| uid.clone());
            let manifest = images.manifest(digest).await.map_err(local)?;
            let stored = images.inspect(digest).await.map_err(local)?;
            return Ok(Observed { digest: Some(digest.clone()), manifest, stored, left_over, ..seen });
        }
        (ImageSource::Registry, Some(digest)) => match images.manifest(digest).await.map_err(local)? {
            Some(manifest) => (digest.clone(), Some(manifest)),
            // The content went missing: its manifest is requested again by digest.
            None => {
                let reference = reference.with_digest(digest);
                (digest.clone(), jobs.resolve(uid, &reference, spec.platform, spec.pull).await?)
            }
        },
        (ImageSource::Registry, None) => {
            // A request to the registry for the digest of a tag is an observation, not a step.
            match jobs.resolve(uid, reference, spec.platform, spec.pull).await? {
                Some(resolved) => (resolved.digest.clone(), Some(resolved)),
                None => {
                    let before = object.status.digest.as_ref();
                    let stored = match before {
                        Some(digest) => images.inspect(digest).await.map_err(local)?,
                        None => None,
                    };
                    return Ok(Observed { stored, ..seen });
                }
            }
        }
    };
    let stored = images.inspect(&digest).await.map_err(local)?;
    let job = jobs.job(uid, &digest).await;
    Ok(Observed { digest: Some(digest), manifest, stored, job, ..seen })
}

/// Converts a failure of the host, which is not an answer of the registry, so that it is retried sooner than
/// such an answer.
pub(super) fn local(mut error: HostError) -> HostError {
    error.kind = match error.kind {
        HostErrorKind::Exhausted => HostErrorKind::Exhausted,
        _ => HostErrorKind::Transient,
    };
    error
}

/// Returns the recorded digest, unless a newer pull was requested.
pub(super) fn recorded(object: &Object<Image>) -> Option<&Digest> {
    object.status.digest.as_ref().filter(|_| object.status.resolved_pull == object.spec.pull)
}

/// Returns the content that this pass should collect. The pass of an image that is deleted collects the
/// image's own content; the pass without an image collects any. The content on the host is listed only if
/// there is something to collect.
async fn left_by<H: Host>(
    reconciler: &ImageReconciler<H>,
    object: Option<&Object<Image>>,
) -> Result<Vec<Digest>, HostError> {
    let Some(object) = object else { return unreferenced(reconciler).await };
    let is_left = |digest: &Digest| !reconciler.store.is_referred_to(&Ref::to_content(digest));
    let own: Vec<Digest> = object.content().filter(|digest| is_left(digest)).cloned().collect();
    if own.is_empty() {
        return Ok(own);
    }
    let mut unreferenced = unreferenced(reconciler).await?;
    unreferenced.retain(|digest| own.contains(digest));
    Ok(unreferenced)
}

/// Returns the content on disk that no present spec or status refers to.
pub(super) async fn unreferenced<H: Host>(reconciler: &ImageReconciler<H>) -> Result<Vec<Digest>, HostError> {
    let mut known = reconciler.host.images().known().await.map_err(local)?;
    // The references are read after the listing: content that appeared since is not in the list, and content
    // in the list had its reference by then.
    known.retain(|digest| !reconciler.store.is_referred_to(&Ref::to_content(digest)));
    Ok(known)
}
