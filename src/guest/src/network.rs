//! The guest's interface: sets address and default route with rtnetlink messages that are encoded here.
//!
//! A netlink library would triple this static binary for six messages whose layout is fixed kernel
//! ABI (linux/rtnetlink.h, linux/if_addr.h).

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use stead_schemas::guest::NetworkConfig;
use stead_schemas::network::Mac;

use crate::BootError;
use crate::devices::wait_for;

const INTERFACE: &str = "eth0";
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const AF_INET: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const NLMSG_ERROR: u16 = 2;

/// Brings up loopback, and the interface if the instance has one.
pub(crate) fn configure(network: Option<&NetworkConfig>) -> Result<(), BootError> {
    let failed =
        |what: &'static str| move |reason: String| BootError::new("network", format!("{what}: {reason}"));
    let socket = open().map_err(|error| BootError::new("network", error))?;
    link_up(&socket, index("lo").unwrap_or(1)).map_err(failed("loopback"))?;
    let Some(network) = network else { return Ok(()) };
    let index = wait_for("the network interface", || index(INTERFACE))?;
    set_mtu(&socket, index, network).map_err(failed("MTU"))?;
    add_address(&socket, index, network).map_err(failed("address"))?;
    link_up(&socket, index).map_err(failed("link"))?;
    add_default_route(&socket, index, network.gateway).map_err(failed("default route"))
}

/// Gives the interface its new addresses in a guest that takes over another identity.
pub(crate) fn replace(old: Option<&NetworkConfig>, new: &NetworkConfig) -> Result<(), BootError> {
    let failed =
        |what: &'static str| move |reason: String| BootError::new("network", format!("{what}: {reason}"));
    let socket = open().map_err(|error| BootError::new("network", error))?;
    let index = wait_for("the network interface", || index(INTERFACE))?;
    if let Some(mac) = &new.mac {
        // The interface drops frames that are addressed to another hardware address.
        set_hardware_address(&socket, index, mac).map_err(failed("hardware address"))?;
        renew_link_local();
    }
    if let Some(old) = old {
        // The routes of the address are removed with it. The program may have removed the address itself.
        let _ = address(&socket, RTM_DELADDR, 0, index, old);
    }
    set_mtu(&socket, index, new).map_err(failed("MTU"))?;
    add_address(&socket, index, new).map_err(failed("address"))?;
    link_up(&socket, index).map_err(failed("link"))?;
    add_default_route(&socket, index, new.gateway).map_err(failed("default route"))
}

/// Renews the IPv6 link-local address, which the kernel derives from the hardware address: two guests with the same
/// address would report a duplicate. Without IPv6 there is nothing to do.
fn renew_link_local() {
    let switch = format!("/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6");
    if fs::read_to_string(&switch).is_ok_and(|disabled| disabled.trim() == "0") {
        let _ = fs::write(&switch, "1").and_then(|()| fs::write(&switch, "0"));
    }
}

fn open() -> rustix::io::Result<OwnedFd> {
    // Protocol 0 is NETLINK_ROUTE.
    socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
}

fn index(name: &str) -> Option<u32> {
    fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
}

fn link_up(socket: &OwnedFd, index: u32) -> Result<(), String> {
    // struct ifinfomsg: family, pad, type, index, flags, change mask.
    let mut body = vec![0u8, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    request(socket, RTM_NEWLINK, 0, &body)
}

fn set_hardware_address(socket: &OwnedFd, index: u32, mac: &Mac) -> Result<(), String> {
    let mut body = vec![0u8, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend([0; 8]);
    attribute(&mut body, IFLA_ADDRESS, &mac.0);
    request(socket, RTM_NEWLINK, 0, &body)
}

fn set_mtu(socket: &OwnedFd, index: u32, network: &NetworkConfig) -> Result<(), String> {
    let Some(mtu) = network.mtu else { return Ok(()) };
    let mut body = vec![0u8, 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend([0; 8]);
    attribute(&mut body, IFLA_MTU, &u32::from(mtu).to_ne_bytes());
    request(socket, RTM_NEWLINK, 0, &body)
}

fn add_address(socket: &OwnedFd, index: u32, network: &NetworkConfig) -> Result<(), String> {
    address(socket, RTM_NEWADDR, NLM_F_CREATE, index, network)
}

fn address(
    socket: &OwnedFd,
    kind: u16,
    flags: u16,
    index: u32,
    network: &NetworkConfig,
) -> Result<(), String> {
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut body = vec![AF_INET, network.prefix, 0, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, IFA_LOCAL, &network.address.octets());
    attribute(&mut body, IFA_ADDRESS, &network.address.octets());
    request(socket, kind, flags, &body)
}

fn add_default_route(socket: &OwnedFd, index: u32, gateway: Ipv4Addr) -> Result<(), String> {
    // struct rtmsg: family, lengths, tos, table, protocol, scope, type, flags.
    let mut body = vec![AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0];
    attribute(&mut body, RTA_OIF, &index.to_ne_bytes());
    attribute(&mut body, RTA_GATEWAY, &gateway.octets());
    request(socket, RTM_NEWROUTE, NLM_F_CREATE, &body)
}

/// Appends a struct rtattr, padded to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Sends one request and reads its acknowledgement.
fn request(socket: &OwnedFd, kind: u16, flags: u16, body: &[u8]) -> Result<(), String> {
    let length = u32::try_from(16 + body.len()).map_err(|error| error.to_string())?;
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    message.extend(1u32.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.extend(body);
    send(socket, &message, SendFlags::empty()).map_err(|error| error.to_string())?;
    let mut answer = vec![0u8; 4096];
    let (_, count) = recv(socket, &mut answer[..], RecvFlags::empty()).map_err(|error| error.to_string())?;
    let answer = &answer[..count];
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    let code = answer.get(16..20).map(|bytes| i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(rustix::io::Errno::from_raw_os_error(-code).to_string()),
        _ => Err("the kernel's answer is not understood".to_owned()),
    }
}
