//! Connections of a scenario's clients: those that keep an instance up, and those that wake it.

use super::*;

impl Play {
    /// Connects to an instance, running or not.
    pub(super) fn connect(&mut self) {
        let Some(uid) = self.pick() else { return };
        let port = PORTS[usize::try_from(self.rng.below(2)).expect("small")];
        let lasts = Duration::from_secs(self.rng.below(30));
        self.log.push(format!("connect to {port} of {uid} for {lasts:?}"));
        if let Some(address) = self.address(&uid) {
            self.world.connect(address, port, lasts);
        }
    }

    pub(super) fn address(&self, uid: &Uid) -> Option<Ipv4Addr> {
        let instance = self.daemon.store.get::<Instance>(uid)?;
        let nic = self.daemon.store.get::<Nic>(instance.spec.allocated.nic.as_ref()?)?;
        Some(nic.spec.address)
    }

    /// Checks that no VM entered standby by itself despite a connection that its policy counts.
    pub(super) fn nobody_was_slept_on(&self) {
        for SleptOn { owner, standby, port } in self.world.slept_on() {
            let instance = self.daemon.store.get::<Instance>(&owner);
            let policy = instance.and_then(|instance| instance.spec.auto_standby.clone());
            let counts = policy.is_some_and(|policy| !policy.ignore_destination_ports.contains(&port));
            let is_broken = counts && !self.asked.contains(&(owner.clone(), standby));
            assert!(!is_broken, "{owner} was put to standby over a connection\n{}", self.log.join("\n"));
        }
    }

    /// Checks that the first packet of a connection wakes each instance in standby that it should wake.
    pub(super) async fn wake_all(&mut self) -> Result<(), String> {
        let host = self.world.snapshot();
        let asleep = self.daemon.store.list::<Instance>().into_iter().filter(|instance| {
            let policy = instance.spec.auto_standby.as_ref();
            let is_waking = policy.is_some_and(AutoStandbyPolicy::is_waking);
            // Without its image the instance stays as it is, despite the connection.
            let digest = instance.status.image_digest.as_ref();
            let has_image = digest.is_some_and(|digest| host.images.contains(digest));
            instance.status.state == State::Standby && is_waking && has_image
        });
        let asleep: Vec<Uid> = asleep.map(|instance| instance.meta.uid.clone()).collect();
        let mut all_pending = Vec::new();
        for uid in asleep {
            let Some(address) = self.address(&uid) else { continue };
            self.log.push(format!("wake {uid}"));
            all_pending.push((uid, self.world.connect(address, PORTS[0], Duration::from_secs(5))));
        }
        sleep(Duration::from_millis(900)).await; // A client would repeat its packet later: it is kept, not lost.
        for (uid, number) in all_pending {
            // The instance's time may have just ended.
            let Some(instance) = self.daemon.store.get::<Instance>(&uid) else { continue };
            let wanted = (instance.spec.power, instance.spec.power_by);
            let is_woken = self.world.is_let_in(number) && wanted == (Power::Running, PowerCause::Traffic);
            // An unhealthy instance is restarted at once.
            let is_ill = instance.status.restart.last_reason.is_some();
            if !is_woken && !instance.meta.is_deleting() && !is_ill {
                return Err(format!("{uid} was not woken: {instance:?}\n{}", self.log.join("\n")));
            }
        }
        Ok(())
    }
}
