//! Entry points for fuzzers: the answers of a VMM on its monitor.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::monitor::Monitor;

/// Writes one line of the input as a greeting and one more after each command. Then it hangs up, or stays
/// silent when the first byte is odd. Waiting takes no time.
pub fn qmp(data: &[u8]) {
    let Some((&flags, written)) = data.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
        let lines: Vec<Vec<u8>> =
            written.split_inclusive(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
        let far_end = tokio::spawn(async move {
            let mut received = [0; 4096];
            for line in lines {
                if theirs.write_all(&line).await.is_err() {
                    return;
                }
                if !matches!(theirs.read(&mut received).await, Ok(1..)) {
                    return;
                }
            }
            if flags % 2 == 1 {
                while let Ok(1..) = theirs.read(&mut received).await {}
            }
        });
        let notify: crate::hypervisor::driver::Notify = Arc::new(|| {});
        if let Ok(monitor) = Monitor::negotiated(ours, &notify).await {
            let _ = monitor.state().await;
            let _ = monitor.version().await;
            let _ = monitor.plug(|| std::fs::File::open("/dev/null")).await;
            let _ = monitor.migrated().await;
        }
        far_end.abort();
    });
}
