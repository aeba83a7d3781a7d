//! Seeds x faults: the whole daemon on a simulated host, in virtual time.
//!
//! Each seed runs clients, foreign changes, failing verbs and crashes of the daemon. Then the system is left alone,
//! and the invariants of `checks`, which call no plan, decide whether the host is as specified. A failing seed is
//! printed; `STEAD_SEED=n` replays it, `STEAD_SEEDS=n` sets the number of seeds.

#![cfg(test)]

mod api;
mod clients;
mod daemon;
#[path = "../it/no_host.rs"]
mod no_host;
mod scale;
mod scenario;
mod schedules;
mod toy_kind;
mod volumes;

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Number of seeds in an ordinary run; `tests/README.md` names the longer runs.
const SEEDS: u64 = 2000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn run(seed: u64) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let result = catch_unwind(AssertUnwindSafe(|| runtime.block_on(scenario::play(seed))));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default())
    })
}

#[test]
fn every_seed_converges() {
    let (first, count) = match number("STEAD_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("STEAD_SEEDS").unwrap_or(SEEDS)),
    };
    let failures: Vec<String> = (first..first + count)
        .filter_map(|seed| run(seed).err().map(|why| format!("STEAD_SEED={seed}: {why}")))
        .take(5)
        .collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n\n"));
}

#[test]
fn the_same_seed_is_the_same_run() {
    let trace = |seed| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(scenario::trace(seed))
    };
    assert_eq!(trace(7), trace(7));
    assert_ne!(trace(7), trace(8));
}
