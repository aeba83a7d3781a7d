//! The sockets of the API: passed by a service manager, or made here.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use listenfd::ListenFd;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::net::{TcpListener, UnixListener};

use crate::access::{AccountId, TlsConfig};
use crate::api::tls::{Tls, TlsFiles, own_certificate};
use crate::api::{Account, Listener, LocalUsers};
use crate::config::Config;

/// Mode of the socket without a group, and with one.
const OWNER_ONLY: u32 = 0o600;
const WITH_GROUP: u32 = 0o660;
/// Mode of the run directory when a group may connect to the socket in it: its users reach the socket by name, and
/// cannot list the directory.
const REACHED_BY_GROUP: u32 = 0o710;

/// Sockets that a service manager passed, as systemd does (`LISTEN_FDS`).
#[derive(Debug, Default)]
pub struct Passed {
    tcp: Vec<std::net::TcpListener>,
    local: Vec<std::os::unix::net::UnixListener>,
}

impl Passed {
    /// Takes the passed sockets. Changes the environment, so it is called before other threads read that.
    ///
    /// # Errors
    /// Fails when a passed descriptor is something else.
    pub fn take() -> anyhow::Result<Self> {
        let (mut passed, mut descriptors) = (Self::default(), ListenFd::from_env());
        for index in 0..descriptors.len() {
            if let Ok(Some(listener)) = descriptors.take_unix_listener(index) {
                passed.local.push(listener);
            } else if let Ok(Some(listener)) = descriptors.take_tcp_listener(index) {
                passed.tcp.push(listener);
            } else {
                bail!("passed socket {index} is neither a TCP socket nor a Unix stream socket");
            }
        }
        Ok(passed)
    }
}

/// The sockets of the API; the files of sockets that were made here are removed when this is dropped.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) listeners: Vec<Listener>,
    pub(super) file: Option<SocketFile>,
}

/// Opens all sockets. Must be called within a runtime, because it spawns a task.
pub(super) async fn open(config: &Config, passed: Passed) -> anyhow::Result<Opened> {
    let users = users(config)?;
    let (mut listeners, mut file) = (Vec::new(), None);
    if passed.local.is_empty() {
        let (listener, made) = local(config)?;
        tracing::info!(socket = %made.path.display(), "listening");
        listeners.push(Listener::Local { listener, users: users.clone() });
        file = Some(made);
    }
    for listener in passed.local {
        listener.set_nonblocking(true)?;
        tracing::info!(socket = ?listener.local_addr()?, "listening on a passed socket");
        listeners.push(Listener::Local { listener: UnixListener::from_std(listener)?, users: users.clone() });
    }
    let tls = config.tls.as_ref().map(|tls| certificate(config, tls)).transpose()?;
    if let Some(tls) = &tls {
        tokio::spawn(tls.clone().follow());
    }
    let mut tcp = Vec::new();
    for listener in passed.tcp {
        if let Some(problem) = config.exposure("a passed socket", listener.local_addr()?.ip()) {
            bail!(problem);
        }
        listener.set_nonblocking(true)?;
        tcp.push(TcpListener::from_std(listener)?);
    }
    if tcp.is_empty() {
        let bound = TcpListener::bind(config.listen).await;
        tcp.push(bound.with_context(|| format!("cannot listen on {}", config.listen))?);
    }
    for listener in tcp {
        tracing::info!(address = %listener.local_addr()?, tls = tls.is_some(), "listening");
        listeners.push(Listener::Tcp { listener, tls: tls.clone() });
    }
    Ok(Opened { listeners, file })
}

fn certificate(config: &Config, tls: &TlsConfig) -> anyhow::Result<Tls> {
    let files = match tls {
        TlsConfig::Files(files) => {
            TlsFiles { certificate: files.certificate.clone(), key: files.key.clone() }
        }
        TlsConfig::Own(_) => own_certificate(&config.data_dir.join("keys"), names(config.listen.ip()))?,
    };
    Tls::open(files).context("cannot use the TLS certificate")
}

/// Returns the names in a certificate that is made here: those of loopback and of this host, and the address that is
/// listened on.
fn names(address: IpAddr) -> Vec<String> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    // A name in a certificate is ASCII.
    names.extend(Some(host).filter(|host| !host.is_empty() && host.is_ascii()));
    names.extend((!address.is_unspecified()).then(|| address.to_canonical().to_string()));
    names.sort();
    names.dedup();
    names
}

