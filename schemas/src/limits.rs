//! The limits, each with its reason. A limit is enforced at one edge, and tested at the limit and one beyond.

use std::time::Duration;

use crate::quantity::Bytes;

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

/// Largest number of vCPUs: the peer's server limit; more vCPUs than cores only slow a guest down.
pub const VCPUS_MAX: u32 = 16;
pub const VCPUS_DEFAULT: u32 = 2;
/// Smallest memory of a VM: a Debian cloud kernel with its initrd does not reach user space in less.
pub const MEMORY_MIN: Bytes = Bytes(96 << 20);
/// Largest memory of a VM: the peer's server limit.
pub const MEMORY_MAX: Bytes = Bytes(32 << 30);
pub const MEMORY_DEFAULT: Bytes = Bytes(1 << 30);
/// Smallest overlay: ext4 with its metadata needs some room to be of use.
pub const OVERLAY_MIN: Bytes = Bytes(16 << 20);
/// Largest overlay: the peer's server limit.
pub const OVERLAY_MAX: Bytes = Bytes(100 << 30);
pub const OVERLAY_DEFAULT: Bytes = Bytes(10 << 30);
/// Largest volume, in GiB. Sizes are overcommitted; the metadata of a fresh volume of this size takes 25 MB
/// (measured), which is within `DISK_ROOM_MIN`.
pub const VOLUME_GB_MAX: u32 = 2 << 10;
/// Number of block devices for volumes, after root, overlay and configuration (contract.md 2.1).
pub const VOLUME_DEVICES_MAX: usize = 23;
/// Number of block devices for volumes on a machine type without PCI: it has 24 slots for virtio devices, of
/// which root, overlay, headers, network, control channel and random numbers take six.
pub const VOLUME_DEVICES_WITHOUT_PCI_MAX: usize = 18;
/// Longest mount path, in bytes: PATH_MAX is 4096, and a mount's path is short.
pub const MOUNT_PATH_BYTES_MAX: usize = 1024;
/// Free space, beyond the reserve, that is required to create a disk: the metadata of the largest disk and
/// the first writes of its guest. Sizes themselves are overcommitted: the files are sparse.
pub const DISK_ROOM_MIN: Bytes = Bytes(64 << 20);
/// Time for which the TAP of a stopped VM is kept. Making a TAP takes a millisecond and removing it twenty,
/// so a VM that returns soon reuses it.
pub const TAP_KEPT: Duration = Duration::from_secs(5);
/// Time between two polls of a full disk: no event reports that space became free, and a poll costs one
/// system call.
pub const DISK_FULL_RETRY: Duration = Duration::from_secs(10);

/// Largest number of arguments. execve takes 128 KiB for one string; argument lists of this size fit the
/// guest's stack.
pub const ARGV_MAX: usize = 1024;
pub const ARG_BYTES_MAX: usize = 64 << 10;
/// Largest number of environment variables; they and their total stay below one control frame.
pub const ENV_MAX: usize = 1024;
/// Longest environment variable, in bytes, as `NAME=value` with its final zero byte: the kernel executes no
/// program with a longer string.
pub const ENV_VAR_BYTES_MAX: usize = 128 << 10;
pub const ENV_BYTES_MAX: usize = 256 << 10;

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
/// Largest number of stored objects of one kind; lists and memory stay bounded.
pub const OBJECTS_PER_KIND_MAX: usize = 100_000;
/// Largest number of transactions that wait for the store's writer: some seconds of work; more would only
/// wait longer.
pub const STORE_QUEUE_MAX: usize = 1024;
/// Largest number of transactions that one commit makes durable: they share its cost well, and the wait of
/// the first is bounded.
pub const STORE_GROUP_MAX: usize = 256;
/// Largest number of keys of failed commits, which are all written again with the next commit. Beyond this
/// number new objects are refused, so that neither memory nor the next commit grows for as long as a disk
/// fails.
pub const STORE_SUSPECTS_MAX: usize = 4096;
/// Number of events that a watcher may lag behind before it must list again; about 200 bytes each.
pub const WATCH_RING_EVENTS: usize = 16_384;
/// Largest number of ports of a Linux bridge: BR_MAX_PORTS is 1024, and port numbers start at 1.
pub const PORTS_PER_BRIDGE_MAX: usize = 1023;

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

