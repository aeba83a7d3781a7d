//! A daemon as it is installed, with its registry and its client, in its own namespaces.
//!
//! Guarantees: a daemon is ended by its pid, at the latest when the value is dropped.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use reqwest::{Client, Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::fixtures::{Fixtures, patience, run, timeout, until};
use crate::namespace::bridge;
use crate::unit;

/// Name of the firewall table. Names need not be unique: no other daemon is in the namespace.
/// The program under test.
const DAEMON: &str = env!("CARGO_BIN_EXE_stead");
pub(crate) const TABLE: &str = "steade2e";
pub(crate) const TAP_PREFIX: &str = "tp";
pub(crate) const GATEWAY: &str = "10.185.0.1";
const REGISTRY: &str = "127.0.0.1:5000";
pub(crate) const LISTEN: &str = "127.0.0.1:8080";

/// Time limit for a boot or a pull on a busy machine.
pub(crate) const BOOT: Duration = Duration::from_secs(300);
/// Time limit for changes that are immediate on an idle machine.
pub(crate) const MOMENT: Duration = Duration::from_secs(60);
/// Time limit of a request. A verb waits for up to 55 s before it answers.
const REQUEST: Duration = Duration::from_secs(120);

/// Directory of images that were prepared elsewhere, because the programs that make them are slow here
/// (`STEAD_TEST_IMAGES`).
static PREPARED: LazyLock<Option<PathBuf>> =
    LazyLock::new(|| std::env::var_os("STEAD_TEST_IMAGES").map(PathBuf::from));
/// Names of the directories with a site's images: an OCI layout, and the storage of its registry.
const IMAGES: [&str; 2] = ["layout", "registry"];

/// Time after which a connection is not used again. The daemon ends idle ones later, and a client on a
/// slow machine may send a request before it notices that.
const IDLE_CONNECTION: Duration = Duration::from_secs(1);

/// A child process that does not outlive the value.
pub(crate) struct Program(pub(crate) Child);

impl Program {
    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("a child that was not waited for can be signalled");
    }

    async fn end(&mut self) -> ExitStatus {
        until("the end of a process", MOMENT, async || self.0.try_wait().expect("waited")).await
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A process that has already ended cannot be killed, so the error is ignored.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) struct Harness {
    fixtures: Fixtures,
    http: Client,
    token: String,
    daemon: Option<Program>,
    /// Directory in which the daemon searches for a guest kernel.
    pub(crate) kernel_dir: PathBuf,
    /// Firewall table that the daemon is configured with.
    pub(crate) table: &'static str,
    /// Certificates that the daemon trusts instead of the system's.
    pub(crate) trusts: Option<PathBuf>,
    _registry: Program,
}

