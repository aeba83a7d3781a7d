//! A scenario for one seed: its steps, and the verification after them.

mod connections;
mod content;
mod draws;
mod requests;
mod snapshot_steps;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::checks::{self, Records};
use stead_controllers::image::admission as images;
use stead_controllers::ingress::admission as ingresses;
use stead_controllers::node::local;
use stead_controllers::schedule::admission as schedules;
use stead_controllers::sim::{AMPLE, Drift, Faults, Rng, SimRegistryImage, SleptOn, World};
use stead_controllers::snapshot::admission as snapshots;
use stead_controllers::store::{MemoryKv, Tx};
use stead_controllers::vm::admission::{self, Target};
use stead_schemas::api::{
    BandwidthAsked, CompressionAsked, ImageAsked, IngressRequest, InstancePatch, InstanceRequest,
    InstanceStart, NetworkAsked, ScheduleRequest, StandbyRequest,
};
use stead_schemas::compression::{Algorithm, Compression};
use stead_schemas::egress::{
    CertificateAuthority, Credential, EgressMode, EgressSpec, HostPattern, Injection, Source, Target as Field,
};
use stead_schemas::health::{HealthCheck, Probe};
use stead_schemas::image::{Image, ImageConfig};
use stead_schemas::ingress::Ingress;
use stead_schemas::instance::{Hypervisor, Instance, Pending, Power, PowerCause, Rates, Secret, State};
use stead_schemas::meta::Tags;
use stead_schemas::names::{ImageRef, LinkName, Name, Platform, Uid};
use stead_schemas::network::Nic;
use stead_schemas::node::Resources;
use stead_schemas::numbers::StandbyNo;
use stead_schemas::policy::{AutoStandbyPolicy, Expiry, RestartPolicy, RestartWhen};
use stead_schemas::quantity::{Bytes, GoDuration, Rate};
use stead_schemas::schedule::Retention;
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPurpose};
use tokio::time::sleep;

use crate::daemon::Daemon;

const IMAGES: [&str; 3] = ["sim/a", "sim/b", "sim/missing"];
const PORTS: [u16; 2] = [80, 22];
const PROGRAMS: [&str; 7] = ["serve", "exit 0 1", "exit 3 0", "hang", "exit 1 20", "sick 0", "sick 25"];

pub(crate) struct Play {
    pub(crate) rng: Rng,
    pub(crate) world: World,
    kv: MemoryKv,
    pub(crate) daemon: Daemon,
    names: u64,
    pub(crate) log: Vec<String>,
    /// Standbys that a client requested, by their number: these may happen in spite of connections.
    asked: BTreeSet<(Uid, StandbyNo)>,
    foreign: BTreeSet<LinkName>,
    /// True for a scenario about auto-standby and wake-ups.
    is_sleepy: bool,
    clients: requests::Clients,
    /// True if the scenario removed an object that a client may have waited for.
    has_removed: bool,
    /// True for a scenario about volumes, and about their snapshots and forks.
    pub(crate) is_storing: bool,
}

/// Mark of the generator that decides about the size of the host.
const SMALL: u64 = 0x512e;

/// Returns the size of a host with room for two to four VMs of a scenario, and a few disks.
fn small(seed: u64) -> Resources {
    let vms = 2 + seed % 3;
    // Four vcpus for each processor, of which a VM has one.
    let memory = Bytes(vms * (384 << 20));
    Resources { cpus: 1, memory, disk: Bytes((8 + seed % 8) << 30) }
}

fn reference(word: &str) -> ImageRef {
    word.parse().expect("valid")
}

/// Returns the steps of a seed as text, for the proof that a seed always gives the same run.
pub(crate) async fn trace(seed: u64) -> Vec<String> {
    let mut play = Play::on_some_host(seed).await;
    play.steps().await;
    play.log.push(format!("{:?}", play.world.snapshot()));
    play.log
}

/// Runs a seed and verifies it.
pub(crate) async fn play(seed: u64) -> Result<(), String> {
    let mut play = Play::on_some_host(seed).await;
    play.steps().await;
    play.end().await
}

