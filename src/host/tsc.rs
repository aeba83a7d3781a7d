//! The frequency of this host's time stamp counter, which is also that of an emulated guest.
//!
//! A machine type without another clock to compare it with lets the guest measure it with a timer that an emulator
//! under load serves too late. A guest that fails to measure it stops forever.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Time between the two readings. Both clocks are read to 100 ns, which is an error of five millionths.
const WINDOW: Duration = Duration::from_millis(20);
/// Number of attempts for one reading. The least disturbed one counts.
const TRIES: usize = 8;

/// Returns the frequency in kilohertz, or `None` if there is no counter. It is measured once, in 20 ms.
#[must_use]
pub(crate) fn khz() -> Option<u64> {
    static MEASURED: OnceLock<Option<u64>> = OnceLock::new();
    *MEASURED.get_or_init(measure)
}

fn measure() -> Option<u64> {
    let (first_count, first) = read_both()?;
    std::thread::sleep(WINDOW);
    let (second_count, second) = read_both()?;
    rate(second_count.checked_sub(first_count)?, second.duration_since(first))
}

fn rate(counted: u64, within: Duration) -> Option<u64> {
    let counted = u128::from(counted) * 1_000_000;
    u64::try_from(counted.checked_div(within.as_nanos())?).ok().filter(|&khz| khz > 0)
}

/// Reads the counter and the time, as close together as possible.
fn read_both() -> Option<(u64, Instant)> {
    let read = |_| {
        let before = Instant::now();
        let count = read_counter()?;
        Some((before.elapsed(), count, before))
    };
    let (_, count, at) = (0..TRIES).filter_map(read).min_by_key(|(took, ..)| *took)?;
    Some((count, at))
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the counter is read by an instruction of its own")]
fn read_counter() -> Option<u64> {
    // SAFETY: this reads a register that every processor of this architecture has and that Linux lets processes read.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn read_counter() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_counts_in_a_millisecond() {
        assert_eq!(rate(52_000_000, Duration::from_millis(20)), Some(2_600_000));
        assert_eq!(rate(1, Duration::from_secs(1)), None);
        assert_eq!(rate(1, Duration::ZERO), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn it_is_that_of_a_processor() {
        let khz = khz().expect("there is one");
        assert!((500_000..10_000_000).contains(&khz), "{khz}");
    }
}
