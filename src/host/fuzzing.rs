//! Fuzz targets for packets to VMs in standby, and for messages of the kernel.

use std::net::Ipv4Addr;

use stead_schemas::network::Mac;

use super::{conntrack_forget, flows, netfilter_messages, wake};

/// Address of the VM whose wake listener is fuzzed. The seeds are made for it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Reads the input as a frame and as each of the kernel's messages.
pub fn packets(data: &[u8]) {
    let _ = wake::received(data, Mac::of_address(ADDRESS), ADDRESS);
    netfilter_messages::is_forwarding_switched(data);
    let _ = netfilter_messages::of_table(data, "stead");
    netfilter_messages::generation(data);
    flows::fuzz(data);
    conntrack_forget::fuzz(data);
}
