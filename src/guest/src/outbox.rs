//! Frames that wait to be written to the port: bounded, first in, first out.
//!
//! Guarantees: memory stays bounded however slowly the host reads. A stream's thread waits here for room and is
//! released when its stream is closed.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::spare::Spares;

/// Number of queued bytes from which streams wait. It holds a few of the largest data frames, so that the host never
/// waits for the next one.
const BYTES_MAX: usize = 512 << 10;

/// A counter that poll can wait for (an eventfd).
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> rustix::io::Result<Self> {
        eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map(Self)
    }

    pub(crate) fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Resets the counter. Returns `true` if it was woken since the last call.
    pub(crate) fn take(&self) -> bool {
        let mut count = [0u8; 8];
        rustix::io::read(&self.0, &mut count).is_ok()
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[derive(Debug)]
pub(crate) struct Outbox {
    queue: Mutex<Queue>,
    has_room: Condvar,
    /// Wake-up of the port's thread when a frame enters an empty queue.
    wake: Wake,
    pub(crate) spares: Spares,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Outbox {
    pub(crate) fn new() -> rustix::io::Result<Self> {
        let (queue, has_room, spares) = (Mutex::default(), Condvar::new(), Spares::default());
        Ok(Self { queue, has_room, wake: Wake::new()?, spares })
    }

    pub(crate) fn wake(&self) -> &Wake {
        &self.wake
    }

    /// Queues a frame when there is room. Returns `false` if the stream was closed meanwhile.
    pub(crate) fn put(&self, frame: Vec<u8>, is_closed: impl Fn() -> bool) -> bool {
        let mut queue = self.lock();
        while queue.bytes >= BYTES_MAX && !is_closed() {
            queue = self.has_room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if is_closed() {
            return false;
        }
        let is_first = queue.frames.is_empty();
        queue.bytes += frame.len();
        queue.frames.push_back(frame);
        drop(queue);
        // A frame behind others needs no wake-up: the port's thread does not rest before it has written the last one.
        if is_first {
            self.wake.wake();
        }
        true
    }

    /// Queues a frame without waiting. Only the port's own thread calls this; its frames are small and few.
    pub(crate) fn put_now(&self, frame: Vec<u8>) {
        let mut queue = self.lock();
        queue.bytes += frame.len();
        queue.frames.push_back(frame);
    }

    pub(crate) fn pop(&self) -> Option<Vec<u8>> {
        let mut queue = self.lock();
        let frame = queue.frames.pop_front()?;
        let was_full = queue.bytes >= BYTES_MAX;
        queue.bytes -= frame.len();
        drop(queue);
        if was_full {
            self.has_room.notify_all();
        }
        Some(frame)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().frames.is_empty()
    }

    /// Drops all frames and lets waiting streams check again whether they are closed.
    pub(crate) fn clear(&self) {
        *self.lock() = Queue::default();
        self.has_room.notify_all();
    }

    /// Wakes streams that wait for room, so that they check again whether they are closed.
    pub(crate) fn recheck(&self) {
        // The lock is held, so a stream that has just checked is waiting by now.
        let _queue = self.lock();
        self.has_room.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
