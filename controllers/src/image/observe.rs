//! What the image reconciler sees: what the reference means, and how much of it is here.

use stead_schemas::image::{Image, ImageSource};
use stead_schemas::meta::Object;
use stead_schemas::names::{Digest, Uid};
use stead_schemas::references::Ref;

use super::ImageReconciler;
use crate::host::{Host, HostError, HostErrorKind, Images, Job, Resolved, StoredImage};

/// One look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The content that the reference means: as recorded, else as the registry says now.
    pub digest: Option<Digest>,
    /// Its manifest, when it was needed.
    pub manifest: Option<Resolved>,
    /// The complete root file system; the one meant before, while the registry is asked.
    pub stored: Option<StoredImage>,
    pub job: Option<Job>,
    /// Content that no image, instance or snapshot refers to and that this pass is to remove.
    pub unreferenced: Vec<Digest>,
    /// The image for which something goes on, or is kept, although it is deleted or means other content.
    pub left_over: Option<Uid>,
}

pub(super) async fn observe<H: Host>(
    reconciler: &ImageReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Image>>,
) -> Result<Observed, HostError> {
    let images = reconciler.host.images();
    let Some(object) = object.filter(|object| !object.meta.is_deleting()) else {
        let unreferenced = left_by(reconciler, object).await?;
        let left_over = images.is_busy(uid).await.then(|| uid.clone());
        return Ok(Observed { unreferenced, left_over, ..Observed::default() });
    };
    let seen = Observed::default();
    let (spec, reference) = (&object.spec, &object.spec.reference);
    let (digest, manifest) = match (&spec.source, recorded(object)) {
        (ImageSource::Local { digest }, _) => {
            // It was asked for before the name was pointed at something else.
            let left_over = images.is_busy(uid).await.then(|| uid.clone());
            let manifest = images.manifest(digest).await.map_err(local)?;
            let stored = images.inspect(digest).await.map_err(local)?;
            return Ok(Observed { digest: Some(digest.clone()), manifest, stored, left_over, ..seen });
        }
        (ImageSource::Registry, Some(digest)) => match images.manifest(digest).await.map_err(local)? {
            Some(manifest) => (digest.clone(), Some(manifest)),
            // The content went missing: its manifest is asked for again by digest.
            None => {
                let reference = reference.with_digest(digest);
                (digest.clone(), images.resolve(uid, &reference, spec.platform, spec.pull).await?)
            }
        },
        (ImageSource::Registry, None) => {
            // Asking the registry what a tag means is a look at the world, not a step in it.
            match images.resolve(uid, reference, spec.platform, spec.pull).await? {
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
    let job = images.job(uid, &digest).await;
    Ok(Observed { digest: Some(digest), manifest, stored, job, ..seen })
}

/// A failure of the host, not of what the registry says: it does not rest as an answer does.
pub(super) fn local(mut error: HostError) -> HostError {
    error.kind = match error.kind {
        HostErrorKind::Exhausted => HostErrorKind::Exhausted,
        _ => HostErrorKind::Transient,
    };
    error
}

/// The recorded meaning, unless a newer pull was asked for.
pub(super) fn recorded(object: &Object<Image>) -> Option<&Digest> {
    object.status.digest.as_ref().filter(|_| object.status.resolved_pull == object.spec.pull)
}

/// Content to be collected by the pass of an image that goes, which is its own, or of no image, which is any.
/// The content on the host is listed only when there is something to collect.
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

/// Content on disk, less everything that is referred to by specs and statuses as they are now.
pub(super) async fn unreferenced<H: Host>(reconciler: &ImageReconciler<H>) -> Result<Vec<Digest>, HostError> {
    let mut known = reconciler.host.images().known().await.map_err(local)?;
    // After the listing: what appeared since is not in it, and what was in it had its reference then.
    known.retain(|digest| !reconciler.store.is_referred_to(&Ref::to_content(digest)));
    Ok(known)
}
