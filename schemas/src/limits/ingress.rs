//! Limits of ingresses.

use super::PLAN_STEPS_MAX;
use std::time::Duration;

/// Largest number of rules of an ingress: as many as one plan can open.
pub const INGRESS_RULES_MAX: usize = PLAN_STEPS_MAX;
/// Largest number of ports of this host that ingresses listen at: each is a descriptor and a task.
pub const INGRESS_PORTS_MAX: usize = 256;
/// Time between two polls of a port that another program uses: no event reports that the program leaves it,
/// and a poll costs two system calls.
pub const INGRESS_PORT_POLL_INTERVAL: Duration = Duration::from_secs(2);
/// Largest number of client connections over all ports; a further one waits in the kernel's queue. Together
/// with the connections to instances they stay far below the daemon's descriptors (65,536).
pub const INGRESS_CONNECTIONS_MAX: usize = 8192;
/// Largest number of concurrent requests to instances, over all ports; a further one is answered with 503.
pub const INGRESS_EXCHANGES_MAX: usize = 4096;
/// Largest number of concurrent requests to one instance: an instance that does not answer leaves room for
/// the others.
pub const INGRESS_EXCHANGES_PER_TARGET_MAX: usize = 512;
/// Largest number of concurrent requests by the rules of one ingress: an ingress leaves room for the others.
pub const INGRESS_EXCHANGES_PER_OWNER_MAX: usize = 1024;
/// Largest number of concurrent requests of one client address; a browser has some ten, and a proxy has one
/// for each of its waiting clients.
pub const INGRESS_EXCHANGES_PER_CLIENT_MAX: usize = 256;
/// Largest number of connections of one client address; those beyond are closed.
pub const INGRESS_CONNECTIONS_PER_CLIENT_MAX: usize = 512;
/// Time for which the ingress waits for the sender of a request's body: at the start, and again and again as
/// long as it sends more than `BODY_RATE_MIN`; common proxies allow a minute.
pub const INGRESS_BODY_WAIT_MAX: Duration = Duration::from_secs(60);
/// Largest head of a request or a response, in bytes; common browsers and proxies stop at 8 to 64 KiB.
pub const INGRESS_HEAD_BYTES_MAX: usize = 64 << 10;
pub const INGRESS_HEADERS_MAX: usize = 128;
/// Time within which a request's head must arrive, and the next request over a connection that is kept.
pub const INGRESS_HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to connect to an instance, which may have to be restored first: a restore takes a tenth of a second,
/// or a hundred times as long when the memory is compressed and the machine busy.
pub const INGRESS_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the head of a response once the request is sent whole: long polls wait a minute or two.
pub const INGRESS_ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// Time after which a client should retry when its instance is down or has too many requests.
pub const INGRESS_RETRY_AFTER: Duration = Duration::from_secs(5);
/// Time after which a request, or the upgraded connection it became, is ended when no data moved over it:
/// its permit, and the standby that it prevents, are worth more. A client that means to stay sends something
/// once in a while.
pub const INGRESS_STALL_MAX: Duration = Duration::from_secs(600);
