//! Every limit, with its why. A limit is enforced at one edge and tested at itself and one beyond.

use std::time::Duration;

use crate::quantity::Bytes;

/// CUID2 as the wire has it (contract.md 2.1).
pub const UID_BYTES: usize = 24;
/// RFC 1123 label, and the wire's own bound.
pub const NAME_BYTES_MAX: usize = 63;
/// Registries refuse longer ones; a reference is also an object name and a key.
pub const IMAGE_REF_BYTES_MAX: usize = 512;
/// Linux IFNAMSIZ less the terminating zero.
pub const LINK_NAME_BYTES_MAX: usize = 15;

/// Wire bounds of tags (contract.md 2.1).
pub const TAGS_MAX: usize = 50;
pub const TAG_KEY_BYTES_MAX: usize = 128;
pub const TAG_VALUE_BYTES_MAX: usize = 256;

/// The peer's server limit; more vCPUs than cores only slow a guest down.
pub const VCPUS_MAX: u32 = 16;
pub const VCPUS_DEFAULT: u32 = 2;
/// A Debian cloud kernel with its initrd does not reach user space in less.
pub const MEMORY_MIN: Bytes = Bytes(96 << 20);
/// The peer's server limit.
pub const MEMORY_MAX: Bytes = Bytes(32 << 30);
pub const MEMORY_DEFAULT: Bytes = Bytes(1 << 30);
/// ext4 with its metadata needs some room to be of use.
pub const OVERLAY_MIN: Bytes = Bytes(16 << 20);
/// The peer's server limit.
pub const OVERLAY_MAX: Bytes = Bytes(100 << 30);
pub const OVERLAY_DEFAULT: Bytes = Bytes(10 << 30);
/// Sizes are overcommitted; the metadata of a fresh one of this size takes 25 MB (measured), which is
/// within `DISK_ROOM_MIN`.
pub const VOLUME_GB_MAX: u32 = 2 << 10;
/// Block devices after root, overlay and configuration (contract.md 2.1).
pub const VOLUME_DEVICES_MAX: usize = 23;
/// Likewise on a board without PCI: it has 24 places for virtio devices, of which root, overlay, headers,
/// network, control channel and random numbers take six.
pub const VOLUME_DEVICES_WITHOUT_PCI_MAX: usize = 18;
/// PATH_MAX is 4096; a mount's path is short.
pub const MOUNT_PATH_BYTES_MAX: usize = 1024;
/// Free room, beyond the reserve, with which a disk is begun: the metadata of the largest one and
/// the first writes of its guest. Sizes themselves are overcommitted: the files are sparse.
pub const DISK_ROOM_MIN: Bytes = Bytes(64 << 20);
/// For a VM that is down. To make a TAP takes a millisecond, to remove it twenty: who comes back soon
/// finds it.
pub const TAP_KEPT: Duration = Duration::from_secs(5);
/// Nothing tells when space becomes free; a look costs one system call.
pub const DISK_FULL_RETRY: Duration = Duration::from_secs(10);

/// execve takes 128 KiB for one string; argument lists of this size fit the guest's stack.
pub const ARGV_MAX: usize = 1024;
pub const ARG_BYTES_MAX: usize = 64 << 10;
/// Environment entries and their total stay below one control frame.
pub const ENV_MAX: usize = 1024;
/// Length of one variable, `NAME=value` with the zero byte at its end, in bytes: the kernel executes no
/// program with a longer string.
pub const ENV_VAR_BYTES_MAX: usize = 128 << 10;
pub const ENV_BYTES_MAX: usize = 256 << 10;

