//! A network outside of the host, with a name server and hosts whose certificates a test authority signed.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::fixtures::{run, until};
use crate::harness::{Harness, MOMENT, Program};

/// Names of the hosts, which all have one address.
const HOSTS: [&str; 3] = ["api.example.com", "other.example.com", "api.example.org"];
const SERVERS: &str = include_str!("outside.py");

/// The network; its programs end with the value.
pub(super) struct Outside {
    directory: PathBuf,
    _network: Program,
    _servers: Program,
}

impl Outside {
    /// Makes the network, which the host reaches by a link of its own, and starts the servers.
    pub(super) async fn new(site: &Harness) -> Self {
        let directory = site.scratch("outside");
        certify(&directory.display().to_string());
        let mut network = Command::new("unshare");
        network.args(["--net", "sleep", "infinity"]).stdin(Stdio::null());
        let network = Program(network.spawn().expect("unshare runs"));
        let pid = network.0.id();
        let own = fs::read_link("/proc/self/ns/net").expect("read");
        until("the network", MOMENT, async || {
            let theirs = fs::read_link(format!("/proc/{pid}/ns/net")).ok()?;
            (theirs != own).then_some(())
        })
        .await;
        let inside = format!("nsenter -t {pid} -n");
        site.shell(&format!(
            "ip link add outside type veth peer name in0 netns {pid}
             ip addr add 203.0.113.1/24 dev outside; ip link set outside up
             {inside} ip link set lo up; {inside} ip link set in0 up
             {inside} ip addr add 203.0.113.10/24 dev in0; {inside} ip addr add 203.0.113.53/24 dev in0"
        ));
        let script = directory.join("outside.py");
        fs::write(&script, SERVERS).expect("written");
        let mut servers = Command::new("nsenter");
        servers.args(["-t", &pid.to_string(), "-n", "python3"]).arg(&script).arg(&directory);
        servers.arg(directory.join("seen")).stdin(Stdio::null());
        let servers = Program(servers.spawn().expect("python3 runs"));
        let outside = Self { directory, _network: network, _servers: servers };
        until("the servers", MOMENT, async || outside.seen().contains("ready").then_some(())).await;
        outside
    }

    /// Returns the file with the authority of the hosts.
    pub(super) fn authority(&self) -> String {
        self.directory.join("ca.pem").display().to_string()
    }

    /// Returns a line for all that arrived so far.
    pub(super) fn seen(&self) -> String {
        fs::read_to_string(self.directory.join("seen")).unwrap_or_default()
    }
}

fn certify(at: &str) {
    let names: Vec<String> = HOSTS.iter().map(|host| format!("DNS:{host}")).collect();
    let lines = format!(
        "cd {at}
         openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
         openssl req -newkey rsa:2048 -nodes -subj /CN=hosts -keyout host.key -out host.csr
         printf 'subjectAltName={}\\nbasicConstraints=CA:FALSE\\nextendedKeyUsage=serverAuth\\n' >ext
         openssl x509 -req -in host.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out host.pem
         chmod 644 ca.pem; chmod 755 .",
        names.join(",")
    );
    run("sh", &["-ec", &format!("({lines}) 2>&1")]);
}
