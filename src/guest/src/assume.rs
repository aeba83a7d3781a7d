//! Takes over the identity of another instance: the steps of a guest that continues from another guest's memory.
//!
//! Programs keep running meanwhile. Random numbers come first, because keys are made of them.

use stead_schemas::guest::{Assumed, Config, Seed};

use crate::children::Children;
use crate::{BootError, host_keys, identity, network, root};

/// Takes over hostname, addresses and keys. A guest that returns to its own snapshot keeps its keys, because its
/// clients know it by them.
pub(crate) fn assume(
    old: &Config,
    assumed: &Assumed,
    seed: &Seed,
    children: &Children,
) -> Result<(), BootError> {
    // A kernel that refuses has its own random numbers.
    let _ = identity::credit_entropy(&seed.0);
    rustix::system::sethostname(assumed.hostname.as_bytes())
        .map_err(|error| BootError::new("hostname", error))?;
    if let Some(new) = &assumed.network {
        network::replace(old.network.as_ref(), new)?;
    }
    root::write_names("", &assumed.hostname, assumed.network.as_ref())?;
    identity::set_machine_id(&assumed.machine_id).map_err(|error| BootError::new("machine id", error))?;
    if assumed.instance == old.instance {
        return Ok(());
    }
    host_keys::settle_in_another(&assumed.instance, children)
        .map_err(|error| BootError::new("ssh host keys", error))
}
