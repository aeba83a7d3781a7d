//! The control channel: tells the whole state whenever it changes or the host attaches, and takes
//! the host's requests.
//!
//! One thread owns the port. The host may go and come back at any time: a hang-up only resets the
//! decoder, and the next `Attach` is answered with the state as it is.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Pid, Signal, kill_process};
use stead_schemas::guest::{Config, Decoder, Frame, FromGuest, PROTOCOL, Phase, ToGuest, Token};
use stead_schemas::instance::Exit;

use crate::BootError;
use crate::program;

/// Pause after a hang-up before the port is looked at again; poll reports hang-ups without end.
const HANG_UP_PAUSE: Duration = Duration::from_millis(20);

/// Shared between the port's thread and the rest.
#[derive(Clone)]
pub(crate) struct Control(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: OwnedFd,
}

#[derive(Default)]
struct State {
    nonce: u64,
    token: Option<Token>,
    config: Option<Config>,
    phase: Option<Phase>,
    exit: Option<Exit>,
    is_acknowledged: bool,
    program: Option<Program>,
    /// The host asked to end the program; before it started, the request waits here.
    is_stopping: bool,
}

struct Program {
    pid: Pid,
    stop_signal: Signal,
    grace: Duration,
    kill_at: Option<Instant>,
}

impl Control {
    pub(crate) fn start(port: File) -> Result<Self, BootError> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| BootError::new("control port", error))?;
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), wake };
        let control = Self(Arc::new(shared));
        let of_thread = control.clone();
        std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || of_thread.serve(port))
            .map_err(|error| BootError::new("control port", error))?;
        Ok(control)
    }

    /// Blocks until the host has sent the configuration.
    pub(crate) fn wait_for_config(&self) -> Config {
        let mut state = self.lock();
        loop {
            if let Some(config) = &state.config {
                return config.clone();
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn program_started(&self, pid: Pid, config: &Config) {
        let stop_signal = program::signal(config.stop_signal.as_deref());
        let grace = Duration::from_millis(config.shutdown_grace_millis);
        self.lock().program = Some(Program { pid, stop_signal, grace, kill_at: None });
        self.set(Phase::Ready, None);
    }

    pub(crate) fn set(&self, phase: Phase, exit: Option<Exit>) {
        {
            let mut state = self.lock();
            state.phase = Some(phase);
            if exit.is_some() {
                // The pid may be another's from here on.
                state.program = None;
                state.exit = exit;
            }
        }
        self.wake();
    }

    pub(crate) fn wait_for_acknowledgement(&self, at_most: Duration) {
        let deadline = Instant::now() + at_most;
        let mut state = self.lock();
        while !state.is_acknowledged {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    fn serve(&self, mut port: File) {
        let mut decoder = Decoder::default();
        let mut unsent: Vec<u8> = Vec::new();
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            let mut interest = PollFlags::IN;
            if !unsent.is_empty() {
                interest |= PollFlags::OUT;
            }
            let events = self.wait(&port, interest);
            if events.contains(PollFlags::HUP) {
                decoder = Decoder::default();
                unsent.clear();
                std::thread::sleep(HANG_UP_PAUSE);
            }
            if events.contains(PollFlags::IN) {
                match port.read(&mut buffer) {
                    Ok(count) => decoder.push(&buffer[..count]),
                    Err(error) if is_passing(&error) => {}
                    Err(_) => std::thread::sleep(HANG_UP_PAUSE),
                }
            }
            let mut shall_tell = self.take_wake();
            while let Some(frame) = decoder.next() {
                shall_tell |= frame.message().is_some_and(|message| self.take(message));
            }
            // One state at a time: a newer one replaces nothing that is half sent.
            if shall_tell && unsent.is_empty() {
                unsent = self.tell();
            } else if shall_tell {
                self.wake();
            }
            if !unsent.is_empty() {
                match port.write(&unsent) {
                    Ok(count) => drop(unsent.drain(..count)),
                    Err(error) if is_passing(&error) => {}
                    Err(_) => unsent.clear(),
                }
            }
            self.enforce_grace();
        }
    }

    fn wait(&self, port: &File, interest: PollFlags) -> PollFlags {
        let timeout = self.lock().program.as_ref().and_then(|program| program.kill_at).map(|at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec::try_from(left).unwrap_or_default()
        });
        let mut fds = [
            PollFd::from_borrowed_fd(port.as_fd(), interest),
            PollFd::from_borrowed_fd(self.0.wake.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => fds[0].revents(),
            Err(_) => PollFlags::empty(),
        }
    }

    fn take_wake(&self) -> bool {
        let mut count = [0u8; 8];
        rustix::io::read(&self.0.wake, &mut count).is_ok()
    }

    /// Handles one request; whether the state is to be told.
    fn take(&self, message: ToGuest) -> bool {
        let mut state = self.lock();
        let is_ours = |token: &Token, state: &State| state.token.as_ref() == Some(token);
        match message {
            ToGuest::Attach { nonce } => {
                state.nonce = nonce;
                true
            }
            ToGuest::Configure { token, config } => {
                if state.config.is_none() {
                    (state.token, state.config) = (Some(token), Some(*config));
                    if state.phase.is_none() {
                        state.phase = Some(Phase::Configured);
                    }
                }
                self.0.changed.notify_all();
                true
            }
            ToGuest::Shutdown { token } if is_ours(&token, &state) => {
                state.is_stopping = true;
                true
            }
            ToGuest::AcknowledgeExit { token } if is_ours(&token, &state) => {
                state.is_acknowledged = state.exit.is_some();
                self.0.changed.notify_all();
                false
            }
            ToGuest::Shutdown { .. } | ToGuest::AcknowledgeExit { .. } => false,
        }
    }

    fn tell(&self) -> Vec<u8> {
        let state = self.lock();
        let message = FromGuest {
            protocol: PROTOCOL,
            nonce: state.nonce,
            token: state.token.clone(),
            phase: state.phase.unwrap_or(Phase::AwaitingConfig),
            exit: state.exit.clone(),
        };
        Frame::control(&message).map(|frame| frame.encode()).unwrap_or_default()
    }

    /// Stop signal first, the kill when the grace is over.
    fn enforce_grace(&self) {
        let mut state = self.lock();
        let is_stopping = state.is_stopping;
        let Some(program) = &mut state.program else { return };
        match program.kill_at {
            None if is_stopping => {
                program.kill_at = Some(Instant::now() + program.grace);
                let _ = kill_process(program.pid, program.stop_signal);
            }
            Some(at) if Instant::now() >= at => {
                program.kill_at = Some(Instant::now() + program.grace);
                let _ = kill_process(program.pid, Signal::KILL);
            }
            _ => {}
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
