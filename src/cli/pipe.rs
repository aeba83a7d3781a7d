//! Detection that the reader of our output is gone.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use tokio::sync::oneshot;

/// Exit code, as in a shell, of a program that wrote to a pipe without a reader (128 + SIGPIPE).
pub(super) const CODE: u8 = 141;
/// Time to wait after a poll that failed; no such failure is known.
const PAUSE: Duration = Duration::from_secs(1);

/// Returns when the standard output is a pipe or a socket whose reader is gone; otherwise never returns.
pub(super) async fn closed() {
    let is_pipe = fstat(std::io::stdout().as_fd())
        .map(|stat| FileType::from_raw_mode(stat.st_mode))
        .is_ok_and(|kind| matches!(kind, FileType::Fifo | FileType::Socket));
    if !is_pipe {
        return std::future::pending().await;
    }
    let (report, reported) = oneshot::channel();
    // The thread ends with the process: it blocks in a poll without using the processor, however long that
    // lasts.
    std::thread::spawn(move || {
        let stdout = std::io::stdout();
        loop {
            let mut observed = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty())];
            match poll(&mut observed, None) {
                Ok(_) if observed[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) => break,
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => std::thread::sleep(PAUSE),
            }
        }
        let _ = report.send(());
    });
    if reported.await.is_err() {
        std::future::pending().await
    }
}
