//! Launches: start the VM if everything that it needs exists, or wait for the first part that is missing.

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::instance::Instance;
use stead_schemas::limits;
use stead_schemas::meta::Object;
use stead_schemas::numbers::RunNo;
use stead_schemas::policy::RestartReason;

use crate::host::{LaunchPlan, SavedMemory, VolumeDisk};
use crate::runtime::{Moment, Plan, Refusal};
use crate::vm::program::argv;
use crate::vm::steps::{act, record, wait, wait_for_disk};
use crate::vm::{Action, Observed, Parts, VolumesSeen, restarts, vmm_limits};

/// Launches or restores the VM once everything that it needs exists.
pub(super) fn plan_launch(
    object: &Object<Instance>,
    seen: &Observed,
    run: RunNo,
    now: Moment,
) -> Plan<Action> {
    let parts = &seen.parts;
    let Some(digest) = object.content() else {
        // The status of this pass pins the content.
        return match &parts.image_trouble {
            Some((reason, message)) => wait(*reason, message.clone(), None),
            None => record(Reason::WaitingForImage, "recording the image's content"),
        };
    };
    let Some(config) = &parts.image_config else {
        let (reason, message) = parts.image_trouble.clone().unwrap_or((
            Reason::WaitingForImage,
            format!("the content {digest} of image {} is not on this host", object.spec.image),
        ));
        return wait(reason, message, None);
    };
    if argv(&object.spec, config).is_empty() {
        let message = "neither the image nor the instance names a program: give entrypoint or cmd".to_owned();
        return Plan::Refuse(Refusal { reason: Reason::ImageInvalid, message });
    }
    if !parts.is_disk_ready {
        return wait_for_disk(seen, "the root overlay is being made");
    }
    if let Some(why) = &parts.volumes.trouble {
        return wait(Reason::WaitingForDisk, why.clone(), None);
    }
    if let Some(plan) = wait_for_network(object, parts) {
        return plan;
    }
    if let Some(until) = restarts::next_attempt(&object.status, now).filter(|&until| now.at() < until) {
        let (reason, message) = match object.status.restart.last_reason {
            None => (Reason::ProgramExited, "the program ended; it is started again after a delay"),
            Some(RestartReason::HealthCheckFailed) => (
                Reason::HealthCheckFailed,
                "the health check failed; the program is started again after a delay",
            ),
        };
        return wait(reason, message, Some(until));
    }
    if let Some(until) = relaunch_at(object, now).filter(|&until| now.at() < until) {
        return wait_for_relaunch(object, until);
    }
    let saved = seen.saved(object);
    let plan = Box::new(LaunchPlan {
        owner: object.meta.uid.clone(),
        run,
        launch: saved.map_or(object.status.launch.next(), |saved| saved.launch),
        hypervisor: object.spec.hypervisor,
        vcpus: object.spec.vcpus,
        memory: object.spec.memory_max(),
        hotplug: object.spec.hotplug,
        disk_rate: object.spec.disk_rate(),
        rootfs: digest.clone(),
        overlay: object.spec.allocated.disk.clone(),
        cid: object.spec.allocated.cid,
        network: parts.nic.as_ref().map(|nic| nic.card.clone()),
        wants_headers: !object.spec.skip_kernel_headers,
        volumes: volumes(&parts.volumes, saved),
        limits: vmm_limits::desired(&object.spec, parts.accelerator),
    });
    act(if saved.is_some() { Action::Restore(plan) } else { Action::Launch(plan) })
}

/// Waits for the card, and for the policy of mediated egress: a program's first requests need both.
fn wait_for_network(object: &Object<Instance>, parts: &Parts) -> Option<Plan<Action>> {
    if object.spec.has_network && !parts.nic.as_ref().is_some_and(|nic| nic.is_ready) {
        let trouble = parts.nic.as_ref().and_then(|nic| nic.trouble.clone());
        let message = trouble.unwrap_or_else(|| "the network port is being made".to_owned());
        return Some(wait(Reason::WaitingForNetwork, message, None));
    }
    let has_policy = parts.mediation.as_ref().is_some_and(|mediation| mediation.is_ready);
    if object.spec.has_network && object.spec.egress.is_some() && !has_policy {
        let trouble = parts.mediation.as_ref().and_then(|mediation| mediation.trouble.clone());
        let message = trouble.unwrap_or_else(|| "the policy of its egress is not in force yet".to_owned());
        return Some(wait(Reason::WaitingForEgress, message, None));
    }
    None
}

/// Returns the disks of a VM that boots, or those that it had when its memory was saved: others come when it runs.
fn volumes(seen: &VolumesSeen, saved: Option<&SavedMemory>) -> Vec<VolumeDisk> {
    let was_there = |disk: &&VolumeDisk| saved.is_none_or(|saved| saved.volumes.contains(&disk.number));
    seen.disks.iter().filter(was_there).cloned().collect()
}

fn wait_for_relaunch(object: &Object<Instance>, until: Timestamp) -> Plan<Action> {
    let is_out_of_memory = object.status.last_death.is_some_and(|death| death.is_out_of_memory);
    let (reason, message) = match is_out_of_memory {
        true => (
            Reason::OutOfMemory,
            "the kernel ended the VMM because memory was short; it is started again after a delay",
        ),
        false => (Reason::VmmDied, "the VMM died; it is started again after a delay"),
    };
    wait(reason, message, Some(until))
}

/// Returns when a VMM that died may be started again: at once after the first death, then with doubling
/// delays.
fn relaunch_at(object: &Object<Instance>, now: Moment) -> Option<Timestamp> {
    let death = object.status.last_death?;
    let doublings = object.status.vmm_deaths.checked_sub(2)?.min(16);
    let delay = limits::RELAUNCH_DELAY_FIRST.saturating_mul(1 << doublings).min(limits::RELAUNCH_DELAY_MAX);
    Some(now.end(death.noticed_at, delay))
}
