//! Snapshots, their pools and what is made of them, in a play.

use super::*;

impl Play {
    pub(super) fn play_count(&mut self, below: u64) -> u32 {
        u32::try_from(self.rng.below(below)).expect("small")
    }

    pub(super) async fn take_snapshot(&mut self) {
        let Some(uid) = self.pick() else { return };
        let kind = if self.rng.chance(600) { SnapshotKind::Standby } else { SnapshotKind::Stopped };
        self.log.push(format!("snapshot {uid} {kind:?}"));
        let pool =
            if kind == SnapshotKind::Standby { u32::try_from(self.rng.below(3)).expect("small") } else { 0 };
        let compression = self.compression();
        let name = Name::resource("s").ok().filter(|_| self.rng.chance(500));
        let wish = snapshots::Wish {
            kind,
            name,
            tags: Tags::new(),
            purpose: SnapshotPurpose::Kept,
            compression,
            pool,
            schedule: None,
        };
        let _ = self.daemon.store.transact(move |tx| snapshots::create(tx, &uid, wish)).await;
    }

    /// Forks one, restores one in place, or deletes one.
    pub(super) async fn use_snapshot(&mut self) {
        let all = self.daemon.store.list::<Snapshot>();
        let Some(one) = all.get(usize::try_from(self.rng.below(all.len() as u64)).expect("small")) else {
            return;
        };
        let (uid, source) = (one.meta.uid.clone(), one.spec.source.clone());
        // Another than that of a memory is refused.
        let hypervisor = self.rng.chance(500).then(|| self.hypervisor());
        let target = Target { power: self.target(), hypervisor };
        let choice = if self.is_storing && self.rng.chance(500) { 1 } else { self.rng.below(5) };
        self.log.push(format!("use {choice} snapshot {uid} {target:?}"));
        let store = &self.daemon.store;
        match choice {
            0 => {
                let name = Name::resource("g").expect("valid");
                let fork = move |tx: &mut Tx<'_>| forks::fork_snapshot(tx, &uid, name, target, "st");
                drop(store.transact(fork).await);
            }
            1 => {
                drop(store.transact(move |tx| forks::restore(tx, &source, &uid, target)).await);
            }
            2 => {
                drop(store.transact(move |tx| snapshots::delete(tx, &uid)).await);
            }
            _ => {
                let pool = u32::try_from(self.rng.below(3)).expect("small");
                drop(store.transact(move |tx| snapshots::set_pool(tx, &uid, pool)).await);
            }
        }
    }

    /// What the API does when the snapshot that a fork needs came to nothing.
    pub(super) async fn remove_failed_forks(&mut self) {
        let store = &self.daemon.store;
        for instance in store.list::<Instance>() {
            let Some(origin) = &instance.spec.origin else { continue };
            let is_lost = match store.get::<Snapshot>(&origin.snapshot) {
                Some(snapshot) => snapshot.status.phase == SnapshotPhase::Failed,
                None => true,
            };
            let disk = store.get::<Disk>(&instance.spec.allocated.disk);
            if is_lost && disk.is_none_or(|disk| !disk.status.was_created) {
                let uid = instance.meta.uid.clone();
                let _ = store.transact(move |tx| admission::delete(tx, &uid, false)).await;
            }
        }
    }
}
