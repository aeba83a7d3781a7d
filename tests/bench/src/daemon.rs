//! A daemon of the binary beside this program, with VMs. All of it ends with the value.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Daemon {
    child: Child,
    command: Command,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) base: String,
    pub(crate) token: String,
    bridge: &'static str,
    http: reqwest::Client,
}

/// Returns the path of the `stead` beside this program.
fn stead() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    own.with_file_name("stead")
}

impl Daemon {
    pub(crate) async fn start(bridge: &'static str, gateway: &str) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("scratch");
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .expect("a port")
            .port();
        let kernel = std::env::var("STEAD_KERNEL_DIR").expect("make bench sets STEAD_KERNEL_DIR");
        let log = fs::File::create(dir.path().join("log")).expect("made");
        let mut command = Command::new(stead());
        command
            .args(["serve", "--listen", &format!("127.0.0.1:{port}"), "--kernel-dir", &kernel, "--data-dir"])
            .arg(dir.path().join("data"))
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .envs([
                ("STEAD_BRIDGE", bridge),
                ("STEAD_GATEWAY", gateway),
                ("STEAD_TABLE", bridge),
                ("STEAD_TAP_PREFIX", "sb"),
                ("STEAD_LOG", "warn"),
                // Thousands of instances are measured on a small machine.
                ("STEAD_OVERSUBSCRIPTION", "{cpu=1000, memory=1000, disk=1000}"),
                // Some figures use a registry.
                ("STEAD_REGISTRY_ALLOW", r#"["127.0.0.0/8"]"#),
            ])
            .stderr(log);
        let child = command.spawn().expect("the daemon starts");
        let base = format!("http://127.0.0.1:{port}");
        let http = reqwest::Client::new();
        // From here on a panic cleans up.
        let mut daemon = Self { child, command, dir, base, token: String::new(), bridge, http };
        daemon.answers(Duration::from_millis(50)).await;
        daemon.token = daemon.token_of("bench");
        daemon
    }

    /// Makes a token of this subject, with all scopes.
    pub(crate) fn token_of(&self, subject: &str) -> String {
        let minted = Command::new(stead())
            .args(["token", "create", "--subject", subject, "--data-dir"])
            .arg(self.dir.path().join("data"))
            .output();
        String::from_utf8_lossy(&minted.expect("minted").stdout).trim().to_owned()
    }

    /// Waits until the daemon answers.
    async fn answers(&self, poll: Duration) {
        let deadline = Instant::now() + DEADLINE;
        while self.http.get(format!("{}/health", self.base)).send().await.is_err() {
            assert!(Instant::now() < deadline, "the daemon does not answer");
            tokio::time::sleep(poll).await;
        }
    }

    /// Kills the daemon and starts it again. Returns the seconds from the start to its first answer.
    pub(crate) async fn restart(&mut self) -> f64 {
        self.child.kill().and_then(|()| self.child.wait().map(drop)).expect("it was there");
        let start = Instant::now();
        self.child = self.command.spawn().expect("the daemon starts");
        self.answers(Duration::from_millis(2)).await;
        start.elapsed().as_secs_f64()
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let request = self.http.get(format!("{}{path}", self.base)).bearer_auth(&self.token);
        request.send().await.expect("answered").json().await.unwrap_or(Value::Null)
    }

    /// Sends a POST that must succeed.
    pub(crate) async fn ask(&self, path: &str, body: Value) -> Value {
        self.send(reqwest::Method::POST, path, body).await
    }

    /// Sends a PATCH that must succeed.
    pub(crate) async fn change(&self, path: &str, body: Value) -> Value {
        self.send(reqwest::Method::PATCH, path, body).await
    }

    async fn send(&self, method: reqwest::Method, path: &str, body: Value) -> Value {
        let request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.token);
        let answer = request.json(&body).send().await.expect("answered");
        let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap_or(Value::Null));
        assert!(status.is_success(), "{path}: {status} {body}");
        body
    }

    /// Opens a stream of events.
    pub(crate) async fn follow(
        &self,
        path: &str,
    ) -> impl futures::Stream<Item = reqwest::Result<bytes::Bytes>> + Unpin {
        let request = self.http.get(format!("{}{path}", self.base)).bearer_auth(&self.token);
        Box::pin(request.send().await.expect("answered").bytes_stream())
    }

    /// Imports busybox as a bare root file system, so that no registry is part of this figure.
    pub(crate) async fn import(&self) {
        let root = self.dir.path().join("root");
        fs::create_dir_all(root.join("bin")).expect("made");
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        self.import_root(&root, "bench.test/busybox:v1");
    }

    /// Imports a directory as an image of this name.
    pub(crate) fn import_root(&self, root: &Path, name: &str) {
        let tar = root.with_extension("tar");
        let made = Command::new("tar").arg("-C").arg(root).arg("-cf").arg(&tar).arg(".").status();
        assert!(made.is_ok_and(|status| status.success()), "tar runs");
        let imported = Command::new(stead())
            .args(["image", "import", "--name", name])
            .arg(tar)
            .env("STEAD_BASE_URL", &self.base)
            .env("STEAD_API_KEY", &self.token)
            .stdout(Stdio::null())
            .status();
        assert!(imported.is_ok_and(|status| status.success()), "imported");
    }

    /// Returns the seconds from the POST until `wait` reports Running.
    pub(crate) async fn post(&self, name: &str, size: &str) -> f64 {
        self.post_with_disk(name, size, "256MB").await
    }

    pub(crate) async fn post_with_disk(&self, name: &str, size: &str, disk: &str) -> f64 {
        self.post_with(name, json!({ "size": size, "overlay_size": disk })).await
    }

    /// Creates an instance with additional fields, like [`Daemon::post`].
    pub(crate) async fn post_with(&self, name: &str, more: Value) -> f64 {
        let mut body = json!({
            "name": name, "image": "bench.test/busybox:v1", "size": "256MB", "vcpus": 1,
            "overlay_size": "256MB", "cmd": ["/bin/busybox", "sleep", "100000"],
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let start = Instant::now();
        let request = self.http.post(format!("{}/instances", self.base)).bearer_auth(&self.token).json(&body);
        request.send().await.expect("answered").error_for_status().expect("accepted");
        let waited = self.get(&format!("/instances/{name}/wait?state=Running&timeout=60s")).await;
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!(waited["state"], "Running", "{waited}");
        seconds
    }

    pub(crate) async fn verb(&self, path: &str, body: &Value) {
        let request = self.http.post(format!("{}{path}", self.base)).bearer_auth(&self.token).json(body);
        request.send().await.expect("answered").error_for_status().expect("done");
    }

    pub(crate) async fn delete(&self, name: &str) {
        let url = format!("{}/instances/{name}?graceful_shutdown=false", self.base);
        self.http.delete(url).bearer_auth(&self.token).send().await.expect("answered");
    }

    pub(crate) async fn delete_image(&self, reference: &str) {
        let url = format!("{}/images/{reference}", self.base);
        self.http.delete(url).bearer_auth(&self.token).send().await.expect("answered");
    }

    /// Returns the user and system time of the daemon and its ended programs so far, in seconds.
    pub(crate) fn processor_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        // Clock ticks are hundredths of a second on Linux. The last two values are those of the programs that it ran.
        (ticks(11) + ticks(12) + ticks(13) + ticks(14)) / 100.0
    }

    pub(crate) fn resident(&self) -> f64 {
        resident(self.child.id())
    }

    /// Returns the peak resident memory, in MiB.
    pub(crate) fn peak(&self) -> f64 {
        memory(self.child.id(), "VmHWM:")
    }

    /// Lists the remaining VMMs, as recorded in the runtime directory.
    fn vmms(&self) -> Vec<i32> {
        let entries = fs::read_dir(self.dir.path().join("run/vm")).into_iter().flatten().flatten();
        let records = entries.filter_map(|entry| fs::read(entry.path().join("machine.json")).ok());
        let records = records.filter_map(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        records.filter_map(|record| i32::try_from(record["identity"]["pid"].as_i64()?).ok()).collect()
    }
}

/// Returns the resident memory of a process, in MiB.
pub(crate) fn resident(pid: u32) -> f64 {
    memory(pid, "VmRSS:")
}

fn memory(pid: u32, key: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("0");
    line.split_whitespace().next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

impl Drop for Daemon {
    /// Ends all started processes, also after a failure.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let quiet = |program: &str, arguments: &[&str]| {
            let ended = Command::new(program).args(arguments).stderr(Stdio::null()).output();
            ended.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
        };
        for pid in self.vmms() {
            quiet("kill", &["-9", &pid.to_string()]);
        }
        let taps = quiet("ip", &["-br", "link", "show", "master", self.bridge]);
        for tap in taps.lines().filter_map(|line| line.split([' ', '@']).next()) {
            quiet("ip", &["link", "del", tap]);
        }
        quiet("ip", &["link", "del", self.bridge]);
        for root in ["", "memory", "cpu", "pids", "blkio"] {
            let parent = Path::new("/sys/fs/cgroup").join(root).join(format!("stead-{}", self.bridge));
            for group in
                fs::read_dir(&parent).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir())
            {
                let _ = fs::remove_dir(group.path());
            }
            let _ = fs::remove_dir(parent);
        }
        for family in ["inet", "bridge"] {
            quiet("nft", &["delete", "table", family, self.bridge]);
        }
    }
}
