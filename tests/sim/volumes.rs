//! Volumes in a scenario: created, mounted where allowed, unmounted, deleted.

use std::time::Duration;

use stead_controllers::node::local;
use stead_controllers::snapshot::admission as snapshots;
use stead_controllers::store::Tx;
use stead_controllers::vm::admission as instances;
use stead_controllers::volume::admission;
use stead_schemas::api::{
    AccessRequest, CompressionAsked, InstanceRequest, MountRequest, StandbyRequest, VolumeCreate,
};
use stead_schemas::instance::{Hypervisor, Instance, Power, State};
use stead_schemas::meta::Tags;
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose};
use stead_schemas::volume::{Access, Volume};
use tokio::time::sleep;

use crate::scenario::Play;

const VOLUMES: [&str; 2] = ["v0", "v1"];

impl Play {
    pub(crate) async fn make_volumes(&mut self) {
        for volume in VOLUMES {
            self.make_volume(volume).await;
        }
    }

    async fn make_volume(&mut self, word: &str) {
        let name = Name::resource(word).expect("valid");
        let asked = VolumeCreate { id: None, name, size: Bytes(1 << 30), tags: Tags::new() };
        // Some begin as an archive, whose file is prepared before the volume is stored.
        let (is_prepared, world) = (self.rng.chance(300), self.world.clone());
        let create = move |tx: &mut Tx<'_>| {
            if !is_prepared {
                return admission::create(tx, asked);
            }
            let file = tx.next_uid();
            world.prepare_disk(file.clone(), asked.size);
            admission::create_from(tx, asked, file)
        };
        let _ = self.daemon.store.transact(create).await;
    }

    /// Draws the mounts of a new instance: mostly none.
    pub(crate) fn mounts(&mut self) -> Vec<MountRequest> {
        let mut mounts = Vec::new();
        for volume in VOLUMES {
            if self.rng.chance(if self.is_storing { 600 } else { 50 }) {
                mounts.push(self.mount(volume));
            }
        }
        mounts
    }

    fn mount(&mut self, volume: &str) -> MountRequest {
        let access =
            [AccessRequest::ReadWrite, AccessRequest::ReadOnly, AccessRequest::Overlay(Bytes(64 << 20))];
        let access = access[usize::try_from(self.rng.below(5)).expect("small").saturating_sub(2)];
        MountRequest { volume: volume.to_owned(), path: format!("/{volume}"), access }
    }

    /// Creates, changes or deletes a volume. A forbidden request is refused, and leaves nothing.
    pub(crate) async fn volume(&mut self) {
        let word = VOLUMES[usize::try_from(self.rng.below(2)).expect("small")];
        let (choice, instance) = (self.rng.below(7), self.pick());
        self.log.push(format!("volume {choice} {word} of {instance:?}"));
        let mount = self.mount(word);
        let store = &self.daemon.store;
        match (choice, instance) {
            (0..=1, _) => self.make_volume(word).await,
            (2, _) => {
                let Some(volume) = store.find::<Volume>(&Name::resource(word).expect("valid")) else {
                    return;
                };
                let uid = volume.meta.uid.clone();
                let _ = store.transact(move |tx| admission::delete(tx, &uid)).await;
            }
            (6, _) => {
                let Some(volume) = store.find::<Volume>(&Name::resource(word).expect("valid")) else {
                    return;
                };
                let (uid, size) = (volume.meta.uid.clone(), Bytes((1 + self.rng.below(3)) << 30));
                let _ = store.transact(move |tx| admission::grow(tx, &uid, size)).await;
            }
            (3..=4, Some(uid)) => {
                let _ = store.transact(move |tx| instances::attach(tx, &uid, mount)).await;
            }
            (_, Some(uid)) => {
                let _ = store.transact(move |tx| instances::detach(tx, &uid, word)).await;
            }
            (_, None) => {}
        }
    }

    /// Removes the volumes once no instance mounts them.
    pub(crate) async fn remove_volumes(&mut self) {
        let store = &self.daemon.store;
        for volume in store.list::<Volume>() {
            let uid = volume.meta.uid.clone();
            let deleted = store.transact(move |tx| admission::delete(tx, &uid)).await;
            assert!(deleted.is_ok(), "{deleted:?}\n{}", self.log.join("\n"));
        }
    }
}

