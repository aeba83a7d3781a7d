//! The control channel: reports the whole state whenever it changes or the host attaches, and takes the host's
//! requests.
//!
//! A thread owns the port and waits for nothing else: it hands frames of streams to the agent and takes the agent's
//! frames from the outbox. The host may go and come back at any time: a hang-up only resets the decoder, and the next
//! `Attach` is answered with the current state.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stead_schemas::guest::{
    Config, Decoder, Frame, FrameKind, FromGuest, HotplugMemory, NewIdentity, Note, PROTOCOL, Phase, Seed,
    ToGuest, Token, WINDOW_BYTES,
};
use stead_schemas::instance::Exit;

use crate::agent::{Agent, Instance};
use crate::children::Children;
use crate::handover::Handover;
use crate::outbox::{Outbox, Wake};
use crate::pages::Pages;
use crate::unsent::{Taken, Unsent, is_passing};
use crate::{BootError, clock, identity, take_identity};

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

/// The control channel, shared by the port's thread and the rest of the program.
#[derive(Clone)]
pub(crate) struct Control(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: Wake,
    agent: Agent,
    outbox: Arc<Outbox>,
    /// Lock of the thread that takes over another identity.
    identity_change: Mutex<()>,
}

#[derive(Default)]
struct State {
    nonce: u64,
    token: Option<Token>,
    config: Option<Config>,
    phase: Option<Phase>,
    exit: Option<Exit>,
    is_acknowledged: bool,
    /// Identity (incarnation) of this guest, and the error of the last attempt to take over another.
    incarnation: Option<String>,
    identity_error: Option<String>,
    /// Hotplug memory that the host asked to use last, in bytes, and what the guest uses.
    memory_target: Option<u64>,
    memory: Option<HotplugMemory>,
    program: Option<Program>,
    /// True if the host asked to end the program. A request that comes before the program starts is kept here.
    is_stopping: bool,
    /// Receiver of the port, set while another process takes it over.
    heir: Option<mpsc::SyncSender<(File, Handover)>>,
}

struct Program {
    children: Children,
    stop: Stop,
    grace: Duration,
    kill_at: Option<Instant>,
}

/// Asks the program to end. It is called again if the program has not ended. Never waits.
pub(crate) type Stop = Box<dyn FnMut(Urgency) + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    Asked,
    /// The grace period is over.
    Overdue,
}

impl Control {
    pub(crate) fn start(port: File) -> Result<Self, BootError> {
        Self::go_on(port, Handover::default())
    }

