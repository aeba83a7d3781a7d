//! Lines for the log of an instance that describe its new status.

use stead_schemas::health::Verdict;
use stead_schemas::instance::{Instance, InstanceStatus, Power};
use stead_schemas::meta::Object;

/// Describes the differences from the status before, oldest first. No difference is described twice.
pub(super) fn notes(object: &Object<Instance>, next: &InstanceStatus) -> Vec<String> {
    let (spec, before) = (&object.spec, &object.status);
    let mut lines = Vec::new();
    if next.observed_generation != before.observed_generation {
        let generation = next.observed_generation;
        lines.push(format!("spec generation {generation}: run {} {}", spec.run, should_be(spec.power)));
    }
    if let Some(digest) = next.image_digest.as_ref().filter(|_| next.image_digest != before.image_digest) {
        lines.push(format!("the image {} is resolved to {digest}", spec.image));
    }
    if let Some(exit) = next.exit.as_ref().filter(|_| next.exit != before.exit) {
        lines.push(format!("the program ended: {}", exit.message));
    }
    if next.last_death.is_some() && next.last_death != before.last_death {
        let is_out_of_memory = next.last_death.is_some_and(|death| death.is_out_of_memory);
        let how = if is_out_of_memory { "was killed because memory was short" } else { "ended unexpectedly" };
        lines.push(format!("the VMM {how}, {} times so far", next.vmm_deaths));
    }
    if next.health.of != before.health.of || next.health.verdict != before.health.verdict {
        match (next.health.verdict, &next.health.tally.last_error) {
            (Verdict::Unhealthy, Some(error)) => lines.push(format!("unhealthy: {error}")),
            (Verdict::Healthy, _) => lines.push("healthy".to_owned()),
            (Verdict::Unhealthy | Verdict::Starting, _) => {}
        }
    }
    if let Some(at) = next.restart.next_attempt_at.filter(|_| next.ended_launch != before.ended_launch) {
        lines.push(format!("restart {} in a row, at {at}", next.restart.attempts));
    }
    if let Some(blocked) = next.restart.blocked.filter(|_| next.restart.blocked != before.restart.blocked) {
        lines.push(format!("no restart: {blocked:?}"));
    }
    if next.state != before.state {
        lines.push(match &next.state_error {
            Some(error) => format!("{:?} after {:?}: {error}", next.state, before.state),
            None => format!("{:?} after {:?}", next.state, before.state),
        });
    }
    lines
}

fn should_be(power: Power) -> &'static str {
    match power {
        Power::Running => "should be running",
        Power::Stopped => "should be stopped",
        Power::Standby => "should be in standby",
        Power::Warm => "should be held for a fork",
    }
}

#[cfg(test)]
mod tests {
    use stead_schemas::instance::{Exit, State};
    use stead_schemas::numbers::Generation;

    use super::super::tests::instance;
    use super::*;

    #[test]
    fn news_is_logged_once() {
        let mut object = instance(Power::Running, 1, 0);
        let exit = Exit { code: Some(3), message: "exited with code 3".to_owned(), is_boot_failure: false };
        let next = InstanceStatus {
            observed_generation: Generation(1),
            exit: Some(exit),
            state: State::Stopped,
            ..object.status.clone()
        };
        let expected = [
            "spec generation 1: run 1 should be running",
            "the program ended: exited with code 3",
            "Stopped after Created",
        ];
        assert_eq!(notes(&object, &next), expected);
        object.status = next.clone();
        assert_eq!(notes(&object, &next), Vec::<String>::new());
    }
}
