//! The load: wrk, h2load and curl in the namespace of the client.

use std::time::Instant;

use super::world::{INJECTED, LARGE_BYTES, Side};

/// Seconds of one measurement.
const SECONDS: &str = "3";
/// Connections or streams of a load.
const CROWD: &str = "64";
/// The header that the credential's value is injected into, as the guest knows it.
const PLACEHOLDER: &str = "Authorization: Bearer mock-KEY";

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
    let header = ["-H", PLACEHOLDER];
    // To other hosts it is not forwarded.
    let header = if url.contains(INJECTED) { &header[..] } else { &[] };
    let text = output("wrk", &[&["-t1", "--latency", "-d", SECONDS], header, more, &[url]].concat());
    assert!(!text.contains("Non-2xx"), "{text}");
    let table = text.split_once("Latency Distribution").expect("it was asked for").1;
    let time = |label| milliseconds(after(table, label));
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
    let text = output("h2load", &["-c4", "-m16", "-t1", "-D", SECONDS, "-H", PLACEHOLDER, url]);
    let answered: f64 = after(&text, "status codes:").parse().expect("a number");
    answered / SECONDS.parse::<f64>().expect("a number")
}

/// Returns the MB/s of one large download.
pub(super) fn download(url: &str) -> f64 {
    let start = Instant::now();
    output("curl", &["-sSkf", "--http1.1", "-H", PLACEHOLDER, "-o", "/dev/null", url]);
    megabytes(start)
}

/// Returns the MB/s of one large upload of a file.
pub(super) fn upload(url: &str, file: &str) -> f64 {
    let start = Instant::now();
    output(
        "curl",
        &["-sSkf", "--http1.1", "-H", PLACEHOLDER, "-X", "POST", "-T", file, "-o", "/dev/null", url],
    );
    megabytes(start)
}

#[expect(clippy::cast_precision_loss, reason = "a round number")]
fn megabytes(start: Instant) -> f64 {
    LARGE_BYTES as f64 / 1e6 / start.elapsed().as_secs_f64()
}
