//! Admission of policies. Only the admission of network cards makes them.

use std::net::Ipv4Addr;

use stead_schemas::mediation::{Mediation, MediationSpec};
use stead_schemas::meta::{Kind, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::network::Nic;
use stead_schemas::references::Ref;

use crate::mediator::admission as mediators;
use crate::refused::Refused;
use crate::store::{New, Tx};

/// Stores the policy of an instance's card, whose guest has this address.
pub(crate) fn create(tx: &mut Tx<'_>, instance: &Uid, nic: &Uid, address: Ipv4Addr) -> Result<(), Refused> {
    let mediator = mediators::local(tx)?;
    let uid = tx.next_uid();
    let spec = MediationSpec { instance: instance.clone(), nic: nic.clone(), mediator, address };
    let owner = Some(OwnerRef { kind: Nic::NAME.to_owned(), uid: nic.clone() });
    tx.create::<Mediation>(New { name: Name::from(&uid), uid: Some(uid), tags: Tags::new(), owner, spec })?;
    Ok(())
}

/// Requests the deletion of the policy of a card, if it has one.
pub(crate) fn remove(tx: &mut Tx<'_>, nic: &Uid) -> Result<(), Refused> {
    for mediation in tx.referring::<Mediation>(&Ref::to_owner(nic)) {
        if !mediation.meta.is_deleting() {
            tx.request_deletion::<Mediation>(&mediation.meta.uid)?;
        }
    }
    Ok(())
}
