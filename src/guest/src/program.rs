//! The program: starts it directly, waits for it, and reports its end in the words that users know.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::{fmt::Write as _, os::fd::AsFd};

use nix::sys::signal::SigSet;
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitStatus, getrlimit, setrlimit};
use stead_schemas::guest::Config;
use stead_schemas::instance::Exit;
use stead_schemas::signal;

use crate::children::Children;
use crate::control::{Stop, Urgency};
use crate::user::{self, User};
use crate::{egress_env, inside, trust};

/// Exit code of a program that was not found, as in Docker and shells.
pub(crate) const NOT_FOUND: i32 = 127;
pub(crate) const NOT_EXECUTABLE: i32 = 126;
/// Soft limit on open files that the kernel gives to programs that do not ask for more.
const OPEN_FILES_UNASKED: u64 = 1024;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The instance's own program.
pub(crate) struct Program {
    pub(crate) pid: Pid,
    end: mpsc::Receiver<WaitStatus>,
}

/// Starts the program in its own session, with the console as its standard streams but not as its terminal.
pub(crate) fn start(config: &Config, children: &Children) -> Result<Program, Exit> {
    let user = user::look_up(&config.user).map_err(|reason| not_started(None, &format!("user: {reason}")))?;
    let (name, arguments) =
        config.argv.split_first().ok_or_else(|| not_started(Some(NOT_FOUND), "no program given"))?;
    let directory = absolute(&config.working_dir);
    // Docker creates a missing working directory, and so do we, even behind a link of the image.
    let made = inside::resolve(Path::new("/"), &directory).and_then(fs::create_dir_all);
    made.and_then(|()| std::env::set_current_dir(&directory)).map_err(|error| {
        not_started(Some(NOT_EXECUTABLE), &format!("working directory {directory}: {error}"))
    })?;
    stop_signal(config.stop_signal.as_deref())?;
    let console = console().map_err(|error| not_started(None, &format!("console: {error}")))?;
    give_to(&console, user.uid);
    let clone = || console.try_clone().map_or_else(|_| Stdio::null(), Stdio::from);
    let mut command = Command::new(name);
    command.args(arguments).env_clear().envs(environment(config, &user)).current_dir(&directory);
    command.stdin(Stdio::null()).stdout(clone()).stderr(clone());
    set_user(&mut command, user, false);
    let (sender, end) = mpsc::sync_channel(1);
    // The receiver exists as long as the run does.
    let started = children.spawn(&mut command, move |status| {
        let _ = sender.send(status);
    });
    // The directory may be on a volume, which could not be unmounted while this process is there.
    let _ = std::env::set_current_dir("/");
    match started {
        Ok(pid) => Ok(Program { pid, end }),
        Err(error) => {
            let (code, message) = start_error(name, &error);
            Err(not_started(Some(code), &message))
        }
    }
}

/// Returns the function that ends the program: the stop signal first, the kill when the grace period is over.
pub(crate) fn stop(program: &Program, config: &Config, children: &Children) -> Stop {
    let (pid, children) = (program.pid, children.clone());
    // An invalid signal is impossible here: such a program did not start.
    let stop_signal = stop_signal(config.stop_signal.as_deref()).unwrap_or(Signal::TERM);
    Box::new(move |urgency| match urgency {
        Urgency::Asked => children.signal(pid, stop_signal),
        Urgency::Overdue => children.signal(pid, Signal::KILL),
    })
}

/// Returns the image's stop signal. An invalid one is reported before the program starts, not when it should end.
fn stop_signal(word: Option<&str>) -> Result<Signal, Exit> {
    let Some(word) = word.filter(|word| !word.trim().is_empty()) else { return Ok(Signal::TERM) };
    let number = signal::number(word);
    let unknown = || not_started(None, &format!("the image's stop signal is none: {word}"));
    number.map(signal_of).ok_or_else(unknown)
}

/// Gives a file to the program's user: a program may open its own outputs by their names in `/dev`.
pub(crate) fn give_to(file: impl AsFd, uid: u32) {
    let _ = rustix::fs::fchown(file, Some(rustix::fs::Uid::from_raw(uid)), None);
}

/// Sets the program's user and gives it its own session. Its standard input becomes its controlling terminal if it
/// has one.
#[expect(unsafe_code, reason = "pre_exec is the one way to drop groups and to make a session")]
pub(crate) fn set_user(command: &mut Command, user: User, has_terminal: bool) {
    let groups: Vec<rustix::process::Gid> =
        user.groups.iter().map(|&gid| rustix::process::Gid::from_raw(gid)).collect();
    let drop_rights = move || -> io::Result<()> {
        rustix::process::setsid()?;
        // These settings of an agent beside another init must not pass to its programs.
        SigSet::empty().thread_set_mask()?;
        reset_oom_score();
        reset_open_files();
        if has_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        rustix::thread::set_thread_groups(&groups)?;
        let gid = rustix::process::Gid::from_raw(user.gid);
        let uid = rustix::process::Uid::from_raw(user.uid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: this runs between fork and exec in the child, which has one thread, however many its parent has. It
    // only makes system calls and allocates nothing.
    unsafe {
        command.pre_exec(drop_rights);
    }
}

/// Resets the OOM score to that of any other process. It makes system calls only: it runs between fork and exec.
fn reset_oom_score() {
    use rustix::fs::{Mode, OFlags};
    if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY, Mode::empty()) {
        let _ = rustix::io::write(&file, b"0");
    }
}

/// Resets the soft limit on open files to the kernel's default. It makes system calls only: it runs between fork and
/// exec.
fn reset_open_files() {
    let own = getrlimit(Resource::Nofile);
    let current = own.maximum.map_or(OPEN_FILES_UNASKED, |maximum| maximum.min(OPEN_FILES_UNASKED));
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..own });
}

