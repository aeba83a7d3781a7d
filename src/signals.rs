//! The end of the daemon: by whom it is asked for, and how its parts hear of it.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Until a part is told to end.
pub(crate) async fn ended(mut ending: watch::Receiver<bool>) {
    drop(ending.wait_for(|&is_over| is_over).await);
}

/// Until SIGTERM or SIGINT.
pub(crate) async fn terminated() {
    let listen = |kind| signal(kind).expect("signal handlers can be installed in a running runtime");
    let (mut term, mut int) = (listen(SignalKind::terminate()), listen(SignalKind::interrupt()));
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
