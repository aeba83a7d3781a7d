//! Verbs on this host's own daemon: serve, config, doctor, restore-backup.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{Failure, Output};
use crate::assemble::Passed;
use crate::config::{Config, Effective};
use crate::doctor::{Finding, Level};
use crate::lines::{Lines, StandardError};

/// Time for writing the last lines of the log when the daemon ends.
const LOG_FLUSH_MAX: Duration = Duration::from_secs(1);

/// Flags that are configuration keys; the other keys are in the file or the environment.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// A YAML file with the configuration.
    #[arg(long, env = "STEAD_CONFIG")]
    config: Option<PathBuf>,
    #[arg(long)]
    data_dir: Option<String>,
    #[arg(long)]
    run_dir: Option<String>,
    /// Address and port of the API.
    #[arg(long)]
    listen: Option<String>,
    /// Address of this host at which ingresses open their ports.
    #[arg(long)]
    ingress_address: Option<String>,
    /// Directory of an unpacked Debian cloud kernel package.
    #[arg(long)]
    kernel_dir: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigVerb {
    /// Print the configuration in force, with the source of each key.
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
    if !rustix::process::geteuid().is_root() {
        let message = "the daemon must be run as root, because it makes network devices, mounts and users of VMMs; \
                       deploy/stead.service has the capabilities that it needs";
        return Err(Failure::Usage(message.to_owned()));
    }
    let passed = Passed::take()?;
    let config = load(serve)?.config;
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log)
        .map_err(|error| Failure::Usage(format!("log: {error}")))?;
    // The log is written by a thread of its own: a reader that stalls must not stop the daemon.
    let log = Lines::new("log", StandardError).map_err(|error| Failure::Other(error.to_string()))?;
    let is_colourful = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(is_colourful).with_writer(log.clone()).init();
    if !crate::allocator::return_large_buffers() {
        tracing::warn!("the allocator may keep memory that is not needed any more");
    }
    let ended = crate::assemble::serve(config, passed).await.map_err(Failure::from);
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

/// The source and destination of a restored backup.
#[derive(Debug, Args)]
pub(crate) struct RestoreBackup {
    /// A file made by `stead backup`.
    backup: PathBuf,
    /// A directory that is empty or does not exist yet.
    #[arg(long)]
    data_dir: PathBuf,
    /// The `keys/seal.key` of the data directory that the backup was made of.
    #[arg(long)]
    seal_key: PathBuf,
}

pub(super) async fn restore_backup(restore: RestoreBackup) -> Result<(), Failure> {
    let RestoreBackup { backup, data_dir, seal_key } = restore;
    let restored = crate::store::backup::restore(&backup, &data_dir, &seal_key).await;
    let summary = restored.map_err(|error| Failure::from(anyhow::Error::from(error)))?;
    super::show::line(&format!(
        "restored {} records of {} into {}",
        summary.records,
        summary.created_at,
        data_dir.display()
    ));
    Ok(())
}

/// Prints the findings; a problem makes the verb fail.
pub(super) async fn doctor(serve: Serve, output: Output) -> Result<(), Failure> {
    let config = load(serve)?.config;
    let findings = crate::doctor::examine(&config).await;
    let rows = || {
        let rows = |finding: &Finding| {
            let level = format!("{:?}", finding.level).to_lowercase();
            let mut rows = vec![vec![level, finding.subject.to_owned(), finding.message.clone()]];
            if !finding.remedy.is_empty() {
                // The remedy is a row of its own: cells have no line breaks.
                rows.push(vec![String::new(), String::new(), format!("-> {}", finding.remedy)]);
            }
            rows
        };
        findings.iter().flat_map(rows).collect()
    };
    super::show::print(&findings, output, &["LEVEL", "SUBJECT", "FOUND"], rows)?;
    let problems = findings.iter().filter(|finding| finding.level == Level::Problem).count();
    match problems {
        0 => Ok(()),
        1 => Err(Failure::Other("1 problem was found".to_owned())),
        more => Err(Failure::Other(format!("{more} problems were found"))),
    }
}
