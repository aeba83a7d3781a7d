//! Limits of networks and of the connections of VMs.

use std::time::Duration;

use crate::quantity::Rate;

/// Time for which the TAP of a stopped VM is kept. Making a TAP takes a millisecond and removing it twenty,
/// so a VM that returns soon reuses it.
pub const TAP_KEPT: Duration = Duration::from_secs(5);
/// Largest number of pairs of queues of a network card. Each has a thread in the kernel; a card that more processors
/// share is not faster for more.
pub const CARD_QUEUES_MAX: u16 = 8;
/// Lowest limit of a network card's rate, 64 kbit/s. The kernel lets a limiter save up tokens for at most 4.29 s, and
/// the smallest burst (32 KiB) takes 4.1 s at this rate.
pub const BANDWIDTH_MIN: Rate = Rate(8_000);
/// Highest limit of a network card's rate, 400 Gbit/s, which is that of the fastest Ethernet in use. The kernel counts
/// the bytes that wait for 60 ms of it in 32 bits.
pub const BANDWIDTH_MAX: Rate = Rate(50_000_000_000);
/// Largest number of ports of a Linux bridge: BR_MAX_PORTS is 1024, and port numbers start at 1.
pub const PORTS_PER_BRIDGE_MAX: usize = 1023;
/// Largest number of pending connections of a VM that returns from standby, each kept as its first packet. A
/// further packet replaces the oldest, whose sender repeats it.
pub const PENDING_CONNECTIONS_MAX: usize = 16;
/// Largest size of such a packet, in bytes; a packet that opens a connection carries only options.
pub const PENDING_PACKET_BYTES_MAX: usize = 1600;
/// Time for which such a packet is kept for a VM that does not return; its sender has repeated it five times
/// by then.
pub const PENDING_KEPT_MAX: Duration = Duration::from_secs(60);
/// Greatest age of a reading of the connection table that decides nothing by itself: as short as the
/// shortest time between two readings of the monitor, so that passes which follow one of its reports share
/// its reading.
pub const FLOWS_AGE_MAX: Duration = Duration::from_secs(1);
