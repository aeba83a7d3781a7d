//! The port `Machines`: VMs of this host, whatever their driver.
//!
//! Guarantees: a VMM has a session of its own and outlives the daemon. It is found again by its runtime
//! directory, and its process by pid, start time and boot id. `inspect` reports the present state, from the
//! kernel, from the VMM and from the guest.
//! Cancel/crash: `launch` writes its record before it spawns; a process that was spawned and not
//! recorded is found by its command line.

use std::time::Duration;

use stead_controllers::host::{
    AdoptPlan, GuestPhase, HostError, HostErrorKind, LaunchPlan, Machine, Machines, Memory, VmmState,
};
use stead_schemas::compression::Compression;
use stead_schemas::guest::{self, Seed, ToGuest};
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::numbers::StandbyNo;

use super::hypervisors::Hypervisors;
use super::process;
use super::record::Record;
use super::save::on_thread;
use super::taps::{check_tap, has_tap};
use crate::guest_channel::{clock, random, silent};
use crate::host::directories::{remove_dir, uids_in};
use crate::host::kernel::Kernel;
use crate::host::process::Identity;

/// Size of a random seed, in bytes: that of the guest's pool.
const SEED_BYTES: usize = 32;
/// Time limit for a guest's first answer, which takes milliseconds. Without an answer the guest is reported as
/// booting.
const FIRST_ANSWER_WAIT: Duration = Duration::from_millis(500);

impl Hypervisors {
    /// Observes a VM whose process lives.
    async fn inspect_live(
        &self,
        owner: &Uid,
        record: &Record,
        identity: &Identity,
        machine: &mut Machine,
    ) -> Result<(), HostError> {
        machine.pid = Some(identity.pid);
        let Some(choice) = self.config.drivers.by_record(record.machine_type.as_deref()) else {
            let name = record.machine_type.as_deref().unwrap_or_default();
            machine.vmm = VmmState::Unreachable(format!("no driver has the machine type {name}"));
            return Ok(());
        };
        let (attached, is_new) = self.attach(owner, &choice, record, identity)?;
        if is_new {
            process::enter_group(&self.config.cgroups, owner, identity);
            // The guest of an earlier daemon's VM answers at once, or still boots.
            attached.channel.first_answer(FIRST_ANSWER_WAIT).await;
        }
        machine.listening_since = attached.since;
        machine.vmm = self.vmm_state(owner, &attached).await;
        machine.guest = attached.channel.judged(machine.vmm == VmmState::Running);
        let has_network = record.tap.as_ref().map_or(Ok(true), |tap| has_tap(identity.pid, tap.as_str()));
        let failed = |error| HostError::io("observe the network of", owner.as_str(), error);
        machine.is_network_cut = !has_network.map_err(failed)?;
        Ok(())
    }
}

impl Machines for Hypervisors {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        let mut owners = uids_in(&self.config.run_dir.join("vm"))?;
        owners.extend(uids_in(&self.config.data_dir.join("logs"))?);
        owners.extend(uids_in(&self.config.data_dir.join("memory"))?);
        owners.sort();
        owners.dedup();
        Ok(owners)
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<Machine>, HostError> {
        let paths = self.paths(owner);
        let Some(record) = Record::read(&paths)? else {
            self.lock().remove(owner);
            return Ok(None);
        };
        let drivers = &self.config.drivers;
        // A VM without a driver can still be ended; any hypervisor will do for what is shown of it.
        let choice = drivers.by_record(record.machine_type.as_deref()).or_else(|| drivers.by_record(None));
        let unsupported = || HostError::new(HostErrorKind::Unsupported, "inspect the VM of", owner.as_str());
        let mut machine = Machine {
            owner: owner.clone(),
            run: record.run,
            hypervisor: choice.ok_or_else(unsupported)?.machine_type.hypervisor,
            vmm: VmmState::Dead,
            pid: None,
            launch: record.launch,
            launched_at: record.launched_at,
            listening_since: record.launched_at,
            is_network_cut: false,
            has_headers: record.kernel_files.as_deref().is_some_and(Kernel::has_headers),
            guest: silent(),
        };
        if let Some(identity) = self.find_process(&record, &paths)? {
            self.inspect_live(owner, &record, &identity, &mut machine).await?;
        } else if let Some(attached) = self.lock().get(owner) {
            // The last state of the guest of a VMM that just died is still true.
            machine.guest = attached.channel.view();
        }
        Ok(Some(machine))
    }

    async fn has_records(&self, owner: &Uid) -> Result<bool, HostError> {
        let logs = self.paths(owner).logs().to_owned();
        logs.try_exists().map_err(|error| HostError::io("observe", logs.display().to_string(), error))
    }

    async fn launch(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let _lock = self.locks.take(&plan.owner).await;
        self.launch_fresh(plan).await
    }

