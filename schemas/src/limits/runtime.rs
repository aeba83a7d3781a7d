//! Limits of the runtime of reconcilers.

use crate::quantity::Bytes;
use std::time::Duration;

/// Largest number of steps of a plan; a longer plan means a planner that does not converge.
pub const PLAN_STEPS_MAX: usize = 64;
/// Largest number of rounds of observe-plan-act within one pass before the key goes back to the queue.
pub const PASS_ROUNDS_MAX: usize = 4;
/// Largest number of records that a pass writes, each time continuing, before the key goes back to the
/// queue.
pub const PASS_RECORDS_MAX: usize = 4;
/// Largest number of concurrent passes of one kind: they wait for the host more than they compute.
pub const PASSES_AT_ONCE: usize = 16;
/// Largest number of passes that a runner begins before it checks its signals again; a no-op pass takes
/// microseconds.
pub const PASSES_INLINE_MAX: usize = 64;
/// Time between two resynchronisations of all objects: a safety net under the monitors, not the way drift is
/// noticed.
pub const RESYNC_INTERVAL: Duration = Duration::from_secs(300);
/// Time that running passes get at shutdown; a pass can be abandoned safely after it.
pub const PASS_GRACE: Duration = Duration::from_secs(10);
/// Largest number of reports of host drift that wait for one runner; beyond it the runner checks all
/// objects.
pub const DRIFT_QUEUE_MAX: usize = 1024;
/// Time for which drift of a failing key waits: the notification may come from the key's own steps, and
/// healing within two seconds is promised.
pub const DRIFT_WHILE_FAILING: Duration = Duration::from_secs(1);
/// Longest text of a condition, in characters; longer causes are cut, not refused.
pub const MESSAGE_CHARS_MAX: usize = 1024;
/// Least difference between the wall clock and the elapsed time that counts as a step of the clock.
pub const CLOCK_STEP_MIN: Duration = Duration::from_secs(1);
/// Divisor for the drift that is allowed in addition: one part in this many of the elapsed time. Kernels
/// slew a clock by up to 500 parts in a million.
pub const CLOCK_DRIFT_DIVISOR: u32 = 1000;
/// Time for which the record of a snapshot that was never taken is kept, or of a fork that failed after its
/// client had a response. A client that waits reads it within milliseconds, a client that polls within
/// seconds.
pub const FAILURE_KEPT: Duration = Duration::from_secs(300);
/// Size of the log of the daemon's actions for an instance: weeks of ordinary life; twice as much with the
/// previous file.
pub const JOURNAL_LOG_MAX: Bytes = Bytes(1 << 20);
/// Longest line of that log, in characters: a whole chain of causes, twice the text of a condition.
pub const JOURNAL_LINE_CHARS_MAX: usize = 2048;
