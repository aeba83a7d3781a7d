//! Faults of verbs, and the wrapper that applies them to every verb.

use std::time::Duration;

use super::{State, World};
use crate::host::{HostError, HostErrorKind};

/// Probabilities of faults, in thousandths.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    /// The verb fails before it does anything.
    pub before: u64,
    /// The verb does its work and its answer is lost.
    pub after: u64,
    /// The verb takes up to `delay_max`.
    pub delay: u64,
    pub delay_max: Duration,
}

impl Faults {
    #[must_use]
    pub fn none() -> Self {
        Self { before: 0, after: 0, delay: 0, delay_max: Duration::ZERO }
    }

    #[must_use]
    pub fn many() -> Self {
        Self { before: 60, after: 60, delay: 100, delay_max: Duration::from_secs(2) }
    }
}

/// The kinds of errors that a passing fault appears as; each of them is retried.
const KINDS: [HostErrorKind; 3] =
    [HostErrorKind::Transient, HostErrorKind::Exhausted, HostErrorKind::Missing];

impl World {
    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// Runs one verb on the state, with the faults in force around it.
    pub(super) async fn verb<T>(
        &self,
        operation: &'static str,
        subject: &str,
        effect: impl FnOnce(&mut State) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        let (delay, fails_before, fails_after, kind) = {
            let mut state = self.lock();
            let faults = state.faults;
            state.listings += usize::from(operation == "list");
            let delay = state.rng.chance(faults.delay).then(|| {
                let max = u64::try_from(faults.delay_max.as_millis()).unwrap_or(u64::MAX);
                Duration::from_millis(state.rng.below(max.saturating_add(1)))
            });
            let (before, after) = (state.rng.chance(faults.before), state.rng.chance(faults.after));
            let pick = usize::try_from(state.rng.below(KINDS.len() as u64)).unwrap_or(0);
            (delay, before, after, KINDS[pick])
        };
        match delay {
            Some(delay) => tokio::time::sleep(delay).await,
            None => tokio::task::yield_now().await,
        }
        let fail = || HostError::new(kind, operation, subject).because("simulated fault");
        if fails_before {
            return Err(fail());
        }
        let result = effect(&mut self.lock())?;
        // There is an await after the effect: a daemon may die without knowing of the effect.
        tokio::task::yield_now().await;
        if fails_after { Err(fail()) } else { Ok(result) }
    }
}
