//! The list of all kinds of objects.

use stead_schemas::disk::Disk;
use stead_schemas::image::Image;
use stead_schemas::ingress::Ingress;
use stead_schemas::instance::Instance;
use stead_schemas::network::{Network, Port};
use stead_schemas::schedule::SnapshotSchedule;
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::Volume;

use crate::store::Kinds;

/// Returns the kinds that a store has.
#[must_use]
pub fn kinds() -> Kinds {
    Kinds::new()
        .with::<Instance>()
        .with::<Image>()
        .with::<Disk>()
        .with::<Network>()
        .with::<Port>()
        .with::<Snapshot>()
        .with::<SnapshotSchedule>()
        .with::<Volume>()
        .with::<Ingress>()
}
