//! The port `Guests`: requests to the agents of VMs on their control channels.

use stead_controllers::host::{GuestPhase, Guests, HostError, HostErrorKind};
use stead_schemas::guest::{Config, Frame, NewIdentity, Seed, ToGuest, VolumeMount};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::hypervisors::Hypervisors;
use crate::guest_channel::random;

/// Size of a random seed, in bytes: that of the guest's pool.
const SEED_BYTES: usize = 32;

impl Guests for Hypervisors {
    async fn configure(&self, owner: &Uid, config: &Config) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let token = attached.channel.token();
        let failed = |error| HostError::io("configure the guest of", owner.as_str(), error);
        let seed = Seed(random::<SEED_BYTES>().map_err(failed)?.to_vec());
        let request = ToGuest::Configure { token, seed, config: Box::new(config.clone()) };
        // The channel would drop it again and again.
        if let Err(too_large) = Frame::control(&request) {
            let error = HostError::new(HostErrorKind::Permanent, "configure the guest of", owner.as_str());
            return Err(error.because(format!("its command and environment are too long: {too_large}")));
        }
        let asked = attached.channel.ask(request, |view| view.phase = view.phase.max(GuestPhase::Configured));
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "configure the guest of", owner.as_str()).because(why)
        })
    }

    async fn take_identity(&self, owner: &Uid, identity: &NewIdentity) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "name the guest of", owner.as_str()).because(why)
        };
        let seed = Seed(random::<SEED_BYTES>().map_err(|error| failed(error.to_string()))?.to_vec());
        // Recorded before it is sent: this daemon may end in between, or the guest's answer may be lost.
        let new_token = attached.channel.tokens().begin(&identity.incarnation)?;
        let token = attached.channel.token();
        let request = ToGuest::Identity { token, new_token, seed, identity: Box::new(identity.clone()) };
        let sent = Some(identity.incarnation.clone());
        attached.channel.ask(request, |view| view.identity_sent = sent).map_err(failed)
    }

    async fn resize_memory(&self, owner: &Uid, hotplugged: Bytes) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let token = attached.channel.token();
        let request = ToGuest::Memory { token, hotplugged_bytes: hotplugged.0 };
        let asked = attached.channel.ask(request, |view| view.memory_asked = Some(hotplugged));
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "resize the memory of", owner.as_str()).because(why)
        })
    }

    async fn mount_volumes(&self, owner: &Uid, volumes: &[VolumeMount]) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let request = ToGuest::Volumes { token: attached.channel.token(), volumes: volumes.to_vec() };
        let asked = attached.channel.ask(request, |view| view.volumes_asked = Some(volumes.to_vec()));
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "mount volumes in the guest of", owner.as_str())
                .because(why)
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
}