/// Runs an instance that writes to a volume: takes a snapshot of it, restores it in place and forks it, with failing
/// verbs and a crash between any two steps.
async fn goes_back(seed: u64) -> Result<(), String> {
    let mut play = Play::new(seed).await;
    play.make_volumes().await;
    let body = serde_json::json!({
        "name": "writer", "image": "sim/a", "size": "256MB",
        "volumes": [
            { "volume_id": "v0", "mount_path": "/data" },
            { "volume_id": "v1", "mount_path": "/set", "readonly": true, "overlay": true, "overlay_size": "64MB" },
        ],
    });
    let node = local(&play.daemon.store).expect("declared");
    let asked = InstanceRequest::read(body, &node.offer()).expect("valid");
    let created = play.daemon.store.transact(move |tx| instances::create(tx, asked, "st")).await;
    let writer = created.expect("created").meta.uid.clone();
    play.until_state(&writer, State::Running).await?;
    play.by_chance().await;

    let kind = if seed.is_multiple_of(2) { SnapshotKind::Standby } else { SnapshotKind::Stopped };
    if kind == SnapshotKind::Stopped {
        play.stop_now(&writer).await?;
    }
    let snapshot = play.snapshot_of(&writer, kind).await?;
    let disk_of = |play: &Play| {
        let volume = play.daemon.store.find::<Volume>(&Name::resource("v0").expect("valid"));
        volume.expect("there").spec.disk.clone()
    };
    let before = disk_of(&play);
    // The instance writes on, and is then restored, from standby or after its end.
    if kind == SnapshotKind::Standby && play.rng.chance(500) {
        let moved = writer.clone();
        let request = StandbyRequest { compression: CompressionAsked::Unsaid, delay: None };
        play.ask(move |tx| instances::standby(tx, &moved, request)).await?;
        play.until_state(&writer, State::Standby).await?;
    } else if kind == SnapshotKind::Standby {
        play.stop_now(&writer).await?;
    }
    play.by_chance().await;
    let moved = (writer.clone(), snapshot.clone());
    // Disks fit any machine type.
    let hypervisor = (kind == SnapshotKind::Stopped).then_some(Hypervisor::QemuMicrovm);
    let target = instances::Target { power: Some(Power::Running), hypervisor };
    play.ask(move |tx| instances::restore_snapshot(tx, &moved.0, &moved.1, target, "st")).await?;
    play.by_chance().await;
    play.until_state(&writer, State::Running).await?;
    if disk_of(&play) == before {
        return Err("the volume has the content that it had".to_owned());
    }

    // A fork writes to its own volume, and reads the shared one.
    let moved = snapshot.clone();
    let name = Name::resource("fork").expect("valid");
    let forked = play.ask(move |tx| instances::fork_snapshot(tx, &moved, name.clone(), target, "st")).await?;
    play.by_chance().await;
    play.until_state(&forked.instance.meta.uid, State::Running).await?;
    let source = play.daemon.store.get::<Instance>(&writer).ok_or("it is gone")?;
    write_apart(&source, &forked.instance)?;
    play.end().await
}

