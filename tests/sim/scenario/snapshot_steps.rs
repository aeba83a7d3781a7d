//! Snapshots, their pools and their forks, in a scenario.

use super::*;

impl Play {
    pub(super) fn play_count(&mut self, below: u64) -> u32 {
        u32::try_from(self.rng.below(below)).expect("small")
    }

    pub(super) fn take_snapshot(&mut self) {
        let Some(uid) = self.pick() else { return };
        let kind = if self.rng.chance(600) { SnapshotKind::Standby } else { SnapshotKind::Stopped };
        let mut body = serde_json::json!({ "kind": kind });
        if kind == SnapshotKind::Standby {
            body["pool_size"] = self.rng.below(3).into();
        }
        body["compression"] = match self.compression() {
            Some(_) => serde_json::json!({ "enabled": true, "algorithm": "zstd", "level": 1 }),
            None => serde_json::json!({ "enabled": false }),
        };
        if self.rng.chance(500) {
            body["name"] = "s".into();
        }
        self.request(format!("/instances/{uid}/snapshots"), body);
    }

    /// Forks one, restores one in place, or deletes one.
    pub(super) async fn use_snapshot(&mut self) {
        let all = self.daemon.store.list::<Snapshot>();
        let Some(one) = all.get(usize::try_from(self.rng.below(all.len() as u64)).expect("small")) else {
            return;
        };
        let (uid, source) = (one.meta.uid.clone(), one.spec.source.clone());
        // A machine type other than the memory's is refused.
        let hypervisor = self.rng.chance(500).then(|| self.hypervisor());
        let target = Target { power: self.target(), hypervisor };
        let choice = if self.is_storing && self.rng.chance(500) { 1 } else { self.rng.below(5) };
        self.log.push(format!("use {choice} snapshot {uid} {target:?}"));
        let store = self.daemon.store.clone();
        match choice {
            0 => {
                let mut body = serde_json::json!({ "name": "g" });
                if let Some(power) = target.power {
                    body["target_state"] = format!("{power:?}").into();
                }
                if let Some(hypervisor) = target.hypervisor {
                    body["target_hypervisor"] = hypervisor.as_str().into();
                }
                // A snapshot that only serves a fork belongs to no client.
                if one.spec.purpose == SnapshotPurpose::Kept && !one.meta.is_deleting() {
                    self.request(format!("/snapshots/{uid}/fork"), body);
                }
            }
            1 => {
                drop(
                    store
                        .transact(move |tx| admission::restore_snapshot(tx, &source, &uid, target, "st"))
                        .await,
                );
            }
            2 => {
                self.has_removed = true;
                drop(store.transact(move |tx| snapshots::delete(tx, &uid)).await);
            }
            _ => {
                let pool = u32::try_from(self.rng.below(3)).expect("small");
                drop(store.transact(move |tx| snapshots::set_pool(tx, &uid, pool)).await);
            }
        }
    }
}
