//! A copy that is larger than the guest's memory, and than the buffers of both sides.

use serde_json::json;

use super::waiting;
use crate::harness::Harness;
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, shell};

const BYTES: usize = 1 << 30;
/// Size of the chunks that an ordinary client sends, in bytes.
const CHUNK_BYTES: usize = 256 << 10;
/// Limit on the daemon's growth, in KiB: windows, buffers of sockets and frames in both directions, and the
/// allocator's overhead.
const DAEMON_GROWTH_MAX: u64 = 32 << 10;
/// Limit on the agent's growth, in KiB: a window and the spare buffers of one stream.
const AGENT_GROWTH_MAX: u64 = 8 << 10;

/// Returns the peak memory of a process in KiB, from its `/proc/PID/status`.
fn peak(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("reported");
    line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
}

/// Returns the peak memory of the daemon and of the agent in the guest.
async fn peaks(site: &Harness) -> [u64; 2] {
    let daemon = std::fs::read_to_string(format!("/proc/{}/status", site.daemon_pid())).expect("it lives");
    [peak(&daemon), peak(&shell(site, "box", "cat /proc/1/status").await)]
}

async fn copy_in(site: &Harness) {
    let mut socket = Socket::cp(site, "box", &json!({ "direction": "to", "guest_path": "/large" })).await;
    // The chunk has no zeros, so it does not become a hole.
    let chunk = vec![0xa5; CHUNK_BYTES];
    for _ in 0..BYTES / CHUNK_BYTES {
        socket.bytes(&chunk).await;
    }
    socket.json(&json!({ "type": "end" })).await;
    let done = json!({ "type": "result", "success": true, "bytes_written": BYTES });
    assert_eq!(socket.next().await, Received::Json(done));
}

async fn copy_out(site: &Harness) {
    let mut socket = Socket::cp(site, "box", &json!({ "direction": "from", "guest_path": "/large" })).await;
    let Received::Json(header) = socket.next().await else { panic!("no header") };
    assert_eq!(header["size"], BYTES, "{header}");
    let mut received = 0;
    loop {
        match socket.next().await {
            Received::Bytes(bytes) => {
                assert!(bytes.iter().all(|&byte| byte == 0xa5), "the contents differ behind {received}");
                received += bytes.len();
            }
            Received::Json(end) => {
                assert_eq!((end, received), (json!({ "type": "end", "final": true }), BYTES));
                return;
            }
            Received::End => panic!("the end came without a word behind {received} bytes"),
        }
    }
}

#[test]
fn a_gigabyte_is_copied_in_and_out_of_a_guest_of_192_mb_in_constant_memory() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({ "overlay_size": "1200MB" })).await;
        let before = peaks(&site).await;
        copy_in(&site).await;
        let between = peaks(&site).await;
        copy_out(&site).await;
        let after = peaks(&site).await;
        eprintln!(
            "peaks of daemon and agent in KiB: {before:?} before, {between:?} between, {after:?} after"
        );
        for (at, most) in [DAEMON_GROWTH_MAX, AGENT_GROWTH_MAX].into_iter().enumerate() {
            let grown = after[at].saturating_sub(before[at]);
            assert!(grown < most, "the {} grew by {grown} KiB", ["daemon", "agent"][at]);
        }
        site.delete("box").await;
        settles(&mut site, "a gigabyte").await;
    });
}
