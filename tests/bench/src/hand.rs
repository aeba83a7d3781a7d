//! A manually started VM: the exact command line of our VMM, with its own sockets, and this program as the host in
//! the guest's handshake.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stead_schemas::guest::{Config, Decoder, Frame, FromGuest, NetworkConfig, Phase, Seed, ToGuest, Token};

use crate::daemon::DEADLINE;

/// A process that does not outlive the value, even after a panic.
#[derive(Debug)]
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A TAP for a manually started VM, on no bridge. It is removed when the value is dropped.
#[derive(Debug)]
pub(crate) struct Tap(&'static str);

impl Tap {
    pub(crate) fn make(name: &'static str) -> Self {
        for words in [&["tuntap", "add", name, "mode", "tap"][..], &["link", "set", name, "up"]] {
            let made = Command::new("ip").args(words).status();
            assert!(made.is_ok_and(|status| status.success()), "ip {words:?}");
        }
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", self.0]).status();
    }
}

/// Returns the command line of our VM, with its own sockets, logs, RAM and overlay, and the same network card if
/// there is a TAP for it. Files that our VM got as descriptors are opened by their paths.
pub(crate) fn arguments(pid: u64, own: &Path, directory: &Path, tap: Option<&Tap>) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).expect("the VMM runs");
    let words: Vec<String> = line
        .split(|&byte| byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    // A descriptor is described by the path of its file.
    let mut files = BTreeMap::new();
    for pair in words.windows(2).filter(|pair| pair[0] == "-add-fd") {
        let mut parts = pair[1].splitn(3, ',');
        let (number, path) = (parts.next().expect("a number"), parts.nth(1).expect("a path"));
        let number = number.strip_prefix("fd=").expect("a number").to_owned();
        files.insert(number, path.strip_prefix("opaque=").expect("a path").to_owned());
    }
    let mut out = Vec::new();
    let mut words = words.into_iter().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "-add-fd" => drop(words.next()),
            "-netdev" | "-device" | "-chardev" | "-blockdev" | "-object" => {
                let value = words.next().unwrap_or_default();
                if let Some(value) = by_hand(&value, own, directory, tap, &files) {
                    out.extend([word, value]);
                }
            }
            _ => out.push(word),
        }
    }
    out
}

/// Converts the value of an option, or returns `None` if the VM should be without it.
fn by_hand(
    value: &str,
    own: &Path,
    directory: &Path,
    tap: Option<&Tap>,
    files: &BTreeMap<String, String>,
) -> Option<String> {
    let is_network = value.starts_with("tap,") || value.starts_with("virtio-net");
    if is_network && tap.is_none() {
        return None;
    }
    let file = |name: &str| directory.join(name).display().to_string();
    let part = |part: &str| match part.split_once('=') {
        // The measured VMs have one processor, so one queue.
        Some(("fds", _)) => tap.map(|Tap(name)| format!("ifname={name},script=no,downscript=no")),
        // Opened by the VMM itself.
        Some(("vhostfds", _)) => None,
        Some(("fd", _)) if value.starts_with("socket,id=qmp,") => Some(format!("path={}", file("qmp.sock"))),
        Some(("fd", _)) => Some(format!("path={}", file("control.sock"))),
        // The console's log.
        Some(("path", _)) => Some(format!("path={}", file("app.log"))),
        Some(("filename", _)) if value.contains("overlay-file") => {
            Some(format!("filename={}", own.display()))
        }
        Some(("filename", name)) => {
            Some(format!("filename={}", files[name.strip_prefix("/dev/fdset/").expect("a descriptor")]))
        }
        // Our RAM is a file of our VMM.
        Some(("mem-path", _)) => None,
        _ if part == "memory-backend-file" => Some("memory-backend-memfd".to_owned()),
        _ => Some(part.to_owned()),
    };
    Some(value.split(',').filter_map(part).collect::<Vec<_>>().join(","))
}

/// Puts the card behind a hub, without which earlier daemons could not replace a removed TAP.
pub(crate) fn move_behind_hub(arguments: &mut Vec<String>) {
    let at = arguments.iter().position(|word| word.starts_with("tap,id=card,")).expect("a card");
    // The kernel cannot serve a hub.
    let tap = arguments[at].replace("id=card,", "id=tap,").replace(",vhost=on", "");
    let ports = ["hubport,id=plug,hubid=0,netdev=tap", "hubport,id=card,hubid=0"];
    let words = [tap.as_str(), "-netdev", ports[0], "-netdev", ports[1]].map(ToOwned::to_owned);
    arguments.splice(at..=at, words);
}