impl Harness {
    /// Creates a registry with the image `busybox`, and directories, without a daemon.
    pub(crate) async fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let fixtures = Fixtures::new();
        let config = fixtures.dir.path().join("registry.yml");
        if let Some(prepared) = &*PREPARED {
            for name in IMAGES {
                let from = prepared.join(name).display().to_string();
                run("cp", &["-a", &from, &fixtures.dir.path().display().to_string()]);
            }
        }
        let storage = fixtures.path("registry");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '{REGISTRY}'}}\n",
            storage.display()
        );
        fs::write(&config, text).expect("written");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let registry = Program(command.spawn().expect("docker-registry runs: deploy/setup installs it"));
        let http = Client::builder().timeout(patience(REQUEST)).pool_idle_timeout(IDLE_CONNECTION);
        let http = http.build().expect("a client");
        let kernel_dir = crate::fixtures::kernel_dir();
        let site = Self {
            fixtures,
            http,
            token: String::new(),
            daemon: None,
            kernel_dir,
            table: TABLE,
            trusts: None,
            _registry: registry,
        };
        until("the registry", MOMENT, async || {
            site.http.get(format!("http://{REGISTRY}/v2/")).send().await.ok()
        })
        .await;
        if PREPARED.is_none() {
            let layout = site.layout();
            run(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/make-busybox-image"), &[&layout]);
            site.push(&layout, "busybox");
        }
        site
    }

    /// Replaces the images at `directory` by this site's.
    pub(crate) fn prepare_images(&self, directory: &Path) {
        fs::create_dir_all(directory).expect("made");
        for name in IMAGES {
            let (from, to) = (self.fixtures.dir.path().join(name), directory.join(name));
            let [from, to] = [from, to].map(|path| path.display().to_string());
            run("rm", &["-rf", &to]);
            run("cp", &["-a", &from, &to]);
        }
    }

    /// Creates a site with a daemon that answers.
    pub(crate) async fn running() -> Self {
        let mut site = Self::new().await;
        site.start().await;
        site
    }

    /// Copies an image of an OCI layout to the registry, under its own name.
    pub(crate) fn push(&self, layout: &str, name: &str) {
        let (from, to) = (format!("oci:{layout}:{name}"), format!("docker://{}", image(name)));
        run("skopeo", &["copy", "-q", "--dest-tls-verify=false", &from, &to]);
    }

    /// Returns the directory of the layout in which the site's images are made.
    pub(crate) fn layout(&self) -> String {
        self.fixtures.dir.path().join("layout").display().to_string()
    }

    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.fixtures.path(name)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.fixtures.dir.path().join("data")
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.fixtures.dir.path().join("run")
    }

    /// Runs a shell line, which may contain `$DATA`, `$BRIDGE`, `$TABLE`, and `$TAP` for the only TAP.
    pub(crate) fn shell(&self, line: &str) -> String {
        // The TAP is found by its whole name, because a mark beside it may look like it.
        let tap = format!("TAP=$(ls /sys/class/net | grep '^{TAP_PREFIX}' | head -n 1 || true)");
        let data = self.data().display().to_string();
        let head = format!("DATA={data} BRIDGE={} TABLE={}; {tap}", bridge(), self.table);
        run("sh", &["-ec", &format!("{head}; {line}")])
    }

    pub(crate) fn taps(&self) -> usize {
        let links = run("ip", &["-br", "link", "show"]);
        links.lines().filter(|line| line.starts_with(TAP_PREFIX)).count()
    }

    /// Lists the live VMM processes of this namespace.
    pub(crate) fn vmms(&self) -> Vec<u32> {
        let entries = fs::read_dir("/proc").expect("mounted").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains("(qemu-system") && !stat.contains(") Z ")
        })
        .collect()
    }

    /// Returns the output of the client for a command line.
    pub(crate) fn cli(&self, words: &str) -> String {
        let program = DAEMON;
        let token = &self.token;
        run("sh", &["-c", &format!("STEAD_BASE_URL=http://{LISTEN} STEAD_API_KEY={token} {program} {words}")])
    }

    // The daemon.

    /// Starts a daemon that dies at `failpoint`. It may be dead when this returns.
    pub(crate) fn spawn(&mut self, failpoint: Option<&str>) {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let log = fs::File::options().create(true).append(true).open(self.log_file()).expect("opened");
        let mut command = self.serve(unit::command(DAEMON), failpoint);
        command.stdout(log.try_clone().expect("cloned")).stderr(log);
        self.daemon = Some(Program(command.spawn().expect("the daemon starts")));
    }

    /// Starts a daemon by another function, such as under a filter.
    pub(crate) fn spawn_by(&mut self, start: impl FnOnce(&mut Command) -> Child) {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let log = fs::File::options().create(true).append(true).open(self.log_file()).expect("opened");
        // The filter counts the calls of the program from its first one.
        let mut command = self.serve(Command::new(DAEMON), None);
        command.stdout(log.try_clone().expect("cloned")).stderr(log);
        self.daemon = Some(Program(start(&mut command)));
    }

    /// Starts a daemon whose log, with a line for each request, goes into a pipe.
    pub(crate) fn spawn_piped(&mut self) -> ChildStderr {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let mut command = self.serve(unit::command(DAEMON), None);
        command.env("STEAD_LOG", "info").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the daemon starts");
        let pipe = child.stderr.take().expect("piped");
        self.daemon = Some(Program(child));
        pipe
    }

    fn serve(&self, mut command: Command, failpoint: Option<&str>) -> Command {
        command.args(["serve", "--listen", LISTEN, "--data-dir"]).arg(self.data());
        command.arg("--run-dir").arg(self.run_dir()).arg("--kernel-dir").arg(&self.kernel_dir);
        command
            .env("STEAD_BRIDGE", bridge())
            .env("STEAD_TABLE", self.table)
            .env("STEAD_TAP_PREFIX", TAP_PREFIX);
        command.env("STEAD_GATEWAY", format!("{GATEWAY}/24")).env("STEAD_DISK_RESERVE", "16MB");
        command.env("STEAD_GUEST_HOST_PORTS", "[8081]");
        command.env("STEAD_DNS_SEARCH", "[a.test, b.test]").env("STEAD_DNS_OPTIONS", r#"["ndots:2"]"#);
        // The site's registry is on loopback.
        command.env("STEAD_REGISTRY_ALLOW", r#"["127.0.0.0/8"]"#);
        command.env("STEAD_LOG", "info,stead::api=warn").env("NO_COLOR", "1").env_remove("STEAD_KERNEL_DIR");
        command.envs(self.trusts.as_ref().map(|file| ("SSL_CERT_FILE", file)));
        command.envs(failpoint.map(|failpoint| ("STEAD_FAILPOINT", failpoint)));
        command.stdin(Stdio::null());
        command
    }

    /// Starts a daemon that is held at `failpoint` once, and otherwise continues.
    pub(crate) fn spawn_held(&mut self, failpoint: &str) {
        self.spawn(Some(&format!("{failpoint}:{}", self.hold().display())));
    }

    /// Returns the path of a file that exists while the daemon is held.
    fn hold(&self) -> PathBuf {
        self.fixtures.dir.path().join("held")
    }

    pub(crate) async fn held(&self, failpoint: &str) {
        let is_held = timeout(BOOT, async {
            while !self.hold().exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(is_held.await.is_ok(), "{failpoint} was not reached\n{}", self.daemon_log());
    }

    pub(crate) fn let_go(&self) {
        fs::remove_file(self.hold()).expect("it is held");
    }

    /// Returns the status with which the daemon ended, or `Ok` if it answers, or `None` while it does neither.
    pub(crate) async fn begun(&mut self) -> Option<Result<(), ExitStatus>> {
        let daemon = self.daemon.as_mut().expect("started");
        if let Some(status) = daemon.0.try_wait().expect("waited") {
            self.daemon = None;
            return Some(Err(status));
        }
        // A daemon that cannot accept connections does not answer.
        let asked =
            self.http.get(format!("http://{LISTEN}/health")).timeout(patience(Duration::from_secs(5))).send();
        asked.await.ok().map(|_| Ok(()))
    }

    pub(crate) fn has_daemon(&self) -> bool {
        self.daemon.is_some()
    }

    /// Waits until the daemon answers.
    pub(crate) async fn answers(&mut self) {
        let begun = until("the daemon to answer", MOMENT, async || self.begun().await).await;
        let ended = begun.err();
        assert!(ended.is_none(), "the daemon ended: {ended:?}\n{}", self.daemon_log());
        let data = self.data().display().to_string();
        let token = run(DAEMON, &["token", "create", "--data-dir", &data]);
        self.token = token.trim().to_owned();
    }

    pub(crate) async fn start(&mut self) {
        self.spawn(None);
        self.answers().await;
    }

    /// Ends the daemon as an operator does.
    pub(crate) async fn stop(&mut self) {
        let mut daemon = self.daemon.take().expect("started");
        daemon.signal(Signal::TERM);
        let status = daemon.end().await;
        assert!(status.success(), "the daemon ended with {status}\n{}", self.daemon_log());
    }

    /// Ends the daemon as a power cut would.
    pub(crate) async fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("started");
        daemon.signal(Signal::KILL);
        daemon.end().await;
    }

    /// Reduces the site to what survives a reboot of the host: the disks.
    pub(crate) async fn reboot(&mut self) {
        self.kill().await;
        for pid in self.vmms() {
            self.shell(&format!("kill -9 {pid} || true"));
        }
        until("no VMM", MOMENT, async || self.vmms().is_empty().then_some(())).await;
        let lost = format!(
            "for link in $(ls /sys/class/net | grep ^{TAP_PREFIX}); do ip link del $link; done
             ip link del $BRIDGE; nft flush ruleset; conntrack -F; echo 1 >/proc/sys/net/ipv4/ip_forward
             echo 0 >/proc/sys/net/ipv4/ip_forward
             rm -r {}",
            self.run_dir().display()
        );
        self.shell(&lost);
    }

    /// Waits until the daemon ended by itself.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("started");
        daemon.end().await
    }

    /// Waits until the daemon died at its failpoint.
    pub(crate) async fn crashed(&mut self, failpoint: &str) {
        let mut daemon = self.daemon.take().expect("started");
        let end = timeout(BOOT, async {
            loop {
                if let Some(status) = daemon.0.try_wait().expect("waited") {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let Ok(status) = end.await else {
            self.daemon = Some(daemon);
            let seen = self.attempt(Method::GET, "/instances", None).await;
            panic!("{failpoint} was not reached\n{seen:?}\n{}", self.daemon_log())
        };
        assert_eq!(
            status.signal(),
            Some(9),
            "{failpoint}: the daemon ended with {status}\n{}",
            self.daemon_log()
        );
    }

    /// Returns the log file with the standard error of all daemons of the site.
    pub(crate) fn log_file(&self) -> PathBuf {
        self.fixtures.dir.path().join("daemon.log")
    }

    pub(crate) fn daemon_log(&self) -> String {
        let log = fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("started").0.id()
    }

    // The API.

    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// Sends a request that may fail, for example because the daemon dies of it.
    pub(crate) async fn attempt(&self, method: Method, path: &str, body: Option<Value>) -> Option<Answer> {
        let request = self.http.request(method, format!("http://{LISTEN}{path}")).bearer_auth(&self.token);
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let response = request.send().await.ok()?;
        let status = response.status();
        Some(Answer { status, body: response.json().await.unwrap_or(Value::Null) })
    }

    /// Sends a request with any body. If the answer is not JSON, its first bytes are returned as text.
    pub(crate) async fn attempt_raw(&self, method: Method, path: &str, body: Vec<u8>) -> Option<Answer> {
        let request = self.http.request(method, format!("http://{LISTEN}{path}")).bearer_auth(&self.token);
        let response = request.body(body).send().await.ok()?;
        let status = response.status();
        let bytes = response.bytes().await.ok()?;
        let text = || Value::String(String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned());
        Some(Answer { status, body: serde_json::from_slice(&bytes).unwrap_or_else(|_| text()) })
    }

    /// Returns the status of an answer to a request with this token.
    pub(crate) async fn status_with(&self, token: &str) -> Option<u16> {
        let request = self.http.get(format!("http://{LISTEN}/instances")).bearer_auth(token);
        Some(request.send().await.ok()?.status().as_u16())
    }

    pub(crate) async fn request(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let answer = self.attempt(method.clone(), path, body).await;
        answer.unwrap_or_else(|| panic!("{method} {path}: no answer\n{}", self.daemon_log()))
    }

    /// Creates a VM of 192 MB. `more` is added to the request. Returns its id.
    pub(crate) async fn create(&self, name: &str, image: &str, more: Value) -> String {
        let mut body =
            json!({ "name": name, "image": image, "size": "192MB", "vcpus": 1, "overlay_size": "64MB" });
        let fields = body.as_object_mut().expect("an object");
        fields.extend(more.as_object().expect("an object").clone());
        let answer = self.request(Method::POST, "/instances", Some(body)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        answer.body["id"].as_str().expect("an id").to_owned()
    }

    pub(crate) async fn get(&self, name: &str) -> Value {
        self.request(Method::GET, &format!("/instances/{name}"), None).await.body
    }

    pub(crate) async fn delete(&self, name: &str) {
        let answer = self.request(Method::DELETE, &format!("/instances/{name}"), None).await;
        assert_eq!(answer.status, StatusCode::NO_CONTENT, "{answer:?}");
    }

    /// Returns the instance when the condition holds.
    pub(crate) async fn until(&self, name: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let observed = timeout(BOOT, async {
            loop {
                last = self.get(name).await;
                if is_so(&last) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let is_in_time = observed.await.is_ok();
        assert!(is_in_time, "{name}: not {what}, but {last:#}\n{}", self.daemon_log());
        last
    }

    pub(crate) async fn until_state(&self, name: &str, state: &str) -> Value {
        self.until(name, state, |seen| seen["state"] == state).await
    }

    /// Returns the image when it is ready.
    pub(crate) async fn until_image(&self, name: &str) -> Value {
        let path = format!("/images/{}", name.replace('/', "%2F"));
        until("the image", BOOT, async || {
            let answer = self.request(Method::GET, &path, None).await;
            Some(answer.body).filter(|image| image["status"] == "ready")
        })
        .await
    }

    pub(crate) fn console(&self, id: &str) -> String {
        let log = self.data().join("logs").join(id).join("app.log");
        String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned()
    }

    /// Returns the messages of the daemon and of the guest's PID 1 in the instance's own log.
    pub(crate) fn journal_of(&self, id: &str) -> String {
        let log = self.data().join("logs").join(id).join("stead.log");
        String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned()
    }

    /// Returns the console once it contains `text`.
    pub(crate) async fn until_console(&self, id: &str, text: &str) -> String {
        let reported = timeout(BOOT, async {
            loop {
                let console = self.console(id);
                if console.contains(text) {
                    return console;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        reported.await.unwrap_or_else(|_| panic!("{text:?} is not on the console:\n{}", self.console(id)))
    }

    /// Lists the files of instances: disks, logs, memories, runtime directories.
    pub(crate) fn instance_files(&self) -> Vec<PathBuf> {
        let directories = [
            self.data().join("disks"),
            self.data().join("logs"),
            self.data().join("memory"),
            self.run_dir().join("vm"),
        ];
        let entries = |dir: &PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().collect::<Vec<_>>();
        directories.iter().flat_map(entries).map(|entry| entry.path()).collect()
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Value,
}

/// Returns the reference of an image in the site's registry.
pub(crate) fn image(name: &str) -> String {
    format!("{REGISTRY}/{name}:latest")
}

/// Returns the runtime directory of an instance.
pub(crate) fn runtime(run_dir: &Path, id: &str) -> PathBuf {
    run_dir.join("vm").join(id)
}
