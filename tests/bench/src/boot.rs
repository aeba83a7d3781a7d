//! From POST to Running, against the same kernel, initrd and disks started by hand.
//!
//! By hand: the very command line of our VMM, with sockets of its own, and this program answering
//! the guest's handshake. Rounds are interleaved.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stead_schemas::guest::{Config, Decoder, Frame, FromGuest, Phase, Seed, ToGuest, Token};

use crate::daemon::{DEADLINE, Daemon};
use crate::{Figure, median};

const ROUNDS: usize = 5;

/// A process that does not outlive the value, whatever panics.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The command line of our VM, with sockets, logs, RAM and overlay of its own and without a network card.
fn by_hand(pid: u64, own: &Path, place: &Path) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).expect("the VMM runs");
    let words: Vec<String> = line
        .split(|&byte| byte == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let place = place.display().to_string();
    let mut out = Vec::new();
    let mut words = words.into_iter().skip(1);
    while let Some(word) = words.next() {
        if matches!(
            word.as_str(),
            "-netdev" | "-device" | "-chardev" | "-qmp" | "-blockdev" | "-name" | "-object"
        ) {
            let value = words.next().unwrap_or_default();
            if word == "-netdev" || value.starts_with("virtio-net") {
                continue;
            }
            let mut value = value;
            for name in ["qmp.sock", "control.sock", "app.log"] {
                let at = value.find("path=").or_else(|| value.find("unix:")).map(|at| at + 5);
                if let (Some(at), Some(end)) = (at, value.find(name)) {
                    value = format!("{}{place}/{}", &value[..at], &value[end..]);
                }
            }
            if value.contains("overlay-file") && value.contains("filename=") {
                value = format!(
                    "driver=file,node-name=overlay-file,filename={},read-only=off,discard=unmap",
                    own.display()
                );
            }
            if word == "-object" {
                // Ours is a descriptor of our VMM's.
                let rest = value.replace("memory-backend-file", "memory-backend-memfd");
                value = rest
                    .split(',')
                    .filter(|part| !part.starts_with("mem-path="))
                    .collect::<Vec<_>>()
                    .join(",");
            }
            out.extend([word, value]);
        } else {
            out.push(word);
        }
    }
    out
}

/// Seconds from the spawn until the guest says its program runs.
fn hand_boot(arguments: &[String], place: &Path) -> f64 {
    let _ = fs::remove_dir_all(place);
    fs::create_dir_all(place).expect("made");
    let start = Instant::now();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _vmm = Vmm(command.spawn().expect("qemu runs"));
    let mut socket = loop {
        match UnixStream::connect(place.join("control.sock")) {
            Ok(socket) => break socket,
            Err(_) if start.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("no control socket: {error}"),
        }
    };
    let token = Token("bench".to_owned());
    let mut writer = socket.try_clone().expect("cloned");
    let mut send = |message: &ToGuest| {
        let frame = Frame::control(message).expect("small");
        writer.write_all(&frame.encode()).expect("sent");
    };
    send(&ToGuest::Attach { nonce: 1 });
    let argv = ["/bin/busybox", "sleep", "100000"].map(ToOwned::to_owned).to_vec();
    let config = Config {
        hostname: "hand".to_owned(),
        machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
        argv,
        env: std::collections::BTreeMap::new(),
        working_dir: String::new(),
        user: String::new(),
        stop_signal: None,
        shutdown_grace_millis: 1000,
        network: None,
        has_agent: true,
        incarnation: String::new(),
    };
    let mut decoder = Decoder::default();
    let mut buffer = [0u8; 4096];
    let mut is_configured = false;
    loop {
        let count = socket.read(&mut buffer).expect("read");
        assert!(count > 0, "the VMM ended");
        decoder.push(&buffer[..count]);
        let mut is_ready = false;
        while let Some(frame) = decoder.next() {
            let phase = frame.message::<FromGuest>().map(|state| state.phase);
            if phase == Some(Phase::AwaitingConfig) && !is_configured {
                is_configured = true;
                let (token, config) = (token.clone(), Box::new(config.clone()));
                send(&ToGuest::Configure { token, seed: Seed(vec![7; 32]), config });
            }
            is_ready |= phase == Some(Phase::Ready);
        }
        if is_ready {
            return start.elapsed().as_secs_f64();
        }
    }
}

pub(crate) async fn boot() -> Vec<Figure> {
    let daemon = Daemon::start("stbench0", "10.239.250.1/24").await;
    daemon.import().await;
    let (mut ours, mut hand) = (Vec::new(), Vec::new());
    let overlay = daemon.dir.path().join("hand.ext4");
    let place = daemon.dir.path().join("hand");
    for round in 0..ROUNDS {
        let name = format!("b{round}");
        ours.push(daemon.post(&name, "256MB").await);
        let instance = daemon.get(&format!("/instances/{name}")).await;
        let arguments = by_hand(instance["vmm_pid"].as_u64().expect("a process"), &overlay, &place);
        daemon.delete(&name).await;
        fs::File::create(&overlay).and_then(|file| file.set_len(256 << 20)).expect("made");
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&overlay).status();
        assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4 runs");
        hand.push(hand_boot(&arguments, &place));
    }
    vec![Figure {
        what: "POST to Running (peer: the same command line by hand, no network card)".to_owned(),
        ours: median(ours),
        peer: Some(median(hand)),
        unit: "s",
        goal: "<= 1.10",
    }]
}
