//! The end of a database, which may have failed, and calls of it that may panic.
//!
//! Guarantees: a panic of the database ends no thread and is reported as a warning.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Once, mpsc};
use std::thread;
use std::time::Duration;

use tracing::warn;

/// Name of the thread in which a database is closed.
const CLOSER: &str = "store-close";

/// The way in which a database was closed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Closed {
    Whole,
    /// A database that panicked. Its files are closed: unwinding drops what the database owns.
    Unsynced,
    /// A database that still closes when the deadline is over.
    Never,
}

/// Closes a database. The closing flush of one that failed may wait for ever for a write that will never come, so
/// it gets a thread of its own. While that hangs, sled keeps its file locked, opening the database again
/// fails with that reason, and only a restart helps. sled panics when its file cannot be synced. A deadline of
/// `Duration::MAX` is none.
pub(super) fn close_aside(database: impl Send + 'static, deadline: Duration) -> Closed {
    let (sender, receiver) = mpsc::channel();
    let closing = thread::Builder::new().name(CLOSER.to_owned()).spawn(move || {
        let is_whole = contained(|| drop(database)).is_some();
        let _ = sender.send(is_whole); // The receiver is gone after the deadline.
    });
    match closing.map(|_| receiver.recv_timeout(deadline)) {
        Ok(Ok(true)) => Closed::Whole,
        Ok(Ok(false)) => {
            warn!("the database could not be synced when it was closed");
            Closed::Unsynced
        }
        _ => {
            warn!("the database does not close; writes fail until the daemon is restarted");
            Closed::Never
        }
    }
}

thread_local! {
    /// True while this thread is in a call of the database.
    static IS_CALLING: Cell<bool> = const { Cell::new(false) };
}

/// Calls the database. Returns `None` if it panicked, as sled does when it is dropped after its file could not be synced,
/// also within an open that fails.
pub(super) fn contained<T>(call: impl FnOnce() -> T) -> Option<T> {
    quiet_panics();
    IS_CALLING.set(true);
    let result = catch_unwind(AssertUnwindSafe(call)).ok();
    IS_CALLING.set(false);
    result
}

/// Keeps the panics of the database off standard error, where they would look like a fault of the daemon.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |panic| {
            if !IS_CALLING.get() {
                report(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database whose closing does something.
    struct Closes<Closing: FnMut()>(Closing);

    impl<Closing: FnMut()> Drop for Closes<Closing> {
        fn drop(&mut self) {
            self.0();
        }
    }

    const NEVER: Duration = Duration::from_secs(3600);

    #[test]
    fn a_database_that_panics_when_it_closes_is_closed_and_ends_nothing() {
        assert_eq!(close_aside(Closes(|| ()), NEVER), Closed::Whole);
        // The file is closed after the panic, as sled's is.
        let (file, other_end) = rustix::pipe::pipe().expect("a pipe");
        let database = (Closes(|| panic!("the file cannot be synced")), file);
        assert_eq!(close_aside(database, NEVER), Closed::Unsynced);
        assert_eq!(rustix::io::write(&other_end, &[0]), Err(rustix::io::Errno::PIPE), "nobody reads it");
    }

    #[test]
    fn a_call_that_panics_ends_nothing() {
        assert_eq!(contained(|| 7), Some(7));
        assert_eq!(contained(|| -> u8 { panic!("the file cannot be synced") }), None);
        assert!(!IS_CALLING.get(), "other panics are reported");
    }

    #[test]
    fn a_database_that_does_not_close_is_given_up() {
        let (hold, release) = mpsc::channel::<()>();
        let database = Closes(move || assert!(release.recv().is_err(), "nothing is sent"));
        assert_eq!(close_aside(database, Duration::ZERO), Closed::Never);
        drop(hold);
    }
}
