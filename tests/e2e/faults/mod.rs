//! Files and descriptors that fail under a real daemon: ENOSPC, EMFILE, ENOMEM and EIO at every call that it makes
//! of its files, one class of calls after another.
//!
//! The classes are found, not listed: each step of the scenario is played once with all calls counted, and what was
//! called then fails in later rounds of the same step. `make test` has each class fail with one of its errors in one
//! step; `STEAD_TEST_ROUNDS` of 1 or more has each fail in every step, with every error, once and lastingly.

mod calls;
mod filter;
mod steps;
mod supervisor;
mod trial;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

pub(crate) use self::steps::instance;

use self::calls::Class;
use self::supervisor::{Fault, Supervisor};
use self::trial::{Outcome, Walk};
use crate::judge::settles;
use crate::namespace::in_namespace;
use crate::site::{Site, image};
use crate::stage::run;

/// Times that a fault is tried until its call is made: what happens once in a while is not in every round.
const TRIES: usize = 5;

fn is_thorough() -> bool {
    std::env::var("STEAD_TEST_ROUNDS").is_ok()
}

/// Tells what goes on: of a thorough run, which takes long, also to a file that can be looked at meanwhile.
fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("it is read");
    let Some(file) = std::env::var_os("STEAD_TEST_REPORT") else { return };
    let mut file = fs::File::options().create(true).append(true).open(file).expect("the report opens");
    writeln!(file, "{line}").expect("the report is written");
}

/// Only faults whose text has this are played; for who mends one.
fn only() -> String {
    std::env::var("STEAD_TEST_FAULT").unwrap_or_default()
}

/// A daemon under supervision, and what its clients keep.
struct Scene {
    site: Site,
    supervisor: Supervisor,
    archive: Vec<u8>,
    /// Files and objects that are there between steps.
    kept: (BTreeSet<String>, BTreeMap<String, Value>),
    /// The VM that runs all the time, if there is one.
    vm: Option<String>,
    number: usize,
    outcomes: BTreeMap<Class, BTreeSet<String>>,
    failures: Vec<String>,
}

impl Scene {
    /// Instances wait for a kernel, so that no VM is needed.
    async fn new() -> Self {
        let mut scene = Self::with_kernel().await;
        scene.site.kernel_dir = scene.site.scratch("no-kernel");
        scene
    }

    async fn with_kernel() -> Self {
        let site = Site::new().await;
        let layout = site.layout();
        let small = format!(
            "umoci new --image {layout}:other && mkdir -p {layout}-root/etc \
            && echo other >{layout}-root/etc/motd && umoci insert --image {layout}:other {layout}-root / >/dev/null \
            && umoci config --image {layout}:other --config.cmd /bin/sh"
        );
        run("sh", &["-ec", &small]);
        site.push(&layout, "other");
        let archive = site.scratch("archives").join("other.tar");
        run(
            "sh",
            &[
                "-ec",
                &format!(
                    "echo imported >>{layout}-root/etc/motd; umoci new --image {layout}:imported; \
            umoci insert --image {layout}:imported {layout}-root / >/dev/null; \
            umoci config --image {layout}:imported --config.cmd /bin/sh"
                ),
            ],
        );
        run(
            "skopeo",
            &["copy", "-q", &format!("oci:{layout}:imported"), &format!("oci-archive:{}", archive.display())],
        );
        let archive = fs::read(archive).expect("made");
        Self {
            site,
            supervisor: Supervisor::default(),
            archive,
            kept: Default::default(),
            vm: None,
            number: 0,
            outcomes: BTreeMap::new(),
            failures: Vec::new(),
        }
    }

    fn spawn(&mut self) {
        let (supervisor, data, run) = (self.supervisor.clone(), self.site.data(), self.site.run_dir());
        self.site.spawn_by(|command| {
            // What nothing tells of is found by looking at everything.
            command.env("STEAD_RESYNC", format!("{}s", trial::RESYNC.as_secs()));
            supervisor.spawn(command, &data, &run)
        });
    }

    /// Starts a daemon whose calls are counted and do not fail.
    async fn start(&mut self) {
        self.spawn();
        self.site.answers().await;
    }

    async fn kill(&mut self) {
        if self.site.has_daemon() {
            self.site.kill().await;
        }
    }

    async fn restart(&mut self) {
        self.kill().await;
        self.start().await;
    }

