//! `GET /instances?watch=true&resource_version=N`: changes as they happen, as one JSON line each.
//!
//! A line is `{"type": "added"|"modified"|"deleted", "resource_version": N, "object": {...}}`. A client that
//! fell behind, or asks from a version that is too old, gets `{"type": "too_old", "oldest": N}` and lists
//! again. When nothing happens, `{"type": "bookmark", "resource_version": N}` comes from time to time: all
//! changes up to N were sent.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use stead_controllers::store::{Change, Event, Store, TooOld, Watch};
use stead_schemas::api::InstanceEvent;
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Kind, Object, Tags};

use super::auth::{Bearer, Scope};
use super::pace::{Pace, Participant};
use super::tags::has_tags;
use super::{ApiState, lookup};

/// Number of revisions whose lines are kept for other watches. Watches that keep up need the newest few.
const LINES_MAX: u64 = 64;

/// The part of all watches that they share, so that a change costs each further watch little.
#[derive(Debug, Default)]
pub(super) struct Watches {
    pace: Arc<Pace>,
    lines: Mutex<VecDeque<Line>>,
}

/// The line of one change, for readers with the same right to see secrets.
#[derive(Debug, Clone)]
struct Line {
    revision: u64,
    shows_secrets: bool,
    text: Bytes,
}

impl Watches {
    /// Returns the line of an event of this object. For the newest events it is made once for all readers with the
    /// same rights; who reads old events does that at its own cost.
    fn line(&self, store: &Store, bearer: &Bearer, event: &Event, object: &Object<Instance>) -> Bytes {
        if store.revision().saturating_sub(event.revision) >= LINES_MAX {
            return rendered(store, bearer, event, object);
        }
        let (revision, shows_secrets) = (event.revision, bearer.sees(Scope::InstanceSecrets));
        // The lock is held while a line is made: the other watches wait for this very line.
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |line: &&Line| (line.revision, line.shows_secrets) == (revision, shows_secrets);
        if let Some(line) = lines.iter().rev().find(same) {
            return line.text.clone();
        }
        let text = rendered(store, bearer, event, object);
        keep(&mut lines, Line { revision, shows_secrets, text: text.clone() });
        text
    }
}

/// Keeps a line, and drops those that are too old for other watches.
fn keep(lines: &mut VecDeque<Line>, line: Line) {
    lines.retain(|other| other.revision + LINES_MAX > line.revision);
    lines.push_back(line);
}

fn rendered(store: &Store, bearer: &Bearer, event: &Event, object: &Object<Instance>) -> Bytes {
    let resource_version = event.revision;
    let object = Box::new(lookup::view(store, bearer, object));
    text(&match event.change {
        Change::Created => InstanceEvent::Added { resource_version, object },
        Change::Updated | Change::StatusUpdated => InstanceEvent::Modified { resource_version, object },
        Change::Deleted => InstanceEvent::Deleted { resource_version, object },
    })
}

/// Returns the object of an event, or `None` if it is gone: its deletion is sent as an event of its own.
fn object_of(store: &Store, event: &Event) -> Option<Arc<Object<Instance>>> {
    match event.change {
        Change::Created | Change::Updated | Change::StatusUpdated => store.get::<Instance>(&event.uid),
        Change::Deleted => event.last::<Instance>(),
    }
}

/// Streams the changes after a version, or from now on; a bookmark comes after each `idle_max` without one.
pub(super) fn instances(
    state: &ApiState,
    bearer: Bearer,
    after: Option<u64>,
    tags: Tags,
    idle_max: Duration,
) -> Response {
    let from = after.unwrap_or_else(|| state.store().revision());
    let body = match state.store().watch(Some(Instance::NAME), from) {
        Ok(watch) => {
            let participant = state.0.watches.pace.join();
            let following = Following { state: state.clone(), watch, tags, bearer, participant, idle_max };
            Body::from_stream(futures::stream::unfold(Some(following), next))
        }
        Err(error) => Body::from(too_old(&error)),
    };
    ([(header::CONTENT_TYPE, "application/x-ndjson"), (header::CACHE_CONTROL, "no-cache")], body)
        .into_response()
}

/// The state of one watch between two lines.
struct Following {
    state: ApiState,
    watch: Watch,
    tags: Tags,
    bearer: Bearer,
    participant: Participant,
    idle_max: Duration,
}

impl Following {
    async fn event(&mut self) -> Result<Event, TooOld> {
        loop {
            if let Some(event) = self.watch.next().now_or_never() {
                return event;
            }
            self.participant.rest().await;
            self.watch.changed().await;
        }
    }
}

impl Drop for Following {
    /// Drops the kept lines with the last watch: they contain what only its reader might see.
    fn drop(&mut self) {
        if self.participant.is_last() {
            self.state.0.watches.lines.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }
}

async fn next(following: Option<Following>) -> Option<(Result<Bytes, Infallible>, Option<Following>)> {
    let mut following = following?;
    loop {
        let line = match tokio::time::timeout(following.idle_max, following.event()).await {
            Err(_) => text(&InstanceEvent::Bookmark { resource_version: following.watch.revision() }),
            Ok(Ok(event)) => {
                let Following { state, tags, bearer, .. } = &following;
                let object = object_of(state.store(), &event).filter(|object| is_wanted(object, tags));
                let Some(object) = object else {
                    // Thousands of events may come that this watch does not want.
                    tokio::task::yield_now().await;
                    continue;
                };
                state.0.watches.line(state.store(), bearer, &event, &object)
            }
            Ok(Err(error)) => return Some((Ok(too_old(&error)), None)),
        };
        return Some((Ok(line), Some(following)));
    }
}

fn is_wanted(object: &Object<Instance>, tags: &Tags) -> bool {
    has_tags(&object.meta.tags, tags) && !object.is_pooled()
}

fn too_old(error: &TooOld) -> Bytes {
    text(&InstanceEvent::TooOld { oldest: error.oldest })
}

fn text(event: &InstanceEvent) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(revision: u64) -> Line {
        Line { revision, shows_secrets: true, text: Bytes::from_static(b"{}") }
    }

    #[test]
    fn lines_of_the_newest_changes_are_kept_and_no_others() {
        let mut lines = VecDeque::new();
        for revision in 1..=1000 {
            keep(&mut lines, line(revision));
        }
        assert_eq!(
            lines.iter().map(|line| line.revision).collect::<Vec<_>>(),
            (937..=1000).collect::<Vec<_>>()
        );
    }
}
