//! Requests of a scenario that take time. The client randomly waits for its answer or hangs up.

use stead_schemas::limits::VERB_WAIT_MAX;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::*;
use crate::api::{Answer, Api};

/// Free space of the host's disk while it is not full.
const ROOM: Bytes = Bytes(1 << 40);

/// The clients of one life of the daemon.
pub(super) struct Clients {
    api: Api,
    /// Path and answer of each client that waited, with the time that the answer took.
    tasks: JoinSet<Option<(String, Answer, Duration)>>,
}

impl Clients {
    pub(super) fn of(daemon: &Daemon) -> Self {
        Self { api: Api::of(&daemon.store), tasks: JoinSet::new() }
    }
}

impl Play {
    /// Sends a request whose answer takes time. Sometimes there is no room for its result.
    pub(super) fn request(&mut self, path: String, body: serde_json::Value) {
        if self.rng.chance(250) {
            self.log.push("the disk is full".to_owned());
            self.world.set_space(Bytes(0));
        }
        let hangs_up = self.rng.chance(500).then(|| Duration::from_millis(self.rng.below(8000)));
        self.log.push(format!("POST {path} {body}, hangs up: {hangs_up:?}"));
        let api = self.clients.api.clone();
        self.clients.tasks.spawn(async move {
            let begun = Instant::now();
            let call = api.send("POST", &path, body);
            match hangs_up {
                Some(after) => {
                    drop(timeout(after, call).await);
                    None
                }
                None => Some((path.clone(), call.await, begun.elapsed())),
            }
        });
    }

    /// Frees space on the host's disk.
    pub(super) fn make_room(&mut self) {
        self.log.push("the disk has room".to_owned());
        self.world.set_space(ROOM);
    }

    /// Ends the clients' connections, because the daemon dies.
    pub(super) async fn lose_clients(&mut self) {
        self.clients.tasks.abort_all();
        while self.clients.tasks.join_next().await.is_some() {}
    }

    /// Verifies the answers that came by now.
    pub(super) fn check_answers(&mut self) {
        while let Some(ended) = self.clients.tasks.try_join_next() {
            let answered = ended.expect("a client does not panic");
            if let Some(answered) = answered {
                self.check(&answered);
            }
        }
    }

    /// Waits for all answers.
    pub(super) async fn answer_all(&mut self) {
        while let Some(ended) = self.clients.tasks.join_next().await {
            let answered = ended.expect("a client does not panic");
            if let Some(answered) = answered {
                self.check(&answered);
            }
        }
    }

    /// Checks that a waiting client gets its result, or the reason for the failure, within the time limit.
    fn check(&self, (path, (status, body), took): &(String, Answer, Duration)) {
        let log = || self.log.join("\n");
        let message = body["message"].as_str().unwrap_or_default().trim_end();
        let is_answer = match status {
            201 => body["id"].is_string(),
            400 | 409 | 507 => !message.is_empty() && !message.ends_with(':'),
            // Nothing else removes the awaited object before the client could read why it failed.
            404 => self.has_removed,
            _ => false,
        };
        assert!(is_answer, "{path} was answered {status} {body}\n{}", log());
        // Commits take no time here.
        assert!(*took <= VERB_WAIT_MAX, "{path} was answered after {took:?}\n{}", log());
    }
}
