//! The port of the process that carries mediated egress: its sockets, its start, its identity and its end.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::sockopt::{set_ip_freebind, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};
use stead_controllers::host::{HostError, HostErrorKind, MediatorSeen, Mediators};
use stead_schemas::egress::MediatorSettings;
use stead_schemas::names::Uid;
use tokio::task::spawn_blocking;

use super::{Carriers, Known};
use crate::host::cgroup::Group;
use crate::host::process::{Identity, arguments, find_by_argument};
use crate::hypervisor::CarrierCommand;

/// Number of connections that wait in the kernel while the process is busy.
const BACKLOG: i32 = 4096;
/// Time limit for the first reply of a process that starts.
const START_WAIT: Duration = Duration::from_secs(60);
/// Pause between two questions to a process that starts.
const START_POLL: Duration = Duration::from_millis(2);
/// Time for which a process may be silent before it counts as hanging. A machine that others keep busy answers later
/// than a quiet one.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Size of the log of messages, in bytes, at which a process that starts begins it anew. Its limit on files keeps it within
/// four times of that while it runs.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// The arguments by which a process is found again and compared.
const OWNER: &str = "--owner";
const BUILD: &str = "--build";
const MARK: &str = "--mark";

/// Returns the identity of this program's file.
fn build() -> io::Result<String> {
    let meta = fs::metadata("/proc/self/exe")?;
    Ok(format!("{}-{}-{}", meta.dev(), meta.ino(), meta.mtime()))
}

/// Returns the path of this program.
fn program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    // The program was replaced since this daemon began: the new file is the program of the next process.
    let text = path.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| path.clone(), PathBuf::from))
}

/// Returns the argument after a word.
fn after<'a>(arguments: &'a [String], word: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|argument| argument == word)?;
    arguments.get(at + 1).map(String::as_str)
}

fn internet(kind: SocketType, address: SocketAddrV4) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if kind == SocketType::STREAM {
        set_socket_reuseaddr(&socket, true)?;
    }
    // The bridge with this address may not exist yet, or be made again.
    set_ip_freebind(&socket, true)?;
    let named = |error: rustix::io::Errno| {
        io::Error::new(io::Error::from(error).kind(), format!("{address}: {error}"))
    };
    bind(&socket, &address).map_err(named)?;
    if kind == SocketType::STREAM {
        listen(&socket, BACKLOG).map_err(named)?;
    }
    Ok(socket)
}

/// Opens the sockets of the process, in the order of its descriptors.
fn sockets(control: &Path, settings: &MediatorSettings) -> io::Result<Vec<OwnedFd>> {
    let at = |port| SocketAddrV4::new(settings.address, port);
    let ports = settings.ports;
    let mut all = vec![
        internet(SocketType::STREAM, at(ports.captured))?,
        internet(SocketType::STREAM, at(ports.explicit))?,
        internet(SocketType::DGRAM, at(ports.names))?,
        internet(SocketType::STREAM, at(ports.names))?,
    ];
    match fs::remove_file(control) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        done => done?,
    }
    let listener = UnixListener::bind(control)?;
    listener.set_nonblocking(true)?;
    all.insert(0, listener.into());
    Ok(all)
}

