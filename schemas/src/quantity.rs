//! Units: bytes, rates and durations in the forms of the wire.
//!
//! Sources: contract.md 2.1; Go's `time.ParseDuration` for durations; the response form of sizes is that of
//! the Go package datasize (`1.0 GB`), which clients print unchanged.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The reason why a quantity was refused; suitable for a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct QuantityError(pub String);

/// A number of bytes. It parses from `1GB`, `1G`, `512MB`, `64KiB`, `1.5GB`, `4096`; units are binary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Returns whole mebibytes, rounded up, which is the unit that VMMs take.
    #[must_use]
    pub fn mib_ceil(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl FromStr for Bytes {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let (number, unit) = split_number(text.trim())?;
        let shift = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => {
                return Err(QuantityError(format!("has the unknown unit {unit:?}; use B, KB, MB, GB or TB")));
            }
        };
        scale(number, 1 << shift).map(Self)
    }
}

impl fmt::Display for Bytes {
    /// Writes one decimal from a kilobyte up: `512.0 MB`, `1.5 GB`; a plain number below: `42 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40u32, "TB"), (30, "GB"), (20, "MB"), (10, "KB")] {
            if self.0 >= 1 << shift {
                let tenths = (u128::from(self.0) * 10 + (1u128 << (shift - 1))) >> shift;
                return write!(f, "{}.{} {unit}", tenths / 10, tenths % 10);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// A rate in bytes per second. It parses from `1Gbps`, `100Mbps` (decimal bits) and `125MB/s` (binary
/// bytes).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate(pub u64);

impl FromStr for Rate {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let rate = Self::rounded_down(text.trim())?;
        // Zero stands for no limit. A very low rate must not become it.
        if rate.0 == 0 && text.contains(|digit| ('1'..='9').contains(&digit)) {
            return Err(QuantityError("is less than a byte per second".to_owned()));
        }
        Ok(rate)
    }
}

impl Rate {
    fn rounded_down(text: &str) -> Result<Self, QuantityError> {
        if let Some(bytes) = text.strip_suffix("/s").or_else(|| text.strip_suffix("/S")) {
            return bytes.parse().map(|Bytes(rate)| Self(rate));
        }
        let (number, unit) = split_number(text)?;
        let bits = match unit.to_ascii_lowercase().as_str() {
            "bps" => 1,
            "kbps" => 1_000,
            "mbps" => 1_000_000,
            "gbps" => 1_000_000_000,
            "" | "b" | "k" | "kb" | "m" | "mb" | "g" | "gb" => {
                return text.parse().map(|Bytes(rate)| Self(rate));
            }
            _ => {
                return Err(QuantityError(format!(
                    "has the unknown unit {unit:?}; use kbps, Mbps, Gbps or MB/s"
                )));
            }
        };
        scale(number, bits).map(|bits| Self(bits / 8))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Bytes(self.0))
    }
}

/// A non-negative Go duration: `1m30s`, `500ms`, `1.5h`, `0`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration(pub Duration);

impl FromStr for GoDuration {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let refuse = || QuantityError("must be a duration such as \"30s\", \"1m30s\" or \"2h\"".to_owned());
        let mut rest = text.strip_prefix('+').unwrap_or(text);
        if rest == "0" {
            return Ok(Self(Duration::ZERO));
        }
        if rest.is_empty() {
            return Err(refuse());
        }
        let mut nanos: u128 = 0;
        while !rest.is_empty() {
            let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(refuse)?;
            let unit_end =
                rest[end..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |at| end + at);
            let unit: u128 = match &rest[end..unit_end] {
                "ns" => 1,
                "us" | "µs" | "μs" => 1_000,
                "ms" => 1_000_000,
                "s" => 1_000_000_000,
                "m" => 60_000_000_000,
                "h" => 3_600_000_000_000,
                _ => return Err(refuse()),
            };
            let number = Decimal::parse(&rest[..end]).ok_or_else(refuse)?;
            nanos = number.times(unit).and_then(|part| nanos.checked_add(part)).ok_or_else(refuse)?;
            rest = &rest[unit_end..];
        }
        // Go holds durations in an i64 of nanoseconds, as do all other readers of the wire.
        let nanos = i64::try_from(nanos).map_err(|_| refuse())?;
        Ok(Self(Duration::from_nanos(nanos.unsigned_abs())))
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        let (whole, fraction) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
        if whole == 0 && fraction != 0 {
            let (unit, size) = if fraction >= 1_000_000 {
                ("ms", 1_000_000)
            } else if fraction >= 1_000 {
                ("µs", 1_000)
            } else {
                ("ns", 1)
            };
            return write!(f, "{}{unit}", trimmed(fraction / size, fraction % size, size));
        }
        let (hours, minutes, seconds) = (whole / 3600, whole / 60 % 60, whole % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        write!(f, "{}s", trimmed(seconds, fraction, 1_000_000_000))
    }
}

