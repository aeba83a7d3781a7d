//! The host's requests on the control channel.

use std::sync::PoisonError;

use stead_schemas::guest::{NewIdentity, Phase, Seed, ToGuest, Token};

use super::{Control, State, VolumesRequest};
use crate::{BootError, clock, identity, take_identity};

impl Control {
    /// Handles one request. Returns `true` if the state must be reported.
    pub(super) fn take(&self, message: ToGuest) -> bool {
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
            ToGuest::Volumes { token, volumes } if is_ours(&token, &state) => {
                let number = state.volumes_request.number + 1;
                state.volumes_request = VolumesRequest { number, volumes };
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
            | ToGuest::Volumes { .. }
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
}