    /// What is there all the time.
    async fn keep(&mut self) {
        let made =
            self.site.request(Method::POST, "/images", Some(json!({ "name": image("busybox") }))).await;
        assert_eq!(made.status, StatusCode::ACCEPTED, "{made:?}");
        self.site.until_image(&image("busybox")).await;
        let made = self.site.request(Method::POST, "/instances", Some(instance("kept"))).await;
        assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
        // So that nothing is tried for it again and again.
        self.site.until("kept", "waiting", |seen| seen["conditions"].to_string().contains("kernel")).await;
        let stopped = self.site.request(Method::POST, "/instances/kept/stop", None).await;
        assert_eq!(stopped.status, StatusCode::OK, "{stopped:?}");
        let volume = json!({ "name": "kept", "size_gb": 1 });
        let made = self.site.request(Method::POST, "/volumes", Some(volume)).await;
        assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
        let is_there = |seen: &Value| seen["conditions"].to_string().contains("Converged");
        let mut walk = Walk::new(vec![steps::Act::See("/volumes/kept".to_owned(), is_there)], &[]);
        assert_eq!(trial::recover(&self.site, &mut walk).await, Ok(()));
        self.kept = (trial::files(&self.site), trial::objects(&self.site).await);
    }

    /// Removes what a step that failed has left, so that the next one begins as it should.
    async fn clear(&mut self) {
        self.restart().await;
        for path in trial::objects(&self.site).await.keys().filter(|path| !self.kept.1.contains_key(*path)) {
            let (kind, name) = path.split_once('/').expect("a kind");
            let path = format!("/{kind}/{}", name.replace('/', "%2F"));
            self.site.attempt(Method::DELETE, &path, None).await;
        }
        if let Err(why) = trial::leaves_nothing(&self.site, &self.kept.0).await {
            // It has failed already; later steps should not fail for the same reason.
            say(&format!("NOT CLEARED {why}"));
            self.kept.0 = trial::files(&self.site);
        }
    }

    fn walk(&mut self, step: &str) -> Walk {
        self.number += 1;
        Walk::new(steps::acts(step, &format!("n{}", self.number)), &self.archive)
    }

    /// Plays a step without a fault; gives what was called.
    async fn count(&mut self, step: &str) -> BTreeMap<Class, u64> {
        self.supervisor.take_seen();
        let mut walk = self.walk(step);
        let gone = trial::recover(&self.site, &mut walk).await;
        if step == steps::OF_A_VM[0] {
            tokio::time::sleep(trial::LOOKED_THROUGH).await;
        }
        if let Err(why) = gone {
            panic!("{step} without a fault: {why}\n{}", self.site.daemon_log());
        }
        self.supervisor.take_seen()
    }

    /// Plays a step with a fault.
    async fn suffer(&mut self, step: &str, fault: &Fault) -> Result<Outcome, String> {
        let log = trial::log_length(&self.site);
        let mut walk = self.walk(step);
        self.supervisor.begin(fault);
        let outcome = trial::suffer(&self.site, &self.supervisor, fault, &mut walk, log, &self.kept.0).await;
        self.supervisor.end();
        let outcome = outcome?;
        // What is acknowledged by now is on the disk.
        if is_thorough() || self.number.is_multiple_of(4) {
            self.restart().await;
        }
        trial::recover(&self.site, &mut walk).await?;
        trial::leaves_nothing(&self.site, &self.kept.0).await?;
        let after = trial::objects(&self.site).await;
        if after != self.kept.1 {
            return Err(format!("there was {:#?}\nand is {after:#?}", self.kept.1));
        }
        if trial::log_since(&self.site, log).contains("panicked") {
            return Err("the daemon panicked".to_owned());
        }
        self.same_vm().await?;
        Ok(outcome)
    }

