//! The plan of image content: from the spec and the observation to the next steps.

use stead_schemas::condition::Reason;
use stead_schemas::image::{Image, ImageSource};
use stead_schemas::limits;
use stead_schemas::meta::Object;

use super::observe::recorded;
use super::{Action, Observed};
use crate::host::Layer;
use crate::runtime::{Desired, Plan, Record, Refusal, Wait};

pub(super) fn plan(desired: &Desired<'_, Image>, seen: &Observed) -> Plan<Action> {
    let garbage = seen.unreferenced.iter().take(limits::PLAN_STEPS_MAX / 2);
    let removals: Vec<Action> = garbage.map(|digest| Action::Remove { digest: digest.clone() }).collect();
    if let Some(owner) = &seen.left_over {
        return Plan::Act(vec![Action::Forget { owner: owner.clone() }]);
    }
    match desired {
        _ if !removals.is_empty() => Plan::Act(removals),
        Desired::Absent(_) => Plan::Converged,
        Desired::Present(object) => plan_present(object, seen),
    }
}

fn plan_present(object: &Object<Image>, seen: &Observed) -> Plan<Action> {
    let Some(digest) = &seen.digest else {
        return wait("the registry is being asked");
    };
    if seen.stored.is_some() {
        return Plan::Converged;
    }
    if let ImageSource::Local { .. } = &object.spec.source {
        let message = format!("the local content {digest} is not on this host any more; import it again");
        return Plan::Refuse(Refusal { reason: Reason::ImageNotFound, message });
    }
    if recorded(object) != Some(digest) {
        return Plan::Record(Record {
            reason: Reason::Converging,
            what: "recording what the reference means",
        });
    }
    if seen.job.is_some() {
        return wait("the image is being fetched or converted");
    }
    let Some(manifest) = &seen.manifest else {
        return wait("the manifest is being fetched");
    };
    let (owner, digest) = (object.meta.uid.clone(), digest.clone());
    if manifest.layers.iter().all(is_present) {
        return Plan::Act(vec![Action::Convert { owner, digest }]);
    }
    let reference = object.spec.reference.clone();
    Plan::Act(vec![Action::Fetch { owner, reference, digest }])
}

fn is_present(layer: &Layer) -> bool {
    layer.present >= layer.size
}

fn wait(message: &str) -> Plan<Action> {
    Plan::Wait(Wait { reason: Reason::Converging, message: message.to_owned(), until: None })
}
