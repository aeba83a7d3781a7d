//! Keys of the configuration about the resources of the host: capacities, factors of oversubscription, and reserves.

use serde::{Deserialize, Serialize};
use stead_schemas::quantity::{Bytes, Rate};
use stead_schemas::resource::{PerResource, Ratio, Resource};

/// Capacities that replace what the host shows. Sizes are written as `64GB`, and rates as `10Gbps` or `1GB/s`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CapacityConfig {
    pub cpu: Option<u32>,
    pub memory: Option<String>,
    pub disk: Option<String>,
    pub network: Option<String>,
    pub disk_io: Option<String>,
}

/// Number of times that each resource may be promised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OversubscriptionConfig {
    pub cpu: f64,
    pub memory: f64,
    pub disk: f64,
    pub network: f64,
    pub disk_io: f64,
}

impl Default for OversubscriptionConfig {
    fn default() -> Self {
        let [cpu, memory, disk, network, disk_io] =
            Resource::ALL.map(|resource| PerResource::standard().of(resource).as_f64());
        Self { cpu, memory, disk, network, disk_io }
    }
}

impl CapacityConfig {
    /// Reads the values; `problems` gets one text for each that is wrong.
    pub(crate) fn read(&self, problems: &mut Vec<String>) -> PerResource<Option<u64>> {
        let size = |text: &str| text.parse::<Bytes>().map(|Bytes(size)| size);
        let rate = |text: &str| text.parse::<Rate>().map(|Rate(rate)| rate);
        let mut take = |key: &str, parsed: Option<Result<u64, _>>| match parsed? {
            // These two may be without a limit.
            Ok(0) if !matches!(key, "network" | "disk_io") => {
                problems.push(format!("capacity.{key}: must be more than zero"));
                None
            }
            Ok(value) => Some(value),
            Err(error) => {
                problems.push(format!("capacity.{key}: {error}"));
                None
            }
        };
        PerResource {
            cpu: take("cpu", self.cpu.map(|cpus| Ok(u64::from(cpus)))),
            memory: take("memory", self.memory.as_deref().map(size)),
            disk: take("disk", self.disk.as_deref().map(size)),
            network: take("network", self.network.as_deref().map(rate)),
            disk_io: take("disk_io", self.disk_io.as_deref().map(rate)),
        }
    }
}

impl OversubscriptionConfig {
    /// Reads the values; `problems` gets one text for each that is wrong.
    pub(crate) fn read(&self, problems: &mut Vec<String>) -> PerResource<Ratio> {
        let mut take = |key: &str, value: f64| {
            // Written out, a number has the digits that its reader checks.
            value.to_string().parse().unwrap_or_else(|error| {
                problems.push(format!("oversubscription.{key}: {error}"));
                Ratio::default()
            })
        };
        PerResource {
            cpu: take("cpu", self.cpu),
            memory: take("memory", self.memory),
            disk: take("disk", self.disk),
            network: take("network", self.network),
            disk_io: take("disk_io", self.disk_io),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_named_is_standard_and_each_problem_has_its_key() {
        let mut problems = Vec::new();
        assert_eq!(OversubscriptionConfig::default().read(&mut problems), PerResource::standard());
        assert_eq!(CapacityConfig::default().read(&mut problems), PerResource::default());
        assert_eq!(problems, Vec::<String>::new());
        let capacity = CapacityConfig {
            cpu: Some(0),
            memory: Some("lots".to_owned()),
            network: Some("10Gbps".to_owned()),
            disk_io: Some("0".to_owned()),
            ..CapacityConfig::default()
        };
        let read = capacity.read(&mut problems);
        assert_eq!((read.network, read.disk_io), (Some(1_250_000_000), Some(0)));
        let factors = OversubscriptionConfig {
            disk: 1.5,
            cpu: 0.0,
            disk_io: f64::NAN,
            memory: 1e30,
            ..Default::default()
        };
        assert_eq!(factors.read(&mut problems).disk, "1.5".parse().expect("valid"));
        let keys: Vec<_> = problems.iter().filter_map(|problem| problem.split(':').next()).collect();
        let expected = [
            "capacity.cpu",
            "capacity.memory",
            "oversubscription.cpu",
            "oversubscription.memory",
            "oversubscription.disk_io",
        ];
        assert_eq!(keys, expected);
    }
}
