//! The port of the control channel: its thread reads frames, hands them on, and writes the state and the agent's frames.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stead_schemas::guest::{Decoder, FrameKind};

use super::{Control, Urgency};
use crate::pages::Pages;
use crate::unsent::{Taken, Unsent, is_passing};

/// Pause after a hang-up before the port is polled again. `poll` reports a hang-up continuously.
const HANG_UP_PAUSE: Duration = Duration::from_millis(20);
/// Size of the buffer for headers and small frames, in bytes. The rest of a payload is read into the frame itself.
const READ_BYTES: usize = 64 << 10;
/// Number of writes after which the port is read: a busy output must not delay the host's requests.
const WRITES_BEFORE_READ: usize = 16;
/// Number of reads after which the port is written: a busy input must not delay the state.
const READS_BEFORE_WRITE: usize = 8;
/// Time in which the rest of a payload may arrive before the next read. A wake-up for every page costs more than the
/// page, and a guest handles some dozens of pages in this time.
const LULL: Duration = Duration::from_micros(400);
/// Number of missing bytes from which a lull is worth its delay.
const LULL_BYTES_MIN: usize = 32 << 10;

impl Control {
    /// Serves the port until another process takes it over.
    pub(super) fn serve(&self, mut port: File, received: &[u8], mut unsent: Unsent) {
        let mut decoder = Decoder::default();
        decoder.push(received);
        let (mut pages, mut buffer) = (Pages::default(), vec![0u8; READ_BYTES]);
        let (mut must_report, mut is_lull) = (false, false);
        loop {
            let heir = self.lock().heir.take();
            if let Some(heir) = heir {
                let handed = self.handover(&decoder, &unsent);
                // The other end waits for the port.
                let _ = heir.send((port, handed));
                return;
            }
            let mut interest = if is_lull { PollFlags::empty() } else { PollFlags::IN };
            if unsent.is_some() || must_report || !self.0.outbox.is_empty() {
                interest |= PollFlags::OUT;
            }
            let (events, is_woken) = self.wait(&port, interest, is_lull.then_some(LULL));
            if events.contains(PollFlags::HUP) {
                decoder = Decoder::default();
                unsent = Unsent::default();
                self.0.agent.close_all();
                std::thread::sleep(HANG_UP_PAUSE);
            }
            if is_lull || events.contains(PollFlags::IN) {
                let taken = self.read(&mut port, &mut pages, &mut decoder, &mut buffer);
                must_report |= taken.must_report;
                // If nothing arrived, the rest of the payload may not be on its way.
                is_lull = taken.is_drained && taken.bytes > 0 && decoder.lacks() >= LULL_BYTES_MIN;
            }
            if is_woken {
                must_report |= self.0.wake.take();
                self.0.outbox.wake().take();
            }
            for _ in 0..WRITES_BEFORE_READ {
                if !unsent.is_some() {
                    // The state goes before streams: it is small, and others wait for it.
                    let next = if must_report { Some(self.report()) } else { self.0.outbox.pop() };
                    must_report = false;
                    let Some(next) = next else { break };
                    unsent = Unsent::of(next);
                }
                if !unsent.write(&mut port) {
                    break;
                }
                if !unsent.is_some() {
                    self.0.outbox.spares.put(std::mem::take(&mut unsent).into_bytes());
                }
            }
            self.enforce_grace();
        }
    }

    /// Reads the available data in a few calls: a `poll` before each read would cost more.
    fn read(&self, port: &mut File, pages: &mut Pages, decoder: &mut Decoder, buffer: &mut [u8]) -> Taken {
        let mut taken = Taken::default();
        for _ in 0..READS_BEFORE_WRITE {
            if !decoder.has_spare()
                && let Some(spare) = self.0.outbox.spares.take()
            {
                decoder.give(spare);
            }
            match pages.read(port, decoder.targets(buffer)) {
                Ok(0) => break,
                Ok(count) => {
                    taken.bytes += count;
                    decoder.arrived(buffer, count);
                }
                Err(error) if is_passing(&error) => {
                    taken.is_drained = true;
                    break;
                }
                Err(_) => {
                    std::thread::sleep(HANG_UP_PAUSE);
                    break;
                }
            }
            while let Some(frame) = decoder.next() {
                if frame.kind != FrameKind::Control {
                    self.0.agent.take(frame);
                } else if let Some(message) = frame.message() {
                    taken.must_report |= self.take(message);
                }
            }
        }
        taken
    }

    /// Waits until the port is ready or other work is due. Returns the port's events and `true` if other work is due.
    fn wait(&self, port: &File, interest: PollFlags, at_most: Option<Duration>) -> (PollFlags, bool) {
        let kill_at = self.lock().program.as_ref().and_then(|program| program.kill_at);
        let left = kill_at.map(|at| at.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let timeout = at_most.or(left).map(|time| Timespec::try_from(time).unwrap_or_default());
        let mut fds = [
            PollFd::from_borrowed_fd(port.as_fd(), interest),
            PollFd::new(&self.0.wake, PollFlags::IN),
            PollFd::new(self.0.outbox.wake(), PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => (fds[0].revents(), fds[1..].iter().any(|fd| !fd.revents().is_empty())),
            Err(_) => (PollFlags::empty(), false),
        }
    }

    /// Sends the stop signal first, and the kill when the grace period is over.
    fn enforce_grace(&self) {
        let mut state = self.lock();
        let is_stopping = state.is_stopping;
        let Some(program) = &mut state.program else { return };
        match program.kill_at {
            None if is_stopping => {
                program.kill_at = Some(Instant::now() + program.grace);
                (program.stop)(Urgency::Asked);
            }
            Some(at) if Instant::now() >= at => {
                program.kill_at = Some(Instant::now() + program.grace);
                (program.stop)(Urgency::Overdue);
            }
            _ => {}
        }
    }
}
