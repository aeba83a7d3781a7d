//! Figures against those of peers, measured side by side in one run: a table, and JSON in `target/bench.json`.
//!
//! Never a test: nothing here asserts a time. It needs root, `deploy/setup`, and an idle machine.

mod agent;
mod bare;
mod boot;
mod channel;
mod copies;
mod crowd;
mod crowded;
mod daemon;
mod disk;
mod egress;
mod hand;
mod heal;
mod limits;
mod logs;
mod machine_types;
mod many;
mod network;
#[path = "../../it/no_host.rs"]
mod no_host;
mod posts;
mod qmp;
#[cfg(feature = "kube-runtime")]
mod runtime;
mod scale;
mod standby;
mod stream;
mod wake;
mod weight;

use comfy_table::{Table, presets};
use serde_json::json;

/// A figure, its peer's, and the ratio that counts as good.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) ours: f64,
    pub(crate) peer: Option<f64>,
    pub(crate) unit: &'static str,
    pub(crate) goal: &'static str,
}

fn main() {
    let only = std::env::args().nth(1);
    let is_wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _ = rustls::crypto::ring::default_provider().install_default();
    if only.as_deref().is_some_and(|role| is_played(role, &runtime)) {
        return;
    }
    let mut figures = Vec::new();
    #[cfg(feature = "kube-runtime")]
    if is_wanted("runtime") {
        figures.push(runtime.block_on(runtime::passes()));
    }
    if is_wanted("posts") {
        figures.extend(runtime.block_on(posts::posts()));
    }
    if is_wanted("weight") {
        figures.extend(runtime.block_on(weight::stored()));
        figures.extend(runtime.block_on(weight::running()));
    }
    if is_wanted("many") {
        figures.extend(runtime.block_on(many::many()));
    }
    if is_wanted("scale") {
        figures.extend(scale::scale());
    }
    if is_wanted("boot") {
        figures.extend(runtime.block_on(boot::boot()));
        figures.extend(runtime.block_on(machine_types::machine_types()));
    }
    if is_wanted("agent") {
        figures.extend(runtime.block_on(agent::agent()));
    }
    if is_wanted("disk") {
        figures.extend(runtime.block_on(disk::disk()));
    }
    if is_wanted("standby") {
        figures.extend(runtime.block_on(standby::standby()));
    }
    if is_wanted("wake") {
        figures.extend(runtime.block_on(wake::wake()));
    }
    if is_wanted("network") {
        figures.extend(runtime.block_on(network::network()));
    }
    if is_wanted("limits") {
        figures.extend(runtime.block_on(limits::limits()));
    }
    if is_wanted("egress") {
        figures.extend(runtime.block_on(egress::egress()));
    }
    if is_wanted("heal") {
        figures.extend(runtime.block_on(heal::heal()));
    }
    if is_wanted("crowded") {
        figures.extend(runtime.block_on(crowded::crowded()));
    }
    report(&figures);
}

/// Becomes one of the programs that are measured, if the argument names one.
fn is_played(role: &str, runtime: &tokio::runtime::Runtime) -> bool {
    let directory = || std::path::PathBuf::from(std::env::args().nth(2).expect("a directory"));
    match role {
        bare::ARGUMENT => runtime.block_on(bare::run(&directory())),
        crowded::ARGUMENT => {
            let reported: Vec<String> = std::env::args().skip(2).collect();
            let [address, token, bomb] = reported.as_slice() else { panic!("address, token, archive") };
            runtime.block_on(crowded::run([address, token, bomb]));
        }
        egress::ARGUMENT => egress::carry(&directory()),
        scale::ARGUMENT => runtime.block_on(scale::run()),
        _ => return false,
    }
    true
}

fn report(figures: &[Figure]) {
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_header(["figure", "Stead", "peer", "ratio", "unit", "goal"]);
    let mut rows = Vec::new();
    for Figure { what, ours, peer, unit, goal } in figures {
        let ratio = peer.map(|peer| ours / peer);
        let show = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        table.add_row([
            what.clone(),
            show(Some(*ours)),
            show(*peer),
            show(ratio),
            (*unit).to_owned(),
            (*goal).to_owned(),
        ]);
        rows.push(
            json!({"figure": what, "stead": ours, "peer": peer, "ratio": ratio, "unit": unit, "goal": goal}),
        );
    }
    let text = serde_json::to_string_pretty(&rows).unwrap_or_default();
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench.json");
    if let Err(error) =
        std::fs::create_dir_all(directory.with_file_name("")).and_then(|()| std::fs::write(&directory, text))
    {
        eprintln!("bench: {}: {error}", directory.display());
    }
    #[expect(clippy::print_stdout, reason = "the table is what this program is for")]
    {
        println!("{table}");
    }
}

/// Returns the median.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
