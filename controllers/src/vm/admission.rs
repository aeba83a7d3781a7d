//! What may become of a request on an instance: checks, references and allocations, all within the
//! commit that stores the wish.
//!
//! Guarantees: a refused request stages nothing; an accepted one has its address, its guest cid,
//! its disk, its port and its image object in the same commit.

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

/// Claim table of guest context ids; 0 to 2 are reserved by vsock(7).
const CIDS: &str = "guest_cid";
const CID_FIRST: u32 = 3;
/// Why a request was refused; each has its code on the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("an instance named {0} exists already")]
    NameTaken(Name),
    #[error("{0}")]
    InsufficientResources(String),
    /// The image is known and failed for good.
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
    /// Compare on `resource_version` failed, or the record cannot be read.
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

/// Stores the wish for a new instance with all it needs.
///
/// # Errors
/// [`Refused`]; nothing is staged then.
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

/// What a new instance has of its own: its number, its disk, and its port when it has a network.
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

/// The end that a request asks for, as a time.
fn expires_at(expiry: Expiry, now: Timestamp) -> Result<Option<Timestamp>, Refused> {
    match expiry {
        Expiry::Never => Ok(None),
        // Beyond the last time there is: never.
        Expiry::After(life) => Ok(now.checked_add(life).ok()),
        Expiry::At(at) if at > now => Ok(Some(at)),
        Expiry::At(_) => Err(Refused::InvalidExpiry),
    }
}

/// Changes what a request names; a running program is not touched.
///
/// # Errors
/// `NotFound`, `InvalidExpiry`, `InvalidHealthCheck`; `Expired` when its time is over already.
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

/// Asks for a deletion when the instance's time is over, when it is a member of a pool, whose VM has
/// ended then, or when it is a fork that can never begin; one that was taken meanwhile is none.
///
/// # Errors
/// `NotFound`.
pub fn expire(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), Refused> {
    let object = tx.get::<Instance>(uid).ok_or_else(|| no_instance(uid))?;
    // A patch may have come in between.
    let is_over = object.spec.expires_at.is_some_and(|at| at <= tx.now());
    if object.is_pooled() || is_over || failed_forks::has_failed_in(tx, &object) {
        tx.request_deletion::<Instance>(uid)?;
    }
    Ok(())
}

/// The image object of the reference, found, or created so that it is pulled; and the number of the pull that
/// its content has to be of.
fn image(tx: &mut Tx<'_>, wish: &InstanceWish) -> Result<(Uid, u64), Refused> {
    let found = tx.find::<Image>(&Name::from(&wish.image));
    // What was imported or named here is not asked of any registry.
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

/// Asks for the next run. While the wanted one is on its way, asking again is the same request.
///
/// # Errors
/// `InvalidState` while it runs.
pub fn start(tx: &mut Tx<'_>, uid: &Uid, start: InstanceStart) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    // One that waits for its restart is started now.
    let is_waiting = object.status.restart.next_attempt_at.is_some();
    let is_up = object.spec.power == Power::Running && object.goal().run().is_some() && !is_waiting;
    match (is_up, object.status.state) {
        // What it is to be woken from is not thrown away by a start.
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

/// Asks for the VM to be down.
///
/// # Errors
/// `InvalidState` when it is down already.
pub fn stop(tx: &mut Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    // Between an end and its restart it is down and yet wanted: a stop is what ends that.
    // A standby that does not come back is ended by a stop after the restore that was asked for.
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

/// Asks for the VM's memory to be kept and its process to be gone. While that is on its way, asking
/// again is the same request.
///
/// # Errors
/// `InvalidState` unless it runs.
pub fn standby(
    tx: &mut Tx<'_>,
    uid: &Uid,
    request: StandbyRequest,
) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let state = object.status.state;
    match (object.spec.power, state) {
        // One that it was going to by itself is asked for now, and not undone by a connection.
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

/// The request's word goes before the instance's policy.
pub(super) fn compression_wish(
    spec: &InstanceSpec,
    request: StandbyRequest,
    now: Timestamp,
) -> Option<CompressionWish> {
    let policy = spec.snapshot_policy.unwrap_or_default();
    let how = request.compression.or(policy.compression)?;
    let delay = request.delay.or(policy.delay).map_or(Duration::ZERO, |delay| delay.0);
    // Beyond the last time there is: never.
    Some(CompressionWish { how, not_before: now.checked_add(delay).unwrap_or(Timestamp::MAX) })
}

/// Asks for the VM to go on from its kept memory; before it is kept, for nothing to come of that.
///
/// # Errors
/// `InvalidState` unless it is in standby or on its way there or back.
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

/// Changes the wish about running.
pub(super) fn set_power(spec: &mut InstanceSpec, power: Power, by: PowerCause, now: Timestamp) {
    spec.power = power;
    spec.power_by = by;
    spec.power_since = now;
}

/// Asks for the instance to be gone; without grace when forced.
///
/// # Errors
/// `NotFound`.
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
