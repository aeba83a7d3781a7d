//! The command line.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such object, 4 timed out, 141 the reader of the output
//! is gone. `exec` exits with the program's code, and so do `run` and `start` when the program ended before
//! it was waited for. The client verbs know only the wire: they work against any server that speaks it.

mod arguments;
mod auto_standby;
mod backup;
mod bandwidth;
mod base;
mod client;
mod copy;
mod credentials;
mod daemon;
mod egress;
mod exec;
mod follow;
mod health;
mod hotplug;
mod images;
mod ingresses;
mod instance_table;
mod instances;
mod links;
mod pipe;
mod policies;
mod resources;
mod schedules;
mod show;
mod snapshots;
mod tls;
mod tokens;
mod top;
mod update;
mod volumes;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use client::Client;

/// A declarative controller for micro-VMs.
#[derive(Debug, Parser)]
#[command(name = "stead", version, about)]
struct Cli {
    #[command(flatten)]
    remote: Remote,
    #[command(subcommand)]
    verb: Verb,
}

/// The server to use, and the format of the output.
#[derive(Debug, Args)]
pub(crate) struct Remote {
    /// The server: unix:///PATH, https://HOST:PORT or http://HOST:PORT [env: STEAD_BASE_URL, HYPEMAN_BASE_URL;
    /// default unix:///run/stead/stead.sock if that exists, else http://127.0.0.1:8080]
    #[arg(long, visible_alias = "host", global = true)]
    base_url: Option<String>,
    /// A token of `stead token create` [env: STEAD_API_KEY, HYPEMAN_API_KEY]
    #[arg(long, global = true, hide = true)]
    api_key: Option<String>,
    /// A PEM file with the authorities that may certify the server, in the place of those of this host.
    #[arg(long, global = true, env = "STEAD_CACERT", hide_env_values = true)]
    cacert: Option<PathBuf>,
    /// The SHA-256 of the server's certificate in hexadecimal digits; its name and its authority then do not matter.
    #[arg(long, global = true, env = "STEAD_TLS_FINGERPRINT", hide_env_values = true)]
    tls_fingerprint: Option<String>,
    /// Output format.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the daemon.
    Serve(daemon::Serve),
    /// Manage tokens for the API.
    #[command(subcommand)]
    Token(tokens::Token),
    /// Show the daemon's configuration.
    #[command(subcommand)]
    Config(daemon::ConfigVerb),
    /// Examine this host, the data directory and the leftovers of an ended daemon, and suggest remedies.
    Doctor(daemon::Serve),
    /// Write a backup of everything that is stored to a file, while the daemon runs.
    Backup(backup::Backup),
    /// Restore a backup into a new data directory; the daemon must not run on it.
    RestoreBackup(daemon::RestoreBackup),
    /// Create and start an instance, and wait until it runs.
    Run(Box<instances::Run>),
    /// List instances.
    Ps(instances::Ps),
    /// Print an instance.
    Get { name: String },
    /// Print an instance with its conditions.
    Describe { name: String },
    /// Print the last lines of an instance's log, and with -f the following ones.
    Logs(instances::Logs),
    /// Stop an instance.
    Stop {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Keep an instance's memory and end its process.
    Standby {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Restore instances from their kept memory.
    Restore {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Make a copy of an instance in its current state.
    Fork(snapshots::Fork),
    /// Manage snapshots of instances.
    #[command(subcommand)]
    Snapshot(snapshots::SnapshotVerb),
    /// Manage volumes, which outlive instances.
    #[command(subcommand)]
    Volume(volumes::VolumeVerb),
    /// Manage ingresses: host names that lead to instances.
    #[command(subcommand)]
    Ingress(ingresses::IngressVerb),
    /// Show what instances reach through mediated egress.
    #[command(subcommand)]
    Egress(egress::EgressVerb),
    /// Manage the standby of idle instances.
    #[command(subcommand)]
    AutoStandby(auto_standby::AutoStandby),
    /// Start a stopped instance.
    Start {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Change the policies of an instance: restart, health check, expiry, auto-standby.
    Update(Box<update::Update>),
    /// Stop and delete instances.
    Rm(instances::Rm),
    /// Run a program in an instance.
    Exec(exec::Exec),
    /// Copy files to or from an instance; its side is NAME:PATH.
    Cp(copy::Cp),
    /// Print what exists at a path in an instance.
    Stat(copy::StatPath),
    /// Print the resource usage of instances, repeatedly at a terminal.
    Top(top::Top),
    /// Print what the host has of each resource and what is allocated, or take memory back.
    Resources(resources::ShowResources),
    /// Wait until an instance is in a state.
    Wait(instances::WaitFor),
    /// Pull an image and wait until it is ready.
    Pull { image: String },
    /// List images.
    Images,
    /// Manage images of this host.
    #[command(subcommand)]
    Image(images::ImageVerb),
}

/// The way in which a verb failed.
#[derive(Debug)]
pub(crate) enum Failure {
    Usage(String),
    NotFound(String),
    TimedOut(String),
    Other(String),
    /// The connection broke, or could not be made.
    Lost(String),
    /// The program of an instance ended with this code, and `text` explains it.
    Ended {
        code: u8,
        text: String,
    },
    /// The program in the guest ended with this code; its own output explains it.
    Program(u8),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Other(_) | Self::Lost(_) => 1,
            Self::Usage(_) => 2,
            Self::NotFound(_) => 3,
            Self::TimedOut(_) => 4,
            Self::Program(code) | Self::Ended { code, .. } => *code,
        }
    }
    fn text(&self) -> &str {
        match self {
            Self::Program(_) => "",
            Self::Usage(text)
            | Self::NotFound(text)
            | Self::TimedOut(text)
            | Self::Other(text)
            | Self::Lost(text)
            | Self::Ended { text, .. } => text,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(format!("{error:#}"))
    }
}

/// Parses the command line, runs the verb, and reports failures.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::Program(_)) {
                for (number, line) in failure.text().lines().enumerate() {
                    // Parts of the text may come from a guest or a server.
                    let start = if number == 0 { "stead: " } else { "" };
                    eprintln!("{start}{}", show::shown(line));
                }
            }
            ExitCode::from(failure.code())
        }
    }
}

