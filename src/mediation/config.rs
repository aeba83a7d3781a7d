//! The configuration of mediated egress.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use stead_schemas::egress::{MediatorPorts, MediatorSettings};
use stead_schemas::network::{Cidr, MediatorGate};

use crate::config::Config;
use crate::hypervisor::UserRange;

/// Largest number of networks: each is a rule that packets of the process are compared with.
const NETWORKS_MAX: usize = 64;
/// The file with the authorities of servers in Debian.
const ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The keys of `egress`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressConfig {
    /// Ports at the gateway's address at which the process listens that carries mediated egress.
    pub ports: MediatorPorts,
    /// Private, loopback and other special networks that mediated guests may reach through it, such as `10.1.0.0/16`,
    /// besides those of `guest_networks`.
    pub networks: Vec<Cidr>,
    /// A file in PEM with the authorities that servers are verified by.
    pub roots: PathBuf,
}

impl Default for EgressConfig {
    fn default() -> Self {
        let ports = MediatorPorts { captured: 18443, explicit: 18080, names: 18053 };
        Self { ports, networks: Vec::new(), roots: ROOTS.into() }
    }
}

impl EgressConfig {
    /// Adds the problems of the values.
    pub(crate) fn check(&self, problems: &mut Vec<String>) {
        let MediatorPorts { captured, explicit, names } = self.ports;
        let ports = BTreeSet::from([captured, explicit, names]);
        if ports.len() < 3 || ports.contains(&0) {
            problems.push("egress.ports: must be three different ports from 1 to 65535".to_owned());
        }
        if self.networks.len() > NETWORKS_MAX {
            problems.push(format!("egress.networks: must have at most {NETWORKS_MAX} entries"));
        }
        if !self.roots.is_absolute() {
            problems.push("egress.roots: must be an absolute path".to_owned());
        }
    }
}

/// Returns the settings of the process that carries mediated egress.
pub(crate) fn settings(config: &Config) -> MediatorSettings {
    let open = config.egress.networks.iter().chain(&config.guest_networks);
    let open = open.filter_map(|network| Ipv4Net::new(network.network(), network.prefix).ok());
    MediatorSettings {
        address: config.gateway.address,
        ports: config.egress.ports,
        subnet: config.gateway,
        dns: config.dns.iter().copied().map(IpAddr::from).collect(),
        open: open.map(IpNet::from).collect(),
    }
}

/// Returns the firewall's side of the process, or `None` for a range of users that is not valid.
pub(crate) fn gate(config: &Config) -> Option<MediatorGate> {
    let user = UserRange::new(config.vm_uid_base).ok()?.mediator();
    Some(MediatorGate { settings: settings(config), user })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_name_their_keys() {
        let problems = |config: EgressConfig| {
            let mut problems = Vec::new();
            config.check(&mut problems);
            problems
                .iter()
                .filter_map(|problem| Some(problem.split_once(':')?.0.to_owned()))
                .collect::<Vec<_>>()
        };
        let default = EgressConfig::default;
        assert_eq!(problems(default()), [""; 0]);
        let ports = MediatorPorts { captured: 1, explicit: 1, names: 2 };
        assert_eq!(problems(EgressConfig { ports, ..default() }), ["egress.ports"]);
        let network: Cidr = "10.0.0.0/8".parse().expect("valid");
        let networks = |count| EgressConfig { networks: vec![network; count], ..default() };
        assert_eq!(
            (problems(networks(NETWORKS_MAX)).len(), problems(networks(NETWORKS_MAX + 1)).len()),
            (0, 1)
        );
        assert_eq!(problems(EgressConfig { roots: "roots.pem".into(), ..default() }), ["egress.roots"]);
    }

    #[test]
    fn networks_of_guests_are_open_to_mediated_guests_too() {
        let networks = |text: &str| vec![text.parse().expect("valid")];
        let mut config = Config { guest_networks: networks("10.1.2.3/16"), ..Config::default() };
        config.egress.networks = networks("127.0.0.1/8");
        let open: Vec<String> = settings(&config).open.iter().map(ToString::to_string).collect();
        assert_eq!(open, ["10.1.0.0/16", "127.0.0.0/8"]);
    }
}