impl Carriers {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self) -> String {
        self.socket().display().to_string()
    }

    /// Returns the live process and the object that it runs for. One that an earlier daemon started is found by its
    /// command line. Waits for the kernel.
    fn find(&self) -> io::Result<Option<(Uid, Identity)>> {
        let (known, is_searched) = {
            let known = self.known();
            (known.process.clone(), known.is_searched)
        };
        if let Some(process) = known
            && process.1.is_alive()?
        {
            return Ok(Some(process));
        }
        if is_searched {
            return Ok(None);
        }
        let mark = self.mark();
        let user = self.0.config.jails.carrier_user();
        let identity = find_by_argument(user, |argument| argument == mark)?;
        let found = match identity {
            Some(identity) => {
                let owner = after(&arguments(identity.pid)?, OWNER).and_then(|owner| owner.parse().ok());
                owner.map(|owner| (owner, identity))
            }
            None => None,
        };
        self.known().is_searched = true;
        found.iter().for_each(|found| self.remember(found.clone()));
        Ok(found)
    }

    /// Keeps the process and notices its end.
    fn remember(&self, found: (Uid, Identity)) {
        self.known().process = Some(found.clone());
        let (owner, identity) = found;
        let ended = self.0.config.ended.clone();
        match identity.open() {
            Ok(Some(pidfd)) => drop(tokio::spawn(async move {
                pidfd.exited().await;
                ended(owner);
            })),
            Ok(None) => ended(owner),
            Err(error) => tracing::warn!(%error, "the end of the process that carries egress is found later"),
        }
    }

    async fn found(&self) -> Result<Option<(Uid, Identity)>, HostError> {
        let carriers = self.clone();
        let found = spawn_blocking(move || carriers.find()).await.map_err(io::Error::other);
        let failed = |error| HostError::io("find", "the process that carries egress".to_owned(), error);
        found.and_then(|found| found).map_err(failed)
    }

    /// Spawns the process, which is in `known` afterwards. Waits for the disk and for the child.
    fn spawn(&self, owner: &Uid, settings: &MediatorSettings) -> io::Result<()> {
        let config = &self.0.config;
        let sockets = sockets(&self.socket(), settings)?;
        let log =
            File::options().create(true).append(true).mode(0o600).open(config.data_dir.join("egress.log"))?;
        if log.metadata()?.len() > LOG_BYTES_MAX {
            log.set_len(0)?;
        }
        let roots = config.roots.display().to_string();
        let settings = serde_json::to_string(settings)?;
        let daemon = rustix::process::geteuid().as_raw().to_string();
        let arguments = [
            "egress",
            "serve",
            "--settings",
            &settings,
            "--roots",
            &roots,
            "--daemon",
            &daemon,
            OWNER,
            owner.as_str(),
            BUILD,
            &build()?,
            MARK,
            &self.mark(),
        ];
        let command = CarrierCommand {
            program: program()?,
            arguments: arguments.map(str::to_owned).to_vec(),
            descriptors: sockets,
            files: vec![config.roots.clone()],
            log,
            group: config.cgroups.prepare("egress", None).unwrap_or_else(|error| {
                tracing::warn!(%error, "the process that carries egress is in no control group of its own");
                Group::default()
            }),
        };
        // Until it is known, a process may be there that only a search finds.
        self.known().is_searched = false;
        let spawned = config.jails.spawn_carrier(command)?;
        match Identity::of(spawned.pid)? {
            Some(identity) => {
                self.remember((owner.clone(), identity));
                self.known().is_searched = true;
            }
            None => return Err(io::Error::other("it ended at once; its log says why")),
        }
        Ok(())
    }

    /// Waits until the process answers, or has ended.
    async fn answered(&self) -> Result<(), HostError> {
        let subject = "the process that carries egress";
        let ended = || HostError::new(HostErrorKind::Transient, "start", subject);
        let wait = async {
            while self.state().await?.is_none() {
                if self.found().await?.is_none() {
                    return Err(ended().because("it ended; egress.log in the data directory says why"));
                }
                tokio::time::sleep(START_POLL).await;
            }
            Ok(())
        };
        tokio::time::timeout(START_WAIT, wait).await.unwrap_or_else(|_| Err(ended().because("it is silent")))
    }
}

impl Mediators for Carriers {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        Ok(self.found().await?.into_iter().map(|(owner, _)| owner).collect())
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<MediatorSeen>, HostError> {
        let Some((_, identity)) = self.found().await?.filter(|(found, _)| found == owner) else {
            return Ok(None);
        };
        let failed = |error| HostError::io("inspect", format!("process {}", identity.pid), error);
        let build = build().map_err(failed)?;
        let is_current = after(&arguments(identity.pid).map_err(failed)?, BUILD) == Some(&build);
        let answer = async {
            loop {
                if let Ok(state) = self.state().await {
                    return state.map(|state| state.settings);
                }
                tokio::time::sleep(START_POLL).await;
            }
        };
        let settings = tokio::time::timeout(SILENCE_MAX, answer).await.ok().flatten();
        Ok(Some(MediatorSeen { pid: identity.pid, is_current, settings }))
    }

    async fn launch(&self, owner: &Uid, settings: &MediatorSettings) -> Result<(), HostError> {
        if self.found().await?.is_some_and(|(found, _)| found == *owner) {
            return self.answered().await;
        }
        let (carriers, owner, settings) = (self.clone(), owner.clone(), settings.clone());
        let spawned = spawn_blocking(move || carriers.spawn(&owner, &settings)).await;
        let spawned = spawned.map_err(io::Error::other).and_then(|spawned| spawned);
        spawned.map_err(|error| {
            let subject = "the process that carries egress".to_owned();
            if error.kind() == io::ErrorKind::AddrInUse {
                return HostError::new(HostErrorKind::Conflict, "start", subject).because(error);
            }
            HostError::io("start", subject, error)
        })?;
        self.answered().await
    }

    async fn retire(&self, owner: &Uid) -> Result<(), HostError> {
        let Some((_, identity)) = self.found().await?.filter(|(found, _)| found == owner) else {
            return Ok(());
        };
        identity.kill().await?;
        self.known().process = None;
        // The group is empty now; one that is left is used again.
        if let Err(error) = self.0.config.cgroups.remove("egress") {
            tracing::debug!(%error, "the control group of the process that carried egress is left");
        }
        Ok(())
    }
}