impl Play {
    /// Begins a scenario on a host that is ample or, for a third of the seeds, small: then the requests of its clients do
    /// not all fit. A generator of its own decides, so that it changes no step.
    async fn on_some_host(seed: u64) -> Self {
        let is_small = Rng::new(seed ^ SMALL).chance(333);
        Self::on(seed, if is_small { small(seed) } else { AMPLE }).await
    }

    pub(crate) async fn new(seed: u64) -> Self {
        Self::on(seed, AMPLE).await
    }

    async fn on(seed: u64, capacity: Resources) -> Self {
        let world = World::new(seed);
        world.set_capacity(capacity);
        for (index, word) in IMAGES.iter().take(2).enumerate() {
            let digest = content::digest(index);
            let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
            world.serve(&reference(word), SimRegistryImage { digest, config });
        }
        world.add_foreign_link("eth0".parse().expect("valid"));
        let kv = MemoryKv::new();
        let daemon = Daemon::start(&world, &kv, seed).await;
        // The scenario's random numbers are separate from the world's: another fault changes no step.
        let mut rng = Rng::new(seed ^ 0x5eed);
        if rng.chance(750) {
            world.set_faults(Faults::many());
        }
        let is_sleepy = rng.chance(250);
        let is_storing = !is_sleepy && rng.chance(300);
        let (log, asked, foreign) = (Vec::new(), BTreeSet::new(), world.foreign_links());
        let clients = requests::Clients::of(&daemon);
        let (names, has_removed) = (0, false);
        let mut play = Self {
            rng,
            world,
            kv,
            daemon,
            names,
            log,
            asked,
            foreign,
            is_sleepy,
            clients,
            has_removed,
            is_storing,
        };
        if is_storing {
            play.make_volumes().await;
        }
        play
    }

    /// Checks that the system settles in the desired state, and is empty without any spec.
    pub(crate) async fn end(mut self) -> Result<(), String> {
        self.world.set_faults(Faults::none());
        self.make_room();
        self.enlarge().await;
        self.answer_all().await;
        self.settle().await?;
        self.nobody_was_slept_on();
        self.content_is_that_of_the_image();
        self.wake_all().await?;
        self.settle().await?;
        self.remove_everything().await;
        self.settle().await?;
        self.remove_volumes().await;
        self.settle().await?;
        let left = self.world.snapshot();
        let is_clear = left.machines.is_empty()
            && left.disks.is_empty()
            && left.images.is_empty()
            && left.records.is_empty()
            && left.memories.is_empty()
            && left.snapshots.is_empty()
            && left.listeners.as_ref().is_some_and(BTreeMap::is_empty);
        if !is_clear || left.links.len() != 1 {
            return Err(format!("left over: {left:?}\n{}", self.log.join("\n")));
        }
        if self.world.foreign_links() != self.foreign {
            return Err("a stranger's link was touched".to_owned());
        }
        self.daemon.die(&self.world).await;
        Ok(())
    }

    /// Makes the host ample, and waits until the daemon knows.
    async fn enlarge(&mut self) {
        self.world.set_capacity(AMPLE);
        while local(&self.daemon.store).is_none_or(|node| node.status.capacity != AMPLE) {
            sleep(Duration::from_secs(1)).await;
        }
    }