/// Returns the program's environment. Image and instance variables override the defaults that Docker sets, and those
/// of mediated egress.
pub(crate) fn environment(config: &Config, user: &User) -> Vec<(String, String)> {
    let given = &config.env;
    let defaults =
        [("PATH", DEFAULT_PATH), ("HOME", user.home.as_str()), ("HOSTNAME", config.hostname.as_str())];
    let defaults = defaults
        .into_iter()
        .filter(|(key, _)| !given.contains_key(*key))
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let defaults = defaults.chain(egress_variables(config));
    defaults.chain(given.iter().map(|(key, value)| (key.clone(), value.0.clone()))).collect()
}

/// Returns the variables of mediated egress that the instance does not set itself.
pub(crate) fn egress_variables(config: &Config) -> Vec<(String, String)> {
    egress_env::variables(config.egress.as_ref(), &trust::paths(), &config.env)
}

/// Opens the console and sets it to raw output: no carriage returns are added.
fn console() -> io::Result<File> {
    let console = File::options().read(true).write(true).open("/dev/console")?;
    if let Ok(mut attributes) = rustix::termios::tcgetattr(console.as_fd()) {
        attributes.output_modes.remove(rustix::termios::OutputModes::OPOST);
        let _ =
            rustix::termios::tcsetattr(console.as_fd(), rustix::termios::OptionalActions::Now, &attributes);
    }
    Ok(console)
}

pub(crate) fn not_started(code: Option<i32>, message: &str) -> Exit {
    Exit { code, message: message.to_owned(), is_boot_failure: code.is_none() }
}

/// Returns the shell's exit code and message for a program that could not be started.
pub(crate) fn start_error(name: &str, error: &io::Error) -> (i32, String) {
    match error.kind() {
        io::ErrorKind::NotFound => (NOT_FOUND, format!("command not found: {name}")),
        _ => (NOT_EXECUTABLE, format!("command cannot be executed: {name}: {error}")),
    }
}

/// Waits until the program itself has ended.
pub(crate) fn wait(program: &Program) -> Exit {
    match program.end.recv() {
        Ok(status) => match status.terminating_signal() {
            Some(signal) => killed(program.pid, signal),
            None => {
                let code = status.exit_status().unwrap_or(-1);
                Exit { code: Some(code), message: describe(code), is_boot_failure: false }
            }
        },
        Err(_) => {
            Exit { code: None, message: "the program's end was lost".to_owned(), is_boot_failure: false }
        }
    }
}

fn describe(code: i32) -> String {
    match code {
        NOT_FOUND => "exited with code 127 (command not found)".to_owned(),
        NOT_EXECUTABLE => "exited with code 126 (command cannot be executed)".to_owned(),
        code => format!("exited with code {code}"),
    }
}

fn killed(program: Pid, signal: i32) -> Exit {
    let mut message = format!("killed by signal {signal} ({})", signal::name(signal));
    if signal == Signal::KILL.as_raw() && was_out_of_memory(program) {
        let _ = write!(message, " - OOM");
    }
    Exit { code: Some(128 + signal), message, is_boot_failure: false }
}

/// Returns `true` if the kernel's log names the process as killed by the OOM killer.
fn was_out_of_memory(program: Pid) -> bool {
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0),
    );
    let Ok(mut log) = options.read(true).open("/dev/kmsg") else { return false };
    let needle = format!("Killed process {} ", program.as_raw_nonzero());
    // A record never exceeds this size. The kernel bounds the whole ring, which is read one record at a time.
    let mut record = [0u8; 8192];
    loop {
        match log.read(&mut record) {
            Ok(0) => return false,
            Ok(count) if String::from_utf8_lossy(&record[..count]).contains(&needle) => return true,
            Ok(_) => {}
            // The record was overwritten while it was read. Reading continues with the next one.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
            Err(_) => return false,
        }
    }
}

/// Kills the remaining processes of the program.
pub(crate) fn kill_all() {
    let Ok(entries) = fs::read_dir("/proc") else { return };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|&pid| pid > 1).filter_map(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Returns the signal with this number.
#[expect(unsafe_code, reason = "there is no other way to one that has no name of its own")]
pub(crate) fn signal_of(number: i32) -> Signal {
    // SAFETY: the kernel knows the signal, and it is none of the two that the C library keeps for itself.
    Signal::from_named_raw(number).unwrap_or_else(|| unsafe { Signal::from_raw_unchecked(number) })
}

/// Returns the working directory as an absolute path. A relative one is below the root.
pub(crate) fn absolute(directory: &str) -> String {
    if directory.starts_with('/') { directory.to_owned() } else { format!("/{directory}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_stopped_by_its_images_signal_and_not_started_with_an_unknown_signal() {
        let raw = |word| stop_signal(word).map(Signal::as_raw).map_err(|exit| exit.is_boot_failure);
        assert_eq!(raw(None), Ok(15));
        assert_eq!(raw(Some("")), Ok(15));
        assert_eq!(raw(Some("WINCH")), Ok(28));
        assert_eq!(raw(Some("SIGRTMIN+3")), Ok(37));
        assert_eq!(raw(Some("SIGNONSENSE")), Err(true));
    }

    #[test]
    fn a_program_begins_below_the_root() {
        assert_eq!([absolute(""), absolute("app"), absolute("/srv")], ["/", "/app", "/srv"]);
    }
}
