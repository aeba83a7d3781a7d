//! The escape table: everything that a program in the place of a VMM tries, and what it gets.
//!
//! The test binary runs itself as the VMM, behind exactly the walls of a VMM. It runs once without any walls, where each
//! attempt has to succeed: so the table shows that the walls refuse it, and not a mistake in the attempt.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};

use stead::host::cgroup::Cgroups;
use stead::hypervisor::driver::{Handed, Needs, VmmCommand};
use stead::hypervisor::record::VmPaths;
use stead::hypervisor::{Jails, SpawnPlan, USERS, UserRange, missing_walls, spawn};
use stead_schemas::names::Uid;

use crate::escape_attempts::{ATTEMPTS, TAP, Target};
use crate::namespace::{bridge, in_namespace};

/// The name of the test that is the program when it is run with a target.
const TEST: &str = "escapes::a_vmm_reaches_nothing_of_the_host";
/// Beginning of the argument with the target.
const INSIDE: &str = "inside:";
/// Beginning of a line of the table.
const LINE: &str = "escape|";
/// Largest number of threads of the program in the place of a VMM.
const THREADS_MAX: u64 = 50;

/// Prints the table from inside.
fn attempt(target: &Target) {
    for (name, attempt) in ATTEMPTS {
        let result = match attempt(target) {
            Ok(()) => "REACHED".to_owned(),
            Err(error) => error.to_string(),
        };
        let line = format!("\n{LINE}{name}|{result}\n");
        // One write, so that lines of the test harness are not in between.
        std::io::stdout().write_all(line.as_bytes()).expect("the log is open");
    }
}

struct Host {
    dir: tempfile::TempDir,
    target: Target,
    sleeper: Child,
    _servers: (TcpListener, UnixListener, UnixListener),
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.sleeper.kill();
        let _ = self.sleeper.wait();
    }
}

impl Host {
    /// Makes a host with another VM, an API, keys, and a process.
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("scratch");
        let path = |name: &str| dir.path().join(name).display().to_string();
        for name in ["disk", "memory", "key", "given"] {
            fs::write(dir.path().join(name), "secret").expect("written");
        }
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bound");
        let unix = UnixListener::bind(path("api.sock")).expect("bound");
        let monitor = UnixListener::bind(path("qmp.sock")).expect("bound");
        let made =
            Command::new("ip").args(["tuntap", "add", "mode", "tap", "vnet_hdr", "name", TAP]).status();
        assert!(made.expect("ip runs").success());
        let sleeper = Command::new("sleep").arg("1000").spawn().expect("sleep runs");
        let target = Target {
            directory: dir.path().display().to_string(),
            port: tcp.local_addr().expect("bound").port(),
            pid: i32::try_from(sleeper.id()).expect("small"),
        };
        Self { dir, target, sleeper, _servers: (tcp, unix, monitor) }
    }

    /// Runs the program, and returns the result of each attempt.
    async fn run(&self, jails: &Jails, owner: char, is_walled: bool) -> BTreeMap<String, String> {
        let owner: Uid = format!("{owner}{:023}", 0).parse().expect("a letter and digits");
        let paths = VmPaths::new(&self.dir.path().join("run"), &self.dir.path().join("data"), &owner);
        for directory in [paths.runtime(), paths.logs()] {
            fs::create_dir_all(directory).expect("made");
        }
        let given = Handed::Disk { path: self.dir.path().join("given"), is_read_only: true };
        let listener = Handed::Listener(paths.runtime().join("listener"));
        let tap = Handed::Tap(TAP.parse().expect("valid"));
        let needs =
            Needs { descriptors: vec![given, listener, tap], threads_max: THREADS_MAX, ..Needs::default() };
        let arguments = [TEST, "--exact", "--nocapture", "--test-threads=1"].map(ToOwned::to_owned);
        let command = VmmCommand {
            program: std::env::current_exe().expect("this program has a path"),
            arguments: arguments.into_iter().chain([format!("{INSIDE}{}", self.target.text())]).collect(),
            has_console_on_stdout: false,
            needs: is_walled.then_some(needs),
        };
        let user = is_walled.then(|| UserRange::new(USERS).expect("valid").user(7).expect("in the range"));
        let plan =
            SpawnPlan { owner, paths: paths.clone(), file_size_max: 1 << 20, ram: None, user, limits: None };
        let cgroups = Cgroups::probe(&bridge());
        let spawned = spawn(jails, &cgroups, command, plan).expect("the program runs");
        let missing = missing_walls(spawned.pid).expect("inspected");
        let ended = spawned.ended.await.expect("it ended");
        let _ = Cgroups::probe(&bridge());
        let log = fs::read_to_string(paths.vmm_log()).expect("there");
        let mut table: BTreeMap<String, String> = log
            .lines()
            .filter_map(|line| line.strip_prefix(LINE)?.split_once('|'))
            .map(|(name, result)| (name.to_owned(), result.to_owned()))
            .collect();
        assert_eq!(table.len(), ATTEMPTS.len(), "{ended}: {log}");
        if let Some(missing) = missing {
            table.insert("walls that the kernel does not show".to_owned(), format!("{missing:?}"));
        }
        table
    }
}