impl Serialize for GoDuration {
    fn serialize<Target: serde::Serializer>(&self, serializer: Target) -> Result<Target::Ok, Target::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<Source: serde::Deserializer<'de>>(deserializer: Source) -> Result<Self, Source::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A decimal number as digits and a power of ten, so that no float ever rounds a size.
struct Decimal {
    digits: u128,
    decimals: u32,
}

impl Decimal {
    fn parse(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || digits.len() > 30 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        Some(Self { digits: digits.parse().ok()?, decimals: u32::try_from(fraction.len()).ok()? })
    }

    fn times(&self, unit: u128) -> Option<u128> {
        Some(self.digits.checked_mul(unit)? / 10u128.pow(self.decimals))
    }
}

fn split_number(text: &str) -> Result<(Decimal, &str), QuantityError> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number = Decimal::parse(&text[..end])
        .ok_or_else(|| QuantityError("must start with a number, for example \"512MB\"".to_owned()))?;
    Ok((number, text[end..].trim_start()))
}

fn scale(number: Decimal, unit: u64) -> Result<u64, QuantityError> {
    number
        .times(u128::from(unit))
        .and_then(|value| u64::try_from(value).ok())
        .ok_or_else(|| QuantityError("is too large".to_owned()))
}

/// Writes `whole.fraction` without trailing zeros; `size` is the fraction's denominator, a power of ten.
fn trimmed(whole: u128, fraction: u128, size: u128) -> String {
    if fraction == 0 {
        return whole.to_string();
    }
    let width = size.ilog10() as usize;
    let digits = format!("{fraction:0width$}");
    format!("{whole}.{}", digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_exact() {
        for (text, expected) in [
            ("1GB", 1 << 30),
            ("1G", 1 << 30),
            ("512MB", 512 << 20),
            ("1.5GB", 3 << 29),
            ("4096", 4096),
            ("64 KiB", 65536),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(expected)), "{text}");
        }
        for text in ["", "GB", "-1GB", "1XB", "1..5GB", "99999999999999TB", "1e3"] {
            assert!(text.parse::<Bytes>().is_err(), "{text} was accepted");
        }
        assert_eq!(Bytes(1 << 30).to_string(), "1.0 GB");
        assert_eq!(Bytes(1536 << 20).to_string(), "1.5 GB");
        assert_eq!(Bytes(12).to_string(), "12 B");
    }

    #[test]
    fn rates_distinguish_bits_from_bytes() {
        assert_eq!("1Gbps".parse(), Ok(Rate(125_000_000)));
        assert_eq!("100Mbps".parse(), Ok(Rate(12_500_000)));
        assert_eq!("125MB/s".parse(), Ok(Rate(125 << 20)));
        for text in ["fast", "7bps", "0.001kbps", "0.9B/s", "0.5"] {
            assert!(text.parse::<Rate>().is_err(), "{text} was accepted");
        }
        for text in ["0", "0Mbps", "0.0 MB/s"] {
            assert_eq!(text.parse(), Ok(Rate(0)), "{text}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        for (text, millis) in [
            ("0", 0),
            ("0s", 0),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("500ms", 500),
            ("1h2m3.5s", 3_723_500),
        ] {
            assert_eq!(text.parse(), Ok(GoDuration(Duration::from_millis(millis))), "{text}");
        }
        for text in ["", "5", "-1s", "1x", "s", "1s2", "9999999999h"] {
            assert!(text.parse::<GoDuration>().is_err(), "{text} was accepted");
        }
        for (millis, text) in
            [(0, "0s"), (90_000, "1m30s"), (3_600_000, "1h0m0s"), (500, "500ms"), (1_500, "1.5s")]
        {
            assert_eq!(GoDuration(Duration::from_millis(millis)).to_string(), text);
        }
    }
}