/// A request body: the largest valid instance is well below.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// The time for which the sender of a body may let the daemon wait for it; a client on a bad line sends the
/// largest one in a few seconds.
pub const BODY_WAIT_MAX: Duration = Duration::from_secs(30);
/// Bytes a second at which a body that may be of any length has to come, once that time is over.
pub const BODY_RATE_MIN: u32 = 1000;
/// For a client to take something of what it asked for. Who stops reading for longer, as a pager does,
/// has to ask again; until then the connection and what fills it are kept.
pub const CLIENT_STALL_MAX: Duration = Duration::from_secs(120);
/// Time between two lines of a stream that has nothing to tell; a client that is gone is noticed by it.
pub const STREAM_IDLE_MAX: Duration = Duration::from_secs(15);
/// Stored objects of one kind; lists and memory stay bounded.
pub const OBJECTS_PER_KIND_MAX: usize = 100_000;
/// Transactions waiting for the store's writer: some seconds of work; more would only wait longer.
pub const STORE_QUEUE_MAX: usize = 1024;
/// Transactions made durable by one commit: shares its cost well, bounds the wait of the first.
pub const STORE_GROUP_MAX: usize = 256;
/// Keys of failed commits, all written again with the next one: beyond this new objects are refused, so
/// that neither memory nor the next commit grows for as long as a disk fails.
pub const STORE_SUSPECTS_MAX: usize = 4096;
/// Events a watcher may lag behind before it must list again; about 200 bytes each.
pub const WATCH_RING_EVENTS: usize = 16_384;
/// Ports of one Linux bridge: BR_MAX_PORTS is 1024, port numbers start at 1.
pub const PORTS_PER_BRIDGE_MAX: usize = 1023;

/// Steps of one plan; a longer plan means a planner that does not converge.
pub const PLAN_STEPS_MAX: usize = 64;
/// Rounds of observe-plan-act within one pass before the key goes back to the queue.
pub const PASS_ROUNDS_MAX: usize = 4;
/// Records that one pass writes and goes on from before the key goes back to the queue.
pub const PASS_RECORDS_MAX: usize = 4;
/// Passes of one kind at once: they wait for the host more than they compute.
pub const PASSES_AT_ONCE: usize = 16;
/// Passes begun before a runner looks at its signals again; a no-op pass takes microseconds.
pub const PASSES_INLINE_MAX: usize = 64;
/// Between two looks at everything: a net under the monitors, not the way drift is noticed.
pub const RESYNC_INTERVAL: Duration = Duration::from_secs(300);
/// What running passes get at shutdown; abandoning one later is safe.
pub const PASS_GRACE: Duration = Duration::from_secs(10);
/// Reports of host drift that wait for one runner; beyond it the runner looks at everything.
pub const DRIFT_QUEUE_MAX: usize = 1024;
/// Drift of a failing key waits this long: its own steps may be what is heard, and healing within
/// two seconds is promised.
pub const DRIFT_WHILE_FAILING: Duration = Duration::from_secs(1);
/// Text of a condition; long causes are cut, not refused.
pub const MESSAGE_CHARS_MAX: usize = 1024;