    async fn pause(&self, owner: &Uid) -> Result<(), HostError> {
        let _lock = self.locks.take(owner).await;
        let attached = self.find_attached(owner)?;
        let paused = self.on_session(&attached, async |session| session.pause().await).await;
        paused.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "pause the VM of", owner.as_str()).because(why)
        })
    }

    async fn memory(&self, owner: &Uid) -> Result<Option<Memory>, HostError> {
        self.observe_memory(owner)
    }

    async fn compress_memory(&self, owner: &Uid, how: Compression) -> Result<(), HostError> {
        self.compressor.begin(owner, self.memory_dir(owner), how)
    }

    async fn save(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError> {
        let _lock = self.locks.take(owner).await;
        self.save_memory(owner, standby).await
    }

    async fn restore(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let _lock = self.locks.take(&plan.owner).await;
        self.compressor.end(&plan.owner).await;
        self.launch_saved(plan).await
    }

    async fn discard_memory(&self, owner: &Uid) -> Result<(), HostError> {
        self.compressor.end(owner).await;
        self.forget_verified(owner);
        let (memory, paths) = (self.memory_dir(owner), self.paths(owner));
        let discard = move || match Record::read(&paths)? {
            Some(record) => memory.consume(record.mapped_inode()),
            None => memory.discard(),
        };
        on_thread(owner, discard).await
    }

    async fn adopt_memory(&self, plan: &AdoptPlan) -> Result<(), HostError> {
        self.adopt(plan).await
    }

    async fn assume(&self, owner: &Uid, assumed: &guest::Assumed) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "name the guest of", owner.as_str()).because(why)
        };
        let seed = Seed(random::<SEED_BYTES>().map_err(|error| failed(error.to_string()))?.to_vec());
        // Recorded before it is sent: this daemon may end in between, or the guest's answer may be lost.
        let new_token = attached.channel.tokens().begin(&assumed.incarnation)?;
        let token = attached.channel.token();
        let request = ToGuest::Assume { token, new_token, seed, assumed: Box::new(assumed.clone()) };
        let sent = Some(assumed.incarnation.clone());
        attached.channel.ask(request, |view| view.identity_told = sent).map_err(failed)
    }

    async fn configure(&self, owner: &Uid, config: &guest::Config) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let token = attached.channel.token();
        let failed = |error| HostError::io("configure the guest of", owner.as_str(), error);
        let seed = Seed(random::<SEED_BYTES>().map_err(failed)?.to_vec());
        let request = ToGuest::Configure { token, seed, config: Box::new(config.clone()) };
        // The channel would drop it again and again.
        if let Err(too_large) = guest::Frame::control(&request) {
            let error = HostError::new(HostErrorKind::Permanent, "configure the guest of", owner.as_str());
            return Err(error.because(format!("its command and environment are too long: {too_large}")));
        }
        let asked = attached.channel.ask(request, |view| view.phase = view.phase.max(GuestPhase::Configured));
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "configure the guest of", owner.as_str()).because(why)
        })
    }

    async fn shutdown(&self, owner: &Uid) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let request = ToGuest::Shutdown { token: attached.channel.token() };
        let asked = attached.channel.ask(request, |view| view.is_shutdown_requested = true);
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "shut down the guest of", owner.as_str()).because(why)
        })
    }

    async fn acknowledge_exit(&self, owner: &Uid) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let request = ToGuest::AcknowledgeExit { token: attached.channel.token() };
        let asked = attached.channel.ask(request, |view| view.is_exit_acknowledged = true);
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "answer the guest of", owner.as_str()).because(why)
        })
    }

    async fn reconnect(&self, owner: &Uid, tap: &LinkName) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        Self::require(owner, &attached.choice, |has| has.replace_tap, "reconnect the VM of")?;
        check_tap(tap)?;
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "reconnect the VM of", owner.as_str()).because(why)
        };
        self.on_session(&attached, async |session| session.replace_tap(tap).await).await.map_err(failed)
    }

    async fn resume(&self, owner: &Uid) -> Result<(), HostError> {
        let _lock = self.locks.take(owner).await;
        let attached = self.find_attached(owner)?;
        let refused = |kind| HostError::new(kind, "resume the VM of", owner.as_str());
        if matches!(self.memory_dir(owner).observe()?, Some(Memory::Saved(_))) {
            return Err(refused(HostErrorKind::Conflict).because("its memory is saved"));
        }
        let resumed = self.on_session(&attached, async |session| session.resume().await).await;
        resumed.map_err(|why| refused(HostErrorKind::Transient).because(why))?;
        attached.channel.forgive();
        // The guest's clock stood still. A channel that is full is reconnected, which sends the time again.
        let _ = attached.channel.ask(clock(), |_| {});
        Ok(())
    }

    async fn kill(&self, owner: &Uid) -> Result<(), HostError> {
        let paths = self.paths(owner);
        let Some(record) = Record::read(&paths)? else { return Ok(()) };
        match self.find_process(&record, &paths)? {
            Some(identity) => identity.kill().await,
            None => Ok(()),
        }
    }

    async fn release(&self, owner: &Uid) -> Result<(), HostError> {
        let paths = self.paths(owner);
        let record = Record::read(&paths)?;
        if record.map_or(Ok(None), |record| self.find_process(&record, &paths))?.is_some() {
            return Err(HostError::new(HostErrorKind::Conflict, "release the living VM of", owner.as_str()));
        }
        self.lock().remove(owner);
        let (config, memory, name) = (self.config.clone(), self.memory_dir(owner), owner.clone());
        let release = move || {
            let failed = |error| HostError::io("release the VM of", name.as_str(), error);
            config.cgroups.remove(name.as_str()).map_err(failed)?;
            memory.forget_running()?;
            remove_dir(paths.runtime()).map_err(failed)
        };
        on_thread(owner, release).await
    }

    async fn discard_records(&self, owner: &Uid) -> Result<(), HostError> {
        let (logs, name) = (self.paths(owner).logs().to_owned(), owner.clone());
        let failed = move |error| HostError::io("discard the logs of", name.as_str(), error);
        on_thread(owner, move || remove_dir(&logs).map_err(failed)).await
    }
}
