//! The program of an instance: its command line, and the time for its shutdown.

use std::path::Path;
use std::time::Duration;

use stead_schemas::image::ImageConfig;
use stead_schemas::instance::InstanceSpec;
use stead_schemas::limits;

/// Names of the programs that may be an init. Only the guest can see whether such a program is one.
const INIT_NAMES: [&str; 2] = ["init", "systemd"];

/// Returns the command line by Docker's rule: an entrypoint of the instance replaces the image's entrypoint
/// and its cmd.
pub(super) fn argv(spec: &InstanceSpec, image: &ImageConfig) -> Vec<String> {
    let (entrypoint, default_cmd) = match &spec.entrypoint {
        Some(entrypoint) => (entrypoint, &[][..]),
        None => (&image.entrypoint, image.cmd.as_slice()),
    };
    let cmd = spec.cmd.as_deref().unwrap_or(default_cmd);
    entrypoint.iter().chain(cmd).cloned().collect()
}

/// Returns the time between the request to stop and the kill: an init stops its services one after another,
/// so it has more of it than a program.
pub(super) fn shutdown_grace(spec: &InstanceSpec, image: Option<&ImageConfig>) -> Duration {
    let argv = image.map(|image| argv(spec, image)).unwrap_or_default();
    let name = argv.first().and_then(|word| Path::new(word).file_name());
    match name.is_some_and(|name| INIT_NAMES.iter().any(|init| name == *init)) {
        true => limits::SYSTEM_SHUTDOWN_GRACE,
        false => limits::SHUTDOWN_GRACE,
    }
}
