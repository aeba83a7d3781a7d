//! Limits on the cost of the other end of a connection: a share of the connections, and the time that is
//! waited for it.
//!
//! Guarantees: the connection of a peer that is gone, that does not send what it announced, or that does not
//! take what it asked for is ended within the times that the caller names; one address gets its share and no
//! more.
//! Never: decides those times and shares.

mod patience;
mod shares;
mod stall;

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay,
    set_tcp_user_timeout,
};
use socket2::SockRef;

pub(crate) use patience::{Patience, Patient, TooSlow};
pub(crate) use shares::{Share, Shares, client_of};
pub(crate) use stall::Unstalled;

/// Time between two probes of a silent peer.
const KEEPALIVE_PROBE: Duration = Duration::from_secs(60);
/// Number of probes without an answer after which a peer counts as gone, where the kernel has no time limit for
/// unacknowledged data; with one, it applies that to probes too.
const KEEPALIVE_PROBES_MAX: u32 = 9;

/// Number of unsent bytes that the kernel keeps for a peer. Without a bound it keeps megabytes for each peer that reads
/// nothing; this much is on its way before the next piece is written.
const UNSENT_BYTES_MAX: u32 = 256 << 10;

/// Makes the kernel check whether a silent peer still exists, and give up a peer that does not acknowledge
/// data for `unacknowledged`. An option that cannot be set only delays the detection.
pub(crate) fn watch_over(socket: impl AsFd, unacknowledged: Duration) {
    let socket = socket.as_fd();
    let _ = set_tcp_nodelay(socket, true);
    let _ = set_socket_keepalive(socket, true);
    let _ = set_tcp_keepidle(socket, KEEPALIVE_PROBE);
    let _ = set_tcp_keepintvl(socket, KEEPALIVE_PROBE);
    let _ = set_tcp_keepcnt(socket, KEEPALIVE_PROBES_MAX);
    let _ = set_tcp_user_timeout(socket, u32::try_from(unacknowledged.as_millis()).unwrap_or(u32::MAX));
    let _ = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use rustix::net::sockopt::{
        socket_keepalive, tcp_keepcnt, tcp_keepidle, tcp_keepintvl, tcp_nodelay, tcp_user_timeout,
    };

    use super::*;

    #[test]
    fn the_kernel_probes_a_silent_peer_and_gives_up_one_that_acknowledges_nothing() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        // The defaults of the host may be the expected values: none of them is there before.
        set_tcp_keepidle(&stream, Duration::from_secs(1)).expect("set");
        set_tcp_keepintvl(&stream, Duration::from_secs(1)).expect("set");
        set_tcp_keepcnt(&stream, 1).expect("set");
        watch_over(&stream, Duration::from_secs(7));
        assert!(socket_keepalive(&stream).expect("read"));
        assert_eq!(tcp_keepidle(&stream).expect("read"), KEEPALIVE_PROBE);
        assert_eq!(tcp_keepintvl(&stream).expect("read"), KEEPALIVE_PROBE);
        assert_eq!(tcp_keepcnt(&stream).expect("read"), KEEPALIVE_PROBES_MAX);
        assert_eq!(tcp_user_timeout(&stream).expect("read"), 7000);
        assert!(tcp_nodelay(&stream).expect("read"));
        assert_eq!(SockRef::from(&stream).tcp_notsent_lowat().expect("read"), UNSENT_BYTES_MAX);
    }
}