/// Number of tasks after which a worker asks the kernel for new events. With the runtime's own 61, a request waits for
/// the tasks of dozens of other clients before it is seen at all.
const EVENT_INTERVAL: u32 = 16;

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().event_interval(EVENT_INTERVAL).build()
}

fn run(cli: Cli) -> Result<(), Failure> {
    // This process makes its own runtime.
    if let Verb::Egress(egress::EgressVerb::Serve(serve)) = cli.verb {
        return egress::serve(*serve);
    }
    let runtime = runtime().map_err(|error| Failure::Other(error.to_string()))?;
    let is_daemon = matches!(cli.verb, Verb::Serve(_));
    let result = runtime.block_on(async {
        tokio::select! {
            biased;
            result = dispatch(cli) => result,
            // The output has no reader any more. The daemon prints nothing.
            () = pipe::closed(), if !is_daemon => Err(Failure::Program(pipe::CODE)),
        }
    });
    // A pending read of the terminal, whose result is no longer needed, may never end.
    runtime.shutdown_background();
    result
}

async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let Cli { remote, verb } = cli;
    let client = || Client::new(&remote);
    let output = remote.output;
    match verb {
        Verb::Serve(serve) => daemon::serve(serve).await,
        Verb::Token(token) => tokens::token(token, output),
        Verb::Config(verb) => daemon::config(verb),
        Verb::Doctor(serve) => daemon::doctor(serve, output).await,
        Verb::Backup(backup) => backup::backup(&client()?, backup).await,
        Verb::RestoreBackup(restore) => daemon::restore_backup(restore).await,
        Verb::Run(run) => instances::run(&client()?, *run, output).await,
        Verb::Ps(ps) => instances::ps(&client()?, ps, output).await,
        Verb::Get { name } => instances::get(&client()?, &name, output).await,
        Verb::Describe { name } => instances::describe(&client()?, &name).await,
        Verb::Logs(logs) => follow::logs(&client()?, logs, |text| text).await,
        Verb::Standby { names } => instances::each(&client()?, &names, "standby", output).await,
        Verb::Restore { names } => instances::each(&client()?, &names, "restore", output).await,
        Verb::Fork(fork) => snapshots::fork(&client()?, fork, output).await,
        Verb::Snapshot(verb) => snapshots::snapshot(&client()?, verb, output).await,
        Verb::Volume(verb) => volumes::volume(&client()?, verb, output).await,
        Verb::Ingress(verb) => ingresses::ingress(&client()?, verb, output).await,
        Verb::Egress(verb) => egress::egress(&client()?, verb, output).await,
        Verb::AutoStandby(verb) => auto_standby::auto_standby(&client()?, verb, output).await,
        Verb::Stop { names } => instances::each(&client()?, &names, "stop", output).await,
        Verb::Start { names } => instances::each(&client()?, &names, "start", output).await,
        Verb::Update(update) => update::update(&client()?, *update, output).await,
        Verb::Rm(rm) => instances::rm(&client()?, rm).await,
        Verb::Exec(exec) => exec::exec(&client()?, exec).await,
        Verb::Cp(cp) => copy::cp(&client()?, cp).await,
        Verb::Stat(stat) => copy::stat(&client()?, stat, output).await,
        Verb::Top(top) => top::top(&client()?, top, output).await,
        Verb::Resources(show) => resources::resources(&client()?, show, output).await,
        Verb::Wait(wait) => instances::wait(&client()?, wait).await,
        Verb::Pull { image } => images::pull(&client()?, &image, output).await,
        Verb::Images => images::list(&client()?, output).await,
        Verb::Image(verb) => images::image(&client()?, verb, output).await,
    }
}
