//! Who of the connected clients makes room for another one when all places are taken.
//!
//! Guarantees: a connection over which a request is being answered is never closed for another's sake; of the
//! others, the client with the most connections gives up the one that was idle the longest.
//! Never: closes anything while there is room.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

/// The last of an answer is sent within this time after it was made; who takes it more slowly has not read it.
const SENT_AFTER: Duration = Duration::from_secs(1);

/// All seats that are taken.
#[derive(Debug, Default)]
pub(super) struct Seats {
    table: Mutex<Table>,
    /// Told when a connection has nothing more to do.
    idled: Notify,
}

#[derive(Debug, Default)]
struct Table {
    seats: BTreeMap<u64, Sitter>,
    last: u64,
}

#[derive(Debug)]
struct Sitter {
    client: IpAddr,
    /// `None` while a request is being answered.
    idle_since: Option<Instant>,
    /// Something was answered, whose end may still be on its way.
    has_asked: bool,
    is_leaving: bool,
    leave: Arc<Notify>,
}

/// The seat of one connection, free again with the value.
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

    /// Takes a seat for a connection that was just made, and is idle until its first request is there.
    pub(super) fn sit(self: &Arc<Self>, client: IpAddr) -> Seat {
        let mut table = self.lock();
        table.last += 1;
        let (number, leave) = (table.last, Arc::new(Notify::new()));
        let idle_since = Some(Instant::now());
        let (has_asked, is_leaving) = (false, false);
        table
            .seats
            .insert(number, Sitter { client, idle_since, has_asked, is_leaving, leave: leave.clone() });
        Seat { seats: self.clone(), number, leave }
    }

    /// Asks an idle connection to make room; false when there is none.
    pub(super) fn make_room(&self) -> bool {
        let mut table = self.lock();
        let mut held_by_client: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for sitter in table.seats.values().filter(|sitter| !sitter.is_leaving) {
            *held_by_client.entry(sitter.client).or_default() += 1;
        }
        let idle =
            table.seats.values_mut().filter(|sitter| !sitter.is_leaving && sitter.idle_since.is_some());
        let first = idle.min_by_key(|sitter| {
            let connections = held_by_client.get(&sitter.client).copied().unwrap_or_default();
            (std::cmp::Reverse(connections), sitter.idle_since)
        });
        let Some(sitter) = first else { return false };
        sitter.is_leaving = true;
        sitter.leave.notify_one();
        true
    }

    /// Waits until a connection has become idle since this was asked last.
    pub(super) async fn idled(&self) {
        self.idled.notified().await;
    }
}

impl Seat {
    /// Ends when the connection is to make room.
    pub(super) async fn is_wanted(&self) {
        self.leave.notified().await;
    }

    /// Nothing is lost when the connection is closed now: it is idle, and what it was answered is sent.
    pub(super) fn may_go(&self) -> bool {
        self.seats.lock().seats.get(&self.number).is_none_or(|sitter| match sitter.idle_since {
            Some(since) => !sitter.has_asked || since.elapsed() >= SENT_AFTER,
            None => false,
        })
    }

    /// For a request that has come: the connection is busy as long as this lives.
    pub(super) fn busy(&self) -> Busy {
        if let Some(sitter) = self.seats.lock().seats.get_mut(&self.number) {
            (sitter.idle_since, sitter.has_asked) = (None, true);
        }
        Busy { seats: self.seats.clone(), number: self.number }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.lock().seats.remove(&self.number);
    }
}

/// A request and its answer are on their way.
#[derive(Debug)]
pub(super) struct Busy {
    seats: Arc<Seats>,
    number: u64,
}

impl Busy {
    /// An answer's body that keeps the connection busy until it is sent.
    pub(super) fn over(self, body: Body) -> Body {
        Body::new(Answered { body, _busy: self })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(sitter) = self.seats.lock().seats.get_mut(&self.number) {
            sitter.idle_since = Some(Instant::now());
        }
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

    fn client(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// Whether this connection was asked to leave.
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
        // It was idle before, and is so since now.
        drop(crowd[1].busy());
        assert!(seats.make_room());
        assert!(is_asked(&crowd[2]).await && !is_asked(&crowd[1]).await && !is_asked(&honest).await);
        // Who was asked counts no more: one connection each, and one of the two is busy.
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
        assert!(seats.lock().seats.is_empty());
    }
}
