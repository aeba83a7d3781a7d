//! The budget of a host: what it has of each resource, what is left, and whether more fits.
//!
//! Guarantees: a resource of unknown capacity is unlimited, and what takes nothing more always fits.

use std::fmt;

use crate::meta::Object;
use crate::node::Node;
use crate::resource::{Ratio, Resource, Usage};

/// The amount of a resource that a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Amount that the host has; 0 if that is not known.
    pub capacity: u64,
    /// True if the capacity is from the configuration.
    pub is_configured: bool,
    /// Amount that is kept for the host itself.
    pub reserve: u64,
    pub oversubscription: Ratio,
}

impl Budget {
    /// Returns the amount that objects may take; `None` means any amount.
    #[must_use]
    pub fn limit(&self) -> Option<u128> {
        let shared = self.capacity.saturating_sub(self.reserve);
        (self.capacity > 0).then(|| self.oversubscription.of(shared))
    }
}

/// A resource of which a request needs more than is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    pub resource: Resource,
    pub asked: u128,
    pub left: u128,
    pub limit: u128,
}

/// Continues the name of the resource.
impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [asked, left, limit] = [self.asked, self.left, self.limit].map(|n| self.resource.amount(n));
        write!(f, "is not enough on this host: {asked} are asked for, and {left} of {limit} are left")
    }
}

impl Object<Node> {
    /// Returns what the host has of a resource.
    #[must_use]
    pub fn budget(&self, resource: Resource) -> Budget {
        let (spec, seen) = (&self.spec, &self.status.capacity);
        let detected = match resource {
            Resource::Cpu => u64::from(seen.cpus),
            Resource::Memory => seen.memory.0,
            Resource::Disk => seen.disk.0,
            Resource::Network => self.status.uplink_speed.map_or(0, |speed| speed.0),
            // Detected by nobody yet.
            Resource::DiskIo => 0,
        };
        let configured = spec.capacity.of(resource);
        Budget {
            capacity: configured.unwrap_or(detected),
            is_configured: configured.is_some(),
            reserve: match resource {
                Resource::Memory => spec.memory_reserve.0,
                Resource::Disk => spec.disk_reserve.0,
                Resource::Cpu | Resource::Network | Resource::DiskIo => 0,
            },
            oversubscription: spec.oversubscription.of(resource),
        }
    }

    /// Returns the amount of a resource that is taken: by objects, and by images.
    #[must_use]
    pub fn allocated(&self, resource: Resource, usage: &Usage) -> u128 {
        let images = match resource {
            Resource::Disk => {
                u128::from(self.status.images.content.0) + u128::from(self.status.images.cache.0)
            }
            Resource::Cpu | Resource::Memory | Resource::Network | Resource::DiskIo => 0,
        };
        usage.of(resource) + images
    }

    /// Lists the resources of which a change takes more than is left. What shrinks, or stays, always fits.
    #[must_use]
    pub fn lacks(&self, before: &Usage, after: &Usage) -> Vec<Lack> {
        let lack = |resource| {
            let (was, is) = (self.allocated(resource, before), self.allocated(resource, after));
            let limit = self.budget(resource).limit()?;
            let (asked, left) = (is.saturating_sub(was), limit.saturating_sub(was));
            (asked > left).then_some(Lack { resource, asked, left, limit })
        };
        Resource::ALL.into_iter().filter_map(lack).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_what_is_left_of_the_capacity_times_the_factor() {
        let budget = |capacity, reserve| Budget {
            capacity,
            is_configured: false,
            reserve,
            oversubscription: Ratio::whole(2),
        };
        assert_eq!(budget(0, 0).limit(), None, "unknown is unlimited");
        assert_eq!(budget(10, 3).limit(), Some(14));
        assert_eq!(budget(10, 30).limit(), Some(0), "a reserve beyond the capacity leaves nothing");
    }
}