    async fn steps(&mut self) {
        for _ in 0..4 + self.rng.below(14) {
            let step = self.rng.below(125);
            if self.rng.chance(300) {
                self.make_room();
            }
            match step {
                0..=29 => self.create().await,
                30..=59 if self.is_sleepy => self.connect(),
                30..=37 | 60..=68 if self.is_storing => self.use_snapshot().await,
                38..=47 if self.is_storing => self.take_snapshot(),
                48..=53 if self.is_storing => self.stop().await,
                69..=74 if self.is_storing => self.volume().await,
                30..=39 => self.stop().await,
                40..=49 => self.start().await,
                50..=55 => self.delete().await,
                56..=58 => self.patch().await,
                59 => self.reclaim().await,
                60..=64 => self.touch_image().await,
                65..=79 => {
                    let at = usize::try_from(self.rng.below(Drift::ALL.len() as u64)).expect("small");
                    self.log.push(format!("drift {:?}", Drift::ALL[at]));
                    self.world.drift(Drift::ALL[at]);
                }
                80..=87 => self.crash().await,
                88..=93 => self.standby().await,
                94..=95 => self.restore().await,
                96 | 103 | 104 => self.fork(),
                97..=98 => self.take_snapshot(),
                99..=102 => self.use_snapshot().await,
                105..=107 => self.schedule().await,
                108..=115 => self.volume().await,
                116..=123 => self.ingress().await,
                _ => self.connect(),
            }
            self.pass_time().await;
            let broken = checks::always(&Records::of(&self.daemon.store), &self.world.snapshot());
            assert!(broken.is_empty(), "{broken:?}\n{}", self.log.join("\n"));
            assert!(self.world.corrupted().is_empty(), "old memory\n{}", self.log.join("\n"));
            self.nobody_was_slept_on();
            self.content_is_that_of_the_image();
            self.check_answers();
        }
    }

    /// Waits for some awaits of all tasks, or for some seconds; sometimes long enough for the idle timeout.
    async fn pass_time(&mut self) {
        if self.rng.chance(if self.is_sleepy { 500 } else { 50 }) {
            sleep(Duration::from_millis(self.rng.below(40_000))).await;
        }
        if self.rng.chance(500) {
            for _ in 0..self.rng.below(300) {
                tokio::task::yield_now().await;
            }
        } else {
            sleep(Duration::from_millis(self.rng.below(6000))).await;
        }
    }

    async fn create(&mut self) {
        let image = IMAGES[usize::try_from(self.rng.below(3)).expect("small")];
        let program = PROGRAMS[usize::try_from(self.rng.below(PROGRAMS.len() as u64)).expect("small")];
        let (image, program) = if self.is_sleepy {
            (IMAGES[0], PROGRAMS[0])
        } else if self.is_storing {
            (IMAGES[1], PROGRAMS[0])
        } else {
            (image, program)
        };
        // Names are reused: after a deletion they are free at once.
        self.names = self.rng.below(4);
        let name = format!("i{}", self.names);
        self.log.push(format!("create {name} {image} {program}"));
        let hypervisor = self.hypervisor();
        let has_network = self.rng.chance(800);
        let egress = if has_network { self.egress() } else { None };
        let key = egress.as_ref().map(|_| ("KEY".to_owned(), Secret("1".to_owned())));
        let wanted = InstanceRequest {
            name: Name::resource(&name).expect("valid"),
            tags: Tags::new(),
            image: reference(image),
            platform: Platform::LinuxAmd64,
            vcpus: 1,
            memory: Bytes(256 << 20),
            hotplug: self.hotplug(hypervisor),
            hotplugged: self.hotplugged(),
            overlay: Bytes(1 << 30),
            rates: self.rates(),
            env: key.into_iter().collect(),
            entrypoint: None,
            cmd: Some(program.split(' ').map(ToOwned::to_owned).collect()),
            has_network,
            egress,
            hypervisor,
            skip_guest_agent: false,
            skip_kernel_headers: false,
            pulls_always: false,
            restart: self.restart_policy(),
            health: self.health_check(),
            snapshot_policy: None,
            auto_standby: self.auto_standby(),
            volumes: self.mounts(),
            expiry: if self.rng.chance(150) {
                self.has_removed = true;
                Expiry::After(Duration::from_secs(1 + self.rng.below(90)))
            } else {
                Expiry::Never
            },
        };
        // A name in use and a failed image are refused; both leave nothing.
        let _ = self.daemon.store.transact(move |tx| admission::create(tx, wanted, "st")).await;
    }