    /// Starts a daemon with a fault, and another one without if that ended.
    async fn suffer_start(&mut self, fault: &Fault) -> Result<Outcome, String> {
        let log = trial::log_length(&self.site);
        self.supervisor.begin(fault);
        self.spawn();
        let begun = trial::begun(&mut self.site, &self.supervisor, fault, log).await;
        if begun == Ok(Ok(())) {
            // Some is done a moment after the first answer.
            trial::is_met(&self.supervisor).await;
        }
        let hits = self.supervisor.end();
        let begun = begun?;
        let told = trial::log_since(&self.site, log);
        let tells = trial::tells(&told, fault.error);
        let outcome = match begun {
            _ if hits == 0 => Outcome::Unreached,
            Ok(()) if tells => Outcome::Logged,
            Ok(()) => Outcome::Borne,
            // A runtime that cannot be built panics within tokio, with the reason, before anything was begun.
            Err(status) if status.code().is_some() && tells => Outcome::Ended,
            Err(status) => return Err(format!("it ended with {status} and no clear message")),
        };
        if told.contains("panicked at src") || told.contains("panicked at controllers") {
            return Err("the daemon panicked".to_owned());
        }
        if begun.is_err() {
            self.spawn();
        }
        self.site.answers().await;
        // The daemon that bore it takes what comes, and so does the next one.
        let mut walk = self.walk("volume");
        trial::recover(&self.site, &mut walk).await?;
        if !self.kept.1.is_empty() {
            trial::leaves_nothing(&self.site, &self.kept.0).await?;
            let after = trial::objects(&self.site).await;
            if after != self.kept.1 {
                return Err(format!("there was {:#?}\nand is {after:#?}", self.kept.1));
            }
        }
        Ok(outcome)
    }

    /// Plays a fault until it was met; a failure is noted, and the daemon begins anew after it.
    async fn play(&mut self, step: &str, fault: &Fault) {
        if !format!("{step}: {fault}").contains(&only()) {
            return;
        }
        let log = trial::log_length(&self.site);
        let begun = std::time::Instant::now();
        let mut outcome = Ok(Outcome::Unreached);
        for _ in 0..TRIES {
            outcome = match step {
                EMPTY => {
                    self.kill().await;
                    self.site.shell(&format!("rm -rf $DATA {}", self.site.run_dir().display()));
                    self.suffer_start(fault).await
                }
                KEPT => {
                    self.kill().await;
                    self.suffer_start(fault).await
                }
                _ => self.suffer(step, fault).await,
            };
            if outcome != Ok(Outcome::Unreached) {
                break;
            }
        }
        let text = match &outcome {
            Ok(outcome) => format!("{outcome:?}"),
            Err(why) => {
                let told = format!("{step}: {fault}: {why}\n{}", trial::log_since(&self.site, log));
                say(&told);
                self.failures.push(told);
                format!("FAILED {}", why.lines().next().unwrap_or_default())
            }
        };
        say(&format!("{step}: {fault}: {text} ({} ms)", begun.elapsed().as_millis()));
        self.outcomes.entry(fault.class.clone()).or_default().insert(text);
        if outcome.is_err() && step != EMPTY {
            self.clear().await;
        }
    }

    /// Prints what was done, and fails if something was wrong, or if more classes than `missed_max` were never made
    /// to fail: a daemon that only watches a VM makes some calls once in a while.
    fn report(&self, classes: &BTreeSet<Class>, missed_max: usize) {
        for class in classes {
            say(&format!("CLASS {class}: {:?}", self.outcomes.get(class)));
        }
        say(&format!("{} classes, {} failures", classes.len(), self.failures.len()));
        let unreached = format!("{:?}", Outcome::Unreached);
        let is_met = |class: &&Class| {
            self.outcomes.get(class).is_some_and(|outcomes| outcomes.iter().any(|text| *text != unreached))
        };
        let missed: Vec<String> =
            classes.iter().filter(|class| !is_met(class)).map(ToString::to_string).collect();
        if only().is_empty() {
            assert!(missed.len() <= missed_max, "these classes were never made to fail: {missed:#?}");
        }
        assert!(self.failures.is_empty(), "{}", self.failures.join("\n\n"));
    }
}

/// A start on an empty directory.
const EMPTY: &str = "first start";
/// A start with what another daemon left that was killed.
const KEPT: &str = "start";

impl Scene {
    /// Looks that the VM is the one that was started first, in its first boot.
    async fn same_vm(&mut self) -> Result<(), String> {
        let Some(id) = self.vm.clone() else { return Ok(()) };
        let mut walk = Walk::new(steps::acts("watch", ""), &[]);
        trial::recover(&self.site, &mut walk).await?;
        let boots = self.site.console(&id).matches("booted").count();
        let vmms = self.site.vmms().len();
        if (boots, vmms) == (1, 1) {
            Ok(())
        } else {
            Err(format!("it booted {boots} times, and {vmms} VMMs run"))
        }
    }

