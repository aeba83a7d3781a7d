//! The data directory, and the daemon that uses it.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use super::{ANSWER_DEADLINE, Finding};
use crate::config::Config;
use crate::host::files;
use crate::store::{identity, mark};

/// The daemon that uses the data directory, if one does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Daemon {
    Runs { pid: String, health: Result<(), String> },
    Ended,
}

/// Finds the daemon by the lock that it holds, and asks it for its health.
pub(super) async fn daemon(config: &Config) -> Daemon {
    let path = config.data_dir.join("lock");
    let Ok(file) = fs::File::open(&path) else { return Daemon::Ended };
    // This takes a shared lock and returns it at once: a daemon holds an exclusive one.
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return Daemon::Ended;
    }
    let pid = fs::read_to_string(&path).unwrap_or_default();
    Daemon::Runs { pid, health: health(config).await }
}

async fn health(config: &Config) -> Result<(), String> {
    // The socket needs no certificate, and no other program can have taken it.
    let socket = config.socket();
    let shown = socket.display();
    // The client is built without a provider; one that is installed already stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER_DEADLINE);
    let client = client.unix_socket(socket.as_path()).build();
    let answer = match client {
        Ok(client) => client.get("http://localhost/health").send().await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(format!("{shown} answers {}", answer.status())),
        Err(error) => Err(format!("{shown} does not answer: {}", error.without_url())),
    }
}

pub(super) fn examine(config: &Config, daemon: &Daemon) -> Vec<Finding> {
    let mut findings = vec![running(daemon)];
    findings.push(directory(&config.data_dir));
    if config.data_dir.is_dir() {
        findings.push(room(config));
    }
    if let Err(error) = identity::check(&config.data_dir, &config.run_dir) {
        findings.push(Finding::problem("run directory", error.to_string(), "do as the message says"));
    }
    if let Err(error) = mark::check_presence(&config.data_dir) {
        findings.push(Finding::problem("database", error.to_string(), "do as the message says"));
    }
    findings
}

fn running(daemon: &Daemon) -> Finding {
    match daemon {
        Daemon::Runs { pid, health: Ok(()) } => Finding::ok("daemon", format!("process {pid} answers")),
        Daemon::Runs { pid, health: Err(why) } => Finding::problem(
            "daemon",
            format!("process {pid} runs, but {why}"),
            "see its log; a restart harms no VM",
        ),
        Daemon::Ended => {
            Finding::warning("daemon", "does not run on this data directory", "systemctl start stead")
        }
    }
}

fn directory(path: &Path) -> Finding {
    let subject = "data directory";
    let shown = path.display();
    let seen = match fs::metadata(path) {
        Ok(seen) => seen,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let remedy = "mount it, or start the daemon once, which makes it";
            return Finding::warning(subject, format!("{shown} is not there"), remedy);
        }
        Err(error) => {
            return Finding::problem(subject, format!("{shown}: {error}"), "see to the rights of this path");
        }
    };
    if seen.uid() != 0 {
        let message = format!("{shown} belongs to user {}", seen.uid());
        return Finding::problem(subject, message, format!("chown -R root: {shown}"));
    }
    if seen.permissions().mode() & 0o077 != 0 {
        let message = format!("{shown} is open to other users");
        return Finding::problem(
            subject,
            message,
            format!("chmod 700 {shown}; the daemon does so when it starts"),
        );
    }
    Finding::ok(subject, format!("{shown} is root's alone"))
}

fn room(config: &Config) -> Finding {
    let (_, free) = files::space(&config.data_dir).unwrap_or_default();
    let reserve = config.disk_reserve();
    if free < reserve {
        let message = format!(
            "{free} are free, less than the reserve of {reserve}: new disks, images and saves are refused"
        );
        return Finding::problem("disk", message, "delete instances, snapshots or images, or grow the disk");
    }
    Finding::ok("disk", format!("{free} are free; {reserve} are kept in reserve"))
}
