//! Failpoints for tests of crashes: the daemon dies or is held at one boundary of one action.
//!
//! Never: acts in a daemon that was not asked for it (`STEAD_FAILPOINT`), or in a release without the
//! feature `failpoints`.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use stead_controllers::runtime::{Boundary, Edge, NoBoundary};

/// Time between two polls of whether the daemon may continue.
const HELD_POLL_INTERVAL: Duration = Duration::from_millis(5);

struct Failpoint {
    kind: String,
    action: String,
    edge: Edge,
    end: End,
}

enum End {
    /// The daemon dies as in a crash: without destructors, flushes or messages.
    Dies,
    /// The first time, this action is held until the file that announces it is removed; everything else
    /// continues.
    IsHeld { file: PathBuf, was_reached: AtomicBool },
}

impl Boundary for Failpoint {
    fn reached(&self, kind: &'static str, action: &'static str, edge: Edge) {
        if self.kind != kind || self.action != action || self.edge != edge {
            return;
        }
        match &self.end {
            End::Dies => drop(kill_process(getpid(), Signal::KILL)),
            End::IsHeld { was_reached, .. } if was_reached.swap(true, Ordering::SeqCst) => {}
            End::IsHeld { file, .. } => tokio::task::block_in_place(|| {
                // A failure to make the file is noticed by the test that waits for it.
                drop(File::create(file));
                while file.exists() {
                    std::thread::sleep(HELD_POLL_INTERVAL);
                }
            }),
        }
    }
}

/// Makes the boundary of `KIND/ACTION/EDGE`; with `:FILE` after it, the action is held there.
pub(crate) fn boundary(failpoint: Option<&str>) -> anyhow::Result<Arc<dyn Boundary>> {
    let Some(text) = failpoint else { return Ok(Arc::new(NoBoundary)) };
    if cfg!(not(any(debug_assertions, feature = "failpoints"))) {
        anyhow::bail!("failpoint: this build has none (the feature `failpoints` was not chosen)");
    }
    let (location, end) = match text.split_once(':') {
        Some((location, file)) => {
            (location, End::IsHeld { file: file.into(), was_reached: AtomicBool::new(false) })
        }
        None => (text, End::Dies),
    };
    let parts: Vec<&str> = location.split('/').collect();
    let (kind, action, edge) = match parts[..] {
        [kind, action, "before"] => (kind, action, Edge::Before),
        [kind, action, "after"] => (kind, action, Edge::After),
        _ => anyhow::bail!("failpoint: must be KIND/ACTION/before or KIND/ACTION/after, or that and :FILE"),
    };
    Ok(Arc::new(Failpoint { kind: kind.to_owned(), action: action.to_owned(), edge, end }))
}
