//! The daemon of a site: how it is started, held, and ended in every way.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::Duration;

use reqwest::Method;
use rustix::process::Signal;

use super::{BOOT, DAEMON, GATEWAY, Harness, LISTEN, MOMENT, Program, TAP_PREFIX};
use crate::fixtures::{patience, run, timeout, until};
use crate::namespace::bridge;
use crate::unit;

impl Harness {
    /// Starts a daemon that dies at `failpoint`. It may be dead when this returns.
    pub(crate) fn spawn(&mut self, failpoint: Option<&str>) {
        let command = self.serve(unit::command(DAEMON), failpoint);
        self.launch(command);
    }

    /// Starts a daemon with additional variables in its environment.
    pub(crate) fn spawn_with(&mut self, variables: &[(&str, &str)]) {
        let mut command = self.serve(unit::command(DAEMON), None);
        command.envs(variables.iter().copied());
        self.launch(command);
    }

    fn launch(&mut self, mut command: Command) {
        assert!(self.daemon.is_none(), "one daemon at a time");
        let log = fs::File::options().create(true).append(true).open(self.log_file()).expect("opened");
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
        // The tests are about other subjects than room, and the machine is small.
        command
            .env("STEAD_OVERSUBSCRIPTION", "{cpu=1000, memory=100, disk=1000}")
            .env("STEAD_MEMORY_RESERVE", "0MB");
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
}
