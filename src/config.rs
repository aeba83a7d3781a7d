//! Configuration: defaults, then the file, then `STEAD_*`, then flags; the source of each key is known.
//!
//! Guarantees: an unknown key or a malformed value is an error that names it; two daemons with their own
//! directories and names never touch each other's objects.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Yaml};
use serde::{Deserialize, Serialize};
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{LinkName, Platform};
use stead_schemas::network::Cidr;
use stead_schemas::node::NodeSpec;
use stead_schemas::quantity::{Bytes, GoDuration};

use crate::access::{self, AccountId, SocketUser, TlsConfig};
use crate::host::oci::{Allowed, OciConfig, Target};
use crate::hypervisor::{USERS, UserRange, WantedAccelerator};
use crate::mediation::EgressConfig;
use crate::resources::{CapacityConfig, OversubscriptionConfig};

/// The configuration; field names are the keys of the file, and of the environment with `STEAD_` before
/// them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directory of store, keys, images, disks and logs; survives reboots.
    pub data_dir: PathBuf,
    /// Directory of sockets and records of running VMs; best on tmpfs, which a reboot empties.
    pub run_dir: PathBuf,
    pub listen: SocketAddr,
    /// Certificate of the TCP listener; by default it speaks plain HTTP, and only on loopback.
    pub tls: Option<TlsConfig>,
    /// True if `listen` may be an address other than loopback without TLS, because something else encrypts.
    pub insecure_without_tls: bool,
    /// Runs VMMs without walls, for hosts that cannot make them.
    pub insecure_without_walls: bool,
    /// Path of the API's Unix socket; by default `stead.sock` in `run_dir`.
    pub socket: Option<PathBuf>,
    /// The group whose users may connect to the Unix socket; by default only root may.
    pub socket_group: Option<AccountId>,
    /// Users and groups that need no token at the Unix socket. Root needs none.
    pub socket_users: Vec<SocketUser>,
    /// Address at which ingresses open their ports; by default all addresses of this host, as with the peer,
    /// so that published names can be reached by all who reach the host. Loopback or a single address
    /// narrows that.
    pub ingress_address: IpAddr,
    /// Directory of an unpacked Debian cloud kernel package (deploy/fetch-kernel); default `DATA/kernel`.
    pub kernel_dir: Option<PathBuf>,
    /// Name of our bridge; it also marks all objects of this daemon on the host.
    pub bridge: LinkName,
    /// The host's address on the bridge, with its prefix, which gives the subnet of the guests.
    pub gateway: Cidr,
    /// Name servers that guests get.
    pub dns: Vec<Ipv4Addr>,
    /// Domains in which guests search names, such as `corp.example`.
    pub dns_search: Vec<String>,
    /// Options of the guests' resolv.conf, such as `ndots:2`.
    pub dns_options: Vec<String>,
    /// MTU of guests' cards in bytes, 576 to 1500; by default that of the host's uplink, at most 1500.
    pub guest_mtu: Option<u16>,
    /// TCP and UDP ports of the host that guests may reach at the gateway's address, besides DNS.
    pub guest_host_ports: Vec<u16>,
    /// Private, link-local and other special networks that guests may reach, such as `192.168.7.0/24`.
    pub guest_networks: Vec<Cidr>,
    /// Mediated egress.
    pub egress: EgressConfig,
    /// Name of our nft tables.
    pub table: String,
    /// Start of our TAPs' names; at most 5 characters.
    pub tap_prefix: String,
    /// Number of concurrent conversions of images, and of concurrent fetches from one registry.
    pub image_concurrency: usize,
    /// Registries that are accessed without TLS, besides loopback.
    pub plain_http_hosts: Vec<String>,
    /// Destinations that images may be fetched from besides public addresses: networks (`10.1.0.0/16`) and
    /// hosts (`registry.lan:5000`). Hosts of `plain_http_hosts` need not be listed again.
    pub registry_allow: Vec<String>,
    /// Space that is kept free on the disks' file system, such as `1GB`.
    pub disk_reserve: String,
    /// Memory that is kept for the host itself, such as `256MB`: no instance is admitted that would take it.
    pub memory_reserve: String,
    /// True if memory is taken back from instances for some minutes while programs of the host wait for memory.
    pub reclaim_on_pressure: bool,
    /// Capacities of the host that replace what it shows, such as `{network: 10Gbps}`.
    pub capacity: CapacityConfig,
    /// Number of times that each resource may be promised to instances, such as `{cpu: 4}`.
    pub oversubscription: OversubscriptionConfig,
    /// Largest space that images may take on the disk, complete or partial, such as `50GB`; by default the
    /// whole disk.
    pub image_quota: Option<String>,
    /// Time between two resynchronisations of all objects, such as `5m`.
    pub resync: String,
    /// Number of concurrent connections to the API; for a further one an idle one is closed. It should
    /// exceed the number of requests that one subject's tokens may have in progress, which is half of five
    /// times `requests_max`.
    pub connections_max: usize,
    /// Number of these from one client address: a proxy in front of the API is one client.
    pub connections_per_client_max: usize,
    /// Number of concurrent requests of each kind: requests that are being sent, short requests, requests
    /// that wait for a state, verbs, and streams; the tokens of one subject get half of each.
    pub requests_max: usize,
    /// Number of concurrent sessions of exec and cp.
    pub sockets_max: usize,
    /// True if responses to all tokens contain the values of environment variables and of headers that let
    /// requests in, as with the peer; otherwise only tokens with `instance:secrets` and `ingress:secrets`,
    /// with `*`, or without permissions get them.
    pub show_secrets: bool,
    /// True if a token that names no permissions is refused; otherwise it has all of them, as with the peer.
    pub require_permissions: bool,
    /// The program that runs VMs.
    pub qemu: PathBuf,
    /// The way in which guests' instructions are executed: `kvm`, `tcg` (emulation), or `auto`, which takes KVM
    /// where the host has it. Emulation is no security boundary: with `kvm` no VM starts without it.
    pub accelerator: WantedAccelerator,
    /// First of the 1,048,576 user and group ids of VMMs, a multiple of that number: each VM has one. No
    /// account of the host may have one of them, and each daemon of a host needs a range of its own.
    pub vm_uid_base: u32,
    /// Log level, `error` to `trace`, or a filter such as `stead=debug`.
    pub log: String,
    /// A failpoint for tests: `KIND/ACTION/before` or `KIND/ACTION/after` kills the daemon there
    /// (`src/failpoint.rs`).
    pub failpoint: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        let parsed = "10.100.0.1/16".parse().expect("a valid constant");
        Self {
            data_dir: "/var/lib/stead".into(),
            run_dir: "/run/stead".into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            tls: None,
            insecure_without_tls: false,
            insecure_without_walls: false,
            socket: None,
            socket_group: None,
            socket_users: Vec::new(),
            ingress_address: Ipv4Addr::UNSPECIFIED.into(),
            kernel_dir: None,
            bridge: "stead0".parse().expect("a valid constant"),
            gateway: parsed,
            dns: vec![Ipv4Addr::new(1, 1, 1, 1)],
            dns_search: Vec::new(),
            dns_options: Vec::new(),
            guest_mtu: None,
            guest_host_ports: Vec::new(),
            guest_networks: Vec::new(),
            egress: EgressConfig::default(),
            table: "stead".to_owned(),
            tap_prefix: "st".to_owned(),
            image_concurrency: 2,
            plain_http_hosts: Vec::new(),
            registry_allow: Vec::new(),
            disk_reserve: "1GB".to_owned(),
            memory_reserve: "256MB".to_owned(),
            reclaim_on_pressure: false,
            capacity: CapacityConfig::default(),
            oversubscription: OversubscriptionConfig::default(),
            image_quota: None,
            resync: "5m".to_owned(),
            connections_max: 1536,
            connections_per_client_max: 512,
            requests_max: 512,
            sockets_max: 512,
            show_secrets: false,
            require_permissions: false,
            qemu: "qemu-system-x86_64".into(),
            accelerator: WantedAccelerator::Auto,
            vm_uid_base: VM_UID_BASE,
            log: "info".to_owned(),
            failpoint: None,
        }
    }
}

