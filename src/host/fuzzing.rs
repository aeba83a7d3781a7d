//! Fuzz targets for packets to VMs in standby, and for messages of the kernel.

use std::net::Ipv4Addr;

use stead_schemas::network::Mac;

use super::{conntrack_forget, doors, flows, notices};

/// Address of the VM whose wake listener is fuzzed. The seeds are made for it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Reads the input as a frame and as each of the kernel's messages.
pub fn packets(data: &[u8]) {
    let _ = doors::heard(data, Mac::of_address(ADDRESS), ADDRESS);
    notices::is_forwarding_switched(data);
    let _ = notices::of_table(data, "stead");
    notices::generation(data);
    flows::fuzz(data);
    conntrack_forget::fuzz(data);
}
