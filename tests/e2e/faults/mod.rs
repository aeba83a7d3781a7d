//! Failing files and descriptors under a real daemon: ENOSPC, EMFILE, ENOMEM and EIO at every file-related call, one
//! class of calls after another.
//!
//! The classes are discovered, not listed: each step of the scenario runs once while all calls are counted, and these
//! calls then fail in later rounds of the same step. In `make test` each class fails with one of its errors in one
//! step. With `STEAD_TEST_ROUNDS` of 1 or more each class fails in every step, with every error, once and
//! permanently.

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
use crate::fixtures::run;
use crate::harness::{Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

/// Number of attempts until the call of a fault is made. A rare call does not occur in every round.
const TRIES: usize = 5;

fn is_thorough() -> bool {
    std::env::var("STEAD_TEST_ROUNDS").is_ok()
}

/// Prints the progress. A thorough run takes long, so it also writes to a file that can be read meanwhile.
fn log_line(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("it is read");
    let Some(file) = std::env::var_os("STEAD_TEST_REPORT") else { return };
    let mut file = fs::File::options().create(true).append(true).open(file).expect("the report opens");
    writeln!(file, "{line}").expect("the report is written");
}

/// Returns a text that faults must contain to run, for debugging a single fault.
fn only() -> String {
    std::env::var("STEAD_TEST_FAULT").unwrap_or_default()
}

/// A daemon under supervision, with the knowledge of its clients.
struct Scene {
    site: Harness,
    supervisor: Supervisor,
    archive: Vec<u8>,
    /// Files and objects that exist between steps.
    kept: (BTreeSet<String>, BTreeMap<String, Value>),
    /// Instance whose VM runs all the time, if there is one.
    vm: Option<String>,
    number: usize,
    outcomes: BTreeMap<Class, BTreeSet<String>>,
    failures: Vec<String>,
    /// Classes that some runs of a step do not call.
    by_chance: BTreeSet<Class>,
}

impl Scene {
    /// Creates a scene in which instances wait for a kernel, so that no VM is needed.
    async fn new() -> Self {
        let mut scene = Self::with_kernel().await;
        scene.site.kernel_dir = scene.site.scratch("no-kernel");
        scene
    }

    async fn with_kernel() -> Self {
        let site = Harness::new().await;
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
            by_chance: BTreeSet::new(),
        }
    }

    fn spawn(&mut self) {
        let (supervisor, data, run) = (self.supervisor.clone(), self.site.data(), self.site.run_dir());
        self.site.spawn_by(|command| {
            // Changes without a notification are found by the periodic resync.
            command.env("STEAD_RESYNC", format!("{}s", trial::RESYNC.as_secs()));
            // Only one listener is possible in a process and its children, and this one is in the place of that of the walls.
            command.env("STEAD_INSECURE_WITHOUT_WALLS", "true");
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

    /// Creates the objects that exist all the time.
    async fn keep(&mut self) {
        let made =
            self.site.request(Method::POST, "/images", Some(json!({ "name": image("busybox") }))).await;
        assert_eq!(made.status, StatusCode::ACCEPTED, "{made:?}");
        self.site.until_image(&image("busybox")).await;
        let made = self.site.request(Method::POST, "/instances", Some(instance("kept"))).await;
        assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
        // It waits for a kernel, so nothing is attempted for it again and again.
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

    /// Removes the leftovers of a failed step, so that the next one begins correctly.
    async fn clear(&mut self) {
        self.restart().await;
        for path in trial::objects(&self.site).await.keys().filter(|path| !self.kept.1.contains_key(*path)) {
            let (kind, name) = path.split_once('/').expect("a kind");
            let path = format!("/{kind}/{}", name.replace('/', "%2F"));
            self.site.attempt(Method::DELETE, &path, None).await;
        }
        if let Err(why) = trial::leaves_nothing(&self.site, &self.kept.0).await {
            // The step has failed already. Later steps should not fail for the same reason.
            log_line(&format!("NOT CLEARED {why}"));
            self.kept.0 = trial::files(&self.site);
        }
    }

    fn walk(&mut self, step: &str) -> Walk {
        self.number += 1;
        Walk::new(steps::acts(step, &format!("n{}", self.number)), &self.archive)
    }

    /// Runs a step without a fault. Returns the counted calls.
    async fn count(&mut self, step: &str) -> BTreeMap<Class, u64> {
        self.supervisor.take_seen();
        let mut walk = self.walk(step);
        let gone = trial::recover(&self.site, &mut walk).await;
        if step == steps::OF_A_VM[0] {
            tokio::time::sleep(trial::FULL_SCAN).await;
        }
        if let Err(why) = gone {
            panic!("{step} without a fault: {why}\n{}", self.site.daemon_log());
        }
        self.supervisor.take_seen()
    }

    /// Runs a step with a fault.
    async fn suffer(&mut self, step: &str, fault: &Fault) -> Result<Outcome, String> {
        let log = trial::log_length(&self.site);
        let mut walk = self.walk(step);
        self.supervisor.begin(fault);
        let outcome = trial::suffer(&self.site, &self.supervisor, fault, &mut walk, log, &self.kept.0).await;
        self.supervisor.end();
        let outcome = outcome?;
        // Acknowledged changes must be on the disk by now.
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

    /// Starts a daemon with a fault, and another one without it if the first one ended.
    async fn suffer_start(&mut self, fault: &Fault) -> Result<Outcome, String> {
        let log = trial::log_length(&self.site);
        self.supervisor.begin(fault);
        self.spawn();
        let begun = trial::begun(&mut self.site, &self.supervisor, fault, log).await;
        if begun == Ok(Ok(())) {
            // Some work is done a moment after the first answer.
            trial::is_met(&self.supervisor).await;
        }
        let hits = self.supervisor.end();
        let begun = begun?;
        let reported = trial::log_since(&self.site, log);
        let shows = trial::shows(&reported, fault.error);
        let outcome = match begun {
            _ if hits == 0 => Outcome::Unreached,
            Ok(()) if shows => Outcome::Logged,
            Ok(()) => Outcome::Borne,
            // If a runtime cannot be built, tokio panics with the reason before anything was begun.
            Err(status) if status.code().is_some() && shows => Outcome::Ended,
            Err(status) => return Err(format!("it ended with {status} and no clear message")),
        };
        if reported.contains("panicked at src") || reported.contains("panicked at controllers") {
            return Err("the daemon panicked".to_owned());
        }
        if begun.is_err() {
            self.spawn();
        }
        self.site.answers().await;
        // The daemon that survived the fault accepts new requests, and so does the next one.
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

    /// Repeats a fault until its call occurred. A failure is recorded, and the daemon is started anew after it.
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
                let reported = format!("{step}: {fault}: {why}\n{}", trial::log_since(&self.site, log));
                log_line(&reported);
                self.failures.push(reported);
                format!("FAILED {}", why.lines().next().unwrap_or_default())
            }
        };
        log_line(&format!("{step}: {fault}: {text} ({} ms)", begun.elapsed().as_millis()));
        self.outcomes.entry(fault.class.clone()).or_default().insert(text);
        if outcome.is_err() && step != EMPTY {
            self.clear().await;
        }
    }

    /// Prints a summary, and fails if there was a failure, or if more classes than `missed_max` never failed: a
    /// daemon that only watches a VM makes some calls rarely. Classes that are called by chance do not count.
    fn report(&self, classes: &BTreeSet<Class>, missed_max: usize) {
        for class in classes {
            log_line(&format!("CLASS {class}: {:?}", self.outcomes.get(class)));
        }
        log_line(&format!("{} classes, {} failures", classes.len(), self.failures.len()));
        let unreached = format!("{:?}", Outcome::Unreached);
        let is_met = |class: &&Class| {
            self.outcomes.get(class).is_some_and(|outcomes| outcomes.iter().any(|text| *text != unreached))
        };
        let missed: Vec<String> = classes
            .difference(&self.by_chance)
            .filter(|class| !is_met(class))
            .map(ToString::to_string)
            .collect();
        if only().is_empty() {
            assert!(missed.len() <= missed_max, "these classes were never made to fail: {missed:#?}");
        }
        assert!(self.failures.is_empty(), "{}", self.failures.join("\n\n"));
    }
}

/// Name of the step that starts on an empty directory.
const EMPTY: &str = "first start";
/// Name of the step that starts with the files of a killed daemon.
const KEPT: &str = "start";

impl Scene {
    /// Checks that the VM is the one that was started first, in its first boot.
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

    /// Counts a step twice and makes its calls fail. Returns the classes. Without `STEAD_TEST_ROUNDS` one of `one_in`
    /// classes fails.
    async fn play_step(
        &mut self,
        step: &str,
        one_in: usize,
        chosen: &mut BTreeMap<Class, usize>,
    ) -> BTreeSet<Class> {
        // The first run includes one-time work, so the second one is counted. What is called in one of them only may be
        // called by chance, as when a list is read while a file is being written.
        let first = self.count(step).await;
        let seen = self.count(step).await;
        for (class, count) in &seen {
            log_line(&format!("SEEN {step}: {class}: {count}"));
            if !first.contains_key(class) {
                self.by_chance.insert(class.clone());
            }
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

/// Returns `true` if a class belongs to the daemon, or to a program that it runs to its end. A VMM's own calls
/// concern the guest's disk, which has its own tests.
fn is_ours(class: &Class) -> bool {
    class.program.as_ref().is_none_or(|program| !program.starts_with("qemu"))
}

/// Returns the faults of one class.
fn faults(class: &Class, chosen: &mut BTreeMap<Class, usize>) -> Vec<Fault> {
    let errors = class.errors();
    let played = chosen.entry(class.clone()).or_default();
    *played += 1;
    let of = |error, lasts| Fault { class: class.clone(), error, lasts };
    if is_thorough() {
        return errors.iter().flat_map(|error| [of(*error, false), of(*error, true)]).collect();
    }
    // Each class gets one error, and the next class of the same kind gets another one.
    if *played > 1 { Vec::new() } else { vec![of(errors[chosen.len() % errors.len()], true)] }
}

#[test]
fn a_call_that_fails_in_a_step_of_a_running_daemon_is_reported_and_loses_nothing() {
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
    // Share of the classes that fail in `make test`, for the step that only watches and for the others, because each
    // trial takes seconds.
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
fn a_call_that_fails_in_a_start_is_reported_and_the_next_start_has_everything() {
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
                log_line(&format!("SEEN {step}: {class}: {count}"));
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
