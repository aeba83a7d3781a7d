//! Limits of mediated egress.

use std::time::Duration;

/// Largest number of credentials of an instance: each is compared with every request.
pub const EGRESS_CREDENTIALS_MAX: usize = 64;
/// Largest number of injections of one credential.
pub const EGRESS_INJECTIONS_MAX: usize = 16;
/// Largest number of host patterns of one injection, and of `allow_hosts`.
pub const EGRESS_HOSTS_MAX: usize = 64;
/// Largest value of a credential, in bytes: servers refuse longer header fields.
pub const EGRESS_VALUE_BYTES_MAX: usize = 16 << 10;
/// Largest format of an injection, in bytes: a word or two around the value.
pub const EGRESS_FORMAT_BYTES_MAX: usize = 1 << 10;
/// Largest name of a credential, in bytes. A message of validation repeats it.
pub const EGRESS_CREDENTIAL_NAME_BYTES_MAX: usize = 128;
/// Largest label of a DNS name, in bytes (RFC 1035).
pub const DNS_LABEL_BYTES_MAX: usize = 63;
/// Largest number of connections of one guest through the proxy: a browser has about a hundred.
pub const EGRESS_CONNECTIONS_PER_GUEST_MAX: usize = 512;
/// Largest number of connections of one guest whose first bytes or TLS handshakes are in progress: they cost
/// processor time.
pub const EGRESS_HANDSHAKES_PER_GUEST_MAX: usize = 64;
/// Largest number of new connections of one guest in a second: each may cost a TLS handshake, of which a core makes
/// some thousands a second.
pub const EGRESS_HANDSHAKES_PER_SECOND_MAX: u32 = 200;
/// Largest number of connections through the proxy. With their connections to servers they take about half
/// of the process's 65,536 descriptors.
pub const EGRESS_CONNECTIONS_MAX: usize = 16 << 10;
/// Largest ClientHello with its record headers, in bytes: post-quantum key shares take about 2 KiB.
pub const EGRESS_HELLO_BYTES_MAX: usize = 16 << 10;
/// Time within which a ClientHello must arrive.
pub const EGRESS_HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest head of an HTTP/1 message and largest list of fields of HTTP/2, in bytes.
pub const EGRESS_HEAD_BYTES_MAX: usize = 64 << 10;
/// Largest number of fields of an HTTP/1 head.
pub const EGRESS_HEADERS_MAX: usize = 128;
/// Time within which an HTTP/1 head must arrive.
pub const EGRESS_HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Time within which a name must be resolved and a connection made, all addresses together.
pub const EGRESS_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time within which a TLS handshake must end, on each side.
pub const EGRESS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after which an HTTP connection without any byte in either direction is ended.
pub const EGRESS_IDLE_MAX: Duration = Duration::from_secs(5 * 60);
/// Time after which a tunnel without any byte in either direction is ended: database clients keep idle
/// connections for about that long.
pub const EGRESS_TUNNEL_IDLE_MAX: Duration = Duration::from_secs(60 * 60);
/// Delay before the process that carries egress is started again after it ended soon after its start; it doubles each
/// time.
pub const MEDIATOR_RELAUNCH_DELAY_FIRST: Duration = Duration::from_millis(50);
/// Longest such delay: guests reach nothing meanwhile, and a start each second costs the host little.
pub const MEDIATOR_RELAUNCH_DELAY_MAX: Duration = Duration::from_secs(1);
/// Time between two questions to the process whether it answers: the limit on its silence is twenty seconds.
pub const MEDIATOR_POLL_INTERVAL: Duration = Duration::from_secs(10);
/// Time after which a process did not end soon after its start.
pub const MEDIATOR_LIFE_MIN: Duration = Duration::from_secs(10);
/// Largest number of addresses of a name that are tried.
pub const EGRESS_ADDRESSES_MAX: usize = 8;
/// Largest buffer of a tunnel for one direction, in bytes.
pub const EGRESS_TUNNEL_BUFFER_BYTES_MAX: usize = 64 << 10;
/// Largest number of concurrent streams of one HTTP/2 connection.
pub const EGRESS_STREAMS_MAX: u32 = 256;
/// Largest number of kept leaf certificates of an instance.
pub const EGRESS_LEAVES_MAX: usize = 256;
/// Largest number of new leaf certificates of an instance in one second: each costs a signature.
pub const EGRESS_LEAVES_PER_SECOND_MAX: u32 = 50;
/// Largest number of audit lines of an instance that wait to be written; those beyond are counted and
/// dropped.
pub const EGRESS_AUDIT_QUEUE_MAX: usize = 1024;
/// Size of one of the two files of an audit log, in bytes; a full one is replaced by the other.
pub const EGRESS_AUDIT_FILE_BYTES_MAX: u64 = 8 << 20;
/// Largest path in an audit line, in bytes; a longer one is cut.
pub const EGRESS_AUDIT_PATH_BYTES_MAX: usize = 1 << 10;
/// Smallest value of a credential that is searched for in answers, in bytes: shorter ones occur by chance.
pub const EGRESS_MASKED_BYTES_MIN: usize = 6;
