//! Choice of the connection that makes room for another one when all permits are taken.
//!
//! Guarantees: a connection over which a request is being answered is never closed for the sake of another;
//! among the others, the client with the most connections gives up the connection that was idle the longest.
//! Never: closes anything while there is room.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::client::Origin;

/// Time within which the end of a response is sent after it was made; a client that takes it more slowly has
/// not read it.
const SENT_AFTER: Duration = Duration::from_secs(1);

/// The seats of all connections.
#[derive(Debug, Default)]
pub(super) struct Seats {
    table: Mutex<Table>,
    /// Notified when a connection becomes idle.
    idled: Notify,
}

/// The seats and their clients. No operation visits all seats: thousands may come at the same time.
#[derive(Debug, Default)]
struct Table {
    seats: BTreeMap<u64, Sitter>,
    clients: BTreeMap<Origin, Held>,
    last: u64,
}

#[derive(Debug)]
struct Sitter {
    client: Origin,
    /// Time since which the connection is idle; `None` while a request is being answered.
    idle_since: Option<Instant>,
    /// True if something was answered, whose end may still be on its way.
    has_asked: bool,
    is_leaving: bool,
    leave: Arc<Notify>,
}

/// The seats of one client, without those that were asked to leave.
#[derive(Debug, Default)]
struct Held {
    count: usize,
    /// Seats of idle connections with the time since which they are idle.
    idle: BTreeSet<(Instant, u64)>,
}

impl Table {
    /// Changes a seat, and what is known of its client with it.
    fn change(&mut self, number: u64, change: impl FnOnce(&mut Sitter)) {
        if let Some(mut sitter) = self.take(number) {
            change(&mut sitter);
            self.put(number, sitter);
        }
    }

    fn put(&mut self, number: u64, sitter: Sitter) {
        if !sitter.is_leaving {
            let held = self.clients.entry(sitter.client).or_default();
            held.count += 1;
            held.idle.extend(sitter.idle_since.map(|since| (since, number)));
        }
        self.seats.insert(number, sitter);
    }

    fn take(&mut self, number: u64) -> Option<Sitter> {
        let sitter = self.seats.remove(&number)?;
        if !sitter.is_leaving
            && let Some(held) = self.clients.get_mut(&sitter.client)
        {
            held.count -= 1;
            if let Some(since) = sitter.idle_since {
                held.idle.remove(&(since, number));
            }
            if held.count == 0 {
                self.clients.remove(&sitter.client);
            }
        }
        Some(sitter)
    }
}

/// The seat of one connection, freed when it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    seats: Arc<Seats>,
    number: u64,
    leave: Arc<Notify>,
}

impl Seats {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a seat for a new connection, which is idle until its first request arrives.
    pub(super) fn sit(self: &Arc<Self>, client: Origin) -> Seat {
        let mut table = self.lock();
        table.last += 1;
        let (number, leave) = (table.last, Arc::new(Notify::new()));
        let idle_since = Some(Instant::now());
        let (has_asked, is_leaving) = (false, false);
        table.put(number, Sitter { client, idle_since, has_asked, is_leaving, leave: leave.clone() });
        Seat { seats: self.clone(), number, leave }
    }

    /// Asks an idle connection to make room; returns false when there is none.
    pub(super) fn make_room(&self) -> bool {
        let mut table = self.lock();
        let with_idle = table.clients.values().filter_map(|held| Some((held.count, *held.idle.first()?)));
        let first = with_idle.min_by_key(|&(count, idle)| (Reverse(count), idle));
        let Some((_, (_, number))) = first else { return false };
        table.change(number, |sitter| {
            sitter.is_leaving = true;
            sitter.leave.notify_one();
        });
        true
    }

    /// Waits until a connection has become idle since the last call.
    pub(super) async fn idled(&self) {
        self.idled.notified().await;
    }
}

impl Seat {
    /// Waits until the connection is asked to make room.
    pub(super) async fn is_wanted(&self) {
        self.leave.notified().await;
    }

    /// True if nothing is lost when the connection is closed now: it is idle, and its response is sent.
    pub(super) fn may_go(&self) -> bool {
        self.seats.lock().seats.get(&self.number).is_none_or(|sitter| match sitter.idle_since {
            Some(since) => !sitter.has_asked || since.elapsed() >= SENT_AFTER,
            None => false,
        })
    }

    /// Marks the connection as busy with a request as long as the returned value lives.
    pub(super) fn busy(&self) -> Busy {
        let set = |sitter: &mut Sitter| (sitter.idle_since, sitter.has_asked) = (None, true);
        self.seats.lock().change(self.number, set);
        Busy { seats: self.seats.clone(), number: self.number }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.lock().take(self.number);
    }
}

/// A marker for a request and its response that are in progress.
#[derive(Debug)]
pub(super) struct Busy {
    seats: Arc<Seats>,
    number: u64,
}

impl Busy {
    /// Wraps a response's body so that the connection stays busy until it is sent.
    pub(super) fn over(self, body: Body) -> Body {
        Body::new(Answered { body, _busy: self })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.seats.lock().change(self.number, |sitter| sitter.idle_since = Some(Instant::now()));
        self.seats.idled.notify_one();
    }
}

struct Answered {
    body: Body,
    _busy: Busy,
}

impl HttpBody for Answered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> Origin {
        Origin::Network([10, 0, 0, last].into())
    }

    /// True if this connection was asked to leave.
    async fn is_asked(seat: &Seat) -> bool {
        tokio::time::timeout(Duration::ZERO, seat.is_wanted()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn the_client_with_the_most_connections_gives_up_the_one_that_was_idle_the_longest() {
        let seats = Arc::<Seats>::default();
        assert!(!seats.make_room(), "nobody is there");
        let honest = seats.sit(client(1));
        let crowd: Vec<Seat> = (0..3).map(|_| seats.sit(client(2))).collect();
        let busy = crowd[0].busy();
        tokio::time::advance(SENT_AFTER).await;
        // This connection was idle before, and is idle again from now on.
        drop(crowd[1].busy());
        assert!(seats.make_room());
        assert!(is_asked(&crowd[2]).await && !is_asked(&crowd[1]).await && !is_asked(&honest).await);
        // Connections that were asked to leave no longer count: one connection each is left, and one of the
        // two is busy.
        assert!(seats.make_room() && is_asked(&crowd[1]).await);
        assert!(seats.make_room() && is_asked(&honest).await);
        assert!(!seats.make_room(), "what is left is busy");
        assert!(!crowd[0].may_go());
        drop(busy);
        seats.idled().await;
        assert!(seats.make_room() && is_asked(&crowd[0]).await);
        assert!(!crowd[0].may_go(), "its answer may be on its way");
        tokio::time::advance(SENT_AFTER).await;
        assert!(crowd[0].may_go());
        drop((honest, crowd));
        assert!(seats.lock().seats.is_empty() && seats.lock().clients.is_empty());
    }
}
