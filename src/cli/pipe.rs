//! Whether anybody reads what we print.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use tokio::sync::oneshot;

/// What a shell says of a program that wrote to a pipe nobody reads any more (128 + SIGPIPE).
pub(super) const CODE: u8 = 141;
/// After a look that failed; none is known to.
const PAUSE: Duration = Duration::from_secs(1);

/// Ends when the standard output is a pipe or a socket that nobody reads any more; otherwise never.
pub(super) async fn closed() {
    let is_pipe = fstat(std::io::stdout().as_fd())
        .map(|stat| FileType::from_raw_mode(stat.st_mode))
        .is_ok_and(|kind| matches!(kind, FileType::Fifo | FileType::Socket));
    if !is_pipe {
        return std::future::pending().await;
    }
    let (tell, told) = oneshot::channel();
    // It ends with the process: the look takes no time, however long it lasts.
    std::thread::spawn(move || {
        let stdout = std::io::stdout();
        loop {
            let mut looked = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty())];
            match poll(&mut looked, None) {
                Ok(_) if looked[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) => break,
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => std::thread::sleep(PAUSE),
            }
        }
        let _ = tell.send(());
    });
    if told.await.is_err() {
        std::future::pending().await
    }
}