/// Checks that source and fork write to volumes of their own, and over a shared one to disks of their own.
fn write_apart(source: &Recorded, fork: &Recorded) -> Result<(), String> {
    let pairs = source.spec.volumes.iter().zip(&fork.spec.volumes);
    let shared: Vec<_> =
        pairs.map(|(one, other)| (one.access.is_writing(), one.volume == other.volume)).collect();
    if shared != [(true, false), (false, true)] {
        return Err(format!("{:?} and {:?}", source.spec.volumes, fork.spec.volumes));
    }
    let upper = |instance: &Recorded| {
        instance.spec.volumes.iter().find_map(|mount| match &mount.access {
            Access::Overlay { disk, .. } => Some(disk.clone()),
            Access::ReadWrite | Access::ReadOnly => None,
        })
    };
    if upper(source) == upper(fork) {
        return Err("both write to one disk over what they read".to_owned());
    }
    Ok(())
}

type Recorded = stead_schemas::meta::Object<Instance>;

impl Play {
    /// Repeats a request while the current state does not allow it. After a failure the state is read again.
    async fn ask<T: Send + 'static, E: std::fmt::Debug + Send + 'static>(
        &mut self,
        verb: impl Fn(&mut Tx<'_>) -> Result<T, E> + Clone + Send + 'static,
    ) -> Result<T, String> {
        let mut last = String::new();
        for _ in 0..60 {
            match self.daemon.store.transact(verb.clone()).await {
                Ok(done) => return Ok(done),
                Err(refused) => last = format!("{refused:?}"),
            }
            sleep(Duration::from_secs(1)).await;
        }
        Err(last)
    }

    async fn by_chance(&mut self) {
        if self.rng.chance(300) {
            self.crash().await;
        }
    }

    async fn until_state(&mut self, uid: &Uid, state: State) -> Result<(), String> {
        for _ in 0..600 {
            sleep(Duration::from_secs(1)).await;
            assert!(self.world.corrupted().is_empty(), "a disk is not as a memory knows it");
            let object = self.daemon.store.get::<Instance>(uid);
            if object.is_some_and(|object| {
                object.status.state == state && object.status.observed_generation == object.meta.generation
            }) {
                return Ok(());
            }
        }
        Err(format!("never {state:?}: {:?}", self.daemon.store.get::<Instance>(uid)))
    }

    async fn stop_now(&mut self, uid: &Uid) -> Result<(), String> {
        let moved = uid.clone();
        self.ask(move |tx| instances::stop(tx, &moved)).await?;
        self.until_state(uid, State::Stopped).await
    }

    async fn snapshot_of(&mut self, uid: &Uid, kind: SnapshotKind) -> Result<Uid, String> {
        for _ in 0..10 {
            if let Some(taken) = self.try_snapshot_of(uid, kind).await? {
                return Ok(taken);
            }
        }
        Err("every snapshot failed".to_owned())
    }

    async fn try_snapshot_of(&mut self, uid: &Uid, kind: SnapshotKind) -> Result<Option<Uid>, String> {
        let moved = uid.clone();
        let asked = snapshots::CreateRequest {
            kind,
            name: None,
            tags: Tags::new(),
            purpose: SnapshotPurpose::Kept,
            compression: None,
            pool: 0,
            schedule: None,
        };
        let taken = self.ask(move |tx| snapshots::create(tx, &moved, asked.clone())).await?;
        let uid = taken.meta.uid.clone();
        self.by_chance().await;
        for _ in 0..600 {
            sleep(Duration::from_secs(1)).await;
            let snapshot = self.daemon.store.get::<Snapshot>(&uid).ok_or("the snapshot is gone")?;
            match snapshot.status.phase {
                SnapshotPhase::Pending => {}
                SnapshotPhase::Ready => return Ok(Some(uid)),
                // A verb failed permanently: the moment is over, and another snapshot is taken.
                SnapshotPhase::Failed => return Ok(None),
            }
        }
        Err("the snapshot was never taken".to_owned())
    }
}

#[test]
fn volumes_go_back_with_their_instance_and_forks_write_to_their_own() {
    for seed in 0..40 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let went = runtime.expect("a runtime").block_on(goes_back(seed));
        assert_eq!(went, Ok(()), "seed {seed}");
    }
}
