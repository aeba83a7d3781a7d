//! The token bucket filter (tc-tbf(8)), the limiter of a link's rate, as netlink options.
//!
//! A bucket fills with tokens at the rate, one for each byte, up to the burst. A frame is sent for its tokens, or waits
//! for them as long as the queue has room. rtnetlink does not have these options.

use rtnetlink::packet_core::{DefaultNla, Nla, NlaBuffer, NlasIterator};
use rtnetlink::packet_route::tc::TcOption;
use stead_schemas::quantity::Rate;

/// Name of the queueing discipline.
pub(super) const KIND: &str = "tbf";

const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
/// Size of a `struct tc_tbf_qopt`, in bytes.
const PARMS_BYTES: usize = 36;
/// Position of the link layer in it. With this one, the kernel needs no table of the times of sizes.
const LINK_LAYER_AT: usize = 1;
const ETHERNET: u8 = 1;
/// Positions of the numbers in it that are not zero.
const RATE_AT: usize = 8;
const LIMIT_AT: usize = 24;
const BUFFER_AT: usize = 28;

/// Smallest burst, in bytes: a large frame of many segments is cut into few pieces, and short pauses of a busy host
/// cost a slow link nothing (measured from 10 to 1,000 Mbit/s, within 5 %).
const BURST_MIN: u64 = 32 << 10;
/// Time at the full rate that a burst lasts at least, in milliseconds. A link that was not served for as long loses
/// nothing of its rate.
const BURST_MILLIS: u64 = 10;
/// Time for which a frame waits at most behind others, in milliseconds.
const LATENCY_MILLIS: u64 = 50;
/// Unit of the kernel's times of traffic control, in nanoseconds.
const TICK_NANOS: u128 = 64;

/// Returns the options of a filter with this rate.
pub(super) fn options(rate: Rate) -> Vec<TcOption> {
    let parameters = DefaultNla::new(TCA_TBF_PARMS, parameters(rate).to_vec());
    let rate = DefaultNla::new(TCA_TBF_RATE64, rate.0.to_ne_bytes().to_vec());
    vec![TcOption::Other(parameters), TcOption::Other(rate)]
}

/// Returns the rate of a filter with these options, or `None` if [`options`] makes no such filter.
pub(super) fn rate(options: &[TcOption]) -> Option<Rate> {
    let (mut found, mut long_rate) = (None, None);
    for option in options {
        // The crate has the options of a kind that it does not know in one.
        let TcOption::Other(all) = option else { continue };
        let mut bytes = vec![0; all.value_len()];
        all.emit_value(&mut bytes);
        for nla in NlasIterator::new(bytes.as_slice()) {
            let nla: NlaBuffer<&[u8]> = nla.ok()?;
            match nla.kind() {
                TCA_TBF_PARMS => found = <[u8; PARMS_BYTES]>::try_from(nla.value()).ok(),
                TCA_TBF_RATE64 => long_rate = <[u8; 8]>::try_from(nla.value()).ok().map(u64::from_ne_bytes),
                _ => {}
            }
        }
    }
    let found = found?;
    // The long rate is there only where it is needed.
    let rate = Rate(long_rate.unwrap_or_else(|| number(&found, RATE_AT).into()));
    (rate.0 > 0 && found == parameters(rate)).then_some(rate)
}

/// Returns the `struct tc_tbf_qopt` of a filter with this rate.
fn parameters(rate: Rate) -> [u8; PARMS_BYTES] {
    let burst = BURST_MIN.max(in_millis(rate, BURST_MILLIS));
    let queue = in_millis(rate, LATENCY_MILLIS).saturating_add(burst);
    let burst_nanos = u128::from(burst) * 1_000_000_000 / u128::from(rate.0.max(1));
    let mut parameters = [0; PARMS_BYTES];
    parameters[LINK_LAYER_AT] = ETHERNET;
    let numbers = [(RATE_AT, rate.0.into()), (LIMIT_AT, queue.into()), (BUFFER_AT, burst_nanos / TICK_NANOS)];
    for (at, value) in numbers {
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        parameters[at..at + size_of::<u32>()].copy_from_slice(&value.to_ne_bytes());
    }
    parameters
}

fn in_millis(rate: Rate, millis: u64) -> u64 {
    rate.0.saturating_mul(millis) / 1000
}

fn number(parameters: &[u8; PARMS_BYTES], at: usize) -> u32 {
    let mut bytes = [0; size_of::<u32>()];
    bytes.copy_from_slice(&parameters[at..at + size_of::<u32>()]);
    u32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rtnetlink::packet_core::Emitable;
    use stead_schemas::limits::{BANDWIDTH_MAX, BANDWIDTH_MIN};

    use super::*;

    /// Returns the options as the crate reads them: in one, whose value is all of them.
    fn read_back(options: &[TcOption]) -> Vec<TcOption> {
        let mut value = vec![0; options.buffer_len()];
        options.emit(&mut value);
        vec![TcOption::Other(DefaultNla::new(2, value))]
    }

    #[test]
    fn a_rate_of_100_megabits_has_a_burst_of_10_ms_and_a_queue_of_60_ms() {
        let parameters = parameters("100Mbps".parse().expect("valid"));
        assert_eq!(number(&parameters, RATE_AT), 12_500_000);
        assert_eq!(number(&parameters, LIMIT_AT), 125_000 + 625_000);
        assert_eq!(number(&parameters, BUFFER_AT), 10_000_000 / 64);
    }

    #[test]
    fn the_limits_on_rates_fit_the_numbers_of_the_kernel() {
        let slowest = number(&parameters(BANDWIDTH_MIN), BUFFER_AT);
        assert!(u128::from(slowest) * TICK_NANOS < u128::from(u32::MAX), "the kernel cuts a longer burst");
        assert!(number(&parameters(BANDWIDTH_MAX), LIMIT_AT) < u32::MAX);
    }

    #[test]
    fn a_filter_with_other_parameters_is_not_ours() {
        for at in [LINK_LAYER_AT, 12, LIMIT_AT, BUFFER_AT, 32] {
            let mut altered = parameters(Rate(1_000_000));
            altered[at] ^= 4;
            let altered = [TcOption::Other(DefaultNla::new(TCA_TBF_PARMS, altered.to_vec()))];
            assert_eq!(rate(&read_back(&altered)), None, "byte {at}");
        }
        assert_eq!(rate(&[]), None);
        let short = [TcOption::Other(DefaultNla::new(TCA_TBF_PARMS, vec![0; 35]))];
        assert_eq!(rate(&read_back(&short)), None);
    }

    proptest! {
        #[test]
        fn the_rate_of_options_is_read_back(wanted in BANDWIDTH_MIN.0..=BANDWIDTH_MAX.0) {
            prop_assert_eq!(rate(&read_back(&options(Rate(wanted)))), Some(Rate(wanted)));
        }

        #[test]
        fn no_answer_of_the_kernel_ends_the_daemon(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = rate(&[TcOption::Other(DefaultNla::new(2, bytes))]);
        }
    }
}
