//! Copies into and out of a guest, against the bare channel and against an exec that does nothing. They alternate, so
//! that a temporarily busy machine affects all of them.

use futures::SinkExt;
use serde_json::json;
use std::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use crate::channel::Channel;
use crate::daemon::Daemon;
use crate::stream::{Socket, drain, exec, megabytes, open};
use crate::{Figure, median};

const COPY_BYTES: usize = 256 << 20;
const CHUNK_BYTES: usize = 256 << 10;
const ROUNDS: usize = 5;
const BUSYBOX: &str = "/bin/busybox";
/// Paths of the files: on the guest's disk, and in its memory.
const FILES: [&str; 2] = ["/file", "/dev/shm/file"];

/// Speeds of one kind of transfer in megabytes per second, round by round.
type Speeds = Vec<f64>;

#[derive(Default)]
struct Seen {
    bare_in: Speeds,
    bare_out: Speeds,
    exec_in: Speeds,
    exec_out: Speeds,
    /// Speeds of the copies in, for each of the files.
    copied_in: [Speeds; 2],
    copied_out: [Speeds; 2],
}

/// Returns the speed of the data sent to the guest, in megabytes per second.
async fn send(mut socket: Socket, end: &str) -> f64 {
    let chunk = bytes::Bytes::from(vec![7u8; CHUNK_BYTES]);
    let start = Instant::now();
    for _ in 0..COPY_BYTES / CHUNK_BYTES {
        socket.feed(Message::Binary(chunk.clone())).await.expect("sent");
    }
    socket.send(Message::text(end)).await.expect("sent");
    let (_, last, _) = drain(&mut socket).await;
    assert!(last.contains("true") || last.contains(":0"), "{last}");
    megabytes(COPY_BYTES, start)
}

async fn receive(mut socket: Socket) -> f64 {
    let start = Instant::now();
    let (bytes, last, _) = drain(&mut socket).await;
    assert!(bytes == COPY_BYTES, "{bytes} bytes: {last}");
    megabytes(COPY_BYTES, start)
}

async fn round(daemon: &Daemon, channel: &mut Channel, seen: &mut Seen) {
    let bare = tokio::task::block_in_place(|| channel.round(COPY_BYTES));
    seen.bare_in.push(bare.to_guest);
    seen.bare_out.push(bare.from_guest);
    for (index, file) in FILES.into_iter().enumerate() {
        let to = json!({ "direction": "to", "guest_path": file });
        seen.copied_in[index].push(send(open(daemon, "cp", to).await, r#"{"type":"end"}"#).await);
        let from = json!({ "direction": "from", "guest_path": file });
        seen.copied_out[index].push(receive(open(daemon, "cp", from).await).await);
        // There is room for only one file.
        exec(daemon, &[BUSYBOX, "rm", file]).await;
    }
    let sink = json!({ "command": [BUSYBOX, "sh", "-c", "/bin/busybox cat >/dev/null"] });
    seen.exec_in.push(send(open(daemon, "exec", sink).await, r#"{"stdin_eof":true}"#).await);
    let line = format!("{BUSYBOX} dd if=/dev/zero bs=64k count={} 2>/dev/null", COPY_BYTES >> 16);
    let source = json!({ "command": [BUSYBOX, "sh", "-c", line] });
    seen.exec_out.push(receive(open(daemon, "exec", source).await).await);
}

/// Measures copies with the instance `box`, which has 1 GB of memory and a disk of half a gigabyte.
pub(crate) async fn copies(daemon: &Daemon) -> Vec<Figure> {
    let mut channel = Channel::boot(daemon, "box", COPY_BYTES).await;
    let mut seen = Seen::default();
    for _ in 0..ROUNDS {
        round(daemon, &mut channel, &mut seen).await;
    }
    let figure = |what: &str, ours: &Speeds, peer: &Speeds, goal| Figure {
        what: what.to_owned(),
        ours: median(ours.clone()),
        peer: Some(median(peer.clone())),
        unit: "MB/s",
        goal,
    };
    let ([disk_in, memory_in], [disk_out, memory_out]) = (&seen.copied_in, &seen.copied_out);
    let Seen { bare_in, bare_out, exec_in, exec_out, .. } = &seen;
    vec![
        figure("cp of 256 MiB to the guest's disk (peer: the bare channel, dd)", disk_in, bare_in, ">= 0.5"),
        figure("cp of 256 MiB from the guest's disk (likewise)", disk_out, bare_out, ">= 0.5"),
        figure("cp of 256 MiB to the guest's memory (likewise)", memory_in, bare_in, ">= 0.5"),
        figure("cp of 256 MiB from the guest's memory (likewise)", memory_out, bare_out, ">= 0.5"),
        figure("the same to the guest (peer: exec of cat >/dev/null)", memory_in, exec_in, ""),
        figure("the same from the guest (peer: exec of dd if=/dev/zero)", memory_out, exec_out, ""),
    ]
}
