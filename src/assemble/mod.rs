//! The only folder that knows every concrete type: it builds the daemon out of its parts and runs it.
//!
//! Order: data directory (lock, key, database) -> store -> adapters -> reconcilers -> monitors -> API. Start
//! and stop do not touch VMs: a new daemon finds them by observation.

mod backend;
mod backups;
mod descriptors;
mod facts;
mod host;
mod listeners;
mod monitors;
mod node;
mod ports;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use stead_controllers::daemon::{Controllers, Drifts, Settings};
use stead_controllers::kinds;
use stead_controllers::mediator;
use stead_controllers::network::admission;
use stead_controllers::refused::Refused;
use stead_controllers::store::{Store, TransactError, Tx};
use stead_schemas::instance::Hypervisor;
use stead_schemas::limits::{CLIENT_STALL_MAX, STREAM_IDLE_MAX};
use stead_schemas::network::{GuestReach, NetworkSpec, Resolver};
use tokio::sync::watch;

use self::backend::HostBackend;
use self::host::Host;
use self::listeners::Opened;
pub use self::listeners::Passed;
use crate::api::{self, ApiConfig, ApiState, Audit, ServerLimits};
use crate::config::Config;
use crate::failpoint;
use crate::host::journal::Journals;
use crate::host::pressure;
use crate::hypervisor::Drivers;
use crate::mediation;
use crate::signals::{ended, terminated};
use crate::store::{
    DirectoryLock, SystemClock, close, close_new_files, identity, lock_run_directory, mark, open,
    private_directory,
};

/// Time for a request's head; a client on a slow line needs a second.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The hypervisor of instances that name none.
const DEFAULT_HYPERVISOR: Hypervisor = Hypervisor::Qemu;
/// Time for open requests at shutdown; verbs that wait are cut, and their specs are stored.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);
/// Time between two pings to a client of exec or cp; one that vanished without a close is noticed after a few.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Time for which such a client may be silent: it misses three pings.
const SILENCE_MAX: Duration = Duration::from_secs(70);
/// Time for which a client that sends a file may be silent: it may wait for its own disk.
const SENDER_SILENCE_MAX: Duration = Duration::from_secs(300);

/// Directories in the data directory whose files may be open to other users, because earlier releases made them with
/// the umask that they were started with. Keys are not among them: a key that was open may be known, so it is refused.
const ONCE_OPEN: [&str; 4] = ["audit", "db", "images", "logs"];

/// A holder of the runners' drift reports, which is filled later: the adapters that report drift are made
/// before the runners.
#[derive(Clone, Default)]
struct Reports(Arc<OnceLock<Drifts>>);

impl Reports {
    fn report(&self, report: impl FnOnce(&Drifts)) {
        // No report is lost before the runners exist: they begin by observing all objects.
        if let Some(drifts) = self.0.get() {
            report(drifts);
        }
    }
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// Fails when a part cannot be built; the error chain names the part and the reason.
pub async fn serve(config: Config, passed: Passed) -> anyhow::Result<()> {
    close_new_files();
    hide_memory();
    descriptors::raise();
    identity::check(&config.data_dir, &config.run_dir).context("refused to start beside living VMs")?;
    let directory = open(&config.data_dir, kinds()).context("cannot open the store")?;
    let _run_lock = own_directories(&config)?;
    identity::record(&config.data_dir, &config.run_dir).context("cannot record the store's identity")?;
    let (store, _lock) = (directory.store, directory.lock);
    let (end, ending) = watch::channel(false);
    let writer = tokio::spawn(directory.writer.run(ended(ending.clone())));
    declare_network(&store, &config).await?;
    node::declare(&store, &config).await;
    mark::keep(config.data_dir.clone(), store.clone()).await;

    let reports = Reports::default();
    let drivers = Drivers::built_in(&config.programs(), config.accelerator.accelerator());
    let hypervisors = drivers.probe().await;
    // The journals are kept beside the consoles' logs, and removed with them.
    let journals = Arc::new(Journals::new(config.data_dir.join("logs")).context("cannot write logs")?);
    let host = Host::build(&config, &reports, &store, journals.clone(), drivers, hypervisors)?;
    let settings = Settings {
        store: store.clone(),
        clock: Arc::new(SystemClock),
        boundary: failpoint::boundary(config.failpoint.as_deref())?,
        journal: journals.clone(),
        resync: config.resync(),
        seed: u64::from(std::process::id()),
        tap_prefix: config.tap_prefix.clone(),
    };
    let backend = HostBackend::new(&host, &config, store.clone());
    let for_monitors = store.clone();
    let (controllers, drifts) = Controllers::new(&host.ports, &settings);
    // The reports are set only here, once.
    let _ = reports.0.set(drifts);
    let (stop_controllers, stopping) = watch::channel(false);
    let controllers = tokio::spawn(controllers.run(stopping));
    host.monitor(&config, &reports, &for_monitors)?;
    node::observed(&for_monitors).await;
    if config.reclaim_on_pressure {
        // It ends with the runtime.
        tokio::spawn(stead_controllers::pressure::relieve(store.clone(), pressure::read));
    }

    let audit = Audit::open(&config.data_dir).context("cannot open the audit log")?;
    serve_api(&config, store, backend, audit.clone(), passed).await?;
    let _ = tokio::task::spawn_blocking(move || audit.flush()).await;
    // The passes end first, then the store that they write to.
    let _ = stop_controllers.send(true);
    controllers.await.context("the controllers failed")?;
    let _ = end.send(true);
    writer.await.context("the store's writer failed")?;
    journals.flush(SHUTDOWN_GRACE);
    tracing::info!("ended; VMs run on");
    Ok(())
}

/// Keeps the memory of this process, which has the keys, out of core dumps and from other processes of its user. It
/// stays readable for processes with CAP_SYS_PTRACE.
fn hide_memory() {
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "a core dump of this process would contain the keys");
    }
}