fn print(title: &str, table: &BTreeMap<String, String>) {
    let lines: Vec<String> = table.iter().map(|(name, result)| format!("| {name} | {result} |")).collect();
    eprintln!("{title}\n{}", lines.join("\n"));
}

fn reached(table: &BTreeMap<String, String>) -> Vec<&str> {
    table.iter().filter(|(_, result)| *result == "REACHED").map(|(name, _)| name.as_str()).collect()
}

#[test]
fn a_vmm_reaches_nothing_of_the_host() {
    if let Some(target) = std::env::args().find_map(|argument| Target::parse(argument.strip_prefix(INSIDE)?))
    {
        return attempt(&target);
    }
    in_namespace(async || {
        let host = Host::new();
        let jails = |name: &str| {
            let point = host.dir.path().join(name);
            fs::create_dir(&point).expect("made");
            Jails::new(UserRange::new(USERS).expect("valid"), point)
        };
        let open = host.run(&jails("a"), 'a', false).await;
        print("without walls", &open);
        // A kernel without the interface, such as one without modules, has nothing to refuse.
        let is_lacking = |name: &str| open[name].contains("os error 38");
        let refused: Vec<_> = ATTEMPTS
            .iter()
            .map(|(name, _)| *name)
            .filter(|name| open[*name] != "REACHED" && !is_lacking(name))
            .collect();
        assert!(
            refused.is_empty(),
            "these attempts show nothing, because a process without walls fails too: {refused:?}"
        );
        let first = host.run(&jails("b").without_filters(), 'b', true).await;
        print("behind the first walls alone", &first);
        let all = host.run(&jails("c"), 'c', true).await;
        print("behind all walls", &all);
        assert_eq!(reached(&all), Vec::<&str>::new());
        assert_eq!(all.get("walls that the kernel does not show").map_or("{}", String::as_str), "{}");
        // Interfaces that the kernel offers to every user are refused by the filter alone.
        let by_filter = [
            "make a process",
            "add a key",
            "make an io_uring",
            "make a user namespace",
            "run another program",
            "find a link of the host by a listener",
            "change the hardware address of a TAP",
            "give a TAP to another user",
            "reserve room on the host's disk",
        ];
        let held: Vec<_> = reached(&first).into_iter().filter(|name| !by_filter.contains(name)).collect();
        assert_eq!(held, Vec::<&str>::new(), "the first walls hold without the second");
        assert_owns_nothing(host.dir.path());
    });
}

/// Checks that no file has the user of the VM as its owner.
fn assert_owns_nothing(below: &Path) {
    use std::os::unix::fs::MetadataExt;
    let mut left = vec![below.to_owned()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).expect("there");
        assert_eq!((meta.uid(), meta.gid()), (0, 0), "{}", path.display());
        if meta.is_dir() {
            left.extend(fs::read_dir(&path).expect("read").map(|entry| entry.expect("read").path()));
        }
    }
}
