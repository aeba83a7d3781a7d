//! Three network namespaces in a row: a client, the host of the proxies, and the servers outside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::daemon::DEADLINE;

/// Names of the servers: requests to the first get a credential.
pub(super) const INJECTED: &str = "api.bench.test";
pub(super) const PASSED: &str = "other.bench.test";
pub(super) const CLIENT_ADDRESS: [u8; 4] = [10, 77, 1, 2];
pub(super) const PROXY_ADDRESS: [u8; 4] = [10, 77, 1, 1];
pub(super) const SERVER: &str = "10.77.2.2";
/// Bytes of the large file.
pub(super) const LARGE_BYTES: u64 = 1 << 30;

/// A namespace of the bench.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Client,
    Proxy,
    Outside,
}

impl Side {
    const ALL: [Self; 3] = [Self::Client, Self::Proxy, Self::Outside];

    fn name(self) -> &'static str {
        match self {
            Self::Client => "stead-bench-client",
            Self::Proxy => "stead-bench-proxy",
            Self::Outside => "stead-bench-outside",
        }
    }

    /// Returns a command that runs a program in the namespace.
    pub(super) fn command(self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name(), program]).stdin(Stdio::null());
        command
    }
}

/// A program that is ended with the value.
pub(super) struct Program(pub(super) Child);

impl Drop for Program {
    fn drop(&mut self) {
        // SIGTERM first: servers end their workers.
        let pid = self.0.id();
        // One that has ended cannot be ended.
        let _ = Command::new("kill").arg(pid.to_string()).stderr(Stdio::null()).status();
        let _ = self.0.wait();
    }
}

/// The namespaces, with servers that run; all of it ends with the value.
pub(super) struct World {
    dir: TempDir,
    servers: Vec<Program>,
}

pub(super) fn shell(line: &str) {
    let output = Command::new("sh").args(["-ec", line]).output().expect("sh runs");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Drop for World {
    fn drop(&mut self) {
        self.servers.clear();
        for name in Side::ALL.map(Side::name) {
            let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
            let _ = fs::remove_dir_all(Path::new("/etc/netns").join(name));
        }
    }
}

impl World {
    pub(super) fn new() -> Self {
        let mut world = Self { dir: tempfile::tempdir().expect("scratch"), servers: Vec::new() };
        shell(&format!("chmod 755 {}", world.path("").display()));
        connect();
        world.certify();
        world.serve();
        world
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Leads the client's connections with the servers to a port of the proxy's host, or past all proxies.
    pub(super) fn lead(&self, port: Option<u16>) {
        let rule = port.map(|port| {
            let ports = "iifname \"client0\" tcp dport { 80, 443 }";
            format!("nft add rule ip bench lead {ports} redirect to :{port};")
        });
        let line = format!("nft flush chain ip bench lead; {}", rule.unwrap_or_default());
        let done = Side::Proxy.command("sh").args(["-ec", &line]).status();
        assert!(done.is_ok_and(|status| status.success()), "{line}");
    }

    /// Makes an authority, and a certificate of the servers that it signed.
    fn certify(&self) {
        shell(&format!(
            "cd {at}; exec 2>/dev/null
             openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=authority \
                -keyout ca.key -out ca.pem -addext basicConstraints=critical,CA:TRUE
             openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=servers \
                -keyout host.key -out host.csr
             printf 'subjectAltName=DNS:{INJECTED},DNS:{PASSED}\\nbasicConstraints=CA:FALSE\\n' >ext
             openssl x509 -req -in host.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out host.pem
             cat ca.key ca.pem >both.pem; chmod 644 *; truncate -s {LARGE_BYTES} large",
            at = self.path("").display()
        ));
    }

    /// Starts the servers and their name server.
    fn serve(&mut self) {
        let at = self.path("").display().to_string();
        let body = "x".repeat(1024);
        let config = format!(
            "daemon off; pid {at}/outside.pid; error_log stderr crit; worker_processes 1; events {{ worker_connections 8192; }}
             http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600; client_max_body_size 0;
             server {{ listen {SERVER}:80; listen {SERVER}:443 ssl http2; ssl_certificate {at}/host.pem;
             ssl_certificate_key {at}/host.key; location / {{ return 200 {body}; }} location /large {{ root {at}; }} }} }}"
        );
        self.nginx(Side::Outside, "outside", &config);
        let mut names = Side::Outside.command("dnsmasq");
        names.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--user=root",
        ]);
        names.args([format!("--listen-address={SERVER}"), format!("--address=/bench.test/{SERVER}")]);
        names.args(["--bind-interfaces", "--pid-file="]);
        self.servers.push(Program(names.spawn().expect("dnsmasq runs")));
        let answers =
            Side::Client.command("curl").args(["-sko", "/dev/null", &format!("https://{PASSED}/")]).status();
        assert!(answers.is_ok_and(|status| status.success()), "the servers answer");
    }

    /// Starts nginx with a configuration and waits until it listens.
    pub(super) fn nginx(&mut self, side: Side, name: &str, config: &str) {
        let path = self.path(&format!("{name}.conf"));
        fs::write(&path, config).expect("written");
        let started = side.command("nginx").arg("-c").arg(&path).spawn().expect("nginx runs");
        self.servers.push(Program(started));
        let pid = self.path(&format!("{name}.pid"));
        wait(name, || fs::read_to_string(&pid).is_ok_and(|text| !text.trim().is_empty()));
    }

    pub(super) fn keep(&mut self, program: Program) {
        self.servers.push(program);
    }
}

/// Waits for a condition.
pub(super) fn wait(what: &str, is_met: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !is_met() {
        assert!(start.elapsed() < DEADLINE, "{what} does not start");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn connect() {
    let [client, proxy, outside] = Side::ALL.map(Side::name);
    let hosts = format!("{SERVER} {INJECTED} {PASSED}");
    shell(&format!(
        "for name in {client} {proxy} {outside}; do
            ip netns del $name 2>/dev/null || true
            ip netns add $name; ip -n $name link set lo up
            mkdir -p /etc/netns/$name; echo '127.0.0.1 localhost\n{hosts}' >/etc/netns/$name/hosts
         done
         ip link add client0 netns {proxy} type veth peer name eth0 netns {client}
         ip link add outside0 netns {proxy} type veth peer name eth0 netns {outside}
         ip -n {proxy} addr add 10.77.1.1/24 dev client0; ip -n {client} addr add 10.77.1.2/24 dev eth0
         ip -n {proxy} addr add 10.77.2.1/24 dev outside0; ip -n {outside} addr add {SERVER}/24 dev eth0
         ip -n {proxy} link set client0 up; ip -n {proxy} link set outside0 up
         ip -n {client} link set eth0 up; ip -n {outside} link set eth0 up
         ip -n {client} route add default via 10.77.1.1; ip -n {outside} route add default via 10.77.2.1
         ip netns exec {proxy} sh -ec 'echo 1 >/proc/sys/net/ipv4/ip_forward
            nft add table ip bench; nft \"add chain ip bench lead {{ type nat hook prerouting priority dstnat; }}\"'"
    ));
}