    /// Changes an instance in whatever state it is: at once, at its next start, or by a restart.
    async fn patch(&mut self) {
        let Some(uid) = self.pick() else { return };
        let health = Some(self.health_check());
        // Sometimes a policy is set, removed or changed.
        let auto_standby = self.auto_standby();
        let Rates { download, upload, disk: disk_rate } = self.rates();
        let enabled = self.rng.chance(300).then(|| self.rng.chance(600));
        let bandwidth = BandwidthAsked { download, upload };
        let network = NetworkAsked { enabled, bandwidth, names_more: true };
        let (deferred, restarts) = (self.deferred(), self.rng.chance(300));
        let (name, image) = (self.new_name(), self.image());
        let patch = InstancePatch {
            name,
            image,
            health,
            auto_standby,
            network,
            disk_rate,
            hotplugged: self.hotplugged(),
            deferred,
            restarts,
            ..InstancePatch::default()
        };
        self.log.push(format!(
            "patch {uid} {:?} {:?} {:?} {network:?} {disk_rate:?} {:?} {restarts}",
            patch.name, patch.image, patch.health, patch.deferred
        ));
        let _ = self.daemon.store.transact(move |tx| admission::update(tx, &uid, patch, "st")).await;
    }

    async fn stop(&mut self) {
        let Some(uid) = self.pick() else { return };
        self.log.push(format!("stop {uid}"));
        let _ = self.daemon.store.transact(move |tx| admission::stop(tx, &uid)).await;
    }

    async fn start(&mut self) {
        let Some(uid) = self.pick() else { return };
        self.log.push(format!("start {uid}"));
        let _ =
            self.daemon.store.transact(move |tx| admission::start(tx, &uid, InstanceStart::default())).await;
    }

    async fn standby(&mut self) {
        let Some(uid) = self.pick() else { return };
        self.log.push(format!("standby {uid}"));
        let compression = self.compression().map_or(CompressionAsked::Unsaid, CompressionAsked::On);
        let delay = Some(GoDuration(Duration::from_secs(self.rng.below(30))));
        let request = StandbyRequest { compression, delay };
        let asked = self.daemon.store.transact(move |tx| admission::standby(tx, &uid, request)).await;
        self.asked.extend(asked.ok().map(|instance| (instance.meta.uid.clone(), instance.spec.standby)));
    }

    async fn restore(&mut self) {
        let Some(uid) = self.pick() else { return };
        self.log.push(format!("restore {uid}"));
        let _ = self.daemon.store.transact(move |tx| admission::restore(tx, &uid)).await;
    }

    fn fork(&mut self) {
        let Some(uid) = self.pick() else { return };
        let target = self.target();
        let mut body = serde_json::json!({ "name": format!("f{}", self.rng.below(3)), "from_running": true });
        if let Some(target) = target {
            body["target_state"] = format!("{target:?}").into();
        }
        self.request(format!("/instances/{uid}/fork"), body);
    }

    async fn schedule(&mut self) {
        let Some(uid) = self.pick() else { return };
        let is_deletion = self.rng.chance(250);
        self.log.push(format!("schedule {uid} {is_deletion}"));
        let store = &self.daemon.store;
        if is_deletion {
            let _ = store.transact(move |tx| schedules::delete(tx, &uid)).await;
            return;
        }
        let max_age = self.rng.chance(300).then(|| GoDuration(Duration::from_secs(30 + self.rng.below(200))));
        let wanted = ScheduleRequest {
            interval: GoDuration(Duration::from_secs(60 + self.rng.below(60))),
            retention: Retention { max_count: Some(1 + self.play_count(3)), max_age },
            name_prefix: self.rng.chance(500).then(|| "nightly".to_owned()),
            metadata: Tags::new(),
        };
        let store = &self.daemon.store;
        let _ = store.transact(move |tx| schedules::put(tx, &uid, wanted)).await;
    }

