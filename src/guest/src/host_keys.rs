//! ssh host keys: generated anew if this guest's disk or memory was another instance's.
//!
//! Guarantees: the disk itself records the instance that its keys belong to. So a fork that boots gets its own keys
//! too: the fork of a stopped instance, or a fork whose VMM died while its keys were made.
//! Never: changes the keys of an image that no other instance has used; they belong to the image's owner.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::process::{Pid, Signal, kill_process};

use crate::children::Children;

const SSH: &str = "/etc/ssh";
/// Program that generates every missing host key.
const KEYGEN: &str = "/usr/bin/ssh-keygen";
const SSHD_PID: &str = "/run/sshd.pid";

/// Extended attribute of the root directory: the uid of the instance that the keys below it belong to. Programs see
/// it only if they may administer the system.
const OWNER: &str = "trusted.stead.keys";
const OWNER_BYTES_MAX: usize = 64;

/// Settles the keys before the program starts, and before the reaper runs.
pub(crate) fn settle_at_boot(instance: &str) -> io::Result<()> {
    let owner = owner()?;
    if owner.is_some_and(|owner| owner != instance) {
        renew(|mut command| Ok(command.status()?.success()))?;
    }
    own(instance)
}

/// Settles the keys while programs run. A running ssh server reloads the new keys.
pub(crate) fn settle_in_another(instance: &str, children: &Children) -> io::Result<()> {
    renew(|mut command| {
        let (sender, end) = std::sync::mpsc::sync_channel(1);
        children.spawn(&mut command, move |status| {
            // The receiver waits for the status.
            let _ = sender.send(status);
        })?;
        let status = end.recv().map_err(|_| io::Error::other("the end of ssh-keygen was lost"))?;
        Ok(status.exit_status() == Some(0))
    })?;
    reload_sshd();
    own(instance)
}

/// Makes the keys anew. An image without keys, or without a way to make them, has none to renew.
fn renew(run: impl FnOnce(Command) -> io::Result<bool>) -> io::Result<()> {
    let keys: Vec<PathBuf> = match fs::read_dir(SSH) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).filter(|path| is_host_key(path)).collect(),
        Err(_) => return Ok(()),
    };
    if keys.is_empty() || !Path::new(KEYGEN).exists() {
        return Ok(());
    }
    for key in keys {
        fs::remove_file(key)?;
    }
    let mut command = Command::new(KEYGEN);
    command.arg("-A").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if run(command)? { Ok(()) } else { Err(io::Error::other("ssh-keygen -A failed")) }
}

fn is_host_key(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ssh_host_"))
}

fn owner() -> io::Result<Option<String>> {
    let mut bytes = [0; OWNER_BYTES_MAX];
    match getxattr("/", OWNER, &mut bytes) {
        Ok(count) => Ok(Some(String::from_utf8_lossy(&bytes[..count]).into_owned())),
        Err(rustix::io::Errno::NODATA) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn own(instance: &str) -> io::Result<()> {
    Ok(setxattr("/", OWNER, instance.as_bytes(), XattrFlags::empty())?)
}

/// Reloads a running ssh server, which has the old keys in its memory.
fn reload_sshd() {
    let pid = fs::read_to_string(SSHD_PID).ok().and_then(|text| text.trim().parse::<i32>().ok());
    let Some(pid) = pid else { return };
    let is_sshd = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sshd");
    if let Some(pid) = Pid::from_raw(pid).filter(|_| is_sshd) {
        let _ = kill_process(pid, Signal::HUP);
    }
}
