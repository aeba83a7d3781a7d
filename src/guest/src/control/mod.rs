//! The control channel: reports the whole state whenever it changes or the host attaches, and takes the host's
//! requests.
//!
//! A thread owns the port and waits for nothing else: it hands frames of streams to the agent and takes the agent's
//! frames from the outbox. The host may go and come back at any time: a hang-up only resets the decoder, and the next
//! `Attach` is answered with the current state.

mod followed;
mod port;
mod requests;

use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use stead_schemas::guest::{
    Config, Decoder, Frame, FromGuest, HotplugMemory, MountedVolumes, Note, PROTOCOL, Phase, Token,
    VolumeMount, WINDOW_BYTES,
};
use stead_schemas::instance::Exit;

use crate::BootError;
use crate::agent::{Agent, Instance};
use crate::children::Children;
use crate::handover::Handover;
use crate::outbox::{Outbox, Wake};
use crate::unsent::Unsent;

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
    /// Volumes that the host asked for last, and those of the guest.
    volumes_request: VolumesRequest,
    volumes: Option<MountedVolumes>,
    program: Option<Program>,
    /// True if the host asked to end the program. A request that comes before the program starts is kept here.
    is_stopping: bool,
    /// Receiver of the port, set while another process takes it over.
    heir: Option<mpsc::SyncSender<(File, Handover)>>,
}

/// The host's request for volumes.
#[derive(Debug, Clone, Default)]
pub(crate) struct VolumesRequest {
    /// Number of the request; 0 before any.
    pub(crate) number: u64,
    pub(crate) volumes: Vec<VolumeMount>,
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
            volumes: state.volumes.clone(),
        };
        Frame::control(&message).map(|frame| frame.encode()).unwrap_or_default()
    }
}
