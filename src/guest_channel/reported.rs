//! The parts of a guest's state in the terms of the ports, cleaned and bounded: the guest is not trusted.

use stead_controllers::host::{GuestMemory, GuestPhase};
use stead_schemas::guest::{HotplugMemory, MountedVolumes, Phase};
use stead_schemas::instance::Exit;
use stead_schemas::limits::{
    HOTPLUG_MAX, MEMORY_BLOCK, MESSAGE_CHARS_MAX, MOUNT_PATH_BYTES_MAX, VOLUME_DEVICES_MAX,
};
use stead_schemas::quantity::Bytes;
use stead_schemas::validate::printable;

/// Limit on blocks of memory that a guest can give back.
const BLOCKS_MAX: usize = (HOTPLUG_MAX.0 / MEMORY_BLOCK.0) as usize;

pub(super) fn phase_of(phase: Phase) -> GuestPhase {
    match phase {
        Phase::AwaitingConfig => GuestPhase::AwaitingConfig,
        Phase::Configured => GuestPhase::Configured,
        Phase::Ready => GuestPhase::Ready,
        Phase::Exited => GuestPhase::Exited,
    }
}

pub(super) fn memory_of(memory: HotplugMemory) -> GuestMemory {
    GuestMemory {
        target: memory.target_bytes.map(Bytes),
        used: Bytes(memory.used_bytes),
        error: memory.error.map(|why| printable(&why, MESSAGE_CHARS_MAX)),
        unused: memory.unused_blocks.into_iter().take(BLOCKS_MAX).collect(),
        change: memory.change,
    }
}

pub(super) fn volumes_of(volumes: MountedVolumes) -> MountedVolumes {
    let MountedVolumes { mut requested, mut mounted, problems, fills_disks } = volumes;
    requested.truncate(VOLUME_DEVICES_MAX);
    mounted.truncate(VOLUME_DEVICES_MAX);
    let problems = problems.into_iter().filter(|(path, _)| path.len() <= MOUNT_PATH_BYTES_MAX);
    let problems = problems.map(|(path, why)| (path, printable(&why, MESSAGE_CHARS_MAX)));
    let problems = problems.take(VOLUME_DEVICES_MAX).collect();
    MountedVolumes { requested, mounted, problems, fills_disks }
}

pub(super) fn cleaned(exit: Exit) -> Exit {
    Exit { message: printable(&exit.message, MESSAGE_CHARS_MAX), ..exit }
}
