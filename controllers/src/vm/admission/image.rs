//! The image of an instance: of a new one, and a change of it that waits for the next start.

use stead_schemas::api::ImageAsked;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::image::{Image, ImagePhase, ImageSource};
use stead_schemas::instance::InstanceSpec;
use stead_schemas::meta::Object;
use stead_schemas::names::{ImageRef, Name, Platform, Uid};
use stead_schemas::root_image::NextImage;

use crate::image::admission as images;
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;

/// Finds the image object of the reference, or creates it so that the image is pulled. Also returns the
/// number of the pull that the content has to come from.
pub(super) fn find_or_pull(
    tx: &mut Tx<'_>,
    reference: &ImageRef,
    platform: Platform,
    pulls_always: bool,
) -> Result<(Uid, u64), Refused> {
    let found = tx.find::<Image>(&Name::from(reference));
    // An image that was imported or named on this host is not requested from any registry.
    let is_local = |image: &Object<Image>| matches!(image.spec.source, ImageSource::Local { .. });
    let asks = pulls_always && !found.as_deref().is_some_and(is_local);
    let Some(image) = found.filter(|_| !asks) else {
        let image = images::create(tx, reference, platform, None)?;
        return Ok((image.meta.uid.clone(), if asks { image.spec.pull } else { 0 }));
    };
    if image.status.phase == ImagePhase::Failed && failed_for_good(&image) {
        let error = image.status.error.clone().unwrap_or_default();
        let message = format!("image {} failed: {error}", image.meta.name);
        return Err(Refused::new(RefusedKind::ImageNotReady, message));
    }
    Ok((image.meta.uid.clone(), 0))
}

fn failed_for_good(image: &Object<Image>) -> bool {
    let ready = condition::find(&image.status.conditions, ConditionType::Ready);
    ready.is_some_and(|ready| {
        matches!(
            ready.reason,
            Reason::ImageNotFound
                | Reason::ImageUnauthorized
                | Reason::ImageInvalid
                | Reason::PlatformNotAvailable
        )
    })
}

/// Returns the image that an instance starts with later, after a request; `None` if it keeps its image. An image that
/// the request asks for is pulled from now on.
///
/// # Errors
/// Returns `ImageNotReady`, and a refusal by the store's rules.
pub(super) fn change(
    tx: &mut Tx<'_>,
    spec: &InstanceSpec,
    asked: Option<ImageAsked>,
) -> Result<Option<NextImage>, Refused> {
    let Some(ImageAsked { reference, platform, pulls_always }) = asked else {
        return Ok(spec.pending.image.clone());
    };
    let pending = spec.pending.image.as_ref();
    let reference = reference.unwrap_or_else(|| pending.map_or(&spec.image, |next| &next.reference).clone());
    let platform = platform.unwrap_or(spec.platform);
    if reference == spec.image && platform == spec.platform && !pulls_always {
        return Ok(None);
    }
    let (image, pull) = find_or_pull(tx, &reference, platform, pulls_always)?;
    let next = NextImage { reference, platform, pull, image };
    // What was asked of the registry for this image already is not asked less.
    let earlier = pending.filter(|earlier| earlier.image == next.image && earlier.pull > next.pull);
    Ok(Some(earlier.cloned().unwrap_or(next)))
}