    /// Creates or deletes an ingress. Its names and ports are few, so that they collide.
    async fn ingress(&mut self) {
        let name = format!("g{}", self.rng.below(4));
        if self.rng.chance(400) {
            let store = &self.daemon.store;
            let Some(ingress) = store.find::<Ingress>(&Name::resource(&name).expect("valid")) else { return };
            self.log.push(format!("delete ingress {name}"));
            let _ = store.transact(move |tx| ingresses::delete(tx, &ingress.meta.uid)).await;
            return;
        }
        if self.rng.chance(300) {
            self.log.push("another program takes a port".to_owned());
            self.world.drift(Drift::TakePort);
        }
        let count = 1 + self.rng.below(3);
        let rules: Vec<serde_json::Value> = (0..count)
            .map(|_| {
                let hostname = format!("{}.test", ["a", "b", "{i}"][self.play_count(3) as usize]);
                let target = if hostname.starts_with('{') { "{i}" } else { "i0" };
                let port = [80, 81, 82][self.play_count(3) as usize];
                serde_json::json!({ "match": { "hostname": hostname, "port": port },
                    "target": { "instance": target, "port": 80 } })
            })
            .collect();
        self.log.push(format!("ingress {name} {rules:?}"));
        let body = serde_json::json!({ "name": name, "rules": rules });
        let wanted = IngressRequest::read(body).expect("valid");
        // A name in use and an absent instance are refused.
        let _ = self.daemon.store.transact(move |tx| ingresses::create(tx, wanted)).await;
    }

    async fn delete(&mut self) {
        let Some(uid) = self.pick() else { return };
        let is_forced = self.rng.chance(300);
        self.has_removed = true;
        self.log.push(format!("delete {uid}"));
        let _ = self.daemon.store.transact(move |tx| admission::delete(tx, &uid, is_forced)).await;
    }

    async fn touch_image(&mut self) {
        let word = reference(IMAGES[usize::try_from(self.rng.below(3)).expect("small")]);
        let is_deletion = self.rng.chance(400);
        self.log.push(format!("image {word} {is_deletion}"));
        if !is_deletion {
            let created = self
                .daemon
                .store
                .transact(move |tx| images::create(tx, &word, Platform::LinuxAmd64, None))
                .await;
            drop(created);
        } else if let Some(image) = self.daemon.store.find::<Image>(&Name::from(&word)) {
            let uid = image.meta.uid.clone();
            let _ = self.daemon.store.transact(move |tx| images::delete(tx, &uid)).await;
        }
    }

    pub(crate) async fn crash(&mut self) {
        self.log.push("crash".to_owned());
        let seed = self.rng.draw();
        self.lose_clients().await;
        self.daemon.die(&self.world).await;
        // Writes that the dead process still has in progress reach the old copy only.
        self.kv = self.kv.reopen();
        self.daemon = Daemon::start(&self.world, &self.kv, seed).await;
        self.clients = requests::Clients::of(&self.daemon);
    }

    /// Waits, in virtual time, until the checks find nothing.
    async fn settle(&mut self) -> Result<(), String> {
        let mut broken = Vec::new();
        // Retries after Exhausted come after five minutes, starts of dying VMs as late.
        for _ in 0..60 {
            sleep(Duration::from_secs(30)).await;
            broken =
                checks::settled(&Records::of(&self.daemon.store), &self.world.snapshot(), Timestamp::MAX);
            if broken.is_empty() {
                return Ok(());
            }
        }
        Err(format!("{}\n--\n{}", broken.join("\n"), self.log.join("\n")))
    }

    async fn remove_everything(&mut self) {
        let store = &self.daemon.store;
        for instance in store.list::<Instance>() {
            let uid = instance.meta.uid.clone();
            let _ = store.transact(move |tx| admission::delete(tx, &uid, false)).await;
        }
        for ingress in store.list::<Ingress>() {
            let _ = store.transact(move |tx| ingresses::delete(tx, &ingress.meta.uid)).await;
        }
        for snapshot in store.list::<Snapshot>() {
            let uid = snapshot.meta.uid.clone();
            let _ = store.transact(move |tx| snapshots::delete(tx, &uid)).await;
        }
        for image in store.list::<Image>() {
            let uid = image.meta.uid.clone();
            let _ = store.transact(move |tx| images::delete(tx, &uid)).await;
        }
    }
}
