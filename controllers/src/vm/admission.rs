//! Admission of requests on an instance: checks, references and allocations, all within the commit that
//! stores the spec.
//!
//! Guarantees: a refused request stages nothing; an accepted request has its address, its guest cid, its
//! disk, its port and its image object in the same commit.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::api::{InstancePatch, InstanceStart, InstanceWish, StandbyRequest, check_fits};
use stead_schemas::compression::CompressionWish;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::image::{Image, ImagePhase, ImageSource};
use stead_schemas::instance::{Allocated, Instance, InstanceSpec, Power, PowerCause, State};
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::numbers::{RunNo, StandbyNo};
use stead_schemas::policy::Expiry;

use super::addresses::port;
pub use super::addresses::{DEFAULT_NETWORK, declare_network};
use super::{failed_forks, mounts};
use crate::image::admission as images;
use crate::store::{New, Tx, TxError, absent};

/// Claim table of guest context ids; vsock(7) reserves 0 to 2.
const CIDS: &str = "guest_cid";
const CID_FIRST: u32 = 3;
/// The reason why a request was refused. Each reason has its own code on the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("an instance named {0} exists already")]
    NameTaken(Name),
    #[error("{0}")]
    InsufficientResources(String),
    /// The image is known and failed permanently.
    #[error("{0}")]
    ImageNotReady(String),
    #[error("cannot {verb} an instance that is {state:?}: it must be {legal}")]
    InvalidState { verb: &'static str, state: State, legal: &'static str },
    #[error("{0}")]
    NotFound(String),
    #[error("expires_at must be in the future")]
    InvalidExpiry,
    #[error("health_check {0}")]
    InvalidHealthCheck(&'static str),
    #[error("the instance has expired and is being deleted")]
    Expired,
    #[error("{0}")]
    InvalidRequest(String),
    #[error(transparent)]
    Volume(#[from] crate::volume::admission::VolumeRefused),
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::admission::SnapshotRefused),
    #[error("the instance is in standby")]
    InStandby,
    /// The comparison with `resource_version` failed, or the record cannot be read.
    #[error("{0}")]
    Conflict(String),
}

impl From<TxError> for Refused {
    fn from(error: TxError) -> Self {
        match error {
            TxError::NameTaken { name, .. } => Self::NameTaken(name),
            TxError::NotFound { kind, uid } | TxError::Deleting { kind, uid } => {
                Self::NotFound(absent(kind, uid))
            }
            TxError::TooMany { .. } => Self::InsufficientResources(error.to_string()),
            TxError::UidTaken { .. } | TxError::Stale { .. } | TxError::Unreadable { .. } => {
                Self::Conflict(error.to_string())
            }
        }
    }
}

/// Stores the spec of a new instance with everything that the instance needs.
///
/// # Errors
/// Returns [`Refused`]; nothing is staged then.
pub fn create(
    tx: &mut Tx<'_>,
    wish: InstanceWish,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    let uid = tx.next_uid();
    let (image, pull) = image(tx, &wish)?;
    let purpose = DiskPurpose::RootOverlay;
    let disk = DiskSpec { size: wish.overlay, purpose, source: None, source_disk: None };
    let allocated = allocate(tx, &uid, image, disk, wish.has_network.then_some(tap_prefix))?;
    let volumes = mounts::take(tx, &uid, wish.volumes)?;
    mounts::check_fit(&volumes, wish.hypervisor)?;
    let spec = InstanceSpec {
        image: wish.image,
        platform: wish.platform,
        pull,
        vcpus: wish.vcpus,
        memory: wish.memory,
        overlay: wish.overlay,
        env: wish.env,
        entrypoint: wish.entrypoint,
        cmd: wish.cmd,
        has_network: wish.has_network,
        hypervisor: wish.hypervisor,
        skip_guest_agent: wish.skip_guest_agent,
        skip_kernel_headers: wish.skip_kernel_headers,
        restart: wish.restart,
        snapshot_policy: wish.snapshot_policy,
        compression: None,
        health: wish.health,
        health_version: 0,
        expires_at: expires_at(wish.expiry, tx.now())?,
        auto_standby: wish.auto_standby,
        hold_until: None,
        power: Power::Running,
        power_by: PowerCause::Client,
        power_since: tx.now(),
        run: RunNo(1),
        standby: StandbyNo(0),
        is_forced: false,
        origin: None,
        volumes,
        allocated,
    };
    Ok(tx.create::<Instance>(New { uid: Some(uid), name: wish.name, tags: wish.tags, owner: None, spec })?)
}

/// Allocates what a new instance owns: its guest context id, its disk, and its port if it has a network.
pub(super) fn allocate(
    tx: &mut Tx<'_>,
    uid: &Uid,
    image: Uid,
    disk: DiskSpec,
    tap_prefix: Option<&str>,
) -> Result<Allocated, Refused> {
    let owner = owner(uid);
    let cid = tx
        .claim_lowest(CIDS, CID_FIRST..=u32::MAX - 1, uid)
        .ok_or_else(|| Refused::InsufficientResources("no guest context id is free".to_owned()))?;
    let port = tap_prefix.map(|tap_prefix| port(tx, &owner, tap_prefix)).transpose()?;
    Ok(Allocated { image, disk: new_disk(tx, owner, disk)?, port, cid })
}