    /// Counts a step twice and has its calls fail; gives the classes. Without `STEAD_TEST_ROUNDS` one in so many fails.
    async fn play_step(
        &mut self,
        step: &str,
        one_in: usize,
        chosen: &mut BTreeMap<Class, usize>,
    ) -> BTreeSet<Class> {
        // What only the first time needs is over then.
        self.count(step).await;
        let seen = self.count(step).await;
        for (class, count) in &seen {
            say(&format!("SEEN {step}: {class}: {count}"));
        }
        let mut classes = BTreeSet::new();
        for class in seen.into_keys().filter(is_ours) {
            for fault in faults(&class, chosen) {
                if is_thorough() || chosen.len().is_multiple_of(one_in) {
                    self.play(step, &fault).await;
                    classes.insert(class.clone());
                }
            }
        }
        classes
    }
}

/// Whether a class is of the daemon, or of a program that it runs to its end. A VMM's own calls are the guest's
/// disk, which has tests of its own.
fn is_ours(class: &Class) -> bool {
    class.program.as_ref().is_none_or(|program| !program.starts_with("qemu"))
}

/// The faults of one class.
fn faults(class: &Class, chosen: &mut BTreeMap<Class, usize>) -> Vec<Fault> {
    let errors = class.errors();
    let played = chosen.entry(class.clone()).or_default();
    *played += 1;
    let of = |error, lasts| Fault { class: class.clone(), error, lasts };
    if is_thorough() {
        return errors.iter().flat_map(|error| [of(*error, false), of(*error, true)]).collect();
    }
    // One for each class, and another one for each class of the next kind.
    if *played > 1 { Vec::new() } else { vec![of(errors[chosen.len() % errors.len()], true)] }
}

#[test]
fn a_call_that_fails_in_a_step_of_a_running_daemon_is_told_and_loses_nothing() {
    in_namespace(async || {
        let mut scene = Scene::new().await;
        scene.start().await;
        scene.keep().await;
        let (mut chosen, mut classes) = (BTreeMap::new(), BTreeSet::new());
        for step in steps::STEPS {
            classes.extend(scene.play_step(step, 1, &mut chosen).await);
        }
        scene.report(&classes, 0);
        settles(&mut scene.site, "failing calls").await;
    });
}

#[test]
fn a_call_that_fails_beside_a_vm_does_not_end_it_or_its_memory() {
    // Each trial takes seconds: in `make test` one class in so many fails, of the step that only watches and of the
    // others.
    const WATCH_ONE_IN: usize = 3;
    const ONE_IN: usize = 10;
    in_namespace(async || {
        let mut scene = Scene::with_kernel().await;
        scene.start().await;
        let body = json!({ "cmd": ["sh", "-c", "echo booted; while true; do sleep 1; done"] });
        let id = scene.site.create("kept", &image("busybox"), body).await;
        scene.site.until_console(&id, "booted").await;
        scene.site.until_state("kept", "Running").await;
        scene.vm = Some(id);
        let (mut chosen, mut classes) = (BTreeMap::new(), BTreeSet::new());
        for step in steps::OF_A_VM {
            // A standby and a restore leave other files than a boot.
            scene.count(step).await;
            scene.kept = (trial::files(&scene.site), trial::objects(&scene.site).await);
            let one_in = if step == "watch" { WATCH_ONE_IN } else { ONE_IN };
            classes.extend(scene.play_step(step, one_in, &mut chosen).await);
        }
        scene.report(&classes, classes.len() / 4);
        scene.site.delete("kept").await;
        settles(&mut scene.site, "failing calls beside a VM").await;
    });
}

#[test]
fn a_call_that_fails_in_a_start_is_told_and_the_next_start_has_everything() {
    in_namespace(async || {
        let mut scene = Scene::new().await;
        let (mut chosen, mut classes) = (BTreeMap::new(), BTreeSet::new());
        for step in [EMPTY, KEPT] {
            scene.start().await;
            if step == KEPT {
                scene.keep().await;
                scene.restart().await;
                scene.site.kill().await;
                scene.supervisor.take_seen();
                scene.start().await;
            }
            let seen = scene.supervisor.take_seen();
            for (class, count) in &seen {
                say(&format!("SEEN {step}: {class}: {count}"));
            }
            for class in seen.into_keys() {
                for fault in faults(&class, &mut chosen) {
                    scene.play(step, &fault).await;
                }
                classes.insert(class);
            }
            scene.site.kill().await;
        }
        scene.start().await;
        scene.report(&classes, 0);
        settles(&mut scene.site, "starts with failing calls").await;
    });
}
