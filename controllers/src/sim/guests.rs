//! Requests to simulated guests, which take effect in virtual time.

use stead_schemas::guest::{Config, MountedVolumes, NewIdentity, VolumeMount};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::World;
use super::program::Program;
use super::vmms::{POWER_OFF, START, STOP};
use crate::host::{GuestMemory, Guests, HostError};

impl Guests for World {
    async fn configure(&self, owner: &Uid, config: &Config) -> Result<(), HostError> {
        let now = self.time();
        let program = Program::of(&config.argv);
        self.on_vmm("configure", owner, |vmm| {
            let now = vmm.time(now);
            vmm.configured_at.get_or_insert(now);
            vmm.program = program;
            vmm.incarnation = Some(config.incarnation.clone());
            let hotplug = Bytes(config.hotplug_bytes);
            vmm.memory = (hotplug > Bytes(0)).then_some(GuestMemory {
                target: None,
                used: hotplug,
                error: None,
                unused: Vec::new(),
                change: 0,
            });
            let mounted = config.volumes.clone();
            let volumes = MountedVolumes {
                requested: mounted.clone(),
                mounted,
                fills_disks: true,
                ..MountedVolumes::default()
            };
            vmm.volumes.get_or_insert(volumes);
            Ok(())
        })
        .await?;
        self.announce_in(owner, START);
        if let Program::Ends { after, .. } = program {
            self.announce_in(owner, START + after);
        }
        Ok(())
    }

    async fn take_identity(&self, owner: &Uid, identity: &NewIdentity) -> Result<(), HostError> {
        self.on_vmm("assume", owner, |vmm| {
            vmm.incarnation = Some(identity.incarnation.clone());
            Ok(())
        })
        .await
    }

    async fn resize_memory(&self, owner: &Uid, hotplugged: Bytes) -> Result<(), HostError> {
        self.on_vmm("resize the memory of", owner, |vmm| {
            if let Some(memory) = &mut vmm.memory {
                let is_less = hotplugged < memory.used;
                (memory.target, memory.used) = (Some(hotplugged), hotplugged);
                memory.change += 1;
                // What a saved file backs belongs to others too.
                vmm.has_unused_memory = is_less && !vmm.is_restored;
            }
            Ok(())
        })
        .await
    }

    async fn mount_volumes(&self, owner: &Uid, volumes: &[VolumeMount]) -> Result<(), HostError> {
        self.on_vmm("mount volumes in", owner, |vmm| {
            let (requested, mounted) = (volumes.to_vec(), volumes.to_vec());
            vmm.volumes =
                Some(MountedVolumes { requested, mounted, fills_disks: true, ..MountedVolumes::default() });
            Ok(())
        })
        .await
    }

    async fn shutdown(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        self.on_vmm("shut down", owner, |vmm| {
            let now = vmm.time(now);
            vmm.shutdown_at.get_or_insert(now);
            Ok(())
        })
        .await?;
        self.announce_in(owner, STOP);
        Ok(())
    }

    async fn acknowledge_exit(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        self.on_vmm("acknowledge exit", owner, |vmm| {
            let now = vmm.time(now);
            vmm.acknowledged_at.get_or_insert(now);
            Ok(())
        })
        .await?;
        self.announce_in(owner, POWER_OFF);
        Ok(())
    }
}
