//! Tests of changes that wait for a start: when they are carried out, and what is reported until then.

use stead_schemas::instance::Pending;
use stead_schemas::names::Digest;
use stead_schemas::root_image::{NextImage, PinnedImage};

use super::*;

fn changed(power: Power, ended_run: u64) -> Object<Instance> {
    let mut object = instance(power, 1, ended_run);
    object.spec.defer(Pending { vcpus: Some(4), ..Pending::default() });
    object
}

fn planned(object: &Object<Instance>, machine: Option<Machine>, memory: Option<Memory>) -> String {
    name(&plan(&Desired::Present(object), &Observed { memory, ..seen(machine) }, at(5).into()))
}

#[test]
fn changes_are_carried_out_when_no_vm_and_no_memory_could_contradict_them() {
    let saved = || {
        Some(Memory::Saved(SavedMemory {
            run: RunNo(1),
            launch: LaunchId(1),
            standby: StandbyNo(0),
            compression_state: CompressionState::Plain,
            volumes: Vec::new(),
        }))
    };
    let up = |vmm| Some(machine(vmm, GuestPhase::Ready));
    for (power, ended_run, machine, memory, next) in [
        (Power::Running, 0, None, None, "ApplyChanges"),
        (Power::Stopped, 0, None, None, "ApplyChanges"),
        (Power::Running, 1, None, None, "ApplyChanges"),
        // What is left of a VM goes first.
        (Power::Stopped, 1, up(VmmState::Dead), None, "Release"),
        (Power::Stopped, 1, None, saved(), "DiscardMemory"),
        // A memory has the machine of its save.
        (Power::Running, 0, None, saved(), "Restore"),
        (Power::Standby, 0, None, saved(), "Converged"),
    ] {
        let object = changed(power, ended_run);
        let what = format!("{power:?} {ended_run} {machine:?} {memory:?}");
        assert_eq!(planned(&object, machine, memory), next, "{what}");
    }
    let mut object = changed(Power::Running, 0);
    object.spec.apply_pending();
    assert_eq!(planned(&object, None, None), "Launch");
}

fn digest(letter: char) -> Digest {
    format!("sha256:{}", letter.to_string().repeat(64)).parse().expect("valid")
}

/// Returns an instance that starts with another image later.
fn with_next_image(restarts: bool) -> Object<Instance> {
    let mut object = instance(Power::Running, 1, 0);
    let (reference, image) = ("second".parse().expect("valid"), object.meta.uid.clone());
    let next = NextImage { reference, platform: object.spec.platform, pull: 2, image };
    object.spec.pending = Pending { image: Some(next), restarts, ..Pending::default() };
    object
}

#[test]
fn a_program_runs_on_until_its_new_image_is_here_and_is_then_started_again_if_that_was_asked() {
    let running = || Some(machine(VmmState::Running, GuestPhase::Ready));
    let end = PassEnd { now: at(5).into(), outcome: Outcome::Converged };
    for (restarts, next) in [(false, "Converged"), (true, "ApplyChanges")] {
        let mut object = with_next_image(restarts);
        object.status.started_launch = Some(LaunchId(1));
        assert_eq!(planned(&object, running(), None), "Converged", "{restarts}");
        let mut here = seen(running());
        here.parts.next_image_trouble = Some("image second is pulling".to_owned());
        let reported = status(&object, Some(&here), &end).conditions;
        let waiting = condition::find(&reported, ConditionType::PendingChanges).expect("reported");
        assert!(waiting.message.contains(": image; image second is pulling"), "{}", waiting.message);
        assert_eq!(waiting.message.ends_with("once the new image is on this host"), restarts);
        here.parts.next_image_ready = Some(digest('b'));
        let plan = plan(&Desired::Present(&object), &here, at(5).into());
        assert_eq!(name(&plan), "Record WaitingForImage", "{restarts}");
        object.status = status(&object, Some(&here), &end);
        assert_eq!(object.next_content(), Some(&digest('b')));
        assert_eq!(object.content(), Some(&digest('a')));
        assert_eq!(planned(&object, running(), None), next, "{restarts}");
        // The content stays although the name means other content by now, or nothing.
        here.parts.next_image_ready = Some(digest('c'));
        object.status = status(&object, Some(&here), &end);
        assert_eq!(object.next_content(), Some(&digest('b')));
    }
}

#[test]
fn content_belongs_to_the_version_of_the_image_that_it_was_pinned_for() {
    let end = PassEnd { now: at(5).into(), outcome: Outcome::Converged };
    for pinned in [None, Some((2, 'b')), Some((1, 'd'))] {
        let mut object = with_next_image(false);
        object.status.next_image = pinned.map(|(pull, letter)| PinnedImage {
            image: object.meta.uid.clone(),
            pull,
            digest: digest(letter),
        });
        object.spec.apply_pending();
        // Of an earlier pull there is nothing to use.
        let known = pinned.filter(|(pull, _)| *pull == 2).map(|(_, letter)| digest(letter));
        assert_eq!(object.content(), known.as_ref(), "{pinned:?}");
        let expected = if known.is_some() { "Launch" } else { "Record WaitingForImage" };
        assert_eq!(planned(&object, None, None), expected, "{pinned:?}");
        let mut here = seen(None);
        here.parts.image_ready = Some(digest('e'));
        object.status = status(&object, Some(&here), &end);
        assert_eq!(object.content(), Some(&known.unwrap_or_else(|| digest('e'))), "{pinned:?}");
        assert_eq!(object.status.next_image, None);
    }
}

#[test]
fn the_condition_lists_what_waits_and_goes_with_it() {
    let mut object = changed(Power::Running, 0);
    let running = || Some(machine(VmmState::Running, GuestPhase::Ready));
    let end = PassEnd { now: at(5).into(), outcome: Outcome::Converged };
    object.status = status(&object, Some(&seen(running())), &end);
    let waiting = condition::find(&object.status.conditions, ConditionType::PendingChanges);
    let waiting = waiting.expect("reported");
    assert_eq!((waiting.status, waiting.reason), (ConditionStatus::True, Reason::WaitingForStart));
    assert!(waiting.message.ends_with(": vcpus"), "{}", waiting.message);
    object.spec.apply_pending();
    object.status = status(&object, Some(&seen(running())), &end);
    assert_eq!(condition::find(&object.status.conditions, ConditionType::PendingChanges), None);
}
