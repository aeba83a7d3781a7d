//! The bare channel: bytes through a port of the same kind, with `dd` in the guest and no frames.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::daemon::Daemon;
use crate::hand::{self, Hand};

const BYTES: usize = 256 << 20;
const CHUNK_BYTES: usize = 64 << 10;
/// A port beside the control port, as root of the guest finds it.
const PORT: &str = "/dev/vport0p2";

/// Megabytes a second, each way: what nothing over this channel can exceed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Channel {
    pub(crate) from_guest: f64,
    pub(crate) to_guest: f64,
}

/// Measured on a VM by hand, made like this running one.
pub(crate) async fn measure(daemon: &Daemon, instance: &str) -> Channel {
    let seen = daemon.get(&format!("/instances/{instance}")).await;
    let (overlay, place) = (daemon.dir.path().join("channel.ext4"), daemon.dir.path().join("channel"));
    let mut arguments = hand::arguments(seen["vmm_pid"].as_u64().expect("a process"), &overlay, &place);
    for word in &mut arguments {
        *word = word.replace("max_ports=2", "max_ports=3");
    }
    let socket = place.join("bare.sock");
    let chardev = format!("socket,id=bare,path={},server=on,wait=off", socket.display());
    let device = "virtserialport,chardev=bare,name=bare,nr=2".to_owned();
    arguments.extend(["-chardev".to_owned(), chardev, "-device".to_owned(), device]);
    hand::make_overlay(&overlay);
    let (blocks, busybox) = (BYTES / CHUNK_BYTES, "/bin/busybox");
    // A byte asks for the way out; the way in follows.
    let script = format!(
        "exec 3<>{PORT}; {busybox} dd bs=1 count=1 <&3 of=/dev/null; \
         {busybox} dd if=/dev/zero bs=64k count={blocks} >&3; {busybox} cat <&3 >/dev/null"
    );
    let measured = tokio::task::spawn_blocking(move || {
        let _hand = Hand::boot(&arguments, &place, &[busybox, "sh", "-c", &script]);
        speak(UnixStream::connect(socket).expect("connected"))
    });
    measured.await.expect("measured")
}

fn speak(mut socket: UnixStream) -> Channel {
    let mut chunk = vec![0u8; CHUNK_BYTES];
    socket.write_all(b"x").expect("sent");
    // The first byte: until then the guest is starting a program.
    socket.read_exact(&mut chunk[..1]).expect("received");
    let start = Instant::now();
    let mut left = BYTES - 1;
    while left > 0 {
        let most = left.min(CHUNK_BYTES);
        left -= socket.read(&mut chunk[..most]).expect("received");
    }
    let from_guest = crate::agent::megabytes(BYTES, start);
    let start = Instant::now();
    // What is still in buffers at the end is a thousandth.
    for _ in 0..BYTES / CHUNK_BYTES {
        socket.write_all(&chunk).expect("sent");
    }
    Channel { from_guest, to_guest: crate::agent::megabytes(BYTES, start) }
}