pub(super) fn owner(uid: &Uid) -> OwnerRef {
    OwnerRef { kind: Instance::NAME.to_owned(), uid: uid.clone() }
}

pub(super) fn new_disk(tx: &mut Tx<'_>, owner: OwnerRef, spec: DiskSpec) -> Result<Uid, TxError> {
    let uid = tx.next_uid();
    let new = New { name: Name::from(&uid), uid: Some(uid), tags: Tags::new(), owner: Some(owner), spec };
    Ok(tx.create::<Disk>(new)?.meta.uid.clone())
}

/// Returns the expiry that a request asks for, as a time.
fn expires_at(expiry: Expiry, now: Timestamp) -> Result<Option<Timestamp>, Refused> {
    match expiry {
        Expiry::Never => Ok(None),
        // A time beyond the last representable time means that the instance never expires.
        Expiry::After(life) => Ok(now.checked_add(life).ok()),
        Expiry::At(at) if at > now => Ok(Some(at)),
        Expiry::At(_) => Err(Refused::InvalidExpiry),
    }
}

/// Changes the fields that the request names. A running program is not disturbed.
///
/// # Errors
/// Returns `NotFound`, `InvalidExpiry` or `InvalidHealthCheck`, and `Expired` if the instance's time is over
/// already.
pub fn update(tx: &mut Tx<'_>, uid: &Uid, patch: InstancePatch) -> Result<Arc<Object<Instance>>, Refused> {
    let (object, now) = (live(tx, uid)?, tx.now());
    if object.spec.expires_at.is_some_and(|at| at <= now) {
        return Err(Refused::Expired);
    }
    let expiry = patch.expiry.map(|expiry| expires_at(expiry, now)).transpose()?;
    if let Some(Some(check)) = &patch.health {
        let (has_network, has_agent) = (object.spec.has_network, !object.spec.skip_guest_agent);
        check_fits(check, has_network, has_agent).map_err(Refused::InvalidHealthCheck)?;
    }
    Ok(tx.update_spec::<Instance>(uid, None, |spec| {
        if let Some(restart) = patch.restart {
            spec.restart = restart;
        }
        if let Some(at) = expiry {
            spec.expires_at = at;
        }
        if let Some(health) = patch.health.filter(|health| *health != spec.health) {
            spec.health = health;
            spec.health_version += 1;
        }
        if let Some(auto_standby) = patch.auto_standby {
            spec.auto_standby = Some(auto_standby);
        }
    })?)
}

/// Requests the deletion of the instance if its time is over, if it is a pooled instance (its VM has ended
/// then), or if it is a fork that can never begin. A pooled instance that a fork took meanwhile is kept.
///
/// # Errors
/// Returns `NotFound`.
pub fn expire(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), Refused> {
    let object = tx.get::<Instance>(uid).ok_or_else(|| no_instance(uid))?;
    // A patch may have changed the expiry in between.
    let is_over = object.spec.expires_at.is_some_and(|at| at <= tx.now());
    if object.is_pooled() || is_over || failed_forks::has_failed_in(tx, &object) {
        tx.request_deletion::<Instance>(uid)?;
    }
    Ok(())
}

