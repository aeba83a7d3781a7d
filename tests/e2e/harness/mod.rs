//! A daemon as it is installed, with its registry and its client, in its own namespaces.
//!
//! Guarantees: a daemon is ended by its pid, at the latest when the value is dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};

use crate::fixtures::{Fixtures, patience, run, timeout, until};
use crate::namespace::bridge;

mod child;
mod daemon;

pub(crate) use self::child::Program;

/// The program under test.
const DAEMON: &str = env!("CARGO_BIN_EXE_stead");
/// Name of the firewall table. Names need not be unique: no other daemon is in the namespace.
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

    /// Runs a shell line, which may contain `$DATA`, `$BRIDGE`, `$TABLE`, and `$TAP` for the only TAP
    /// with `$IFB` for the link that limits its guest.
    pub(crate) fn shell(&self, line: &str) -> String {
        // The TAP is found by its whole name, because a mark beside it may look like it.
        let tap = format!("TAP=$(ls /sys/class/net | grep '^{TAP_PREFIX}' | head -n 1 || true)");
        let ifb = "IFB=$(echo $TAP | sed 's/^./\\U&/')";
        let data = self.data().display().to_string();
        let head = format!("DATA={data} BRIDGE={} TABLE={}; {tap}; {ifb}", bridge(), self.table);
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

    /// Lists the files of instances: disks, also prepared ones, logs, memories, runtime directories.
    pub(crate) fn instance_files(&self) -> Vec<PathBuf> {
        let directories = [
            self.data().join("disks"),
            self.data().join("prepared"),
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
