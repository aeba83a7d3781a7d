//! Notifications that files of ours were removed: inotify on directories, on a separate thread.
//!
//! They are level-triggered like every monitor: a name is only a reason to observe the state.

use std::path::PathBuf;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use stead_controllers::host::HostError;

use super::files::make_directory;

/// Calls `gone` with the name of each file that is deleted from, or moved out of, the directory, and with nothing
/// when names were lost. Runs as long as the process.
///
/// # Errors
/// Returns an error when the directory cannot be watched.
pub fn watch_deletions(
    directory: PathBuf,
    gone: impl Fn(Option<&str>) + Send + 'static,
) -> Result<(), HostError> {
    let failed = |error: std::io::Error| HostError::io("watch", directory.display().to_string(), error);
    make_directory(&directory).map_err(failed)?;
    let queue = inotify::init(CreateFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let flags = WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::ONLYDIR;
    inotify::add_watch(&queue, &directory, flags).map_err(|error| failed(error.into()))?;
    let watch = move || {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(queue, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => gone(None),
                Ok(event) => gone(event.file_name().and_then(|name| name.to_str().ok())),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "the watch on files ended; the resync still looks");
                    return;
                }
            }
        }
    };
    std::thread::Builder::new().name("files".to_owned()).spawn(watch).map_err(failed)?;
    Ok(())
}