/// From the VMM's start until the guest reports its program started (TCG boots in 2 s; a loaded
/// host has been seen to take ten times that).
pub const GUEST_BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// A guest answers a daemon that attaches within milliseconds; a busy host needs longer.
pub const GUEST_HEARD_GRACE: Duration = Duration::from_secs(10);
/// Between two restarts of a program that keeps failing; policies double their delay up to here.
pub const RESTART_DELAY_MAX: Duration = Duration::from_secs(300);
/// A count that fits every field it passes through.
pub const RESTART_ATTEMPTS_MAX: u32 = 1_000_000;
/// A probe costs the guest a connection or a process; oftener than this tells nothing more.
pub const HEALTH_INTERVAL_MIN: Duration = Duration::from_secs(1);
/// A day: what is looked at more rarely, or may start for longer, is not watched.
pub const HEALTH_PERIOD_MAX: Duration = Duration::from_secs(24 * 3600);
/// A round trip to an emulated guest.
pub const HEALTH_TIMEOUT_MIN: Duration = Duration::from_millis(10);
/// A probe binds a connection that long at most.
pub const HEALTH_TIMEOUT_MAX: Duration = Duration::from_secs(300);
/// More in a row is hours even at the shortest interval.
pub const HEALTH_THRESHOLD_MAX: u32 = 1000;
/// PATH_MAX is 4096; a path that is asked for at every interval is short.
pub const HEALTH_PATH_BYTES_MAX: usize = 2048;
/// Of the last error: it is part of every answer about the instance.
pub const HEALTH_ERROR_CHARS_MAX: usize = 256;
/// Ten years: a longer life has no end.
pub const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Below, a VM would save its memory more than it runs.
pub const IDLE_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Entries of each of a policy's two lists of what to ignore; every connection is held against all.
pub const IGNORES_MAX: usize = 256;
/// First packets kept for one VM on its way back from standby; a further one takes the place of the
/// oldest, whose sender repeats it.
pub const KNOCKS_MAX: usize = 16;
/// Bytes of such a packet; one that opens a connection carries nothing but options.
pub const KNOCK_BYTES_MAX: usize = 1600;
/// How long one is kept for a VM that does not come back; its sender has repeated it five times.
pub const KNOCK_KEPT_MAX: Duration = Duration::from_secs(60);
/// A verb's answer waits no longer than this for the observed state; SDKs give up at 60 s.
pub const VERB_WAIT_MAX: Duration = Duration::from_secs(55);
/// The longest `/wait` (contract.md 1.4).
pub const WAIT_MAX: Duration = Duration::from_secs(300);
/// The longest time an exec may be given; a longer one wants no limit.
pub const EXEC_TIMEOUT_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// The guest program's time between the request to stop and the kill.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// A VMM that lives without answering is ended after this; a busy host answers within.
pub const UNREACHABLE_GRACE: Duration = Duration::from_secs(30);
/// Delay of the start after the second death in a row; doubles with each further one.
pub const RELAUNCH_DELAY_FIRST: Duration = Duration::from_secs(1);
/// The longest such delay.
pub const RELAUNCH_DELAY_MAX: Duration = Duration::from_secs(300);
/// A VMM that lived this long makes earlier deaths history.
pub const VMM_STABLE_AFTER: Duration = Duration::from_secs(600);
/// The least difference between the wall clock and the time that passed which counts as a step of the clock.
pub const CLOCK_STEP_MIN: Duration = Duration::from_secs(1);
/// Besides, one part in this many of the time that passed: kernels slew a clock by up to 500 parts in a million.
pub const CLOCK_DRIFT_DIVISOR: u32 = 1000;
/// A console's log; with the one before it, an instance holds twice as much.
pub const CONSOLE_LOG_MAX: Bytes = Bytes(8 << 20);
/// Snapshots of one source: a schedule gone wrong fills a disk, not the store too.
pub const SNAPSHOTS_PER_SOURCE_MAX: usize = 256;
/// Failed snapshots of one source that are kept for their clients to read. A client that tries again all the
/// time fills neither the store nor the number above.
pub const FAILED_SNAPSHOTS_PER_SOURCE_MAX: usize = 64;
/// Time for which the record of a snapshot that was never taken, or of a fork that came to nothing after its
/// client had an answer, is kept. A client that waits reads it within milliseconds, one that polls within seconds.
pub const FAILURE_KEPT: Duration = Duration::from_secs(300);
/// Between two looks at a source that is on its way to where it can be captured: its changes are
/// heard, but for a VMM that changed while nobody listened.
pub const SNAPSHOT_LOOK: Duration = Duration::from_secs(1);
/// Forks of one snapshot held ready: each is a process with some 50 MB of its own.
pub const POOL_MAX: u32 = 64;
/// Between the end of one that is held ready and the start of the one in its place.
pub const POOL_RETRY: Duration = Duration::from_secs(5);
/// Size of a file of the audit log, in bytes: some fifty thousand requests.
pub const AUDIT_LOG_MAX: Bytes = Bytes(16 << 20);
/// Files of the audit log, the one that is written to included.
pub const AUDIT_FILES_MAX: u32 = 5;
/// What the daemon did for an instance: weeks of ordinary life; twice as much with the one before it.
pub const JOURNAL_LOG_MAX: Bytes = Bytes(1 << 20);
/// Of one line there: a whole chain of causes, twice the text of a condition.
pub const JOURNAL_LINE_CHARS_MAX: usize = 2048;
/// The wire's own least interval of snapshots; each is a pause of its instance.
pub const SCHEDULE_INTERVAL_MIN: Duration = Duration::from_secs(60);
/// The wire's own bound: with a time behind it, a name has 63 characters.
pub const NAME_PREFIX_BYTES_MAX: usize = 47;
/// Where the host's probes of guests come from, and nothing else of the host's does: above what the
/// kernel gives to connections (32768 to 60999). One from here keeps no VM from its standby.
pub const PROBE_PORTS: std::ops::RangeInclusive<u16> = 61_000..=61_999;
/// Of a host name in DNS.
pub const HOSTNAME_BYTES_MAX: usize = 253;
/// Rules of one ingress: what one plan opens.
pub const INGRESS_RULES_MAX: usize = PLAN_STEPS_MAX;
/// Ports of this host that ingresses listen at: each is a descriptor and a task.
pub const INGRESS_PORTS_MAX: usize = 256;
/// The wire's own bounds of a secret in a header.
pub const HEADER_AUTH_BYTES: std::ops::RangeInclusive<usize> = 32..=256;
/// Of that header's name: longer ones are nobody's.
pub const HEADER_NAME_BYTES_MAX: usize = 128;
/// Nothing tells when another program leaves a port; a look costs two system calls.
pub const INGRESS_PORT_LOOK: Duration = Duration::from_secs(2);
/// Connections of clients over all ports; one more waits in the kernel's queue. With those to instances
/// they stay far below the daemon's descriptors (65,536).
pub const INGRESS_CONNECTIONS_MAX: usize = 8192;
/// Requests to instances at once, over all ports; one more is answered with 503.
pub const INGRESS_EXCHANGES_MAX: usize = 4096;
/// Requests to one instance at once: one that answers nobody leaves room for the others.
pub const INGRESS_EXCHANGES_PER_TARGET_MAX: usize = 512;
/// Requests by the rules of one ingress at once: what one publishes leaves room for the others.
pub const INGRESS_EXCHANGES_PER_OWNER_MAX: usize = 1024;
/// Requests of one client address at once; a browser has some ten, a proxy in front one for each of its
/// clients that waits.
pub const INGRESS_EXCHANGES_PER_CLIENT_MAX: usize = 256;
/// Connections of one client address; those beyond are closed.
pub const INGRESS_CONNECTIONS_PER_CLIENT_MAX: usize = 512;
/// The time for which the sender of a request's body may let us wait for it, at the start and as long as it
/// sends more than `BODY_RATE_MIN` again and again; proxies of the field allow a minute.
pub const INGRESS_BODY_WAIT_MAX: Duration = Duration::from_secs(60);
/// The head of a request or an answer; browsers and proxies of the field stop at 8 to 64 KiB.
pub const INGRESS_HEAD_BYTES_MAX: usize = 64 << 10;
pub const INGRESS_HEADERS_MAX: usize = 128;
/// For a request's head to arrive, and for the next one over a connection that is kept.
pub const INGRESS_HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For a connection to an instance, which may have to be restored first: that takes a tenth of a second,
/// or a hundred times as long where the memory is compressed and the machine busy.
pub const INGRESS_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// For the head of an answer once the request is sent whole: long polls wait a minute or two.
pub const INGRESS_ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// When a client is told to come again that met an instance which is down, or too many others.
pub const INGRESS_RETRY_AFTER: Duration = Duration::from_secs(5);
/// A request, or what it went on with, over which nothing moved for so long is over: its place, and its
/// instance kept from standby, are worth more. Who means to stay says something once in a while.
pub const INGRESS_STALL_MAX: Duration = Duration::from_secs(600);

/// Greatest age of a reading of the table of connections that decides nothing by itself: as short as the shortest
/// time between two readings of the monitor, so that passes which follow one of its reports share its reading.
pub const FLOWS_AGE_MAX: Duration = Duration::from_secs(1);
