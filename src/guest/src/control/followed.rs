//! The parts of the host's desired state that threads follow: hotplug memory and volumes.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use stead_schemas::guest::{HotplugMemory, MountedVolumes};

use super::{Control, VolumesRequest};

impl Control {
    /// Reports the hotplug memory, and blocks until the host asks for another part of it, or for this time. Returns the
    /// part in bytes that the host asked for last.
    pub(crate) fn wait_for_memory(&self, memory: HotplugMemory, at_most: Duration) -> Option<u64> {
        let (known, deadline) = (memory.target_bytes, Instant::now() + at_most);
        let mut state = self.lock();
        if state.memory.as_ref() != Some(&memory) {
            state.memory = Some(memory);
            self.wake();
        }
        while state.memory_target == known {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.memory_target
    }

    /// Reports the volumes, and blocks until the host sends a request after the one with this number, or for this time.
    /// Returns the last request if there is a new one.
    pub(crate) fn wait_for_volumes(
        &self,
        known: u64,
        volumes: &MountedVolumes,
        at_most: Option<Duration>,
    ) -> Option<VolumesRequest> {
        let deadline = at_most.map(|time| Instant::now() + time);
        let mut state = self.lock();
        if state.volumes.as_ref() != Some(volumes) {
            state.volumes = Some(volumes.clone());
            self.wake();
        }
        while state.volumes_request.number == known {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            state = match left {
                None => self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        Some(state.volumes_request.clone())
    }
}
