//! What the image reconciler sees: what the reference means, and how much of it is here.

use std::collections::BTreeSet;

use stead_schemas::image::{Image, ImageSource};
use stead_schemas::instance::Instance;
use stead_schemas::meta::Object;
use stead_schemas::names::{Digest, Uid};
use stead_schemas::snapshot::Snapshot;

use super::ImageReconciler;
use crate::host::{HostError, Images, Job, Resolved, StoredImage};

/// One look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The content that the reference means: as recorded, else as the registry says now.
    pub digest: Option<Digest>,
    /// Its manifest, when it was needed.
    pub manifest: Option<Resolved>,
    /// Its root file system, when complete.
    pub stored: Option<StoredImage>,
    pub job: Option<Job>,
    /// Complete content that no image, instance or snapshot refers to.
    pub unreferenced: Vec<Digest>,
}

pub(super) async fn observe<I: Images>(
    reconciler: &ImageReconciler<I>,
    uid: &Uid,
    object: Option<&Object<Image>>,
) -> Result<Observed, HostError> {
    let images = &reconciler.images;
    let unreferenced = unreferenced(reconciler, object).await?;
    let Some(object) = object.filter(|object| !object.meta.is_deleting()) else {
        return Ok(Observed { unreferenced, ..Observed::default() });
    };
    let (digest, manifest) = match (&object.spec.source, recorded(object)) {
        (ImageSource::Local { digest }, _) => (digest.clone(), None),
        (ImageSource::Registry, Some(digest)) => (digest.clone(), None),
        (ImageSource::Registry, None) => {
            // Asking the registry what a tag means is a look at the world, not a step in it.
            let resolved = images.resolve(uid, &object.spec.reference, object.spec.platform).await?;
            (resolved.digest.clone(), Some(resolved))
        }
    };
    let stored = images.inspect(&digest).await?;
    let job = images.job(&digest).await;
    let manifest = match (manifest, &stored, &object.spec.source) {
        (Some(manifest), ..) => Some(manifest),
        (None, Some(_), _) | (None, None, ImageSource::Local { .. }) => images.manifest(&digest).await?,
        (None, None, ImageSource::Registry) => match images.manifest(&digest).await? {
            Some(manifest) => Some(manifest),
            // The content went missing: its manifest is asked for again by digest.
            None => {
                let reference = object.spec.reference.with_digest(&digest);
                Some(images.resolve(uid, &reference, object.spec.platform).await?)
            }
        },
    };
    Ok(Observed { digest: Some(digest), manifest, stored, job, unreferenced })
}

/// The recorded meaning, unless a newer pull was asked for.
pub(super) fn recorded(object: &Object<Image>) -> Option<&Digest> {
    object.status.digest.as_ref().filter(|_| object.status.resolved_pull == object.spec.pull)
}

/// Content on disk, less everything that is referred to by specs and statuses as they are now.
async fn unreferenced<I: Images>(
    reconciler: &ImageReconciler<I>,
    object: Option<&Object<Image>>,
) -> Result<Vec<Digest>, HostError> {
    let mut on_disk: BTreeSet<Digest> = reconciler.images.list().await?.into_iter().collect();
    // A pull that never completed has no root file system yet, but blobs.
    on_disk.extend(
        object.filter(|object| object.meta.is_deleting()).and_then(|object| object.status.digest.clone()),
    );
    for image in reconciler.store.list::<Image>() {
        if image.meta.is_deleting() {
            continue;
        }
        if let ImageSource::Local { digest } = &image.spec.source {
            on_disk.remove(digest);
        }
        if let Some(digest) = &image.status.digest {
            on_disk.remove(digest);
        }
    }
    for instance in reconciler.store.list::<Instance>() {
        let of_origin = instance.spec.origin.as_ref().and_then(|origin| origin.image_digest.as_ref());
        for digest in instance.status.image_digest.iter().chain(of_origin) {
            on_disk.remove(digest);
        }
    }
    for snapshot in reconciler.store.list::<Snapshot>() {
        if let Some(digest) = &snapshot.spec.image_digest {
            on_disk.remove(digest);
        }
    }
    let mut unreferenced = Vec::new();
    for digest in on_disk {
        if reconciler.images.manifest(&digest).await?.is_some()
            || reconciler.images.inspect(&digest).await?.is_some()
        {
            unreferenced.push(digest);
        }
    }
    Ok(unreferenced)
}
