//! Resources of a host, and the amounts that objects take of them.
//!
//! Guarantees: sums are exact, so that the total after any history of changes equals the sum over all objects.

use std::fmt;
use std::ops::{AddAssign, SubAssign};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits::{OVERSUBSCRIPTION_MAX, VMM_MEMORY_OVERHEAD};
use crate::quantity::{Bytes, QuantityError, Rate};

/// A resource of a host that instances share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// Processors, counted in virtual processors.
    Cpu,
    /// Memory in bytes, that of the VMMs included.
    Memory,
    /// Disk space in bytes: the sizes of disks, and the blocks of images.
    Disk,
    /// Traffic in bytes per second: the larger of both directions.
    Network,
    /// Traffic of disks in bytes per second.
    DiskIo,
}

impl Resource {
    pub const ALL: [Self; 5] = [Self::Cpu, Self::Memory, Self::Disk, Self::Network, Self::DiskIo];

    /// Returns the wire's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Network => "network",
            Self::DiskIo => "disk_io",
        }
    }

    /// Returns an amount in the unit that people read.
    #[must_use]
    pub fn amount(self, amount: u128) -> String {
        let bounded = u64::try_from(amount).unwrap_or(u64::MAX);
        match self {
            Self::Cpu => format!("{amount} vcpus"),
            Self::Memory | Self::Disk => Bytes(bounded).to_string(),
            Self::Network | Self::DiskIo => Rate(bounded).to_string(),
        }
    }
}

/// A value for each resource.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PerResource<T: Default> {
    pub cpu: T,
    pub memory: T,
    pub disk: T,
    pub network: T,
    pub disk_io: T,
}

impl<T: Copy + Default> PerResource<T> {
    #[must_use]
    pub fn of(&self, resource: Resource) -> T {
        match resource {
            Resource::Cpu => self.cpu,
            Resource::Memory => self.memory,
            Resource::Disk => self.disk,
            Resource::Network => self.network,
            Resource::DiskIo => self.disk_io,
        }
    }
}

/// A factor of oversubscription, in thousandths: how many times a resource may be promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ratio(u32);

impl Ratio {
    const ONE: u32 = 1000;

    /// Makes the factor of a whole number.
    #[must_use]
    pub const fn whole(number: u16) -> Self {
        Self(number as u32 * Self::ONE)
    }

    #[must_use]
    pub fn as_f64(self) -> f64 {
        f64::from(self.0) / f64::from(Self::ONE)
    }

    /// Returns the amount times the factor, rounded down.
    #[must_use]
    pub fn of(self, amount: u64) -> u128 {
        u128::from(amount) * u128::from(self.0) / u128::from(Self::ONE)
    }
}

impl Default for Ratio {
    fn default() -> Self {
        Self(Self::ONE)
    }
}

impl FromStr for Ratio {
    type Err = QuantityError;

    /// Parses a decimal number with at most three decimals.
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let refused = || {
            let most = Self::whole(OVERSUBSCRIPTION_MAX);
            QuantityError(format!("must be a number from 0.001 to {most} with at most three decimals"))
        };
        let (whole, decimals) = text.trim().split_once('.').unwrap_or((text.trim(), "0"));
        let is_number =
            |part: &str| (1..=9).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
        if !is_number(whole) || !is_number(decimals) || decimals.trim_end_matches('0').len() > 3 {
            return Err(refused());
        }
        let decimals = format!("{:0<3}", decimals.trim_end_matches('0'));
        let thousandths = format!("{whole}{decimals}").parse::<u64>().map_err(|_| refused())?;
        let ratio = u32::try_from(thousandths).map(Self).map_err(|_| refused())?;
        if ratio.0 == 0 || ratio > Self::whole(OVERSUBSCRIPTION_MAX) { Err(refused()) } else { Ok(ratio) }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_f64().fmt(f)
    }
}

impl PerResource<Ratio> {
    /// Returns the factors of a host whose configuration names none: those of Hypeman's server.
    #[must_use]
    pub fn standard() -> Self {
        let [one, two, four] = [1, 2, 4].map(Ratio::whole);
        Self { cpu: four, memory: one, disk: one, network: two, disk_io: two }
    }
}

/// Amounts that objects take of a host. A record's field may hold any number, so sums have room for all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Number of virtual processors.
    pub vcpus: u128,
    /// Bytes of memory, with those of the VMMs.
    pub memory: u128,
    /// Bytes of disks that instances write over their images and over volumes.
    pub overlays: u128,
    /// Bytes of volumes.
    pub volumes: u128,
    /// Bytes per second to guests.
    pub download: u128,
    /// Bytes per second from guests.
    pub upload: u128,
    /// Bytes per second of disks.
    pub disk_io: u128,
}

impl Usage {
    /// Returns the amount of a resource.
    #[must_use]
    pub fn of(&self, resource: Resource) -> u128 {
        match resource {
            Resource::Cpu => self.vcpus,
            Resource::Memory => self.memory,
            Resource::Disk => self.overlays + self.volumes,
            Resource::Network => self.download.max(self.upload),
            Resource::DiskIo => self.disk_io,
        }
    }

    fn fields(&mut self, other: &Self) -> [(&mut u128, u128); 7] {
        [
            (&mut self.vcpus, other.vcpus),
            (&mut self.memory, other.memory),
            (&mut self.overlays, other.overlays),
            (&mut self.volumes, other.volumes),
            (&mut self.download, other.download),
            (&mut self.upload, other.upload),
            (&mut self.disk_io, other.disk_io),
        ]
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.fields(&other).into_iter().for_each(|(mine, theirs)| *mine += theirs);
    }
}

/// Takes an amount out of a sum that contains it.
impl SubAssign for Usage {
    fn sub_assign(&mut self, other: Self) {
        self.fields(&other).into_iter().for_each(|(mine, theirs)| *mine -= theirs);
    }
}

/// The pressure on the memory of a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Memory that programs can still get.
    pub available: Bytes,
    /// True if programs wait for memory.
    pub is_high: bool,
}

/// Returns the memory that a VM takes of its host: that of the guest, and that of its VMM.
#[must_use]
pub fn vm_memory(guest: Bytes) -> u128 {
    u128::from(guest.0) + u128::from(VMM_MEMORY_OVERHEAD.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_read_exactly_and_others_are_refused() {
        for (text, thousandths) in
            [("4", 4000), ("1.5", 1500), ("0.001", 1), ("1000", 1_000_000), (" 2.250 ", 2250)]
        {
            assert_eq!(text.parse(), Ok(Ratio(thousandths)), "{text}");
        }
        for text in ["", "0", "0.0", "-1", "1.0001", "1001", "1e3", ".5", "1.", "nan", "9999999999"] {
            assert!(text.parse::<Ratio>().is_err(), "{text} was accepted");
        }
        assert_eq!(Ratio(1500).of(3), 4);
        assert_eq!(Ratio::whole(1000).of(u64::MAX), u128::from(u64::MAX) * 1000);
    }

    #[test]
    fn sums_are_exact_at_the_ends_of_the_range() {
        let most =
            Usage { download: u128::from(u64::MAX), memory: vm_memory(Bytes(u64::MAX)), ..Usage::default() };
        let mut sum = Usage::default();
        (0..3).for_each(|_| sum += most);
        (0..3).for_each(|_| sum -= most);
        assert_eq!(sum, Usage::default());
        let usage = Usage { download: 3, upload: 5, overlays: 1, volumes: 2, ..Usage::default() };
        assert_eq!((usage.of(Resource::Network), usage.of(Resource::Disk)), (5, 3));
    }
}
