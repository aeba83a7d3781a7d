//! Changes of an instance's network: its card, and the limits of its traffic.

use stead_schemas::api::{BandwidthAsked, NetworkAsked};
use stead_schemas::instance::{CardChange, Instance, InstanceSpec, Rates};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::network::Nic;

use super::owner;
use crate::nic::admission::{self as nics, TapForm};
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;

/// Carries out a request on the network of an instance whose spec will be `next` after its next start. Returns the
/// rates that the instance has then, and the change of its card that waits for that start. A new card has its addresses
/// from now on; a card that is not wanted any more, and that the instance never had, is removed.
///
/// # Errors
/// Returns `InvalidDownload` or `InvalidUpload` without a network, and `NoRoom`.
pub(super) fn change(
    tx: &mut Tx<'_>,
    object: &Object<Instance>,
    next: &InstanceSpec,
    asked: NetworkAsked,
    tap_prefix: &str,
) -> Result<(Rates, Option<CardChange>), Refused> {
    let (uid, spec) = (&object.meta.uid, &object.spec);
    let (nic, pending) = (spec.allocated.nic.as_ref(), spec.pending.card.clone());
    let is_added = matches!(pending, Some(CardChange::Add(_)));
    let will_have = asked.enabled.unwrap_or(is_added);
    let mut rates = change_limits(tx, spec, asked.bandwidth, will_have)?;
    let card = match (asked.enabled, nic, pending) {
        (None, _, pending) => pending,
        (Some(true), Some(_), _) | (Some(false), None, None) => None,
        (Some(true), None, Some(pending)) => Some(pending),
        (Some(true), None, None) => {
            let form =
                TapForm::new(tx, tap_prefix, next.hypervisor, next.vcpus, &rates, next.egress.as_ref())?;
            Some(CardChange::Add(nics::create(tx, &owner(uid), form)?))
        }
        (Some(false), Some(_), _) => Some(CardChange::Remove),
        (Some(false), None, Some(pending)) => {
            discard(tx, Some(&pending))?;
            (rates.download, rates.upload) = (None, None);
            None
        }
    };
    Ok((rates, card))
}

/// Removes the card of a change that is not carried out.
pub(super) fn discard(tx: &mut Tx<'_>, change: Option<&CardChange>) -> Result<(), Refused> {
    if let Some(CardChange::Add(nic)) = change {
        tx.request_deletion::<Nic>(nic)?;
    }
    Ok(())
}

/// Returns the card that an instance needs for a spec with a network or without one. A card that is missing is
/// created, and one that is not needed is removed.
///
/// # Errors
/// Returns `NoRoom`.
pub(super) fn fit(
    tx: &mut Tx<'_>,
    uid: &Uid,
    present: Option<Uid>,
    spec: &InstanceSpec,
    tap_prefix: &str,
) -> Result<Option<Uid>, Refused> {
    match (spec.has_network, present) {
        (true, None) => {
            let form =
                TapForm::new(tx, tap_prefix, spec.hypervisor, spec.vcpus, &spec.rates, spec.egress.as_ref())?;
            nics::create(tx, &owner(uid), form).map(Some)
        }
        (false, Some(nic)) => {
            tx.request_deletion::<Nic>(&nic)?;
            Ok(None)
        }
        (_, present) => Ok(present),
    }
}

/// Changes the limits of the instance's card. Returns the rates that the instance has then.
fn change_limits(
    tx: &mut Tx<'_>,
    spec: &InstanceSpec,
    asked: BandwidthAsked,
    will_have: bool,
) -> Result<Rates, Refused> {
    let Some(nic) = &spec.allocated.nic else {
        if will_have {
            return Ok(asked.changed(spec.rates));
        }
        let problems = asked.without_network();
        let kind = match problems.iter().next() {
            None => return Ok(spec.rates),
            Some(_) if asked.download.is_some_and(|rate| rate.0 > 0) => RefusedKind::InvalidDownload,
            Some(_) => RefusedKind::InvalidUpload,
        };
        return Err(Refused::fields(kind, problems));
    };
    let rates = asked.changed(spec.rates);
    if rates != spec.rates {
        nics::limit(tx, nic, &rates, spec.vcpus)?;
    }
    Ok(rates)
}
