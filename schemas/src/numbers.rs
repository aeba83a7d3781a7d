//! Numbers that count different things are separate types: a swapped argument does not compile.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};

macro_rules! number {
    ($(#[$attribute:meta])* $name:ident) => {
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        $(#[$attribute])*
        pub struct $name(pub u64);

        impl $name {
            /// Returns the number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// The number of a version of an object's spec: 1 for the first, raised by 1 with every change.
    #[derive(Deserialize)]
    #[serde(transparent)]
    Generation
}

number! {
    /// The number of a run of an instance: 1 for the first, raised by 1 with every start. 0 means no run.
    #[derive(Deserialize)]
    #[serde(transparent)]
    RunNo
}

number! {
    /// The number of a standby that was requested of an instance; restores and forks that continue from a
    /// snapshot count too. 0 means none.
    #[derive(Deserialize)]
    #[serde(transparent)]
    StandbyNo
}

number! {
    /// The number of a launch of an instance: 1 for the first. A launch begins with a boot of the guest, or
    /// with the memory of another instance; standby and restore do not end it. 0 means no launch.
    #[serde(transparent)]
    LaunchId
}

number! {
    /// The number of a grant of processors and memory of the host to an instance: 1 for the first. 0 means none.
    #[derive(Deserialize)]
    #[serde(transparent)]
    GrantNo
}

number! {
    /// The number of a set of devices that a VMM gives to its guests: 0 for the first. A memory that was saved with
    /// one set loads into no other.
    #[derive(Deserialize)]
    #[serde(transparent)]
    DeviceSet
}

/// Converts the old form of a launch, which was the time at which it began, to its nanoseconds since 1970:
/// equal times give equal numbers, which no counter reaches.
impl From<Timestamp> for LaunchId {
    fn from(launched_at: Timestamp) -> Self {
        Self(u64::try_from(launched_at.as_nanosecond()).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for LaunchId {
    fn deserialize<Source: Deserializer<'de>>(deserializer: Source) -> Result<Self, Source::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Stored {
            Number(u64),
            Time(Timestamp),
        }
        Ok(match Stored::deserialize(deserializer)? {
            Stored::Number(number) => Self(number),
            Stored::Time(at) => at.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_that_was_stored_as_a_time_is_one_number_and_no_counter_reaches_it() {
        let read = |text: &str| serde_json::from_str::<LaunchId>(text).expect("readable");
        let at = "\"2026-11-26T15:20:14.123456789Z\"";
        assert_eq!(read(at), read(at));
        assert_eq!(read(at), at.trim_matches('"').parse::<Timestamp>().expect("a time").into());
        assert_ne!(read(at), read("\"2026-11-26T15:20:14.12345679Z\""));
        assert!(read(at).0 > u64::from(u32::MAX));
        let first = LaunchId::default().next();
        assert_eq!(serde_json::to_string(&first).expect("writable"), "1");
        assert_eq!(read("1"), first);
    }
}