/// Time from the VMM's start until the guest must report that its program started (TCG boots in 2 s; a
/// loaded host has been seen to take ten times as long).
pub const GUEST_BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// Time within which a guest must answer a daemon that attaches: it usually takes milliseconds, but longer
/// on a busy host.
pub const GUEST_HEARD_GRACE: Duration = Duration::from_secs(10);
/// Longest time between two restarts of a program that keeps failing; policies double their delay up to
/// here.
pub const RESTART_DELAY_MAX: Duration = Duration::from_secs(300);
/// Largest number of restart attempts: it fits every field it passes through.
pub const RESTART_ATTEMPTS_MAX: u32 = 1_000_000;
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
/// Longest time to live, ten years: a longer life counts as unlimited.
pub const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Shortest idle timeout: with a shorter one a VM would spend more time on saving its memory than on
/// running.
pub const IDLE_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Largest number of entries in each of a policy's two lists of ignored connections; every connection is
/// compared with all of them.
pub const IGNORES_MAX: usize = 256;
/// Largest number of pending connections of a VM that returns from standby, each kept as its first packet. A
/// further packet replaces the oldest, whose sender repeats it.
pub const KNOCKS_MAX: usize = 16;
/// Largest size of such a packet, in bytes; a packet that opens a connection carries only options.
pub const KNOCK_BYTES_MAX: usize = 1600;
/// Time for which such a packet is kept for a VM that does not return; its sender has repeated it five times
/// by then.
pub const KNOCK_KEPT_MAX: Duration = Duration::from_secs(60);
/// Longest time for which the response to a verb waits for the observed state; SDKs give up at 60 s.
pub const VERB_WAIT_MAX: Duration = Duration::from_secs(55);
/// Longest `/wait` (contract.md 1.4).
pub const WAIT_MAX: Duration = Duration::from_secs(300);
/// Longest time limit of an exec; for a longer one, no limit should be set.
pub const EXEC_TIMEOUT_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Time of the guest's program between the request to stop and the kill.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// Time after which a VMM that lives without answering is ended; a busy host answers sooner.
pub const UNREACHABLE_GRACE: Duration = Duration::from_secs(30);
/// Delay of the start after the second death in a row; it doubles with each further death.
pub const RELAUNCH_DELAY_FIRST: Duration = Duration::from_secs(1);
/// Longest such delay.
pub const RELAUNCH_DELAY_MAX: Duration = Duration::from_secs(300);
/// Lifetime of a VMM after which its earlier deaths no longer count.
pub const VMM_STABLE_AFTER: Duration = Duration::from_secs(600);
/// Least difference between the wall clock and the elapsed time that counts as a step of the clock.
pub const CLOCK_STEP_MIN: Duration = Duration::from_secs(1);
/// Divisor for the drift that is allowed in addition: one part in this many of the elapsed time. Kernels
/// slew a clock by up to 500 parts in a million.
pub const CLOCK_DRIFT_DIVISOR: u32 = 1000;
/// Size of a console's log; with the previous file, an instance holds twice as much.
pub const CONSOLE_LOG_MAX: Bytes = Bytes(8 << 20);
/// Largest number of snapshots of one source: a faulty schedule may fill a disk, but not the store too.
pub const SNAPSHOTS_PER_SOURCE_MAX: usize = 256;
/// Largest number of failed snapshots of one source that are kept for clients to read. A client that retries
/// all the time fills neither the store nor the number above.
pub const FAILED_SNAPSHOTS_PER_SOURCE_MAX: usize = 64;
/// Time for which the record of a snapshot that was never taken is kept, or of a fork that failed after its
/// client had a response. A client that waits reads it within milliseconds, a client that polls within
/// seconds.
pub const FAILURE_KEPT: Duration = Duration::from_secs(300);
/// Time between two polls of a source that is about to become capturable: its changes are notified, except
/// for a VMM that changed while no monitor listened.
pub const SNAPSHOT_LOOK: Duration = Duration::from_secs(1);
/// Largest number of forks of one snapshot that are held ready: each is a process with some 50 MB of its
/// own.
pub const POOL_MAX: u32 = 64;
/// Time between the end of a pooled instance and the start of its replacement.
pub const POOL_RETRY: Duration = Duration::from_secs(5);
/// Size of a file of the audit log, in bytes: some fifty thousand requests.
pub const AUDIT_LOG_MAX: Bytes = Bytes(16 << 20);
/// Files of the audit log, the one that is written to included.
pub const AUDIT_FILES_MAX: u32 = 5;
/// Size of the log of the daemon's actions for an instance: weeks of ordinary life; twice as much with the
/// previous file.
pub const JOURNAL_LOG_MAX: Bytes = Bytes(1 << 20);
/// Longest line of that log, in characters: a whole chain of causes, twice the text of a condition.
pub const JOURNAL_LINE_CHARS_MAX: usize = 2048;
/// Shortest interval of scheduled snapshots, as on the wire; each snapshot is a pause of its instance.
pub const SCHEDULE_INTERVAL_MIN: Duration = Duration::from_secs(60);
/// Longest prefix of a snapshot's name, in bytes, as on the wire: with a time behind it, a name has 63
/// characters.
pub const NAME_PREFIX_BYTES_MAX: usize = 47;
/// Source ports of the host's probes of guests; nothing else on the host uses them: they are above the range
/// that the kernel assigns to connections (32768 to 60999). A connection from these ports does not keep a VM
/// from its standby.
pub const PROBE_PORTS: std::ops::RangeInclusive<u16> = 61_000..=61_999;
/// Longest host name in DNS, in bytes.
pub const HOSTNAME_BYTES_MAX: usize = 253;
/// Largest number of rules of an ingress: as many as one plan can open.
pub const INGRESS_RULES_MAX: usize = PLAN_STEPS_MAX;
/// Largest number of ports of this host that ingresses listen at: each is a descriptor and a task.
pub const INGRESS_PORTS_MAX: usize = 256;
/// Length of a secret in a header, in bytes; the wire's own bounds.
pub const HEADER_AUTH_BYTES: std::ops::RangeInclusive<usize> = 32..=256;
/// Longest name of such a header, in bytes; longer names are not in use.
pub const HEADER_NAME_BYTES_MAX: usize = 128;
/// Time between two polls of a port that another program uses: no event reports that the program leaves it,
/// and a poll costs two system calls.
pub const INGRESS_PORT_LOOK: Duration = Duration::from_secs(2);
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

/// Greatest age of a reading of the connection table that decides nothing by itself: as short as the
/// shortest time between two readings of the monitor, so that passes which follow one of its reports share
/// its reading.
pub const FLOWS_AGE_MAX: Duration = Duration::from_secs(1);
