//! The agent beside an image's init: serves the host, and reports how the system ended.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use stead_schemas::guest::{Config, Phase};
use stead_schemas::instance::Exit;

use super::rule::Kind;
use super::{AGAIN, AGENT, Begin, ending, rule, unit, up};
use crate::children::Children;
use crate::control::{Control, Stop, Urgency};
use crate::{BootError, devices, memory, program, volumes};

/// Limit on the handed-over state, in bytes: the largest configuration, its strings and leftovers encoded as JSON.
const BEGIN_BYTES_MAX: u64 = 16 << 20;
/// Limit on an exit record, in bytes.
const EXIT_BYTES_MAX: u64 = 64 << 10;
/// Limit on the command line of PID 1 that is read, in bytes. A longer one is not that of a shutdown.
const COMMAND_LINE_BYTES_MAX: u64 = 4096;
/// Cgroup of the agent. It is beside the groups that a systemd makes, so that the host's programs are in none of its
/// units.
const GROUP: &str = "/sys/fs/cgroup/stead-agent";

/// The way in which the system ended.
enum Ending {
    /// PID 1 ends all processes.
    Down(Exit),
    /// The init was never executed; PID 1 is still ours.
    NotBegun(Exit),
    /// The system was asked to shut down and did not.
    Overdue,
}

/// Runs the agent. Does nothing if this process was started neither by our PID 1 nor by the unit.
pub(crate) fn main() {
    let mut words = std::env::args_os();
    let (name, word) = (words.next().unwrap_or_default(), words.next());
    let done = match word.as_deref().and_then(OsStr::to_str) {
        None if name == AGENT => run(Origin::Init),
        Some(AGAIN) if name == AGENT => run(Origin::Unit),
        Some(unit::ADOPT) => unit::adopt(),
        Some(memory::OFFLINE) => memory::offline_main(&words.next().unwrap_or_default()),
        _ => return,
    };
    if let Err(error) = done {
        if word.is_some_and(|word| word == memory::OFFLINE) {
            // Whoever started this process reports it.
            std::process::exit(1);
        }
        crate::log_line(&format!("the agent cannot go on: {error}"));
        std::process::exit(1);
    }
}

/// The process that started this agent.
#[derive(Clone, Copy)]
enum Origin {
    /// Our PID 1, before the image's init replaced it.
    Init,
    /// A systemd, after an earlier agent ended.
    Unit,
}

fn run(origin: Origin) -> io::Result<()> {
    // The mask is set before the first thread: every thread inherits it, and only one of them takes the signal.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let signals = SignalFd::new(&signals)?;
    let begun = match origin {
        Origin::Init => take_over()?,
        Origin::Unit => begin_again()?,
    };
    stand_apart();
    crate::kernel_log::forward(&begun.control, matches!(origin, Origin::Init));
    let children = Children::start()?;
    let (control, config, kind) = (begun.control, begun.config, begun.kind);
    let (ends, ended) = mpsc::channel();
    control.program_begun(&config, &children, stop(kind, &config, &children, ends.clone()));
    memory::start(&control, &children, &config);
    volumes::find_mounted(&config);
    volumes::start(&control);
    spawn("signals", {
        let (control, ends) = (control.clone(), ends.clone());
        move || watch_signals(&signals, kind, &control, &ends)
    })?;
    spawn("boot", {
        let control = control.clone();
        move || watch_boot(begun.from_init, kind, &config, &control, &children, &ends)
    })?;
    match ended.recv() {
        Ok(Ending::Down(exit) | Ending::NotBegun(exit)) => report(&control, exit),
        Ok(Ending::Overdue) => {
            report(&control, ending::overdue());
            cut_off();
        }
        // The senders exist as long as this process does.
        Err(_) => {}
    }
    Ok(())
}

/// The state with which an agent starts.
struct Begun {
    control: Control,
    config: Config,
    kind: Kind,
    /// Pipe from the PID 1 that preceded the init. It reports whether the init was executed.
    from_init: Option<BufReader<File>>,
}

/// Takes over the pipe from PID 1 and the port. Programs started from here inherit neither.
fn take_over() -> io::Result<Begun> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let from_init = rustix::stdio::stdin().try_clone_to_owned()?;
    let port = rustix::stdio::stdout().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(null.as_fd())?;
    rustix::stdio::dup2_stdout(null.as_fd())?;
    let mut from_init = BufReader::new(File::from(from_init));
    let mut line = Vec::new();
    (&mut from_init).take(BEGIN_BYTES_MAX).read_until(b'\n', &mut line)?;
    let Begin { handed, kind } = serde_json::from_slice(&line)?;
    let config = handed.config.clone().ok_or_else(|| io::Error::other("there is no configuration"))?;
    let control = Control::go_on(port.into(), handed).map_err(|error| io::Error::other(error.reason))?;
    Ok(Begun { control, config, kind, from_init: Some(from_init) })
}

