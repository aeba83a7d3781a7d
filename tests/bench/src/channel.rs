//! The bare channel: bytes through a port of the same kind, with `dd` in the guest and no frames.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::daemon::Daemon;
use crate::hand::{self, Hand};

const CHUNK_BYTES: usize = 64 << 10;
/// Path of a port beside the control port, as root of the guest finds it.
const PORT: &str = "/dev/vport0p2";

/// A manually started VM whose program transfers bytes on request.
#[derive(Debug)]
pub(crate) struct Channel {
    _hand: Hand,
    socket: UnixStream,
}

/// The speed in megabytes per second, in each direction. No transfer over this channel can exceed it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Speed {
    pub(crate) from_guest: f64,
    pub(crate) to_guest: f64,
}

impl Channel {
    /// Boots a VM like this running one.
    pub(crate) async fn boot(daemon: &Daemon, instance: &str, bytes: usize) -> Self {
        let seen = daemon.get(&format!("/instances/{instance}")).await;
        let (overlay, directory) =
            (daemon.dir.path().join("channel.ext4"), daemon.dir.path().join("channel"));
        let mut arguments =
            hand::arguments(seen["vmm_pid"].as_u64().expect("a process"), &overlay, &directory, None);
        for word in &mut arguments {
            *word = word.replace("max_ports=2", "max_ports=3");
        }
        let socket = directory.join("bare.sock");
        let chardev = format!("socket,id=bare,path={},server=on,wait=off", socket.display());
        let device = "virtserialport,chardev=bare,name=bare,nr=2".to_owned();
        arguments.extend(["-chardev".to_owned(), chardev, "-device".to_owned(), device]);
        hand::make_overlay(&overlay);
        // A byte requests the outgoing bytes; the incoming ones follow, and a byte acknowledges them.
        let dd = "/bin/busybox dd status=none";
        let (out, back) = (bytes / CHUNK_BYTES, bytes >> 12);
        let script = format!(
            "exec 3<>{PORT}; while {dd} bs=1 count=1 <&3 of=/dev/null; do \
             {dd} if=/dev/zero bs=64k count={out} >&3; \
             {dd} bs=4k count={back} iflag=fullblock of=/dev/null <&3; echo >&3; done"
        );
        let booted = tokio::task::spawn_blocking(move || {
            let hand = Hand::boot(&arguments, &directory, &["/bin/busybox", "sh", "-c", &script]);
            Self { _hand: hand, socket: UnixStream::connect(socket).expect("connected") }
        });
        booted.await.expect("booted")
    }

    /// Transfers `bytes` bytes out, and as many in.
    pub(crate) fn round(&mut self, bytes: usize) -> Speed {
        let mut chunk = vec![0u8; CHUNK_BYTES];
        self.socket.write_all(b"x").expect("sent");
        // This is the first byte: until then the guest is starting a program.
        self.socket.read_exact(&mut chunk[..1]).expect("received");
        let start = Instant::now();
        let mut left = bytes - 1;
        while left > 0 {
            let most = left.min(CHUNK_BYTES);
            left -= self.socket.read(&mut chunk[..most]).expect("received");
        }
        let from_guest = crate::stream::megabytes(bytes, start);
        let start = Instant::now();
        for _ in 0..bytes / CHUNK_BYTES {
            self.socket.write_all(&chunk).expect("sent");
        }
        self.socket.read_exact(&mut chunk[..1]).expect("received");
        Speed { from_guest, to_guest: crate::stream::megabytes(bytes, start) }
    }
}
