//! Places for requests: so many at once in all, and so many to one instance.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_schemas::limits::{INGRESS_EXCHANGES_MAX, INGRESS_EXCHANGES_PER_TARGET_MAX};
use stead_schemas::names::Uid;

#[derive(Debug, Default)]
pub(super) struct Places(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    of: BTreeMap<Uid, usize>,
}

/// Taken as long as it lives.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    target: Uid,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` when there are too many.
    pub(super) fn take(self: &Arc<Self>, target: &Uid) -> Option<Place> {
        let mut taken = self.lock();
        let here = taken.of.get(target).copied().unwrap_or(0);
        if taken.all >= INGRESS_EXCHANGES_MAX || here >= INGRESS_EXCHANGES_PER_TARGET_MAX {
            return None;
        }
        taken.all += 1;
        taken.of.insert(target.clone(), here + 1);
        Some(Place { places: self.clone(), target: target.clone() })
    }
}

#[cfg(test)]
impl Places {
    pub(super) fn is_taken(&self, target: &Uid) -> bool {
        self.lock().of.contains_key(target)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all = taken.all.saturating_sub(1);
        match taken.of.get_mut(&self.target) {
            Some(here) if *here > 1 => *here -= 1,
            _ => drop(taken.of.remove(&self.target)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(number: usize) -> Uid {
        format!("t{number:023}").parse().expect("valid")
    }

    #[test]
    fn one_instance_and_all_of_them_have_as_many_places_as_the_limits_say() {
        let places = Arc::<Places>::default();
        let mut held: Vec<Place> =
            (0..INGRESS_EXCHANGES_PER_TARGET_MAX).map(|_| places.take(&uid(0)).expect("a place")).collect();
        assert!(places.take(&uid(0)).is_none());
        for number in INGRESS_EXCHANGES_PER_TARGET_MAX..INGRESS_EXCHANGES_MAX {
            held.push(places.take(&uid(number)).expect("a place"));
        }
        assert!(places.take(&uid(1)).is_none());
        held.pop();
        assert!(places.take(&uid(0)).is_none());
        drop(places.take(&uid(1)).expect("free again"));
        held.clear();
        let left = places.lock();
        assert!(left.all == 0 && left.of.is_empty());
    }
}
