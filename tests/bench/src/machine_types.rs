//! The two machine types compared: from POST to Running, to standby and back.
//!
//! Rounds are interleaved. The first standby after a boot writes all of the RAM; it is not counted.

use std::time::Instant;

use serde_json::json;

use crate::daemon::Daemon;
use crate::{Figure, median};

const ROUNDS: usize = 9;
/// Number of standbys and restores in each round, the first not counted.
const STANDBYS: usize = 3;

/// The measurements of one machine type.
#[derive(Default)]
struct Measured {
    boots: Vec<f64>,
    standbys: Vec<f64>,
    restores: Vec<f64>,
}

pub(crate) async fn machine_types() -> Vec<Figure> {
    let daemon = Daemon::start("stbench7", "10.239.247.1/24").await;
    daemon.import().await;
    let (mut microvm, mut q35) = (Measured::default(), Measured::default());
    for round in 0..ROUNDS {
        for (hypervisor, measured) in [("qemu", &mut q35), ("qemu-microvm", &mut microvm)] {
            let name = format!("{hypervisor}-{round}");
            measured.boots.push(daemon.post_with(&name, json!({ "hypervisor": hypervisor })).await);
            for step in 0..STANDBYS {
                let standby = timed(&daemon, &name, "standby").await;
                let restore = timed(&daemon, &name, "restore").await;
                if step > 0 {
                    measured.standbys.push(standby);
                    measured.restores.push(restore);
                }
            }
            daemon.delete(&name).await;
        }
    }
    let beside = |what: &str, ours, peer, unit| Figure {
        what: format!("{what} on qemu-microvm (peer: on qemu)"),
        ours: median(ours),
        peer: Some(median(peer)),
        unit,
        goal: "",
    };
    vec![
        beside("POST to Running", microvm.boots, q35.boots, "s"),
        beside("standby of 256 MB that was restored before,", microvm.standbys, q35.standbys, "ms"),
        beside("restore", microvm.restores, q35.restores, "ms"),
    ]
}

async fn timed(daemon: &Daemon, name: &str, verb: &str) -> f64 {
    let start = Instant::now();
    daemon.verb(&format!("/instances/{name}/{verb}"), &json!({})).await;
    start.elapsed().as_secs_f64() * 1000.0
}
