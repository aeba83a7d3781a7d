//! The sockets that the daemon opened and passed by inheritance.
//!
//! Guarantees: a descriptor that is not a socket of the right kind is refused, and no other descriptor is used. The process
//! takes duplicates, which the kernel gives by number; so no descriptor is closed that belongs to something else.

use std::net::{TcpListener, UdpSocket};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// The numbers of the descriptors of inherited sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketNumbers {
    /// Unix socket of the daemon's requests.
    pub control: RawFd,
    /// TCP connections that the kernel redirects.
    pub captured: RawFd,
    /// Clients that know the proxy, by TCP.
    pub explicit: RawFd,
    /// Questions for names by UDP.
    pub names_udp: RawFd,
    /// Questions for names by TCP.
    pub names_tcp: RawFd,
}

/// The reason why a socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("descriptor {number} for {name} cannot be taken")]
    Take { name: &'static str, number: RawFd, source: Errno },
    #[error("descriptor {number} for {name} is not a socket of that kind")]
    OtherKind { name: &'static str, number: RawFd },
}

/// The inherited sockets, none of which blocks.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) control: UnixListener,
    pub(super) captured: TcpListener,
    pub(super) explicit: TcpListener,
    pub(super) names_udp: UdpSocket,
    pub(super) names_tcp: TcpListener,
}

/// The kind of a socket.
#[derive(Debug, Clone, Copy)]
enum Kind {
    ListensUnix,
    ListensTcp,
    Udp,
}

/// Takes duplicates of the sockets.
///
/// # Errors
/// Fails when a number is not that of a socket of the right kind.
pub(super) fn take(numbers: SocketNumbers) -> Result<Sockets, SocketError> {
    let SocketNumbers { control, captured, explicit, names_udp, names_tcp } = numbers;
    Ok(Sockets {
        control: one("the daemon's requests", control, Kind::ListensUnix)?.into(),
        captured: one("captured connections", captured, Kind::ListensTcp)?.into(),
        explicit: one("clients of the proxy", explicit, Kind::ListensTcp)?.into(),
        names_udp: one("names by UDP", names_udp, Kind::Udp)?.into(),
        names_tcp: one("names by TCP", names_tcp, Kind::ListensTcp)?.into(),
    })
}

fn one(name: &'static str, number: RawFd, kind: Kind) -> Result<OwnedFd, SocketError> {
    let failed = |source| SocketError::Take { name, number, source };
    if number < 0 {
        return Err(failed(Errno::BADF));
    }
    let this_process = pidfd_open(getpid(), PidfdFlags::empty()).map_err(failed)?;
    let socket = pidfd_getfd(this_process, number, PidfdGetfdFlags::empty()).map_err(failed)?;
    if !is_of(&socket, kind) {
        return Err(SocketError::OtherKind { name, number });
    }
    rustix::io::ioctl_fionbio(&socket, true).map_err(failed)?;
    Ok(socket)
}

fn is_of(socket: &OwnedFd, kind: Kind) -> bool {
    let family = sockopt::socket_domain(socket);
    let is_inet = || family.is_ok_and(|family| [AddressFamily::INET, AddressFamily::INET6].contains(&family));
    let is_type = |wanted: SocketType| sockopt::socket_type(socket) == Ok(wanted);
    let listens = || sockopt::socket_acceptconn(socket) == Ok(true);
    match kind {
        Kind::ListensUnix => family == Ok(AddressFamily::UNIX) && is_type(SocketType::STREAM) && listens(),
        Kind::ListensTcp => is_inet() && is_type(SocketType::STREAM) && listens(),
        Kind::Udp => is_inet() && is_type(SocketType::DGRAM),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_sockets_of_the_right_kind_are_taken() {
        let dir = tempfile::tempdir().expect("a folder");
        let control = UnixListener::bind(dir.path().join("socket")).expect("bound");
        let tcp = || TcpListener::bind("127.0.0.1:0").expect("bound");
        let (captured, explicit, names_tcp) = (tcp(), tcp(), tcp());
        let names_udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let file = tempfile::tempfile().expect("a file");
        let connected =
            std::net::TcpStream::connect(captured.local_addr().expect("bound")).expect("connected");
        let numbers = SocketNumbers {
            control: control.as_raw_fd(),
            captured: captured.as_raw_fd(),
            explicit: explicit.as_raw_fd(),
            names_udp: names_udp.as_raw_fd(),
            names_tcp: names_tcp.as_raw_fd(),
        };
        let taken = take(numbers).expect("taken");
        assert_eq!(taken.captured.local_addr().ok(), captured.local_addr().ok());
        assert_eq!(taken.names_udp.local_addr().ok(), names_udp.local_addr().ok());
        for wrong in [
            SocketNumbers { control: numbers.captured, ..numbers },
            SocketNumbers { captured: numbers.control, ..numbers },
            SocketNumbers { captured: connected.as_raw_fd(), ..numbers },
            SocketNumbers { explicit: file.as_raw_fd(), ..numbers },
            SocketNumbers { names_udp: numbers.names_tcp, ..numbers },
            SocketNumbers { names_tcp: numbers.names_udp, ..numbers },
        ] {
            assert!(matches!(take(wrong), Err(SocketError::OtherKind { .. })), "{wrong:?}");
        }
        for number in [-1, RawFd::MIN, RawFd::MAX] {
            let absent = SocketNumbers { control: number, ..numbers };
            assert!(matches!(take(absent), Err(SocketError::Take { .. })), "{number}");
        }
    }
}
