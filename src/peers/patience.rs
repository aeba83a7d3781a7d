//! Bodies that must arrive at a minimum rate.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::HttpBody;
use bytes::{Buf, Bytes};
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

/// The time for which a sender may still make us wait: waiting uses it up, and every received byte adds to
/// it.
///
/// The time counts only while there is nothing to read: a slow reader does not make its sender late.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    left: Duration,
    most: Duration,
    per_byte: Duration,
}

impl Patience {
    /// Makes the patience for a body that must arrive completely within a time.
    pub(crate) fn in_all(most: Duration) -> Self {
        Self { left: most, most, per_byte: Duration::ZERO }
    }

    /// Makes the patience for a body of any length, which must arrive at `bytes_per_second` at least over a
    /// time of `most`.
    pub(crate) fn at_rate(most: Duration, bytes_per_second: u32) -> Self {
        Self { left: most, most, per_byte: Duration::from_secs(1) / bytes_per_second.max(1) }
    }

    fn use_up(&mut self, waited: Duration) {
        self.left = self.left.saturating_sub(waited);
    }

    fn regain(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(self.per_byte.saturating_mul(bytes)).min(self.most);
    }
}

/// The error for a sender that was slower than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooSlow;

impl fmt::Display for TooSlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the body came too slowly")
    }
}

impl std::error::Error for TooSlow {}

/// A body that ends with [`TooSlow`] when its sender used up the patience.
pub(crate) struct Patient<Inner> {
    body: Inner,
    patience: Patience,
    timer: Pin<Box<Sleep>>,
    /// Start of the current wait.
    waiting: Option<Instant>,
}

impl<Inner> Patient<Inner> {
    pub(crate) fn new(body: Inner, patience: Patience) -> Self {
        Self { body, patience, timer: Box::pin(sleep_until(Instant::now())), waiting: None }
    }
}

impl<Inner> HttpBody for Patient<Inner>
where
    Inner: HttpBody<Data = Bytes> + Unpin,
    Inner::Error: Into<axum::BoxError>,
{
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            if let Some(since) = self.waiting.take() {
                self.patience.use_up(since.elapsed());
            }
            if let Some(Ok(frame)) = &frame {
                self.patience.regain(frame.data_ref().map_or(0, Buf::remaining));
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        if self.waiting.is_none() {
            let now = Instant::now();
            self.waiting = Some(now);
            let ends = now + self.patience.left;
            self.timer.as_mut().reset(ends);
        }
        ready!(self.timer.as_mut().poll(context));
        Poll::Ready(Some(Err(TooSlow.into())))
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
    use axum::body::Body;
    use futures::stream;

    use super::*;

    const MOST: Duration = Duration::from_secs(30);

    /// Makes a body of `count` pieces of `size` bytes, one after each pause of `every`.
    fn drip(size: usize, every: Duration, count: usize) -> Body {
        let pieces = stream::unfold(0, move |number| async move {
            (number < count).then_some(())?;
            tokio::time::sleep(every).await;
            Some((Ok::<_, std::io::Error>(Bytes::from(vec![0; size])), number + 1))
        });
        Body::from_stream(pieces)
    }

    async fn read(body: Body, patience: Patience) -> Result<usize, String> {
        let whole = axum::body::to_bytes(Body::new(Patient::new(body, patience)), usize::MAX).await;
        whole.map(|bytes| bytes.len()).map_err(|error| error.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_is_given_up_and_one_that_flows_may_take_as_long_as_it_likes() {
        let second = Duration::from_secs(1);
        let rate = Patience::at_rate(MOST, 1000);
        assert_eq!(read(drip(1, 20 * second, 1000), rate).await, Err(TooSlow.to_string()));
        assert_eq!(read(drip(900, second, 1000), rate).await, Err(TooSlow.to_string()));
        assert_eq!(read(drip(1100, second, 10_000), rate).await, Ok(11_000_000));
        assert_eq!(read(drip(1100, second, 40), Patience::in_all(MOST)).await, Err(TooSlow.to_string()));
        assert_eq!(read(drip(1100, second, 20), Patience::in_all(MOST)).await, Ok(22_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_does_not_make_its_sender_late() {
        let mut body = Patient::new(Body::from("all of it"), Patience::in_all(MOST));
        tokio::time::sleep(10 * MOST).await;
        let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        assert!(frame.expect("a frame").is_ok());
    }
}