    /// Continues to use the port at the point at which another process left it.
    pub(crate) fn go_on(port: File, handed: Handover) -> Result<Self, BootError> {
        let failed = |error| BootError::new("control port", error);
        let outbox = Arc::new(Outbox::new().map_err(failed)?);
        let wake = Wake::new().map_err(failed)?;
        let agent = Agent::new(outbox.clone());
        let Handover { nonce, token, config, is_stopping, received, unsent } = handed;
        let phase = config.is_some().then_some(Phase::Configured);
        let incarnation = config.as_ref().map(|config| config.incarnation.clone());
        let state = State { nonce, token, config, is_stopping, phase, incarnation, ..State::default() };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake,
            agent,
            outbox,
            identity_change: Mutex::default(),
        };
        let control = Self(Arc::new(shared));
        let for_thread = control.clone();
        std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || for_thread.serve(port, &received, Unsent::of(unsent)))
            .map_err(|error| BootError::new("control port", error))?;
        Ok(control)
    }

    /// Sends a line for people to read. Waits while the host does not read.
    pub(crate) fn note(&self, note: String) {
        let Some(token) = self.lock().token.clone() else { return };
        if let Ok(frame) = Frame::control(&Note { token, note }) {
            self.0.outbox.put(frame.encode(), || false);
        }
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

    /// Hands the port and all its state over to another process. No process serves the port until that one does.
    pub(crate) fn leave(&self) -> Option<(File, Handover)> {
        let (heir, left) = mpsc::sync_channel(1);
        self.lock().heir = Some(heir);
        self.wake();
        left.recv().ok()
    }

    /// Records that the program was begun. From here on `stop` ends it when the host asks.
    pub(crate) fn program_begun(&self, config: &Config, children: &Children, stop: Stop) {
        let grace = Duration::from_millis(config.shutdown_grace_millis);
        let children = children.clone();
        self.lock().program = Some(Program { children, stop, grace, kill_at: None });
        self.wake();
    }

    /// Reports the program as running and serves streams, unless the program has ended already.
    pub(crate) fn program_ready(&self, config: &Config, children: &Children) {
        let mut state = self.lock();
        if state.exit.is_some() {
            return;
        }
        state.phase = Some(Phase::Ready);
        let token = state.token.clone().filter(|_| config.has_agent);
        drop(state);
        if let Some(token) = token {
            self.0.agent.enable(Instance { token, config: config.clone(), children: children.clone() });
        }
        self.wake();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.lock().is_stopping
    }

    pub(crate) fn set(&self, phase: Phase, exit: Option<Exit>) {
        {
            let mut state = self.lock();
            state.phase = Some(phase);
            if exit.is_some() {
                // The pid may be reused from here on.
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

    /// Reports the state to the host, even if the host has not asked.
    pub(crate) fn wake(&self) {
        self.0.wake.wake();
    }

    fn serve(&self, mut port: File, received: &[u8], mut unsent: Unsent) {
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

    /// Handles one request. Returns `true` if the state must be reported.
    fn take(&self, message: ToGuest) -> bool {
        let mut state = self.lock();
        let is_ours = |token: &Token, state: &State| state.token.as_ref() == Some(token);
        match message {
            ToGuest::Attach { nonce } => {
                let is_new = state.nonce != nonce;
                state.nonce = nonce;
                drop(state);
                if is_new {
                    self.0.agent.close_all();
                }
                true
            }
            ToGuest::Clock { unix_nanos } => {
                clock::step(unix_nanos);
                false
            }
            ToGuest::Configure { token, seed, config } => {
                if state.config.is_none() {
                    // A kernel that refuses has its own random numbers.
                    let _ = identity::credit_entropy(&seed.0);
                    state.incarnation = Some(config.incarnation.clone());
                    (state.token, state.config) = (Some(token), Some(*config));
                    if state.phase.is_none() {
                        state.phase = Some(Phase::Configured);
                    }
                }
                self.0.changed.notify_all();
                true
            }
            ToGuest::Identity { token, new_token, seed, identity } if is_ours(&token, &state) => {
                if state.incarnation.as_ref() != Some(&identity.incarnation) {
                    drop(state);
                    self.begin_identity(new_token, seed, *identity);
                }
                true
            }
            ToGuest::Memory { token, hotplugged_bytes } if is_ours(&token, &state) => {
                state.memory_target = Some(hotplugged_bytes);
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
            ToGuest::Identity { .. }
            | ToGuest::Memory { .. }
            | ToGuest::Shutdown { .. }
            | ToGuest::AcknowledgeExit { .. } => false,
        }
    }

    /// Starts a thread that takes over another identity, because keys take a while to generate.
    fn begin_identity(&self, new_token: Token, seed: Seed, identity: NewIdentity) {
        let for_thread = self.clone();
        let begun = std::thread::Builder::new().name("assume".to_owned()).spawn(move || {
            // A daemon that attaches meanwhile asks again. The lock keeps two threads from making keys at the same
            // time.
            let held = for_thread.0.identity_change.lock().unwrap_or_else(PoisonError::into_inner);
            let (old, children) = {
                let state = for_thread.lock();
                if state.incarnation.as_ref() == Some(&identity.incarnation) {
                    return;
                }
                (state.config.clone(), state.program.as_ref().map(|program| program.children.clone()))
            };
            let done = match (&old, children) {
                (Some(old), Some(children)) => take_identity::apply(old, &identity, &seed, &children),
                _ => Err(BootError::new("assume", "no program runs")),
            };
            for_thread.took_identity(new_token, identity, done);
            drop(held);
        });
        if let Err(error) = begun {
            self.lock().identity_error = Some(error.to_string());
            self.wake();
        }
    }

    /// Records the result of taking over another identity.
    pub(crate) fn took_identity(&self, new_token: Token, identity: NewIdentity, done: Result<(), BootError>) {
        let mut state = self.lock();
        match done {
            Ok(()) => {
                state.identity_error = None;
                // Identity and token change together, so that no state is reported under one identity with the
                // other's token.
                (state.incarnation, state.token) = (Some(identity.incarnation), Some(new_token.clone()));
                if let Some(config) = &mut state.config {
                    (config.hostname, config.network) = (identity.hostname, identity.network);
                    (config.machine_id, config.instance) = (identity.machine_id, identity.instance);
                    self.0.agent.take_identity(new_token, &config.hostname);
                }
            }
            Err(error) => state.identity_error = Some(format!("{}: {}", error.phase, error.reason)),
        }
        drop(state);
        self.wake();
    }

    fn handover(&self, decoder: &Decoder, unsent: &Unsent) -> Handover {
        let state = self.lock();
        Handover {
            nonce: state.nonce,
            token: state.token.clone(),
            config: state.config.clone(),
            is_stopping: state.is_stopping,
            received: decoder.rest(),
            unsent: unsent.rest().to_vec(),
        }
    }

    fn report(&self) -> Vec<u8> {
        let state = self.lock();
        let message = FromGuest {
            protocol: PROTOCOL,
            nonce: state.nonce,
            token: state.token.clone(),
            phase: state.phase.unwrap_or(Phase::AwaitingConfig),
            exit: state.exit.clone(),
            incarnation: state.incarnation.clone(),
            identity_error: state.identity_error.clone(),
            window: WINDOW_BYTES,
            memory: state.memory.clone().map(|memory| memory.asked(state.memory_target)),
        };
        Frame::control(&message).map(|frame| frame.encode()).unwrap_or_default()
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