/// Finds the image object of the reference, or creates it so that the image is pulled. Also returns the
/// number of the pull that the content has to come from.
fn image(tx: &mut Tx<'_>, wish: &InstanceWish) -> Result<(Uid, u64), Refused> {
    let found = tx.find::<Image>(&Name::from(&wish.image));
    // An image that was imported or named on this host is not requested from any registry.
    let is_local = |image: &Object<Image>| matches!(image.spec.source, ImageSource::Local { .. });
    let asks = wish.pulls_always && !found.as_deref().is_some_and(is_local);
    let Some(image) = found.filter(|_| !asks) else {
        let image = images::create(tx, &wish.image, wish.platform, None)?;
        return Ok((image.meta.uid.clone(), if asks { image.spec.pull } else { 0 }));
    };
    if image.status.phase == ImagePhase::Failed && failed_for_good(&image) {
        let error = image.status.error.clone().unwrap_or_default();
        return Err(Refused::ImageNotReady(format!("image {} failed: {error}", image.meta.name)));
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

/// Requests the next run. While the requested run has not started yet, another call is the same request.
///
/// # Errors
/// Returns `InvalidState` while the instance runs.
pub fn start(tx: &mut Tx<'_>, uid: &Uid, start: InstanceStart) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    // An instance that waits for its restart is started now.
    let is_waiting = object.status.restart.next_attempt_at.is_some();
    let is_up = object.spec.power == Power::Running && object.goal().run().is_some() && !is_waiting;
    match (is_up, object.status.state) {
        // A start must not throw away the memory that the instance would be restored from.
        (_, state) if object.spec.power == Power::Standby && state != State::Stopped => {
            Err(Refused::InvalidState { verb: "start", state, legal: "Stopped" })
        }
        (true, state @ State::Running) => {
            Err(Refused::InvalidState { verb: "start", state, legal: "Stopped" })
        }
        (true, _) => Ok(object),
        (false, _) => {
            let now = tx.now();
            Ok(tx.update_spec::<Instance>(uid, None, |spec| {
                set_power(spec, Power::Running, PowerCause::Client, now);
                spec.run = spec.run.next();
                if let Some(entrypoint) = start.entrypoint {
                    spec.entrypoint = Some(entrypoint);
                }
                if let Some(cmd) = start.cmd {
                    spec.cmd = Some(cmd);
                }
            })?)
        }
    }
}

/// Requests that the VM be down.
///
/// # Errors
/// Returns `InvalidState` if the VM is down already.
pub fn stop(tx: &mut Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    // Between an end and its restart the VM is down although the spec asks for it: a stop ends that. A stop
    // after a requested restore ends a standby that does not come back.
    let is_kept = object.status.state == State::Standby && object.spec.power == Power::Standby;
    let is_down = is_kept || object.status.state == State::Stopped && object.goal().run().is_none();
    match (object.spec.power, is_down) {
        (_, true) => {
            let state = object.status.state;
            Err(Refused::InvalidState {
                verb: "stop",
                state,
                legal: "Created, Initializing, Running, Paused, Shutdown or Unknown",
            })
        }
        (Power::Stopped, false) => Ok(object),
        (Power::Running | Power::Standby | Power::Warm, false) => {
            let now = tx.now();
            Ok(tx.update_spec::<Instance>(uid, None, |spec| {
                set_power(spec, Power::Stopped, PowerCause::Client, now);
            })?)
        }
    }
}

/// Requests a standby: the VM's memory is kept and its process ends. While the standby is in progress,
/// another call is the same request.
///
/// # Errors
/// Returns `InvalidState` unless the instance runs.
pub fn standby(
    tx: &mut Tx<'_>,
    uid: &Uid,
    request: StandbyRequest,
) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let state = object.status.state;
    match (object.spec.power, state) {
        // The request takes over an automatic standby that is in progress, so that a connection no longer
        // undoes it.
        (Power::Standby, State::Running | State::Paused | State::Created | State::Initializing) => {
            Ok(tx.update_spec::<Instance>(uid, None, |spec| spec.power_by = PowerCause::Client)?)
        }
        (Power::Running, State::Running) => {
            let now = tx.now();
            Ok(tx.update_spec::<Instance>(uid, None, |spec| {
                set_power(spec, Power::Standby, PowerCause::Client, now);
                spec.standby = spec.standby.next();
                spec.compression = compression_wish(spec, request, now);
            })?)
        }
        _ => Err(Refused::InvalidState { verb: "standby", state, legal: "Running" }),
    }
}

/// Returns the compression to apply. The request overrides the instance's policy.
pub(super) fn compression_wish(
    spec: &InstanceSpec,
    request: StandbyRequest,
    now: Timestamp,
) -> Option<CompressionWish> {
    let policy = spec.snapshot_policy.unwrap_or_default();
    let how = request.compression.or(policy.compression)?;
    let delay = request.delay.or(policy.delay).map_or(Duration::ZERO, |delay| delay.0);
    // A time beyond the last representable time means that the memory is never compressed.
    Some(CompressionWish { how, not_before: now.checked_add(delay).unwrap_or(Timestamp::MAX) })
}

/// Requests that the VM continue from its kept memory. Before the memory is kept, it cancels the standby.
///
/// # Errors
/// Returns `InvalidState` unless the instance is in standby, or on its way there or back.
pub fn restore(tx: &mut Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let state = object.status.state;
    match (object.spec.power, state) {
        (Power::Standby, State::Stopped) => {}
        (Power::Standby, _) => {
            let now = tx.now();
            return Ok(tx.update_spec::<Instance>(uid, None, |spec| {
                set_power(spec, Power::Running, PowerCause::Client, now);
            })?);
        }
        (Power::Running, State::Standby) => return Ok(object),
        _ => {}
    }
    Err(Refused::InvalidState { verb: "restore", state, legal: "Standby" })
}

/// Changes the desired power state.
pub(super) fn set_power(spec: &mut InstanceSpec, power: Power, by: PowerCause, now: Timestamp) {
    spec.power = power;
    spec.power_by = by;
    spec.power_since = now;
}

/// Requests the deletion of the instance, without a grace period if `is_forced`.
///
/// # Errors
/// Returns `NotFound`.
pub fn delete(tx: &mut Tx<'_>, uid: &Uid, is_forced: bool) -> Result<(), Refused> {
    live(tx, uid)?;
    if is_forced {
        tx.update_spec::<Instance>(uid, None, |spec| spec.is_forced = true)?;
    }
    tx.request_deletion::<Instance>(uid)?;
    Ok(())
}

pub(super) fn live(tx: &Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = tx.get::<Instance>(uid);
    object.filter(|object| !object.meta.is_deleting() && !object.is_pooled()).ok_or_else(|| no_instance(uid))
}

fn no_instance(uid: &Uid) -> Refused {
    Refused::NotFound(absent(Instance::NAME, uid))
}