/// Makes an empty disk for a manually started VM.
pub(crate) fn make_overlay(path: &Path) {
    make_disk(path, 256 << 20);
}

/// Makes an empty disk of this size, in bytes.
pub(crate) fn make_disk(path: &Path, bytes: u64) {
    fs::File::create(path).and_then(|file| file.set_len(bytes)).expect("made");
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(path).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4 runs");
}

/// A manually started VM whose program runs. It is ended when the value is dropped.
#[derive(Debug)]
pub(crate) struct Hand {
    vmm: Vmm,
    _control: UnixStream,
    /// Time from the spawn until the guest reported that its program runs, in seconds.
    pub(crate) seconds: f64,
}

impl Hand {
    pub(crate) fn boot(arguments: &[String], directory: &Path, program: &[&str]) -> Self {
        Self::boot_with(arguments, directory, program, None)
    }

    /// Boots a VM whose guest configures its card so.
    pub(crate) fn boot_with(
        arguments: &[String],
        directory: &Path,
        program: &[&str],
        network: Option<NetworkConfig>,
    ) -> Self {
        let start = Instant::now();
        let (vmm, mut socket) = spawn(arguments, directory);
        let token = Token("bench".to_owned());
        send(&socket, &ToGuest::Attach { nonce: 1 });
        let mut is_configured = false;
        until(&mut socket, |state, writer| {
            if state.phase == Phase::AwaitingConfig && !is_configured {
                is_configured = true;
                let (token, config) = (token.clone(), Box::new(config(program, network.clone())));
                send(writer, &ToGuest::Configure { token, seed: Seed(vec![7; 32]), config });
            }
            state.phase == Phase::Ready
        });
        Self { vmm, _control: socket, seconds: start.elapsed().as_secs_f64() }
    }

    /// Starts a VMM that `load` continues. Returns when its guest answers.
    pub(crate) fn go_on(arguments: &[String], directory: &Path, load: impl FnOnce()) -> Self {
        const NONCE: u64 = 2;
        let start = Instant::now();
        let (vmm, mut socket) = spawn(arguments, directory);
        send(&socket, &ToGuest::Attach { nonce: NONCE });
        load();
        until(&mut socket, |state, _| state.nonce == NONCE && state.phase == Phase::Ready);
        Self { vmm, _control: socket, seconds: start.elapsed().as_secs_f64() }
    }

    /// Waits until its process has ended.
    pub(crate) fn wait(mut self) {
        self.vmm.0.wait().expect("waited");
    }
}

fn spawn(arguments: &[String], directory: &Path) -> (Vmm, UnixStream) {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory).expect("made");
    let start = Instant::now();
    let mut command = Command::new("qemu-system-x86_64");
    // The sandbox option is left out, so that a manually started VMM may spawn a shell.
    let mut is_sandbox = false;
    let arguments = arguments.iter().filter(|word| {
        let is_dropped = is_sandbox || *word == "-sandbox";
        is_sandbox = *word == "-sandbox";
        !is_dropped
    });
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let vmm = Vmm(command.spawn().expect("qemu runs"));
    loop {
        match UnixStream::connect(directory.join("control.sock")) {
            Ok(socket) => return (vmm, socket),
            Err(_) if start.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("no control socket: {error}"),
        }
    }
}

fn send(mut writer: &UnixStream, message: &ToGuest) {
    let frame = Frame::control(message).expect("small");
    writer.write_all(&frame.encode()).expect("sent");
}

/// Reads states until one satisfies the condition.
fn until(socket: &mut UnixStream, mut is_so: impl FnMut(&FromGuest, &UnixStream) -> bool) {
    let writer = socket.try_clone().expect("cloned");
    let mut decoder = Decoder::default();
    let mut buffer = [0u8; 4096];
    loop {
        let count = socket.read(&mut buffer).expect("read");
        assert!(count > 0, "the VM ended");
        decoder.push(&buffer[..count]);
        while let Some(frame) = decoder.next() {
            if frame.message::<FromGuest>().is_some_and(|state| is_so(&state, &writer)) {
                return;
            }
        }
    }
}

fn config(program: &[&str], network: Option<NetworkConfig>) -> Config {
    Config {
        hostname: "hand".to_owned(),
        machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
        instance: String::new(),
        argv: program.iter().map(|word| (*word).to_owned()).collect(),
        env: BTreeMap::new(),
        working_dir: String::new(),
        user: String::new(),
        stop_signal: None,
        shutdown_grace_millis: 1000,
        network,
        hotplug_bytes: 0,
        has_agent: true,
        volumes: Vec::new(),
        egress: None,
        incarnation: String::new(),
    }
}
