//! The load: wrk, h2load and curl in the namespace of the client.

use std::time::Instant;

use super::world::{LARGE_BYTES, Side};

/// Seconds of one measurement.
const SECONDS: &str = "3";
/// Connections or streams of a load.
const CROWD: &str = "64";

/// Figures of one load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) per_second: f64,
    /// Latency in milliseconds.
    pub(super) p50: f64,
    pub(super) p99: f64,
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Side::Client.command(program).args(arguments).output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {text} {}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Returns the word after a label.
fn after<'a>(text: &'a str, label: &str) -> &'a str {
    let rest = text.split_once(label).unwrap_or_else(|| panic!("no {label} in {text}")).1;
    rest.split_whitespace().next().unwrap_or_default()
}

/// Reads a time like `1.20ms`, in milliseconds.
fn milliseconds(text: &str) -> f64 {
    for (unit, factor) in [("us", 1e-3), ("ms", 1.0), ("s", 1e3)] {
        if let Some(number) = text.strip_suffix(unit) {
            return number.parse::<f64>().expect("a number") * factor;
        }
    }
    panic!("{text} is no time")
}

fn wrk(more: &[&str], url: &str) -> Load {
    let placeholder = ["-t1", "--latency", "-d", SECONDS, "-H", "Authorization: Bearer mock-KEY"];
    let text = output("wrk", &[&placeholder[..], more, &[url]].concat());
    assert!(!text.contains("Non-2xx"), "{text}");
    let time = |label| milliseconds(after(&text, label));
    let per_second = after(&text, "Requests/sec:").parse().expect("a number");
    Load { per_second, p50: time("50%"), p99: time("99%") }
}

/// Sends requests over kept connections.
pub(super) fn kept(url: &str) -> Load {
    wrk(&["-c", CROWD], url)
}

/// Sends requests over one connection.
pub(super) fn single(url: &str) -> Load {
    wrk(&["-c1"], url)
}

/// Makes a connection for each request.
pub(super) fn fresh(url: &str) -> Load {
    wrk(&["-c", "16", "-H", "Connection: close"], url)
}

/// Sends requests as 64 streams of HTTP/2 on 4 connections. Returns those answered in a second.
pub(super) fn streams(url: &str) -> f64 {
    let header = "--header=Authorization: Bearer mock-KEY";
    let text = output("h2load", &["-c4", "-m16", "-t1", "-D", SECONDS, header, url]);
    let answered: f64 = after(&text, "status codes:").parse().expect("a number");
    answered / SECONDS.parse::<f64>().expect("a number")
}

/// Returns the MB/s of one large download.
pub(super) fn download(url: &str) -> f64 {
    let start = Instant::now();
    output("curl", &["-skf", "--http1.1", "-H", "Authorization: Bearer mock-KEY", "-o", "/dev/null", url]);
    megabytes(start)
}

/// Returns the MB/s of one large upload of a file.
pub(super) fn upload(url: &str, file: &str) -> f64 {
    let start = Instant::now();
    let header = "Authorization: Bearer mock-KEY";
    output("curl", &["-skf", "--http1.1", "-H", header, "-X", "POST", "-T", file, "-o", "/dev/null", url]);
    megabytes(start)
}

#[expect(clippy::cast_precision_loss, reason = "a round number")]
fn megabytes(start: Instant) -> f64 {
    LARGE_BYTES as f64 / 1e6 / start.elapsed().as_secs_f64()
}
