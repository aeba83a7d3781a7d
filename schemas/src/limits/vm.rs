//! Limits of instances, their VMs, volumes and snapshots.

use crate::quantity::Bytes;
use std::time::Duration;

/// Largest number of vCPUs: the peer's server limit; more vCPUs than cores only slow a guest down.
pub const VCPUS_MAX: u32 = 16;
pub const VCPUS_DEFAULT: u32 = 2;
/// Smallest memory of a VM: a Debian cloud kernel with its initrd does not reach user space in less.
pub const MEMORY_MIN: Bytes = Bytes(96 << 20);
/// Largest memory of a VM: the peer's server limit.
pub const MEMORY_MAX: Bytes = Bytes(32 << 30);
pub const MEMORY_DEFAULT: Bytes = Bytes(1 << 30);
/// Largest hotplug memory of a VM: that of the memory that it boots with.
pub const HOTPLUG_MAX: Bytes = MEMORY_MAX;
/// The unit of hotplug memory: a block of memory of a guest's kernel, which it gives back as a whole. Kernels have larger
/// blocks on machines of 64 GiB and more, which no VM has.
pub const MEMORY_BLOCK: Bytes = Bytes(128 << 20);
/// Memory of a VMM beside its guest's: its program, its devices, the stacks of its threads, and what the kernel keeps
/// for it. A VMM of a guest of 256 MiB had 200 MB of its own and of the guest's together (measured, emulated), and a
/// pooled one some 50 MB.
pub const VMM_MEMORY_OVERHEAD: Bytes = Bytes(128 << 20);
/// Code that an emulating VMM keeps translated, at most: its own limit. It is part of the limit of the VMM, and not of what
/// is promised: a host that emulates has few instances.
pub const TRANSLATED_CODE_MAX: Bytes = Bytes(1 << 30);
/// Largest factor of oversubscription: beyond it a resource is in fact unlimited.
pub const OVERSUBSCRIPTION_MAX: u16 = 1000;
/// Time for which instances do not get memory again that was taken back from them: by default, and the longest.
pub const RECLAIM_HOLD_DEFAULT: Duration = Duration::from_secs(5 * 60);
pub const RECLAIM_HOLD_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Longest reason of a request to take memory back.
pub const RECLAIM_REASON_CHARS_MAX: usize = 256;
/// Time that such a request waits for guests. A block takes tenths of a second, or more on a busy host.
pub const RECLAIM_WAIT: Duration = Duration::from_secs(20);
/// Smallest overlay: ext4 with its metadata needs some room to be of use.
pub const OVERLAY_MIN: Bytes = Bytes(16 << 20);
/// Largest overlay: the peer's server limit.
pub const OVERLAY_MAX: Bytes = Bytes(100 << 30);
pub const OVERLAY_DEFAULT: Bytes = Bytes(10 << 30);
/// Smallest limit of the disks of a VM, per second. A queue of the guest holds 256 requests of at most a mebibyte; its
/// kernel reports tasks that wait for them longer than two minutes.
pub const DISK_RATE_MIN: Bytes = Bytes(1 << 20);
/// Largest limit of the disks of a VM, per second: more than any disk has, and QEMU takes a thousand times as much.
pub const DISK_RATE_MAX: Bytes = Bytes(1 << 40);
/// The factor of the limit that disks may have for a while after they were idle: the peer's burst.
pub const DISK_BURST: u64 = 4;
/// Longest time of such a burst at its full rate. With one second QEMU takes the whole burst at any speed (measured).
pub const DISK_BURST_TIME: Duration = Duration::from_secs(3);
/// Largest volume, in GiB. Sizes are overcommitted; the metadata of a fresh volume of this size takes 25 MB
/// (measured), which is within `DISK_ROOM_MIN`.
pub const VOLUME_GB_MAX: u32 = 2 << 10;
/// Number of block devices for volumes, after root, overlay and configuration (contract.md 2.1).
pub const VOLUME_DEVICES_MAX: usize = 23;
/// Longest mount path, in bytes: PATH_MAX is 4096, and a mount's path is short.
pub const MOUNT_PATH_BYTES_MAX: usize = 1024;
/// Free space, beyond the reserve, that is required to create a disk: the metadata of the largest disk and
/// the first writes of its guest. Sizes themselves are overcommitted: the files are sparse.
pub const DISK_ROOM_MIN: Bytes = Bytes(64 << 20);
/// Time between two polls of a full disk: no event reports that space became free, and a poll costs one
/// system call.
pub const DISK_FULL_RETRY: Duration = Duration::from_secs(10);
/// Time between two attempts of an instance that waits for room on its host, which is notified when room is given back:
/// a safety net.
pub const ROOM_RETRY: Duration = Duration::from_secs(5);
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
/// Time from the VMM's start until the guest must report that its program started. Emulation boots in 2 s, and took more
/// than 120 s on a nested host whose machine was busy. A kernel that panics ends its VMM at once, so this is for a guest
/// that hangs.
pub const GUEST_BOOT_DEADLINE: Duration = Duration::from_secs(300);
/// Time within which a guest must answer a daemon that attaches: it usually takes milliseconds, but longer
/// on a busy host.
pub const GUEST_ANSWER_GRACE: Duration = Duration::from_secs(10);
/// Longest time between two restarts of a program that keeps failing; policies double their delay up to
/// here.
pub const RESTART_DELAY_MAX: Duration = Duration::from_secs(300);
/// Largest number of restart attempts: it fits every field it passes through.
pub const RESTART_ATTEMPTS_MAX: u32 = 1_000_000;
/// Longest time to live, ten years: a longer life counts as unlimited.
pub const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Shortest idle timeout: with a shorter one a VM would spend more time on saving its memory than on
/// running.
pub const IDLE_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Largest number of entries in each of a policy's two lists of ignored connections; every connection is
/// compared with all of them.
pub const IGNORES_MAX: usize = 256;
/// Time of the guest's program between the request to stop and the kill.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// Time of a guest with the image's own init between the request to stop and the power-off.
pub const SYSTEM_SHUTDOWN_GRACE: Duration = Duration::from_secs(60);
/// Time for which a program may keep a volume in use that is to be detached.
pub const VOLUME_RELEASE_WAIT: Duration = Duration::from_secs(10);
/// Time after which a VMM that lives without answering is ended; a busy host answers sooner.
pub const UNREACHABLE_GRACE: Duration = Duration::from_secs(30);
/// Delay of the start after the second death in a row; it doubles with each further death.
pub const RELAUNCH_DELAY_FIRST: Duration = Duration::from_secs(1);
/// Longest such delay.
pub const RELAUNCH_DELAY_MAX: Duration = Duration::from_secs(300);
/// Lifetime of a VMM after which its earlier deaths no longer count.
pub const VMM_STABLE_AFTER: Duration = Duration::from_secs(600);
/// Size of a console's log; with the previous file, an instance holds twice as much.
pub const CONSOLE_LOG_MAX: Bytes = Bytes(8 << 20);
/// Largest number of snapshots of one source: a faulty schedule may fill a disk, but not the store too.
pub const SNAPSHOTS_PER_SOURCE_MAX: usize = 256;
/// Largest number of failed snapshots of one source that are kept for clients to read. A client that retries
/// all the time fills neither the store nor the number above.
pub const FAILED_SNAPSHOTS_PER_SOURCE_MAX: usize = 64;
/// Time between two polls of a source that is about to become capturable: its changes are notified, except
/// for a VMM that changed while no monitor listened.
pub const SNAPSHOT_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Largest number of forks of one snapshot that are held ready: each is a process with some 50 MB of its
/// own.
pub const POOL_MAX: u32 = 64;
/// Time between the end of a pooled instance and the start of its replacement.
pub const POOL_RETRY: Duration = Duration::from_secs(5);
/// Shortest interval of scheduled snapshots, as on the wire; each snapshot is a pause of its instance.
pub const SCHEDULE_INTERVAL_MIN: Duration = Duration::from_secs(60);
