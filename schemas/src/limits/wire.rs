//! Limits of requests, names and texts on the wire.

use crate::quantity::Bytes;
use std::time::Duration;

/// Length of a CUID2 on the wire, in bytes (contract.md 2.1).
pub const UID_BYTES: usize = 24;
/// Longest resource name, in bytes: an RFC 1123 label, and the wire's own bound.
pub const NAME_BYTES_MAX: usize = 63;
/// Longest image reference, in bytes: registries refuse longer ones; a reference is also an object name and
/// a key.
pub const IMAGE_REF_BYTES_MAX: usize = 512;
/// Longest name of a network interface, in bytes: Linux IFNAMSIZ less the terminating zero.
pub const LINK_NAME_BYTES_MAX: usize = 15;
/// Bounds of tags on the wire: number of tags, bytes of a key, bytes of a value (contract.md 2.1).
pub const TAGS_MAX: usize = 50;
pub const TAG_KEY_BYTES_MAX: usize = 128;
pub const TAG_VALUE_BYTES_MAX: usize = 256;
/// Largest request body, in bytes: the largest valid instance is well below.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Time for which the daemon waits for the sender of a body; a client on a slow line sends the largest body
/// in a few seconds.
pub const BODY_WAIT_MAX: Duration = Duration::from_secs(30);
/// Least rate of a body of any length after that time, in bytes per second.
pub const BODY_RATE_MIN: u32 = 1000;
/// Time within which a client must take some of the data that it asked for. A client that stops reading for
/// longer, as a pager does, has to ask again; until then the connection and its buffers are kept.
pub const CLIENT_STALL_MAX: Duration = Duration::from_secs(120);
/// Time between two lines of a stream that has nothing to send; the write shows whether the client is gone.
pub const STREAM_IDLE_MAX: Duration = Duration::from_secs(15);
/// Longest time for which the response to a verb waits for the observed state; SDKs give up at 60 s.
pub const VERB_WAIT_MAX: Duration = Duration::from_secs(55);
/// Longest `/wait` (contract.md 1.4).
pub const WAIT_MAX: Duration = Duration::from_secs(300);
/// Longest time limit of an exec; for a longer one, no limit should be set.
pub const EXEC_TIMEOUT_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Size of a file of the audit log, in bytes: some fifty thousand requests.
pub const AUDIT_LOG_MAX: Bytes = Bytes(16 << 20);
/// Files of the audit log, the one that is written to included.
pub const AUDIT_FILES_MAX: u32 = 5;
/// Longest prefix of a snapshot's name, in bytes, as on the wire: with a time behind it, a name has 63
/// characters.
pub const NAME_PREFIX_BYTES_MAX: usize = 47;
/// Longest host name in DNS, in bytes.
pub const HOSTNAME_BYTES_MAX: usize = 253;
/// Length of a secret in a header, in bytes; the wire's own bounds.
pub const HEADER_AUTH_BYTES: std::ops::RangeInclusive<usize> = 32..=256;
/// Longest name of such a header, in bytes; longer names are not in use.
pub const HEADER_NAME_BYTES_MAX: usize = 128;
