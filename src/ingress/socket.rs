//! The sockets of the ports.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen as begin, socket_with};
use tokio::net::TcpListener;

/// Length of the queue of pending connections: the kernel's default limit (net.core.somaxconn).
const BACKLOG: i32 = 4096;

/// Makes a socket that has the port and takes no connections yet; it never disturbs a program that has the
/// port already.
pub(super) fn bound(address: IpAddr, port: u16) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // Earlier connections that are still closing do not prevent this; another listener does.
    set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddr::new(address, port))?;
    Ok(socket)
}

/// Listens at a port. Must be called within a runtime.
pub(super) fn listen(address: IpAddr, port: u16) -> io::Result<TcpListener> {
    let socket = bound(address, port)?;
    begin(&socket, BACKLOG)?;
    TcpListener::from_std(socket.into())
}
