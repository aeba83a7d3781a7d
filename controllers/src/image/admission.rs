//! Admission of requests on an image.

use std::sync::Arc;

use stead_schemas::image::{Image, ImagePhase, ImageSource, ImageSpec};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Digest, ImageRef, Name, Platform, Uid};

use crate::store::{New, Tx, TxError};

/// Declares that the content of a reference should be on this host. A repeated call has the reference
/// resolved again and retried at once.
///
/// # Errors
/// Returns a refusal by the store's rules.
pub fn create(
    tx: &mut Tx<'_>,
    reference: &ImageRef,
    platform: Platform,
    tags: Option<Tags>,
) -> Result<Arc<Object<Image>>, TxError> {
    let name = Name::from(reference);
    let Some(old) = tx.find::<Image>(&name) else {
        let spec =
            ImageSpec { reference: reference.clone(), platform, source: ImageSource::Registry, pull: 1 };
        return tx.create::<Image>(New {
            uid: None,
            name,
            tags: tags.unwrap_or_default(),
            owner: None,
            spec,
        });
    };
    if let Some(tags) = tags {
        tx.update_tags::<Image>(&old.meta.uid, None, tags)?;
    }
    tx.update_spec::<Image>(&old.meta.uid, None, |spec| {
        spec.source = ImageSource::Registry;
        spec.platform = platform;
        spec.pull += 1;
    })
}

/// Points a name at the present content of an image. Returns `None` if that content is not on this host.
///
/// # Errors
/// Returns a refusal by the store's rules.
pub fn alias(
    tx: &mut Tx<'_>,
    source: &Uid,
    target: &ImageRef,
) -> Result<Option<Arc<Object<Image>>>, TxError> {
    let source = tx.get::<Image>(source).filter(|source| !source.meta.is_deleting());
    let ready = source.filter(|source| source.status.phase == ImagePhase::Ready);
    let meant = ready.and_then(|ready| Some((ready.spec.platform, ready.status.digest.clone()?)));
    let Some((platform, digest)) = meant else { return Ok(None) };
    point(tx, target, platform, digest).map(Some)
}

/// Points a name at content that is on this host, as an alias or an import.
///
/// # Errors
/// Returns a refusal by the store's rules.
pub fn point(
    tx: &mut Tx<'_>,
    target: &ImageRef,
    platform: Platform,
    digest: Digest,
) -> Result<Arc<Object<Image>>, TxError> {
    let name = Name::from(target);
    let source = ImageSource::Local { digest };
    match tx.find::<Image>(&name) {
        Some(old) => tx.update_spec::<Image>(&old.meta.uid, None, |spec| {
            spec.source = source;
            spec.platform = platform;
        }),
        None => {
            let spec = ImageSpec { reference: target.clone(), platform, source, pull: 1 };
            tx.create::<Image>(New { uid: None, name, tags: Tags::new(), owner: None, spec })
        }
    }
}

/// Removes a name. Its content stays while another image or an instance refers to it.
///
/// # Errors
/// Returns a refusal by the store's rules.
pub fn delete(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), TxError> {
    tx.request_deletion::<Image>(uid).map(drop)
}
