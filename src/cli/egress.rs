//! Verbs on mediated egress: its log, a report of what an instance reaches, and the process that carries it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};
use stead_egress::{ProcessArguments, SocketNumbers, run};
use stead_schemas::egress::{AuditLine, Decision, TlsUse};

use super::client::Client;
use super::follow::{self, Lines};
use super::instances::Logs;
use super::show::{line, print};
use super::{Failure, Output};

/// Largest number of lines that a report is made from: the server sends no more.
const REPORT_LINES_MAX: usize = 100_000;

#[derive(Debug, Subcommand)]
pub(crate) enum EgressVerb {
    /// Print what was carried for an instance, and what was refused and why.
    Log {
        name: String,
        #[arg(long, default_value_t = 100)]
        tail: u32,
        /// Continue with the lines that are written from now on.
        #[arg(short, long)]
        follow: bool,
    },
    /// List the hosts that an instance reached or tried to reach, with a policy that allows those.
    Report { name: String },
    /// Run the process that carries mediated egress. The daemon starts it with its sockets.
    #[command(hide = true)]
    Serve(Box<ServeEgress>),
}

/// The arguments that the daemon gives.
#[derive(Debug, Args)]
pub(crate) struct ServeEgress {
    /// The settings, as JSON.
    #[arg(long)]
    settings: String,
    /// A PEM file with the authorities that servers are verified by.
    #[arg(long)]
    roots: Vec<PathBuf>,
    /// The user whose requests are answered.
    #[arg(long)]
    daemon: u32,
    /// The object that the process runs for. This and the following arguments are only for those who look for it.
    #[arg(long)]
    owner: String,
    /// Identity of the program's file.
    #[arg(long)]
    build: String,
    /// The path of the control socket.
    #[arg(long)]
    mark: String,
}

pub(super) async fn egress(client: &Client, verb: EgressVerb, output: Output) -> Result<(), Failure> {
    match verb {
        EgressVerb::Serve(arguments) => serve(*arguments),
        EgressVerb::Log { name, tail, follow } => {
            let form = move |text: String| match output {
                Output::Table => in_words(&text).unwrap_or(text),
                Output::Json | Output::Yaml => text,
            };
            follow::logs(client, log_of(name, tail, follow), form).await
        }
        EgressVerb::Report { name } => report(client, name, output).await,
    }
}

fn log_of(name: String, tail: u32, follow: bool) -> Logs {
    Logs { name, tail, follow, source: "egress".to_owned(), raw: false }
}

/// Returns a line of the log for people, or `None` if it cannot be read.
fn in_words(text: &str) -> Option<String> {
    let line: AuditLine = serde_json::from_str(text).ok()?;
    let mut words = vec![line.time.strftime("%Y-%m-%d %H:%M:%S").to_string(), word(&line.decision)];
    words.push(destination(&line));
    words.extend(line.method.clone());
    words.extend(line.path.clone());
    words.extend(line.status.map(|status| status.to_string()));
    if line.injected {
        words.push(format!("with {}", line.credentials.join(", ")));
    }
    words.extend(line.reason.map(|reason| format!("({})", reason.text())));
    Some(words.join(" "))
}

/// Returns the word of a value that is one on the wire.
fn word(value: &impl Serialize) -> String {
    let word = serde_json::to_value(value).ok();
    word.as_ref().and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn destination(line: &AuditLine) -> String {
    let host = line.host.as_ref().map(ToString::to_string);
    let host = host.or_else(|| line.address.map(|address| address.to_string()));
    match (host, line.port) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host,
        (None, _) => "-".to_owned(),
    }
}

/// The use of one host by an instance.
#[derive(Debug, Default, Serialize)]
struct Used {
    requests: u64,
    refused: u64,
    bytes_up: u64,
    bytes_down: u64,
    protocols: BTreeSet<&'static str>,
    /// True if the host has a name, which a policy can list.
    #[serde(skip)]
    host: Option<String>,
}

impl Used {
    fn add(&mut self, line: &AuditLine) {
        self.requests += 1;
        self.refused += u64::from(line.decision == Decision::Refused);
        self.bytes_up += line.bytes_up;
        self.bytes_down += line.bytes_down;
        self.host = line.host.as_ref().map(ToString::to_string);
        self.protocols.insert(match (line.tls, &line.version, line.port) {
            (TlsUse::None, Some(_), _) => "http",
            (TlsUse::None, None, None) => "dns",
            (TlsUse::None, None, Some(_)) => "tcp",
            (TlsUse::Passthrough, ..) => "tls",
            (TlsUse::Intercept, ..) => "https",
        });
    }
}

async fn report(client: &Client, name: String, output: Output) -> Result<(), Failure> {
    let mut lines = Lines::open(client, &log_of(name, 0, false), REPORT_LINES_MAX).await?;
    let mut hosts: BTreeMap<String, Used> = BTreeMap::new();
    while let Some(text) = lines.next().await? {
        if let Ok(line) = serde_json::from_str::<AuditLine>(&text) {
            hosts.entry(destination(&line)).or_default().add(&line);
        }
    }
    let names: BTreeSet<&String> = hosts.values().filter_map(|used| used.host.as_ref()).collect();
    let policy = json!({ "network": { "egress": { "enabled": true, "allow_hosts": names } } });
    let report = json!({ "hosts": hosts, "policy": policy });
    let header = ["HOST", "PROTOCOLS", "REQUESTS", "REFUSED", "SENT", "RECEIVED"];
    print(&report, output, &header, || {
        let row = |(host, used): (&String, &Used)| {
            let protocols = used.protocols.iter().copied().collect::<Vec<_>>().join(",");
            let counts = [used.requests, used.refused, used.bytes_up, used.bytes_down];
            [host.clone(), protocols].into_iter().chain(counts.map(|count| count.to_string())).collect()
        };
        hosts.iter().map(row).collect()
    })?;
    if output == Output::Table {
        line("");
        line("A policy that allows these hosts:");
        line(&policy.to_string());
    }
    Ok(())
}

/// The descriptors of the sockets, in the order in which the daemon gives them.
const SOCKETS: SocketNumbers =
    SocketNumbers { control: 3, captured: 4, explicit: 5, names_udp: 6, names_tcp: 7 };

/// Carries egress until a socket is lost.
pub(super) fn serve(serve: ServeEgress) -> Result<(), Failure> {
    let ServeEgress { settings, roots, daemon, owner: _, build: _, mark: _ } = serve;
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let arguments = ProcessArguments { settings, sockets: SOCKETS, daemon_uid: daemon, roots };
    run(arguments).map_err(|error| Failure::from(anyhow::Error::from(error)))
}
