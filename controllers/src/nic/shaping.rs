//! The part of the plan that limits the traffic of a TAP.
//!
//! Traffic to the guest is what the TAP sends, and is limited there. Traffic from the guest is led through an IFB of
//! its own, which is limited and up before the first frame comes.

use stead_schemas::meta::Object;
use stead_schemas::network::{Bandwidth, Nic};
use stead_schemas::quantity::Rate;

use super::{Action, Observed};
use crate::host::{Detour, Limit};

/// Returns the steps from the observed limits to those of the spec. The TAP may still have to be made, by earlier steps.
pub(super) fn steps(object: &Object<Nic>, seen: &Observed) -> Vec<Action> {
    let Bandwidth { download, upload } = object.spec.bandwidth;
    let mut steps = Vec::new();
    if seen.shaping.limit != limit(download) {
        steps.push(Action::Limit { link: object.spec.tap.clone(), rate: download });
    }
    match upload {
        Some(_) => lead_through_ifb(object, seen, upload, &mut steps),
        None => lead_straight(object, seen, &mut steps),
    }
    steps
}

fn lead_through_ifb(object: &Object<Nic>, seen: &Observed, rate: Option<Rate>, steps: &mut Vec<Action>) {
    let (tap, ifb) = (object.spec.tap.clone(), object.spec.ifb());
    if seen.ifb.is_none() {
        steps.push(Action::CreateIfb { name: ifb.clone(), owner: object.meta.uid.clone() });
    }
    if seen.ifb.is_none() || seen.ifb_limit != limit(rate) {
        steps.push(Action::Limit { link: ifb.clone(), rate });
    }
    if !seen.ifb.as_ref().is_some_and(|ifb| ifb.is_up) {
        steps.push(Action::RaiseIfb(ifb.clone()));
    }
    if seen.ifb.is_none() || seen.shaping.detour != Detour::Through(ifb.clone()) {
        steps.push(Action::Divert { tap, through: Some(ifb) });
    }
}

fn lead_straight(object: &Object<Nic>, seen: &Observed, steps: &mut Vec<Action>) {
    if seen.shaping.detour != Detour::None {
        steps.push(Action::Divert { tap: object.spec.tap.clone(), through: None });
    }
    steps.extend(seen.ifb.as_ref().map(|ifb| Action::RemoveIfb(ifb.name.clone())));
}

fn limit(rate: Option<Rate>) -> Limit {
    rate.map_or(Limit::None, Limit::At)
}
