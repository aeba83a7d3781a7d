//! The resource use of a VMM: processor time and memory of its process, traffic of its TAP.

use std::fs;

use rustix::param::{clock_ticks_per_second, page_size};

/// A reading of the resource use. Missing values are zero.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time since the start, in seconds.
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    /// Number of bytes that the guest received.
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

impl Usage {
    /// Reads the process, if its command line contains `mark`, and the TAP.
    #[must_use]
    pub fn read(pid: Option<u32>, mark: &str, tap: Option<&str>) -> Self {
        let mut usage = pid.and_then(|pid| process(pid, mark)).unwrap_or_default();
        if let Some(tap) = tap {
            // The TAP's own view is the reverse of the guest's.
            usage.received_bytes = counter(tap, "tx_bytes");
            usage.sent_bytes = counter(tap, "rx_bytes");
        }
        usage
    }
}

fn process(pid: u32, mark: &str) -> Option<Usage> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    // The pid was reused, or was never ours.
    if !String::from_utf8_lossy(&line).contains(mark) {
        return None;
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain anything, also blanks and parentheses: fields are counted from its end.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    // proc(5): utime 14, stime 15, vsize 23, rss 24; the first after the name is 3.
    let ticks = field(11)?.saturating_add(field(12)?);
    let page = u64::try_from(page_size()).unwrap_or(4096);
    Some(Usage {
        cpu_seconds: seconds(ticks, clock_ticks_per_second()),
        virtual_bytes: field(20)?,
        resident_bytes: field(21)?.saturating_mul(page),
        ..Usage::default()
    })
}

#[expect(clippy::cast_precision_loss, reason = "ticks of a century fit a double")]
fn seconds(ticks: u64, per_second: u64) -> f64 {
    ticks as f64 / per_second.max(1) as f64
}

fn counter(link: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/sys/class/net/{link}/statistics/{name}"));
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_by_its_mark_and_a_foreign_process_is_not() {
        let own = std::env::args().next().expect("this program has a name");
        let pid = Some(std::process::id());
        let usage = Usage::read(pid, &own, None);
        assert!(usage.resident_bytes > 100_000 && usage.virtual_bytes > usage.resident_bytes, "{usage:?}");
        assert_eq!(Usage::read(pid, "some other mark", Some("no-such-link")), Usage::default());
    }
}
