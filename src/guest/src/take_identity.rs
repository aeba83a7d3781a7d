//! Takes over the identity of another instance: the steps of a guest that continues from another guest's memory.
//!
//! Programs keep running meanwhile. Random numbers come first, because keys are made of them.

use stead_schemas::guest::{Config, NewIdentity, Seed};

use crate::children::Children;
use crate::{BootError, host_keys, identity, network, root};

/// Takes over hostname, addresses and keys. A guest that returns to its own snapshot keeps its keys, because its
/// clients know it by them.
pub(crate) fn apply(
    old: &Config,
    identity: &NewIdentity,
    seed: &Seed,
    children: &Children,
) -> Result<(), BootError> {
    // A kernel that refuses has its own random numbers.
    let _ = identity::credit_entropy(&seed.0);
    rustix::system::sethostname(identity.hostname.as_bytes())
        .map_err(|error| BootError::new("hostname", error))?;
    if let Some(new) = &identity.network {
        network::replace(old.network.as_ref(), new)?;
    }
    root::write_names("", &identity.hostname, identity.network.as_ref())?;
    identity::set_machine_id(&identity.machine_id).map_err(|error| BootError::new("machine id", error))?;
    if identity.instance == old.instance {
        return Ok(());
    }
    host_keys::settle_in_another(&identity.instance, children)
        .map_err(|error| BootError::new("ssh host keys", error))
}
