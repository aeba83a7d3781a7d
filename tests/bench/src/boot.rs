//! From POST to Running, against the same kernel, initrd and disks started by hand.
//!
//! By hand: the very command line of our VMM, with sockets of its own, and this program answering
//! the guest's handshake. Rounds are interleaved.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stead_schemas::guest::{Config, Decoder, Frame, FromGuest, Phase, ToGuest, Token};

use crate::{Figure, median};

const ROUNDS: usize = 5;
const DEADLINE: Duration = Duration::from_secs(60);

struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
    base: String,
    token: String,
    http: reqwest::Client,
}

/// The `stead` beside this program.
fn stead() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    own.with_file_name("stead")
}

impl Daemon {
    async fn start() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("scratch");
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .expect("a port")
            .port();
        let kernel = std::env::var("STEAD_KERNEL_DIR").expect("make bench sets STEAD_KERNEL_DIR");
        let log = fs::File::create(dir.path().join("log")).expect("made");
        let child = Command::new(stead())
            .args(["serve", "--listen", &format!("127.0.0.1:{port}"), "--kernel-dir", &kernel, "--data-dir"])
            .arg(dir.path().join("data"))
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .envs([
                ("STEAD_BRIDGE", "stbench0"),
                ("STEAD_GATEWAY", "10.239.250.1/24"),
                ("STEAD_TABLE", "stead_bench"),
                ("STEAD_TAP_PREFIX", "sb"),
                ("STEAD_LOG", "warn"),
            ])
            .stderr(log)
            .spawn()
            .expect("the daemon starts");
        let base = format!("http://127.0.0.1:{port}");
        let http = reqwest::Client::new();
        let deadline = Instant::now() + DEADLINE;
        while http.get(format!("{base}/health")).send().await.is_err() {
            assert!(Instant::now() < deadline, "the daemon does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let minted = Command::new(stead())
            .args(["token", "create", "--data-dir"])
            .arg(dir.path().join("data"))
            .output();
        let token = String::from_utf8_lossy(&minted.expect("minted").stdout).trim().to_owned();
        Self { child, dir, base, token, http }
    }

    async fn get(&self, path: &str) -> Value {
        let request = self.http.get(format!("{}{path}", self.base)).bearer_auth(&self.token);
        request.send().await.expect("answered").json().await.unwrap_or(Value::Null)
    }

    /// Imports busybox as a bare root file system: no registry is part of this figure.
    async fn import(&self) {
        let root = self.dir.path().join("root/bin");
        fs::create_dir_all(&root).expect("made");
        fs::copy("/bin/busybox", root.join("busybox")).expect("busybox-static is installed");
        let imported = Command::new(stead())
            .args(["image", "import", "--name", "bench.test/busybox:v1"])
            .arg({
                let tar = self.dir.path().join("root.tar");
                let made = Command::new("tar")
                    .args(["-C"])
                    .arg(self.dir.path().join("root"))
                    .arg("-cf")
                    .arg(&tar)
                    .arg(".")
                    .status();
                assert!(made.is_ok_and(|status| status.success()), "tar runs");
                tar
            })
            .env("STEAD_BASE_URL", &self.base)
            .env("STEAD_API_KEY", &self.token)
            .stdout(Stdio::null())
            .status();
        assert!(imported.is_ok_and(|status| status.success()), "imported");
    }

    /// Seconds from the POST until `wait` says Running.
    async fn post(&self, name: &str) -> f64 {
        let body = json!({
            "name": name, "image": "bench.test/busybox:v1", "size": "256MB", "vcpus": 1, "overlay_size": "256MB",
            "cmd": ["/bin/busybox", "sleep", "100000"],
        });
        let start = Instant::now();
        let request = self.http.post(format!("{}/instances", self.base)).bearer_auth(&self.token).json(&body);
        request.send().await.expect("answered").error_for_status().expect("accepted");
        let waited = self.get(&format!("/instances/{name}/wait?state=Running&timeout=60s")).await;
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!(waited["state"], "Running", "{waited}");
        seconds
    }

    async fn delete(&self, name: &str) {
        let url = format!("{}/instances/{name}?graceful_shutdown=false", self.base);
        self.http.delete(url).bearer_auth(&self.token).send().await.expect("answered");
    }

    /// A delete answers when the instance is gone; its TAP follows, and the daemon must live for that.
    async fn until_clear(&self) {
        let deadline = Instant::now() + DEADLINE;
        let has_taps = || {
            let shown = Command::new("ip").args(["-br", "link", "show", "master", "stbench0"]).output();
            shown.is_ok_and(|shown| !shown.stdout.is_empty())
        };
        while has_taps() {
            assert!(Instant::now() < deadline, "TAPs are left");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// User and system time of the daemon so far, in seconds.
    fn processor_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        // Clock ticks are hundredths of a second on Linux.
        (ticks(11) + ticks(12)) / 100.0
    }

    fn resident(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
        line.split_whitespace().next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for arguments in [&["link", "del", "stbench0"][..]] {
            let _ = Command::new("ip").args(arguments).stderr(Stdio::null()).status();
        }
        for family in ["inet", "bridge"] {
            let _ = Command::new("nft")
                .args(["delete", "table", family, "stead_bench"])
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// The command line of our VM, with sockets, logs and overlay of its own and without a network card.
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
        if matches!(word.as_str(), "-netdev" | "-device" | "-chardev" | "-qmp" | "-blockdev" | "-name") {
            let value = words.next().unwrap_or_default();
            if word == "-netdev" || value.starts_with("virtio-net") {
                continue;
            }
            let mut value = value;
            for name in ["qmp.sock", "control.sock", "app.log"] {
                if let Some(at) =
                    value.find("path=").map(|at| at + 5).or_else(|| value.find("unix:").map(|at| at + 5))
                {
                    if let Some(end) = value.find(name) {
                        value = format!("{}{place}/{}", &value[..at], &value[end..]);
                    }
                }
            }
            if value.contains("overlay-file") && value.contains("filename=") {
                value = format!(
                    "driver=file,node-name=overlay-file,filename={},read-only=off,discard=unmap",
                    own.display()
                );
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
    let mut vmm = Command::new("qemu-system-x86_64")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("qemu runs");
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
        argv,
        env: std::collections::BTreeMap::new(),
        working_dir: String::new(),
        user: String::new(),
        stop_signal: None,
        shutdown_grace_millis: 1000,
        network: None,
        has_agent: true,
    };
    let mut decoder = Decoder::default();
    let mut buffer = [0u8; 4096];
    let mut is_configured = false;
    let seconds = loop {
        let count = socket.read(&mut buffer).expect("read");
        assert!(count > 0, "the VMM ended");
        decoder.push(&buffer[..count]);
        let mut is_ready = false;
        while let Some(frame) = decoder.next() {
            let phase = frame.message::<FromGuest>().map(|state| state.phase);
            if phase == Some(Phase::AwaitingConfig) && !is_configured {
                is_configured = true;
                send(&ToGuest::Configure { token: token.clone(), config: Box::new(config.clone()) });
            }
            is_ready |= phase == Some(Phase::Ready);
        }
        if is_ready {
            break start.elapsed().as_secs_f64();
        }
    };
    let _ = vmm.kill();
    let _ = vmm.wait();
    seconds
}

pub(crate) async fn boot() -> Vec<Figure> {
    let daemon = Daemon::start().await;
    daemon.import().await;
    let (mut ours, mut hand) = (Vec::new(), Vec::new());
    let overlay = daemon.dir.path().join("hand.ext4");
    let place = daemon.dir.path().join("hand");
    for round in 0..ROUNDS {
        let name = format!("b{round}");
        ours.push(daemon.post(&name).await);
        let instance = daemon.get(&format!("/instances/{name}")).await;
        let arguments = by_hand(instance["vmm_pid"].as_u64().expect("a process"), &overlay, &place);
        daemon.delete(&name).await;
        fs::File::create(&overlay).and_then(|file| file.set_len(256 << 20)).expect("made");
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&overlay).status();
        assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4 runs");
        hand.push(hand_boot(&arguments, &place));
    }
    let vms = 3u32;
    for number in 0..vms {
        daemon.post(&format!("w{number}")).await;
    }
    let (resident, before) = (daemon.resident(), daemon.processor_seconds());
    let idle = Duration::from_secs(20);
    tokio::time::sleep(idle).await;
    let busy = daemon.processor_seconds() - before;
    for number in 0..vms {
        daemon.delete(&format!("w{number}")).await;
    }
    daemon.until_clear().await;
    vec![
        Figure {
            what: "POST to Running (peer: the same command line by hand, no network card)".to_owned(),
            ours: median(ours),
            peer: Some(median(hand)),
            unit: "s",
            goal: "<= 1.10",
        },
        Figure {
            what: format!("daemon's resident memory with {vms} VMs"),
            ours: resident,
            peer: None,
            unit: "MiB",
            goal: "",
        },
        Figure {
            what: format!("daemon's processor time, idle with {vms} VMs"),
            ours: busy / idle.as_secs_f64() * 100.0,
            peer: None,
            unit: "% of a core",
            goal: "0",
        },
    ]
}
