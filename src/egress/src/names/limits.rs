//! Limits of the resolver, each with its unit and its reason.

use std::time::Duration;

/// Largest question by UDP, in bytes. A question with the longest name has 282 bytes, and with cookies and padding
/// less than 512, which every sender may use without being asked.
pub(crate) const UDP_QUESTION_BYTES_MAX: usize = 512;
/// Largest question by TCP, in bytes: questions have no use for more, and each connection may hold as much memory.
pub(crate) const TCP_QUESTION_BYTES_MAX: usize = 4096;
/// Largest answer by UDP to a sender without EDNS, in bytes (RFC 1035, section 4.2.1).
pub(crate) const UDP_ANSWER_BYTES_MIN: u16 = 512;
/// Largest answer by UDP to a sender with EDNS, in bytes: what passes every network without fragments (DNS flag day
/// 2020).
pub(crate) const UDP_ANSWER_BYTES_MAX: u16 = 1232;
/// Largest number of records in the additional section of a question: EDNS, and a signature.
pub(crate) const ADDITIONALS_MAX: u16 = 2;

/// Longest host name that a mediated guest may ask for, in bytes without the last dot. The longest names of services
/// that are known (access points of object storage) have about 110; a tunnel wants all 253.
pub(crate) const MEDIATED_NAME_BYTES_MAX: usize = 160;
/// Largest number of aliases that are followed from a name to its addresses: more than any provider uses, and an end
/// for a circle.
pub(crate) const ALIASES_MAX: usize = 8;
/// Largest number of records of an answer that are kept. A host with more addresses has no use for the rest.
pub(crate) const RECORDS_MAX: usize = 128;

/// Shortest time for which an answer is kept, whatever its TTL: a TTL of 0 must not make each question of a guest a
/// question to the upstream resolver.
pub(crate) const TTL_MIN: Duration = Duration::from_secs(5);
/// Longest time for which an answer is kept: a host that moves is found again in this time.
pub(crate) const TTL_MAX: Duration = Duration::from_secs(300);
/// Longest time for which the absence of a name or record is kept: names appear more often than they move.
pub(crate) const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(30);
/// Time for which a failure of the upstream resolver is kept. RFC 9520 asks for at least 1 s.
pub(crate) const FAILURE_TTL: Duration = Duration::from_secs(1);
/// TTL of answers from the caller's tables, in seconds. They change when an instance starts or stops.
pub(crate) const LOCAL_TTL_SECS: u32 = 5;

/// Largest number of answers in the cache.
pub(crate) const CACHE_ENTRIES_MAX: usize = 16_384;
/// Largest size of the cache, in bytes by the estimate of an entry: 16,384 answers with one address have 13 MB.
pub(crate) const CACHE_BYTES_MAX: usize = 16 << 20;
/// Largest number of answers in the cache that one guest caused: programs use some hundreds of hosts.
pub(crate) const CACHE_ENTRIES_PER_GUEST_MAX: usize = 1024;
/// Largest part of the cache that one guest caused, in bytes: 1,024 answers with one address have 0.8 MB.
pub(crate) const CACHE_BYTES_PER_GUEST_MAX: usize = 1 << 20;
/// Largest answer that is kept, in bytes. A larger one is forwarded and forgotten.
pub(crate) const CACHE_ENTRY_BYTES_MAX: usize = 16 << 10;

/// Questions per second that a guest may ask for as long as it likes.
pub(crate) const RATE_PER_SECOND: u32 = 50;
/// Questions that a guest may ask at once after a pause: a start of a large program.
pub(crate) const RATE_BURST: u32 = 200;
/// Largest number of guests whose rates are known. A bridge has 1,023 ports, and this is for four of them.
pub(crate) const RATED_GUESTS_MAX: usize = 4096;

/// Largest number of questions of one guest that wait for an upstream resolver.
pub(crate) const WAITING_PER_GUEST_MAX: usize = 64;
/// Largest number of questions of all guests that wait for an upstream resolver. Each has a socket.
pub(crate) const WAITING_MAX: usize = 1024;
/// Time in which an upstream resolver must answer one attempt.
pub(crate) const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of further attempts after the first one.
pub(crate) const UPSTREAM_RETRIES: usize = 1;
/// Time in which a question must be answered, aliases included: just less than the 5 s for which the C libraries of
/// guests wait, so that they get an answer instead of none.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_millis(4500);
/// Largest number of upstream resolvers, the number that resolv.conf allows.
pub(crate) const UPSTREAMS_MAX: usize = 3;
/// Largest number of questions that wait on one TCP connection to an upstream resolver.
pub(crate) const UPSTREAM_TCP_QUESTIONS_MAX: usize = 256;

/// Largest number of TCP connections of one guest.
pub(crate) const TCP_CONNECTIONS_PER_GUEST_MAX: usize = 32;
/// Largest number of TCP connections of all guests. Connections above it are closed at once, so that nobody waits
/// behind those who hold theirs.
pub(crate) const TCP_CONNECTIONS_MAX: usize = 4096;
/// Time in which a TCP connection must bring a whole question, or take a whole answer.
pub(crate) const TCP_IDLE_MAX: Duration = Duration::from_secs(10);
/// Pause after an error of a socket (no descriptors, no memory), long enough not to spin and short enough not to be
/// noticed.
pub(crate) const SOCKET_PAUSE: Duration = Duration::from_millis(50);
