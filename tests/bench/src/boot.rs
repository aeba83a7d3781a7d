//! The time from POST to Running, against the same kernel, initrd and disks started manually.
//!
//! Rounds are interleaved.

use crate::daemon::Daemon;
use crate::hand::{self, Hand};
use crate::{Figure, median};

const ROUNDS: usize = 5;

pub(crate) async fn boot() -> Vec<Figure> {
    let daemon = Daemon::start("stbench0", "10.239.250.1/24").await;
    daemon.import().await;
    let (mut ours, mut hand) = (Vec::new(), Vec::new());
    let overlay = daemon.dir.path().join("hand.ext4");
    let directory = daemon.dir.path().join("hand");
    for round in 0..ROUNDS {
        let name = format!("b{round}");
        ours.push(daemon.post(&name, "256MB").await);
        let instance = daemon.get(&format!("/instances/{name}")).await;
        let arguments =
            hand::arguments(instance["vmm_pid"].as_u64().expect("a process"), &overlay, &directory, None);
        daemon.delete(&name).await;
        hand::make_overlay(&overlay);
        hand.push(Hand::boot(&arguments, &directory, &["/bin/busybox", "sleep", "100000"]).seconds);
    }
    vec![Figure {
        what: "POST to Running (peer: the same command line by hand, no network card)".to_owned(),
        ours: median(ours),
        peer: Some(median(hand)),
        unit: "s",
        goal: "<= 1.10",
    }]
}
