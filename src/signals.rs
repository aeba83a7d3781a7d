//! The end of the daemon: the signals that request it, and the channel that notifies its parts.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Waits until a part is notified that it should end.
pub(crate) async fn ended(mut ending: watch::Receiver<bool>) {
    drop(ending.wait_for(|&is_over| is_over).await);
}

/// Waits for SIGTERM or SIGINT.
pub(crate) async fn terminated() {
    let listen = |kind| signal(kind).expect("signal handlers can be installed in a running runtime");
    let (mut term, mut int) = (listen(SignalKind::terminate()), listen(SignalKind::interrupt()));
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
