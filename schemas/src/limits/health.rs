//! Limits of health checks and their probes.

use std::time::Duration;

/// Shortest interval of a health check: a probe costs the guest a connection or a process, and more frequent
/// probes bring no more information.
pub const HEALTH_INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest interval and start period of a health check, a day: a program that is probed more rarely, or may
/// start for longer, is effectively not watched.
pub const HEALTH_PERIOD_MAX: Duration = Duration::from_secs(24 * 3600);
/// Shortest timeout of a probe: a round trip to an emulated guest.
pub const HEALTH_TIMEOUT_MIN: Duration = Duration::from_millis(10);
/// Longest timeout of a probe: a probe holds a connection for at most this time.
pub const HEALTH_TIMEOUT_MAX: Duration = Duration::from_secs(300);
/// Largest threshold of a health check: more results in a row take hours even at the shortest interval.
pub const HEALTH_THRESHOLD_MAX: u32 = 1000;
/// Longest path of a probe, in bytes: PATH_MAX is 4096, and a path that is requested at every interval is
/// short.
pub const HEALTH_PATH_BYTES_MAX: usize = 2048;
/// Longest text of a probe's last error, in characters: it is part of every response about the instance.
pub const HEALTH_ERROR_CHARS_MAX: usize = 256;
/// Source ports of the host's probes of guests; nothing else on the host uses them: they are above the range
/// that the kernel assigns to connections (32768 to 60999). A connection from these ports does not keep a VM
/// from its standby.
pub const PROBE_PORTS: std::ops::RangeInclusive<u16> = 61_000..=61_999;
