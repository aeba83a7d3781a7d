//! Verbs on this host's own daemon: serve, config.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::Failure;
use crate::config::{Config, Effective};
use crate::lines::{Lines, StandardError};

/// For the last lines of the log, at the end.
const LOG_FLUSH_MAX: Duration = Duration::from_secs(1);

/// Flags that are configuration keys; the rest is in the file or the environment.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// A YAML file.
    #[arg(long, env = "STEAD_CONFIG")]
    config: Option<PathBuf>,
    #[arg(long)]
    data_dir: Option<String>,
    #[arg(long)]
    run_dir: Option<String>,
    /// Address and port of the API.
    #[arg(long)]
    listen: Option<String>,
    /// Address of this host at which ingresses have their ports.
    #[arg(long)]
    ingress_address: Option<String>,
    /// An unpacked Debian cloud kernel package.
    #[arg(long)]
    kernel_dir: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigVerb {
    /// Print the configuration in force and where each key came from.
    Show(Serve),
}

fn load(serve: Serve) -> Result<Effective, Failure> {
    let Serve { config, data_dir, run_dir, listen, ingress_address, kernel_dir } = serve;
    let given = [
        ("data_dir", data_dir),
        ("run_dir", run_dir),
        ("listen", listen),
        ("ingress_address", ingress_address),
        ("kernel_dir", kernel_dir),
    ];
    let flags: BTreeMap<&'static str, String> =
        given.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    Config::load(config.as_deref(), flags).map_err(|error| Failure::Usage(error.to_string()))
}

pub(super) async fn serve(serve: Serve) -> Result<(), Failure> {
    let config = load(serve)?.config;
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log)
        .map_err(|error| Failure::Usage(format!("log: {error}")))?;
    // Written by a thread of its own: a reader that stalls must not stop the daemon.
    let log = Lines::new("log", StandardError).map_err(|error| Failure::Other(error.to_string()))?;
    let is_colourful = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_colourful).with_writer(log.clone()).init();
    let ended = crate::assemble::serve(config).await.map_err(Failure::from);
    let _ = tokio::task::spawn_blocking(move || log.flush(LOG_FLUSH_MAX)).await;
    ended
}

pub(super) fn config(verb: ConfigVerb) -> Result<(), Failure> {
    let ConfigVerb::Show(serve) = verb;
    let Effective { config, sources } = load(serve)?;
    let yaml = serde_norway::to_string(&config).map_err(|error| Failure::Other(error.to_string()))?;
    for line in yaml.lines() {
        let source = line.split(':').next().and_then(|key| sources.get(key));
        match source {
            Some(source) => super::show::line(&format!("{line}  # {source}")),
            None => super::show::line(line),
        }
    }
    Ok(())
}
