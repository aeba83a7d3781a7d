//! Verbs on mediated egress: the process that carries it, which the daemon starts.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use stead_egress::{ProcessArguments, SocketNumbers, run};

use super::Failure;

#[derive(Debug, Subcommand)]
pub(crate) enum EgressVerb {
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
