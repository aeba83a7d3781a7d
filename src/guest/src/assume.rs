//! Becoming another instance: what a guest does that goes on from the memory of another.
//!
//! Programs run on meanwhile. Random numbers come first: keys are made of them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::{fs, io};

use rustix::process::{Pid, Signal, kill_process};
use stead_schemas::guest::{Assumed, NetworkConfig, Seed};

use crate::children::Children;
use crate::{BootError, identity, network, root};

const SSH: &str = "/etc/ssh";
/// Makes every host key that is missing.
const KEYGEN: &str = "/usr/bin/ssh-keygen";
const SSHD_PID: &str = "/run/sshd.pid";

/// Takes on names, addresses and keys.
pub(crate) fn assume(
    old: Option<&NetworkConfig>,
    assumed: &Assumed,
    seed: &Seed,
    children: &Children,
) -> Result<(), BootError> {
    // A kernel that refuses has numbers of its own.
    let _ = identity::credit_entropy(&seed.0);
    rustix::system::sethostname(assumed.hostname.as_bytes())
        .map_err(|error| BootError::new("hostname", error))?;
    if let Some(new) = &assumed.network {
        network::replace(old, new)?;
    }
    root::write_names("", &assumed.hostname, assumed.network.as_ref())?;
    identity::set_machine_id(&assumed.machine_id).map_err(|error| BootError::new("machine id", error))?;
    renew_host_keys(children).map_err(|error| BootError::new("ssh host keys", error))
}

/// An image without keys, or one that cannot make any, has none to renew.
fn renew_host_keys(children: &Children) -> io::Result<()> {
    let keys: Vec<_> = match fs::read_dir(SSH) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).filter(|path| is_host_key(path)).collect(),
        Err(_) => return Ok(()),
    };
    if keys.is_empty() || !Path::new(KEYGEN).exists() {
        return Ok(());
    }
    for key in keys {
        fs::remove_file(key)?;
    }
    let (sender, end) = std::sync::mpsc::sync_channel(1);
    let mut command = Command::new(KEYGEN);
    command.arg("-A").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    children.spawn(&mut command, move |status| {
        // The receiver waits for it.
        let _ = sender.send(status);
    })?;
    match end.recv() {
        Ok(status) if status.exit_status() == Some(0) => {}
        Ok(status) => return Err(io::Error::other(format!("ssh-keygen -A ended with {status:?}"))),
        Err(_) => return Err(io::Error::other("the end of ssh-keygen was lost")),
    }
    reload_sshd();
    Ok(())
}

fn is_host_key(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ssh_host_"))
}

/// A server that runs has the old keys in its memory.
fn reload_sshd() {
    let pid = fs::read_to_string(SSHD_PID).ok().and_then(|text| text.trim().parse::<i32>().ok());
    let Some(pid) = pid else { return };
    let is_sshd = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sshd");
    if let Some(pid) = Pid::from_raw(pid).filter(|_| is_sshd) {
        let _ = kill_process(pid, Signal::HUP);
    }
}
