//! Admission of the mediator, which is made from the configuration.

use stead_schemas::egress::MediatorSettings;
use stead_schemas::mediation::{Mediator, MediatorSpec};
use stead_schemas::meta::Tags;
use stead_schemas::names::{Name, Uid};

use crate::refused::Refused;
use crate::store::{New, Tx};

/// Name of the only mediator of a host.
pub const LOCAL: &str = "local";

/// Stores the settings of the mediator. A process that runs with others is replaced.
///
/// # Errors
/// Returns the refusal of the store.
pub fn declare(tx: &mut Tx<'_>, settings: MediatorSettings) -> Result<(), Refused> {
    let name = name()?;
    let spec = MediatorSpec { settings };
    match tx.find::<Mediator>(&name) {
        Some(there) => drop(tx.update_spec::<Mediator>(&there.meta.uid, None, |old| *old = spec)?),
        None => drop(tx.create::<Mediator>(New { uid: None, name, tags: Tags::new(), owner: None, spec })?),
    }
    Ok(())
}

/// Returns the mediator of this host.
///
/// # Errors
/// Returns a refusal if none is declared.
pub(crate) fn local(tx: &Tx<'_>) -> Result<Uid, Refused> {
    let mediator = tx.find::<Mediator>(&name()?);
    let mediator = mediator.ok_or_else(|| Refused::conflict("this host has no mediator of egress"))?;
    Ok(mediator.meta.uid.clone())
}

fn name() -> Result<Name, Refused> {
    Name::resource(LOCAL).map_err(|error| Refused::conflict(error.to_string()))
}
