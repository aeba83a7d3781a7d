//! How fast this host's time stamp counter counts: what an emulated guest's does too.
//!
//! A board without another clock to compare it with leaves a guest to find out by a timer that an
//! emulator under load serves too late, and a guest that does not find out stands still for good.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Both clocks are read to 100 ns: this makes five millionths of them.
const WINDOW: Duration = Duration::from_millis(20);
/// Of one reading; the one that was disturbed least counts.
const TRIES: usize = 8;

/// In kilohertz; `None` where there is none. Measured once, in 20 ms.
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

/// The counter and the time, as nearly of one moment as it gets.
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
    // SAFETY: reads a register, which every processor of this architecture has and Linux lets
    // processes read.
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
