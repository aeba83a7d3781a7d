//! The objects that a change of another object wakes, by the declarations of their kind and the store's index.
//!
//! Guarantees: the work depends on the objects concerned, not on how many objects are stored.
//! Never: knows a kind.

use stead_schemas::meta::Kind;
use stead_schemas::names::Uid;
use stead_schemas::references::{Ref, Role, Target, WokenBy};

use crate::store::{Event, Store};

/// Returns the objects of a kind that an event wakes: the owner of the changed object, and the objects that
/// the kind declares.
pub(super) fn dependents<K: Kind>(store: &Store, event: &Event) -> Vec<Uid> {
    let mut woken = Vec::new();
    woken.extend(event.owner.iter().filter(|owner| owner.kind == K::NAME).map(|owner| owner.uid.clone()));
    for rule in K::WOKEN_BY {
        match *rule {
            WokenBy::Target(role) => {
                let target = Target::Object { kind: event.kind, uid: event.uid.clone() };
                woken.extend(store.uids_referring::<K>(&Ref { role, target }));
            }
            WokenBy::Owner => woken.extend(store.uids_referring::<K>(&Ref::to_owner(&event.uid))),
            WokenBy::Referrer(role) => {
                woken.extend(targets::<K>(store, &store.references(event.kind, &event.uid), role));
                woken.extend(targets::<K>(store, &event.dropped, role));
            }
            WokenBy::Gain(role) => woken.extend(targets::<K>(store, &event.gained, role)),
            WokenBy::Release(role) => woken.extend(targets::<K>(store, &event.dropped, role)),
            WokenBy::Departure { left, waits } => {
                for reference in event.dropped.iter().filter(|reference| reference.role == left) {
                    let waiting = Ref { role: waits, target: reference.target.clone() };
                    woken.extend(store.uids_referring::<K>(&waiting));
                }
            }
        }
    }
    woken
}

/// Returns the objects of a kind among the targets of references in a role.
fn targets<K: Kind>(store: &Store, references: &[Ref], role: Role) -> Vec<Uid> {
    let in_role = references.iter().filter(|reference| reference.role == role);
    let uids = in_role.filter_map(|reference| match &reference.target {
        Target::Object { kind, uid } if *kind == K::NAME => Some(uid),
        // An owner is of any kind.
        Target::Owner(uid) if store.get::<K>(uid).is_some() => Some(uid),
        _ => None,
    });
    uids.cloned().collect()
}
