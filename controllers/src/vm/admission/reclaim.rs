//! Memory that instances should give back for a while, because their host needs it.

use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::instance::{Instance, MemoryHold, State};
use stead_schemas::limits::MEMORY_BLOCK;
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;

use crate::refused::Refused;
use crate::store::Tx;

/// The part of one instance.
#[derive(Debug, Clone)]
pub struct Share {
    pub object: Arc<Object<Instance>>,
    /// Hotplug memory that its guest uses.
    pub before: Bytes,
    /// Hotplug memory that its guest should use; `before` where nothing can be taken back.
    pub after: Bytes,
}

impl Share {
    /// True if the host can get memory of this instance back: its RAM is not that of a saved file.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        self.object.status.returns_memory
    }
}

/// Plans which instances give back so many bytes: block by block, those that use most of their hotplug memory first.
#[must_use]
pub fn plan_reclaim(instances: Vec<Arc<Object<Instance>>>, bytes: u64) -> Vec<Share> {
    let has_some = |object: &Arc<Object<Instance>>| {
        let is_running = object.status.state == State::Running && !object.meta.is_deleting();
        object.status.hotplugged.filter(|used| is_running && *used > Bytes(0))
    };
    let mut shares: Vec<Share> = instances
        .into_iter()
        .filter_map(|object| has_some(&object).map(|used| Share { object, before: used, after: used }))
        .collect();
    let mut heap: BinaryHeap<(Bytes, usize)> = shares
        .iter()
        .enumerate()
        .filter(|(_, share)| share.is_possible())
        .map(|(index, share)| (share.after, index))
        .collect();
    let mut left = bytes;
    while left > 0
        && let Some((after, index)) = heap.pop()
    {
        let less = Bytes(after.0.saturating_sub(MEMORY_BLOCK.0));
        shares[index].after = less;
        left = left.saturating_sub(after.0 - less.0);
        if less > Bytes(0) {
            heap.push((less, index));
        }
    }
    shares.retain(|share| share.after < share.before || !share.is_possible());
    shares
}

/// Stores that instances give back so many bytes, and do not get them again for this time. Returns their shares, and when
/// that time ends.
///
/// # Errors
/// Returns a refusal by the store's rules.
pub fn reclaim(tx: &mut Tx<'_>, bytes: u64, hold_for: Duration) -> Result<(Vec<Share>, Timestamp), Refused> {
    let until = tx.now().checked_add(hold_for).unwrap_or(Timestamp::MAX);
    let shares = plan_reclaim(tx.list::<Instance>(), bytes);
    for share in shares.iter().filter(|share| share.is_possible()) {
        let hold = MemoryHold { hotplugged: share.after, until };
        tx.update_spec::<Instance>(&share.object.meta.uid, None, |spec| spec.memory_hold = Some(hold))?;
    }
    Ok((shares, until))
}

#[cfg(test)]
mod tests {
    use stead_schemas::instance::Power;

    use super::*;

    fn using(blocks: u64, returns_memory: bool) -> Arc<Object<Instance>> {
        let mut object = crate::vm::example(Power::Running, 1, 0);
        object.spec.hotplug = Bytes(8 * MEMORY_BLOCK.0);
        object.status.state = State::Running;
        object.status.hotplugged = Some(Bytes(blocks * MEMORY_BLOCK.0));
        object.status.returns_memory = returns_memory;
        Arc::new(object)
    }

    fn blocks(shares: &[Share]) -> Vec<(u64, u64)> {
        shares.iter().map(|share| (share.before.0 / MEMORY_BLOCK.0, share.after.0 / MEMORY_BLOCK.0)).collect()
    }

    #[test]
    fn those_that_use_most_give_first_and_nobody_gives_what_cannot_be_taken() {
        let all = || vec![using(2, true), using(5, true), using(8, false), using(0, true)];
        assert_eq!(blocks(&plan_reclaim(all(), 0)), [(8, 8)]);
        assert_eq!(blocks(&plan_reclaim(all(), 1)), [(5, 4), (8, 8)]);
        assert_eq!(blocks(&plan_reclaim(all(), 3 * MEMORY_BLOCK.0)), [(5, 2), (8, 8)]);
        assert_eq!(blocks(&plan_reclaim(all(), 5 * MEMORY_BLOCK.0 - 9)), [(2, 1), (5, 1), (8, 8)]);
        assert_eq!(blocks(&plan_reclaim(all(), u64::MAX)), [(2, 0), (5, 0), (8, 8)]);
    }
}
