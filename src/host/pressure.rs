//! The pressure on the memory of the host, as its kernel shows it.

use std::fs;

use stead_schemas::resource::Pressure;

use super::capacity::{MEMORY, memory};

/// The file in which the kernel shows which part of the time programs waited for memory (documented in the kernel's tree,
/// accounting/psi). Kernels without it show no pressure.
const PRESSURE: &str = "/proc/pressure/memory";
/// Part of the last ten seconds in which some program waited for memory, from which on the host is under pressure, in
/// percent.
const PRESSURE_MIN: f64 = 10.0;

/// Reads the pressure. What the kernel does not show is zero.
#[must_use]
pub fn read() -> Pressure {
    let text = |path| fs::read_to_string(path).unwrap_or_default();
    Pressure {
        available: memory(&text(MEMORY), "MemAvailable").unwrap_or_default(),
        is_high: waits(&text(PRESSURE)) >= PRESSURE_MIN,
    }
}

/// Returns the value of `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, in percent.
fn waits(shown: &str) -> f64 {
    let line = shown.lines().find_map(|line| line.strip_prefix("some "));
    let word = line.and_then(|line| line.split_whitespace().find_map(|word| word.strip_prefix("avg10=")));
    word.and_then(|word| word.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use stead_schemas::quantity::Bytes;

    use super::*;

    #[test]
    fn pressure_is_read_from_its_lines_and_what_is_missing_is_none() {
        let some =
            "some avg10=12.34 avg60=1.00 avg300=0.00 total=99\nfull avg10=50.00 avg60=0 avg300=0 total=1\n";
        assert!((waits(some) - 12.34).abs() < 1e-9);
        assert_eq!((waits(""), waits("full avg10=50.00"), waits("some avg10=x")), (0.0, 0.0, 0.0));
        assert_eq!(memory("MemTotal: 9 kB\nMemAvailable:   2048 kB\n", "MemAvailable"), Some(Bytes(2 << 20)));
        assert_eq!(memory("MemTotal: 9 kB\n", "MemAvailable"), None);
        assert!(read().available > Bytes(0), "this host has some");
    }
}