/// Asks the host for everything that the previous agent knew.
fn begin_again() -> io::Result<Begun> {
    let failed = |error: BootError| io::Error::other(error.reason);
    let control = Control::start(devices::control_port().map_err(failed)?).map_err(failed)?;
    // The host does not know yet that its streams ended with the previous agent.
    control.wake();
    let config = control.wait_for_config();
    Ok(Begun { control, config, kind: Kind::Systemd, from_init: None })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

/// Moves this process into its own cgroup and makes it the last one that the OOM killer takes. Neither is needed to
/// serve.
fn stand_apart() {
    let _ = fs::create_dir(GROUP);
    // Processes that a previous agent ran for the host are killed, because their results can no longer be reported.
    let _ = fs::write(format!("{GROUP}/cgroup.kill"), "1");
    let _ = fs::write(format!("{GROUP}/cgroup.procs"), "0");
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

fn stop(kind: Kind, config: &Config, children: &Children, ends: Sender<Ending>) -> Stop {
    let (config, children) = (config.clone(), children.clone());
    Box::new(move |urgency| match (urgency, kind) {
        (Urgency::Asked, Kind::Systemd) => ask_systemd(),
        (Urgency::Asked, Kind::Other) => run_poweroff(&config, &children),
        (Urgency::Overdue, _) => drop(ends.send(Ending::Overdue)),
    })
}

/// Starts `poweroff.target` with SIGRTMIN+4, see systemd(1). systemd handles the signal from the first moment,
/// without a bus.
#[expect(unsafe_code, reason = "no library sends realtime signals")]
fn ask_systemd() {
    // SAFETY: this is a system call whose arguments are numbers.
    let _ = unsafe { nix::libc::kill(1, nix::libc::SIGRTMIN() + 4) };
}

/// Runs the poweroff program. Inits have no common signal for it, and all of them bring the program.
fn run_poweroff(config: &Config, children: &Children) {
    let root = crate::user::User { uid: 0, gid: 0, groups: vec![0], home: "/root".to_owned() };
    let environment = program::environment(config, &root);
    let path = environment.iter().find(|(key, _)| key == "PATH").map_or("", |(_, value)| value.as_str());
    let Some(program) = rule::search("poweroff", path) else { return };
    let mut command = Command::new(program);
    command.env_clear().envs(environment).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    program::set_user(&mut command, root, false);
    if let Err(error) = children.spawn(&mut command, |_| ()) {
        crate::log_line(&format!("poweroff cannot be run: {error}"));
    }
}

/// Waits for the signals with which PID 1 ends all processes. Signals from other senders are ignored.
fn watch_signals(signals: &SignalFd, kind: Kind, control: &Control, ends: &Sender<Ending>) {
    loop {
        let is_of_init = matches!(signals.read_signal(), Ok(Some(signal)) if signal.ssi_pid == 1);
        if !is_of_init {
            continue;
        }
        let mut line = Vec::new();
        let read = File::open("/proc/1/cmdline").map(|file| file.take(COMMAND_LINE_BYTES_MAX));
        let _ = read.and_then(|mut file| file.read_to_end(&mut line));
        let exit = match (ending::of_init(&line), kind) {
            (Some(exit), _) => exit,
            (None, Kind::Other) => ending::of_unknown_kind(control.is_stopping()),
            // This systemd ends a group of processes, not all of them.
            (None, Kind::Systemd) => continue,
        };
        let _ = ends.send(Ending::Down(exit));
    }
}

/// Waits until the init was executed and its system is up.
fn watch_boot(
    from_init: Option<BufReader<File>>,
    kind: Kind,
    config: &Config,
    control: &Control,
    children: &Children,
    ends: &Sender<Ending>,
) {
    // A line arrives, or the end: PID 1 waits for this process with its end of the pipe open.
    let mut line = Vec::new();
    if let Some(from_init) = from_init {
        let _ = from_init.take(EXIT_BYTES_MAX).read_until(b'\n', &mut line);
    }
    if let Ok(exit) = serde_json::from_slice(&line) {
        let _ = ends.send(Ending::NotBegun(exit));
        return;
    }
    if kind == Kind::Systemd {
        up::wait(config, children);
    }
    control.program_ready(config, children);
    crate::log_line("the system is up");
}

fn report(control: &Control, exit: Exit) {
    crate::log_line(&exit.message);
    control.set(Phase::Exited, Some(exit));
    control.wait_for_acknowledgement(crate::ACKNOWLEDGE_WAIT);
}

/// Writes all data to the disks and leaves them as clean as their users allow.
fn cut_off() {
    rustix::fs::sync();
    if let Ok(mut trigger) = File::options().write(true).open("/proc/sysrq-trigger") {
        // `u` remounts everything read-only.
        let _ = trigger.write_all(b"u");
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    std::thread::sleep(Duration::from_secs(1));
}
