//! Limits of networks and of the connections of VMs.

use std::time::Duration;

/// Time for which the TAP of a stopped VM is kept. Making a TAP takes a millisecond and removing it twenty,
/// so a VM that returns soon reuses it.
pub const TAP_KEPT: Duration = Duration::from_secs(5);
/// Largest number of pairs of queues of a network card. Each has a thread in the kernel; a card that more processors
/// share is not faster for more.
pub const CARD_QUEUES_MAX: u16 = 8;
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
