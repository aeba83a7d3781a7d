//! Random parts of the requests of a scenario's clients.

use super::*;

impl Play {
    pub(super) fn hypervisor(&mut self) -> Hypervisor {
        if self.rng.chance(500) { Hypervisor::Qemu } else { Hypervisor::QemuMicrovm }
    }

    /// Draws a policy with few attempts, because the scenario should settle.
    pub(super) fn restart_policy(&mut self) -> RestartPolicy {
        let when = [RestartWhen::Never, RestartWhen::Never, RestartWhen::OnFailure, RestartWhen::Always];
        RestartPolicy {
            when: when[usize::try_from(self.rng.below(4)).expect("small")],
            backoff: GoDuration(Duration::from_secs(1 + self.rng.below(20))),
            max_attempts: 1 + u32::try_from(self.rng.below(3)).expect("small"),
            ..RestartPolicy::default()
        }
    }

    pub(super) fn health_check(&mut self) -> Option<HealthCheck> {
        // Each of these suits an instance with or without a network.
        let probe = Probe::Exec { command: vec!["check".to_owned()], working_dir: None };
        self.rng.chance(500).then(|| HealthCheck {
            interval: GoDuration(Duration::from_secs(1 + self.rng.below(10))),
            start_period: GoDuration(Duration::from_secs(self.rng.below(30))),
            failure_threshold: 1 + u32::try_from(self.rng.below(3)).expect("small"),
            success_threshold: 1 + u32::try_from(self.rng.below(2)).expect("small"),
            ..HealthCheck::of(probe)
        })
    }

    /// Draws a policy with short times, so that it acts often.
    pub(super) fn auto_standby(&mut self) -> Option<AutoStandbyPolicy> {
        let is_given = self.rng.chance(if self.is_sleepy { 1000 } else { 300 });
        is_given.then(|| AutoStandbyPolicy {
            enabled: self.rng.chance(900),
            idle_timeout: Some(GoDuration(Duration::from_secs(1 + self.rng.below(15)))),
            ignore_source_cidrs: Vec::new(),
            ignore_destination_ports: if self.rng.chance(300) { vec![PORTS[1]] } else { Vec::new() },
            wake_on_traffic: self.rng.chance(600),
        })
    }

    /// Draws limits of the traffic: of the disks, of both directions of the network, of some, or of none.
    pub(super) fn rates(&mut self) -> Rates {
        let mut rate = || self.rng.chance(400).then(|| Rate(self.rng.below(3) << 20));
        Rates { download: rate(), upload: rate(), disk: rate() }
    }

    /// Draws mediated egress with a credential of the variable `KEY`, or none.
    pub(super) fn egress(&mut self) -> Option<EgressSpec> {
        let host: HostPattern = "api.example.com".parse().expect("valid");
        let target = Field {
            header: "authorization".parse().expect("valid"),
            format: "Bearer ${value}".parse().expect("valid"),
        };
        let inject = vec![Injection { hosts: Some(vec![host.clone()]), target }];
        let credential = Credential { source: Source { env: "KEY".to_owned() }, inject };
        self.rng.chance(400).then(|| EgressSpec {
            mode: if self.rng.chance(700) { EgressMode::All } else { EgressMode::HttpHttpsOnly },
            is_observing: self.rng.chance(200),
            allow_hosts: self.rng.chance(300).then(|| vec![host]),
            credentials: BTreeMap::from([("KEY".to_owned(), credential)]),
            authority: CertificateAuthority { certificate: String::new(), key: Secret(String::new()) },
        })
    }

    /// Draws hotplug memory, which one of the hypervisors has not.
    pub(super) fn hotplug(&mut self, hypervisor: Hypervisor) -> Bytes {
        let has_some = self.rng.chance(500) && hypervisor == Hypervisor::Qemu;
        if has_some { Bytes(256 << 20) } else { Bytes(0) }
    }

    /// Draws the part of the hotplug memory that a guest should have, sometimes more than there is.
    pub(super) fn hotplugged(&mut self) -> Option<Bytes> {
        self.rng.chance(300).then(|| Bytes((128 << 20) * self.rng.below(3)))
    }

    /// Draws changes that a running program cannot see, often none.
    pub(super) fn deferred(&mut self) -> Pending {
        let vcpus = self.rng.chance(300).then(|| u32::try_from(self.rng.below(2)).expect("small") + 1);
        let memory = self.rng.chance(300).then(|| Bytes((128 + 128 * self.rng.below(2)) << 20));
        let hypervisor = self.rng.chance(200).then(|| self.hypervisor());
        let hotplug = self.rng.chance(100).then(|| self.hotplug(hypervisor.unwrap_or(Hypervisor::Qemu)));
        // The source of a credential, where there is one, changes at once.
        let value = self.rng.chance(300).then(|| Secret(self.rng.below(1000).to_string()));
        let env = value.map(|value| ("KEY".to_owned(), Some(value))).into_iter().collect();
        Pending { vcpus, memory, hotplug, hypervisor, env, ..Pending::default() }
    }

    /// Draws a new name of an instance, which another may have.
    pub(super) fn new_name(&mut self) -> Option<Name> {
        let is_given = self.rng.chance(200);
        is_given.then(|| Name::resource(&format!("i{}", self.rng.below(4))).expect("valid"))
    }

    /// Draws another image, perhaps one that does not exist, or the present one anew.
    pub(super) fn image(&mut self) -> Option<ImageAsked> {
        let is_given = self.rng.chance(300);
        is_given.then(|| ImageAsked {
            reference: self.rng.chance(800).then(|| reference(IMAGES[self.play_count(3) as usize])),
            platform: None,
            pulls_always: self.rng.chance(300),
        })
    }

    /// Takes memory back from instances for some seconds.
    pub(super) async fn reclaim(&mut self) {
        let (bytes, held) = (self.rng.below(1 << 30), Duration::from_secs(1 + self.rng.below(60)));
        self.log.push(format!("reclaim {bytes} for {held:?}"));
        let reclaim = move |tx: &mut Tx<'_>| admission::reclaim(tx, bytes, held);
        let _ = self.daemon.store.transact(reclaim).await;
    }

    pub(super) fn compression(&mut self) -> Option<Compression> {
        self.rng.chance(500).then_some(Compression { algorithm: Algorithm::Zstd, level: 1 })
    }

    pub(super) fn target(&mut self) -> Option<Power> {
        let targets = [None, Some(Power::Running), Some(Power::Standby), Some(Power::Stopped)];
        targets[usize::try_from(self.rng.below(4)).expect("small")]
    }

    /// Draws a live instance that is in no pool.
    pub(crate) fn pick(&mut self) -> Option<Uid> {
        let instances = self.daemon.store.list::<Instance>();
        let live: Vec<Uid> = instances
            .iter()
            .filter(|one| !one.meta.is_deleting() && !one.is_pooled())
            .map(|one| one.meta.uid.clone())
            .collect();
        let at = usize::try_from(self.rng.below(live.len() as u64)).expect("small");
        live.get(at).cloned()
    }
}