/// Removes the rights of other users from the directories of this daemon, and locks the run directory. The data
/// directory itself is private already.
fn own_directories(config: &Config) -> anyhow::Result<Option<DirectoryLock>> {
    private_directory(&config.run_dir).context("cannot use the run directory")?;
    let is_shared = config.run_dir == config.data_dir;
    let lock = if is_shared { None } else { Some(lock_run_directory(&config.run_dir)) };
    let lock = lock.transpose().context("cannot use the run directory")?;
    for (directory, inner) in [(&config.data_dir, &ONCE_OPEN[..]), (&config.run_dir, &[])] {
        match close(directory, inner).context("cannot remove the rights of other users")? {
            0 => {}
            count => tracing::warn!(
                directory = %directory.display(),
                count,
                "files and directories were open to other users, and are not any more"
            ),
        }
    }
    Ok(lock)
}

/// Serves the API until SIGTERM or SIGINT.
async fn serve_api(
    config: &Config,
    store: Store,
    backend: HostBackend,
    audit: Audit,
    passed: Passed,
) -> anyhow::Result<()> {
    let keys = api::tokens::load(&config.data_dir).context("cannot read the token keys")?;
    tokio::spawn(api::tokens::follow(config.data_dir.clone(), keys.clone()));
    let state = ApiState::new(ApiConfig {
        store,
        keys,
        backend: Arc::new(backend),
        tap_prefix: config.tap_prefix.clone(),
        requests_max: config.requests_max,
        sockets_max: config.sockets_max,
        shows_secrets: config.show_secrets,
        requires_permissions: config.require_permissions,
        audit,
    });
    let Opened { listeners, file } = listeners::open(config, passed).await?;
    let limits = ServerLimits {
        connections_max: config.connections_max,
        connections_per_client_max: config.connections_per_client_max,
        stall_max: CLIENT_STALL_MAX,
        header_timeout: HEADER_TIMEOUT,
        grace: SHUTDOWN_GRACE,
        stream_idle_max: STREAM_IDLE_MAX,
        ping_interval: PING_INTERVAL,
        silence_max: SILENCE_MAX,
        sender_silence_max: SENDER_SILENCE_MAX,
    };
    api::serve(listeners, api::router(state), limits, terminated()).await?;
    drop(file);
    Ok(())
}

fn unrefused(error: TransactError<Refused>) -> anyhow::Error {
    match error {
        TransactError::Refused(refused) => anyhow::anyhow!(refused),
        TransactError::Store(error) => anyhow::anyhow!(error),
    }
}

async fn declare_network(store: &Store, config: &Config) -> anyhow::Result<()> {
    let spec = NetworkSpec {
        bridge: config.bridge.clone(),
        gateway: config.gateway,
        dns: config.dns.clone(),
        table: config.table.clone(),
        reach: GuestReach {
            host_ports: config.guest_host_ports.clone(),
            networks: config.guest_networks.clone(),
        },
        resolver: Resolver { search: config.dns_search.clone(), options: config.dns_options.clone() },
        mtu: config.guest_mtu,
        mediator: mediation::gate(config),
    };
    let settings = mediation::settings(config);
    let declare = move |tx: &mut Tx<'_>| {
        admission::declare_network(tx, spec)?;
        mediator::admission::declare(tx, settings)
    };
    let declared = store.transact(declare).await;
    declared.map_err(unrefused).context("cannot declare the network")
}