fn users(config: &Config) -> anyhow::Result<LocalUsers> {
    let mut users = Vec::new();
    for user in &config.socket_users {
        let account = match (&user.user, &user.group) {
            (Some(user), _) => Account::User(user_number(user)?),
            (None, Some(group)) => Account::Group(group_number(group)?),
            (None, None) => continue,
        };
        users.push((account, user.scopes.clone()));
    }
    Ok(LocalUsers(users))
}

fn user_number(user: &AccountId) -> anyhow::Result<u32> {
    number(user, "user", |name| Ok(nix::unistd::User::from_name(name)?.map(|user| user.uid.as_raw())))
}

fn group_number(group: &AccountId) -> anyhow::Result<u32> {
    number(group, "group", |name| Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw())))
}

fn number(
    account: &AccountId,
    kind: &str,
    find: impl FnOnce(&str) -> anyhow::Result<Option<u32>>,
) -> anyhow::Result<u32> {
    match account {
        AccountId::Number(number) => Ok(*number),
        AccountId::Name(name) => find(name)?.with_context(|| format!("there is no {kind} {name}")),
    }
}

/// Makes the Unix socket, and opens the way to it for its group.
fn local(config: &Config) -> anyhow::Result<(UnixListener, SocketFile)> {
    let (path, group) = (config.socket(), config.socket_group.as_ref().map(group_number).transpose()?);
    let made = bind(&path, group).with_context(|| format!("cannot listen on {}", path.display()))?;
    if let (Some(group), true) = (group, path.parent() == Some(&config.run_dir)) {
        let opened = chown(&config.run_dir, None, Some(group)).and_then(|()| {
            fs::set_permissions(&config.run_dir, fs::Permissions::from_mode(REACHED_BY_GROUP))
        });
        opened.with_context(|| format!("cannot open {} for the group", config.run_dir.display()))?;
    }
    Ok(made)
}

/// The file of a listening Unix socket, which is removed when this is dropped, unless another one has its name.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|seen| (seen.dev(), seen.ino()))
}

/// Listens on a path. A socket that nobody listens on any more is replaced; anything else there stays.
fn bind(path: &Path, group: Option<u32>) -> anyhow::Result<(UnixListener, SocketFile)> {
    make_way(path)?;
    // Nobody can connect before the socket listens, and by then it has its rights.
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let file = SocketFile { path: path.to_path_buf(), identity: identity(path)? };
    let mode = if group.is_some() { WITH_GROUP } else { OWNER_ONLY };
    chown(path, None, group)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// Length of the queue of pending connections: the kernel's default limit (net.core.somaxconn).
const BACKLOG: i32 = 4096;

/// Removes the socket of a daemon that has ended; fails if another process listens on it, or if it is no socket.
fn make_way(path: &Path) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        seen => ensure!(seen?.file_type().is_socket(), "it exists and is no socket"),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {
            let holder = socket_peercred(&socket).map_or_else(
                |_| "another process".to_owned(),
                |credentials| format!("process {}", credentials.pid.as_raw_pid()),
            );
            bail!("{holder} listens on it")
        }
        // Its queue is full.
        Err(rustix::io::Errno::AGAIN) => bail!("another process listens on it"),
        Err(rustix::io::Errno::CONNREFUSED) => {
            tracing::info!(socket = %path.display(), "the socket of a daemon that has ended is replaced");
            fs::remove_file(path).context("cannot remove the socket of a daemon that has ended")
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn the_socket_of_the_dead_is_replaced_and_that_of_the_living_is_not() {
        let scratch = tempfile::tempdir().expect("scratch");
        let path = scratch.path().join("s");
        let (listener, file) = bind(&path, None).expect("bound");
        assert_eq!(mode(&path), 0o600);
        let refused = bind(&path, None).expect_err("it is in use").to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        // The process died without removing its socket.
        drop(listener);
        std::mem::forget(file);
        let (listener, file) = bind(&path, Some(50)).expect("replaced");
        assert_eq!((mode(&path), fs::metadata(&path).expect("there").gid()), (0o660, 50));
        drop((listener, file));
        assert!(!path.exists());
        fs::write(&path, "precious").expect("written");
        assert!(bind(&path, None).expect_err("no socket").to_string().contains("no socket"));
        assert_eq!(fs::read(&path).expect("kept"), b"precious");
    }

    #[tokio::test]
    async fn only_the_own_file_is_removed() {
        let scratch = tempfile::tempdir().expect("scratch");
        let path = scratch.path().join("s");
        let (_listener, file) = bind(&path, None).expect("bound");
        fs::rename(&path, scratch.path().join("moved")).expect("moved");
        let (_other, _kept) = bind(&path, None).expect("bound");
        drop(file);
        assert!(path.exists());
    }
}