/// The problems of a configuration, one text for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration is wrong: {}", self.0.join("; "))
    }
}

impl std::error::Error for ConfigError {}

/// A configuration with the source of each key.
#[derive(Debug)]
pub struct Effective {
    pub config: Config,
    pub sources: BTreeMap<String, String>,
}

/// First user id of VMMs: among those that systemd's table of user ids lists as unused, beyond those of accounts,
/// of services and of containers.
const VM_UID_BASE: u32 = 1904 * USERS;
/// Longest name of the nft tables, in bytes; the name is one word.
const TABLE_BYTES_MAX: usize = 32;
/// Largest number of entries of `guest_host_ports` and of `guest_networks`: each entry is a firewall rule
/// that packets are compared with.
const GUEST_REACH_MAX: usize = 64;
/// Longest domain name, in bytes (RFC 1035).
const DOMAIN_BYTES_MAX: usize = 253;
/// Largest number of search domains and of resolver options: older C libraries read 6 domains, and the file
/// is read again for each process.
const RESOLVER_WORDS_MAX: usize = 16;
/// Longest prefix of TAPs' names, in bytes: 15 characters less the ten of a uid.
const TAP_PREFIX_BYTES_MAX: usize = 5;

impl Config {
    /// Reads all layers; `flags` are the keys given on the command line.
    ///
    /// # Errors
    /// Returns every problem, by key.
    pub fn load(
        file: Option<&Path>,
        flags: BTreeMap<&'static str, String>,
    ) -> Result<Effective, ConfigError> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(file) = file {
            figment = figment.merge(Yaml::file_exact(file));
        }
        // Other variables with this prefix belong to the client and the tests.
        let keys = serde_json::to_value(Self::default()).unwrap_or_default();
        let keys: Vec<String> =
            keys.as_object().into_iter().flat_map(|object| object.keys().cloned()).collect();
        let known: Vec<&str> = keys.iter().map(String::as_str).collect();
        figment = figment.merge(Env::prefixed("STEAD_").only(&known));
        for (key, value) in flags {
            figment = figment.merge(Serialized::default(key, value));
        }
        let config: Self = figment
            .extract()
            .map_err(|error| ConfigError(error.into_iter().map(|one| one.to_string()).collect()))?;
        config.check()?;
        let source = |key: &String| {
            let name = figment.find_metadata(key).map_or("default", |metadata| metadata.name.as_ref());
            if name.contains("Config") || name.contains("String") {
                "default or flag".to_owned()
            } else {
                name.to_owned()
            }
        };
        let sources = keys.iter().map(|key| (key.clone(), source(key))).collect();
        Ok(Effective { config, sources })
    }

    fn check(&self) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let word = |text: &str, max: usize| {
            (1..=max).contains(&text.len())
                && text.starts_with(|c: char| c.is_ascii_alphabetic())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        };
        if !word(&self.table, TABLE_BYTES_MAX) {
            problems.push(format!("table: must be a word of at most {TABLE_BYTES_MAX} characters"));
        }
        if !word(&self.tap_prefix, TAP_PREFIX_BYTES_MAX) {
            problems.push(format!("tap_prefix: must be a word of at most {TAP_PREFIX_BYTES_MAX} characters"));
        }
        for (key, value) in [
            ("image_concurrency", self.image_concurrency),
            ("connections_max", self.connections_max),
            ("connections_per_client_max", self.connections_per_client_max),
            ("requests_max", self.requests_max),
            ("sockets_max", self.sockets_max),
        ] {
            if value == 0 {
                problems.push(format!("{key}: must be at least 1"));
            }
        }
        for error in self.registry_allow.iter().filter_map(|entry| entry.parse::<Allowed>().err()) {
            problems.push(format!("registry_allow: {error}"));
        }
        for (key, size) in [("disk_reserve", &self.disk_reserve), ("memory_reserve", &self.memory_reserve)] {
            if let Err(error) = size.parse::<Bytes>() {
                problems.push(format!("{key}: {error}"));
            }
        }
        self.capacity.read(&mut problems);
        self.oversubscription.read(&mut problems);
        self.egress.check(&mut problems);
        if let Some(Err(error)) = self.image_quota.as_ref().map(|quota| quota.parse::<Bytes>()) {
            problems.push(format!("image_quota: {error}"));
        }
        match self.resync.parse::<GoDuration>() {
            Ok(GoDuration(interval)) if interval.is_zero() => {
                problems.push("resync: must be more than zero".to_owned())
            }
            Ok(_) => {}
            Err(error) => problems.push(format!("resync: {error}")),
        }
        if self.guest_host_ports.len() > GUEST_REACH_MAX || self.guest_networks.len() > GUEST_REACH_MAX {
            problems.push(format!(
                "guest_host_ports, guest_networks: must have at most {GUEST_REACH_MAX} entries"
            ));
        }
        self.check_resolver(&mut problems);
        if let Err(error) = UserRange::new(self.vm_uid_base) {
            problems.push(format!("vm_uid_base: {error}"));
        }
        if self.guest_host_ports.contains(&0) {
            problems.push("guest_host_ports: must be from 1 to 65535".to_owned());
        }
        for (key, path) in [("data_dir", &self.data_dir), ("run_dir", &self.run_dir)] {
            if !path.is_absolute() {
                problems.push(format!("{key}: must be an absolute path"));
            }
        }
        access::check_socket(&self.socket(), &mut problems);
        access::check_users(&self.socket_users, self.socket_group.is_some(), &mut problems);
        problems.extend(self.exposure("listen", self.listen.ip()));
        if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
    }

    /// Checks the keys of resolv.conf: each entry must be one word, because it is written into a line there.
    fn check_resolver(&self, problems: &mut Vec<String>) {
        let is_word = |text: &String, others: &str| {
            (1..=DOMAIN_BYTES_MAX).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || others.as_bytes().contains(&b))
        };
        for (key, all, others) in
            [("dns_search", &self.dns_search, "-._"), ("dns_options", &self.dns_options, "-:_")]
        {
            if all.len() > RESOLVER_WORDS_MAX {
                problems.push(format!("{key}: must have at most {RESOLVER_WORDS_MAX} entries"));
            }
            for (index, _) in all.iter().enumerate().filter(|(_, text)| !is_word(text, others)) {
                problems.push(format!("{key}[{index}]: must be letters, digits and {others:?}"));
            }
        }
        if self.guest_mtu.is_some_and(|mtu| !(576..=1500).contains(&mtu)) {
            problems.push("guest_mtu: must be from 576 to 1500".to_owned());
        }
    }

    /// Returns the problem of an address of the API that other hosts reach without TLS, or `None`.
    #[must_use]
    pub fn exposure(&self, key: &str, address: IpAddr) -> Option<String> {
        access::exposure(key, address, self.tls.is_some(), self.insecure_without_tls)
    }

    /// Returns the path of the API's Unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.run_dir.join("stead.sock"))
    }

    #[must_use]
    pub fn disk_reserve(&self) -> Bytes {
        self.disk_reserve.parse().unwrap_or_default()
    }

    /// Returns the spec of this host as a node.
    #[must_use]
    pub fn node(&self, platform: Platform, default_hypervisor: Hypervisor) -> NodeSpec {
        // Problems were refused by `load`.
        let mut problems = Vec::new();
        NodeSpec {
            platform,
            default_hypervisor,
            disk_reserve: self.disk_reserve(),
            memory_reserve: self.memory_reserve.parse().unwrap_or_default(),
            capacity: self.capacity.read(&mut problems),
            oversubscription: self.oversubscription.read(&mut problems),
        }
    }

    /// Returns the configuration of the image directory.
    #[must_use]
    pub fn images(&self, target: Target) -> OciConfig {
        OciConfig {
            directory: self.data_dir.join("images"),
            plain_http_hosts: self.plain_http_hosts.clone(),
            // Invalid entries were refused by `load`.
            registry_allow: self.registry_allow.iter().filter_map(|entry| entry.parse().ok()).collect(),
            jobs_max: self.image_concurrency,
            target,
            disk_reserve: self.disk_reserve(),
            quota: self.image_quota.as_ref().and_then(|quota| quota.parse().ok()),
        }
    }

    #[must_use]
    pub fn resync(&self) -> std::time::Duration {
        self.resync.parse().unwrap_or(GoDuration(stead_schemas::limits::RESYNC_INTERVAL)).0
    }

    #[must_use]
    pub fn kernel_dir(&self) -> PathBuf {
        self.kernel_dir.clone().unwrap_or_else(|| self.data_dir.join("kernel"))
    }

    /// Returns the programs of drivers by the drivers' names.
    #[must_use]
    pub fn programs(&self) -> BTreeMap<&'static str, PathBuf> {
        BTreeMap::from([("qemu", self.qemu.clone())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_win_in_order_and_problems_name_their_keys() {
        let file = tempfile::NamedTempFile::new().expect("scratch");
        std::fs::write(file.path(), "bridge: br9\ntable: other\n").expect("written");
        let flags = BTreeMap::from([("table", "flagged".to_owned())]);
        let effective = Config::load(Some(file.path()), flags).expect("valid");
        assert_eq!((effective.config.bridge.as_str(), effective.config.table.as_str()), ("br9", "flagged"));
        std::fs::write(file.path(), "brigde: br9\n").expect("written");
        let error = Config::load(Some(file.path()), BTreeMap::new()).expect_err("misspelt");
        assert!(error.to_string().contains("brigde"), "{error}");
        std::fs::write(file.path(), "gateway: 10.0.0.1\n").expect("written");
        let error = Config::load(Some(file.path()), BTreeMap::new()).expect_err("no prefix");
        assert!(error.to_string().contains("gateway"), "{error}");
        let wrong = Config { registry_allow: vec!["10.0.0.0/99".to_owned()], ..Config::default() };
        assert!(wrong.check().expect_err("no network").to_string().contains("registry_allow"));
        // A key of a key is set without the others.
        std::fs::write(file.path(), "oversubscription: {cpu: 8}\ncapacity: {memory: 2GB}\n")
            .expect("written");
        let config = Config::load(Some(file.path()), BTreeMap::new()).expect("valid").config;
        let node = config.node(Platform::LinuxAmd64, Hypervisor::Vz);
        assert_eq!((node.oversubscription.cpu.as_f64(), node.oversubscription.memory.as_f64()), (8.0, 1.0));
        assert_eq!((node.capacity.memory, node.capacity.cpu), (Some(2 << 30), None));
        for wrong in ["oversubscription: {cpu: 0}", "capacity: {disk: much}", "capacity: {tape: 1}"] {
            std::fs::write(file.path(), format!("{wrong}\n")).expect("written");
            let error = Config::load(Some(file.path()), BTreeMap::new()).expect_err(wrong).to_string();
            assert!(error.contains(wrong.split_once(':').expect("a key").0), "{error}");
        }
        let (dns_search, dns_options) = (vec!["a b".to_owned()], vec!["ndots:2\nnameserver".to_owned()]);
        let wrong = Config { dns_search, dns_options, guest_mtu: Some(68), ..Config::default() };
        let ConfigError(wrong) = wrong.check().expect_err("three problems");
        let keys: Vec<_> = wrong.iter().filter_map(|problem| problem.split(':').next()).collect();
        assert_eq!(keys, ["dns_search[0]", "dns_options[0]", "guest_mtu"]);
        let wrong = Config { socket: Some("x".repeat(108).into()), ..Config::default() };
        assert_eq!(wrong.check().expect_err("relative and too long").0.len(), 2);
        let wrong =
            Config { tap_prefix: "far-too-long".to_owned(), resync: "0s".to_owned(), ..Config::default() };
        assert_eq!(wrong.check().expect_err("two problems").0.len(), 2);
    }
    /// Reads a file; returns the configuration, or its problems in one text.
    fn read(text: &str) -> Result<Config, String> {
        let file = tempfile::NamedTempFile::new().expect("scratch");
        std::fs::write(file.path(), text).expect("written");
        let loaded = Config::load(Some(file.path()), BTreeMap::new());
        loaded.map(|effective| effective.config).map_err(|error| error.to_string())
    }

    #[test]
    fn an_address_beyond_loopback_needs_tls_or_the_word_that_none_is_meant() {
        for address in
            ["0.0.0.0:80", "10.0.0.1:80", "'[::]:80'", "'[2001:db8::1]:80'", "'[::ffff:10.0.0.1]:80'"]
        {
            let listen = format!("listen: {address}\n");
            let error = read(&listen).expect_err("tokens would be sent unencrypted");
            assert!(error.contains("listen:") && error.contains("insecure_without_tls: true"), "{error}");
            for more in ["tls: self-signed", "tls: {certificate: /c, key: /k}", "insecure_without_tls: true"]
            {
                read(&format!("{listen}{more}\n")).expect("meant");
            }
        }
        for address in ["127.0.0.1:80", "127.9.9.9:80", "'[::1]:80'", "'[::ffff:127.0.0.1]:80'"] {
            read(&format!("listen: {address}\n")).expect("nobody else reaches it");
        }
        for wrong in ["tls: none\n", "tls: {certificate: /c}\n", "tls: {certificate: /c, key: /k, ca: /a}\n"]
        {
            assert!(read(wrong).expect_err("malformed").contains("self-signed"), "{wrong}");
        }
    }

    #[test]
    fn users_of_the_socket_have_a_group_that_reaches_it_and_known_scopes() {
        let config =
            read("socket_group: stead\nsocket_users: [{user: 1000}, {group: g, scopes: [image:read]}]\n");
        let users = config.expect("valid").socket_users;
        assert_eq!(
            (users[0].user.clone(), &users[0].scopes[..]),
            (Some(AccountId::Number(1000)), &["*".to_owned()][..])
        );
        assert_eq!(users[1].group, Some(AccountId::Name("g".to_owned())));
        let wrong = "socket_users: [{scopes: ['*']}, {user: a, group: b}, {user: a, scopes: [everything]}]\n";
        let error = read(wrong).expect_err("wrong");
        for part in ["set socket_group", "[0]: must", "[1]: must", "[2].scopes: there is no scope"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
