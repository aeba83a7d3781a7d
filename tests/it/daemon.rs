//! The daemon's own walls: its directories, its sockets, and its memory. It runs in namespaces of its own, without a
//! guest kernel: no test here starts a VM.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::{Child, Command};

use crate::cli::{MOMENT, ended, stead};

/// The directories of a daemon.
struct Site {
    scratch: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        Self { scratch: tempfile::tempdir().expect("scratch") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/stead.sock")
    }

    /// Makes the command of a daemon in its own namespaces.
    fn serve(&self, program: &str) -> Command {
        let apart = "ip link set lo up && mount -t tmpfs none /sys/fs/cgroup && umask 022";
        let (data, run, kernel) = (self.path("data"), self.path("run"), self.path("no-kernel"));
        let serve = format!(
            "{program} serve --data-dir {} --run-dir {} --kernel-dir {}",
            data.display(),
            run.display(),
            kernel.display()
        );
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--", "sh", "-c", &format!("{apart} && exec {serve}")]);
        command.env("STEAD", env!("CARGO_BIN_EXE_stead")).env("NO_COLOR", "1").env_remove("STEAD_KERNEL_DIR");
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        command.stderr(fs::File::options().create(true).append(true).open(self.path("log")).expect("opened"));
        command
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Starts a daemon, and waits until it answers at a socket.
    async fn start(&self, command: &mut Command, socket: &Path) -> Child {
        let mut child = command.spawn().expect("started");
        let base = format!("unix://{}", socket.display());
        let answers = async {
            loop {
                let mut ps = stead(&base, "", &["ps"]);
                if ended(ps.env_remove("STEAD_API_KEY").spawn().expect("started")).await.0 == 0 {
                    return;
                }
                assert!(child.try_wait().expect("waited").is_none(), "it ended:\n{}", self.log());
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(MOMENT, answers).await.is_err() {
            panic!("it does not answer:\n{}", self.log());
        }
        child
    }

    /// Runs a daemon that refuses to start. Returns its exit code and its log.
    async fn refused(&self, command: &mut Command) -> (i32, String) {
        let (code, ..) = ended(command.spawn().expect("started")).await;
        (code, self.log())
    }
}

/// Ends a daemon with this signal.
async fn end(mut child: Child, signal: &str) {
    let pid = child.id().expect("it runs").to_string();
    let killed = Command::new("kill").args([signal, &pid]).status().await.expect("kill runs");
    assert!(killed.success());
    tokio::time::timeout(MOMENT, child.wait()).await.expect("it ends").expect("waited");
}

/// Returns the files and directories that group or others have rights to.
fn open_ones(directory: &Path) -> Vec<PathBuf> {
    let (mut found, mut pending) = (Vec::new(), vec![directory.to_owned()]);
    while let Some(path) = pending.pop() {
        let seen = fs::symlink_metadata(&path).expect("there");
        if seen.is_dir() {
            pending.extend(fs::read_dir(&path).expect("read").map(|entry| entry.expect("read").path()));
        }
        if seen.permissions().mode() & 0o077 != 0 && !seen.is_symlink() {
            found.push(path);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_and_files_are_closed_at_start_and_what_is_made_is_private() {
    let site = Site::new();
    for name in ["data", "data/db", "data/images/manifests", "data/logs", "run"] {
        fs::create_dir_all(site.path(name)).expect("made");
        fs::set_permissions(site.path(name), fs::Permissions::from_mode(0o755)).expect("opened");
    }
    for name in ["data/lock", "data/images/manifests/left", "data/logs/left"] {
        fs::write(site.path(name), "").expect("written");
        fs::set_permissions(site.path(name), fs::Permissions::from_mode(0o644)).expect("opened");
    }
    let child = site.start(&mut site.serve("$STEAD"), &site.socket()).await;
    let open = ["data", "run"].map(|name| open_ones(&site.path(name))).concat();
    assert!(open.is_empty(), "{open:?}");
    assert!(site.log().contains("were open to other users"), "{}", site.log());
    end(child, "-TERM").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_left_by_a_killed_daemon_is_replaced_and_one_in_use_is_not() {
    let site = Site::new();
    let child = site.start(&mut site.serve("$STEAD"), &site.socket()).await;
    end(child, "-KILL").await;
    assert!(fs::symlink_metadata(site.socket()).expect("left").file_type().is_socket());
    let child = site.start(&mut site.serve("$STEAD"), &site.socket()).await;
    let other = Site::new();
    let (code, log) = other.refused(other.serve("$STEAD").env("STEAD_SOCKET", site.socket())).await;
    assert!(
        code == 1 && log.contains(&format!("process {} listens on it", child.id().expect("it runs"))),
        "{log}"
    );
    end(child, "-TERM").await;
    assert!(!site.socket().exists(), "it is removed at the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_run_directory_has_one_daemon() {
    let (site, other) = (Site::new(), Site::new());
    let child = site.start(&mut site.serve("$STEAD"), &site.socket()).await;
    std::os::unix::fs::symlink(site.path("run"), other.path("run")).expect("linked");
    let (code, log) = other.refused(&mut other.serve("$STEAD")).await;
    assert!(code == 1 && log.contains("is in use by process"), "{log}");
    end(child, "-TERM").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_reaches_the_socket_and_nothing_else() {
    let site = Site::new();
    let mut command = site.serve("$STEAD");
    command
        .env("STEAD_SOCKET_GROUP", "65534")
        .env("STEAD_SOCKET_USERS", "[{group=65534, scopes=[\"image:read\"]}]");
    let child = site.start(&mut command, &site.socket()).await;
    fs::set_permissions(site.scratch.path(), fs::Permissions::from_mode(0o711)).expect("opened");
    let as_group = async |path: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--",
            "curl",
            "-s",
            "-o",
            "/dev/null",
        ]);
        command.args(["-w", "%{http_code}", "--unix-socket"]).arg(site.socket());
        let output = command.arg(format!("http://x{path}")).output().await.expect("setpriv runs curl");
        String::from_utf8(output.stdout).expect("text")
    };
    assert_eq!(as_group("/images").await, "200");
    assert_eq!(as_group("/instances").await, "403");
    let mut open = open_ones(&site.path("run"));
    open.sort();
    assert_eq!(open, [site.path("run"), site.socket()]);
    assert_eq!(fs::metadata(site.path("run")).expect("there").permissions().mode() & 0o777, 0o710);
    end(child, "-TERM").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_roots_rights_is_refused_as_wrong_usage() {
    let site = Site::new();
    // The user that the namespace shows is not root. The files are still reached as root.
    let (code, log) = site.refused(&mut site.serve("unshare --user -- $STEAD")).await;
    assert!(code == 2 && log.contains("must be run as root"), "{log}");
    assert!(!site.path("data").exists(), "nothing was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_beyond_loopback_without_tls_is_refused_as_wrong_usage() {
    let site = Site::new();
    let (code, log) = site.refused(site.serve("$STEAD").env("STEAD_LISTEN", "0.0.0.0:8080")).await;
    assert!(
        code == 2 && log.contains("insecure_without_tls: true") && log.contains("tls: self-signed"),
        "{log}"
    );
    assert!(!site.path("data").exists(), "nothing was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_of_the_service_manager_are_served_and_left_to_it() {
    let site = Site::new();
    let passed = site.path("passed");
    let wraps = format!(
        "python3 -c 'import os, socket, sys
s = socket.socket(socket.AF_UNIX); s.bind(\"{}\"); s.listen(9); os.dup2(s.fileno(), 3); os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS=\"1\", LISTEN_PID=str(os.getpid())); os.execv(sys.argv[1], sys.argv[1:])' $STEAD",
        passed.display()
    );
    let child = site.start(&mut site.serve(&wraps), &passed).await;
    assert!(!site.socket().exists());
    end(child, "-TERM").await;
    assert!(passed.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_own_certificate_is_made_once_and_its_fingerprint_is_in_the_log() {
    let site = Site::new();
    let mut print = String::new();
    for _ in 0..2 {
        let mut command = site.serve("$STEAD");
        command.env("STEAD_TLS", "self-signed").env("STEAD_LISTEN", "0.0.0.0:8443");
        let child = site.start(&mut command, &site.socket()).await;
        let pid = child.id().expect("it runs").to_string();
        let log = site.log();
        let shown = log.rsplit_once("fingerprint=\"").expect("it is in the log").1;
        let shown = shown.split('"').next().unwrap_or_default().to_owned();
        assert!(print.is_empty() || print == shown, "{log}");
        print = shown;
        let inside = |program: &str| {
            let mut command = Command::new("nsenter");
            command.args(["--net", "--target", &pid, program]);
            command
        };
        let mut curl = inside("curl");
        curl.args(["-s", "--cacert"])
            .arg(site.path("data/keys/tls.crt"))
            .arg("https://127.0.0.1:8443/health");
        let output = curl.output().await.expect("nsenter runs curl");
        assert!(String::from_utf8_lossy(&output.stdout).contains("ok"), "{output:?}");
        let mut ps = inside(env!("CARGO_BIN_EXE_stead"));
        ps.args(["images", "--base-url", "https://127.0.0.1:8443", "--tls-fingerprint", &print]);
        let output = ps.env("STEAD_API_KEY", "wrong").output().await.expect("nsenter runs it");
        assert!(String::from_utf8_lossy(&output.stderr).contains("Unauthorized"), "{output:?}");
        end(child, "-TERM").await;
    }
    assert_eq!(
        fs::metadata(site.path("data/keys/tls.key")).expect("there").permissions().mode() & 0o777,
        0o600
    );
}

/// Neither the reader nor the daemon has CAP_SYS_PTRACE here, which lets a process read the memory of others.
#[tokio::test(flavor = "multi_thread")]
async fn other_processes_of_root_cannot_read_the_memory_of_the_daemon() {
    let site = Site::new();
    let plain = "setpriv --bounding-set=-sys_ptrace --";
    let child = site.start(&mut site.serve(&format!("{plain} $STEAD")), &site.socket()).await;
    let reads = async |pid: u32| {
        let read = format!("exec {plain} sh -c ': </proc/{pid}/mem'");
        Command::new("sh")
            .args(["-c", &read])
            .stderr(Stdio::null())
            .status()
            .await
            .expect("sh runs")
            .success()
    };
    let mut sleeps = Command::new("sh");
    let other =
        sleeps.args(["-c", &format!("exec {plain} sleep 1000")]).kill_on_drop(true).spawn().expect("started");
    let comes = async {
        while !reads(other.id().expect("it runs")).await {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MOMENT, comes).await.expect("another process can be read");
    assert!(!reads(child.id().expect("it runs")).await);
    end(child, "-TERM").await;
}
