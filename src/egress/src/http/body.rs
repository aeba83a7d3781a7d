//! Bodies on their way through the proxy.
//!
//! Guarantees: a body is counted and never buffered; trailers carry no field that would have a meaning in a
//! head; the record of an exchange ends with the body of its response.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::header::{HeaderMap, HeaderName};
use stead_schemas::egress::Reason;

use super::fields;
use crate::audit::{Counts, Record};
use crate::policies::Active;
use crate::progress::Progress;

/// A body that the proxy sends.
#[derive(Debug)]
pub(crate) enum Body {
    /// A text of the proxy's own; `None` when it was sent.
    Text(Option<Bytes>),
    Request(RequestBody),
    Response(Box<ResponseBody>),
}

/// The body of a guest's request.
#[derive(Debug)]
pub(crate) struct RequestBody {
    incoming: Incoming,
    counts: Arc<Counts>,
    /// Headers that carry credentials; trailers must not have them.
    injected: Vec<HeaderName>,
}

/// The body of a server's response.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    incoming: Incoming,
    /// The policy whose values are masked in trailers.
    active: Arc<Active>,
    end: End,
}

/// The end of an exchange, which comes when this is dropped.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) record: Record,
    /// True if the response arrived whole.
    pub(crate) is_complete: bool,
    /// The connection that may read the next head afterwards; `None` for HTTP/2.
    pub(crate) progress: Option<Progress>,
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.is_complete {
            self.record.note(Reason::Broken);
        }
        if let Some(progress) = &self.progress {
            progress.set_idle();
        }
    }
}

impl Body {
    pub(crate) fn text(text: impl Into<Bytes>) -> Self {
        Self::Text(Some(text.into()))
    }

    pub(crate) fn empty() -> Self {
        Self::Text(None)
    }

    pub(crate) fn request(incoming: Incoming, counts: Arc<Counts>, injected: Vec<HeaderName>) -> Self {
        Self::Request(RequestBody { incoming, counts, injected })
    }

    pub(crate) fn response(incoming: Incoming, active: Arc<Active>, mut end: End) -> Self {
        end.is_complete = incoming.is_end_stream();
        Self::Response(Box::new(ResponseBody { incoming, active, end }))
    }
}

impl RequestBody {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(context));
        Poll::Ready(frame.map(|frame| {
            frame.map(|mut frame| {
                self.counts.up.fetch_add(size(&frame), Ordering::Relaxed);
                if let Some(trailers) = frame.trailers_mut() {
                    fields::clean_trailers(trailers);
                    remove_all(trailers, &self.injected);
                }
                frame
            })
        }))
    }
}

impl ResponseBody {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(context));
        match &frame {
            None => self.end.is_complete = true,
            Some(Err(_)) => self.end.record.note(Reason::UpstreamClosed),
            Some(Ok(frame)) => drop(self.end.record.counts.down.fetch_add(size(frame), Ordering::Relaxed)),
        }
        let is_last = self.incoming.is_end_stream();
        self.end.is_complete |= is_last && matches!(frame, Some(Ok(_)));
        Poll::Ready(frame.map(|frame| {
            frame.map(|mut frame| {
                if let Some(trailers) = frame.trailers_mut() {
                    fields::clean_trailers(trailers);
                    self.active.mask.apply(trailers);
                    self.end.is_complete = true;
                }
                frame
            })
        }))
    }
}

fn remove_all(fields: &mut HeaderMap, names: &[HeaderName]) {
    for name in names {
        fields.remove(name);
    }
}

/// Returns the number of bytes of a frame of data, and 0 for trailers.
fn size(frame: &Frame<Bytes>) -> u64 {
    u64::try_from(frame.data_ref().map_or(0, Buf::remaining)).unwrap_or(u64::MAX)
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Request(body) => body.poll(context),
            Self::Response(body) => body.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Request(body) => body.incoming.is_end_stream(),
            Self::Response(body) => body.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(
                text.as_ref().map_or(0, |text| u64::try_from(text.len()).unwrap_or(u64::MAX)),
            ),
            Self::Request(body) => body.incoming.size_hint(),
            Self::Response(body) => body.incoming.size_hint(),
        }
    }
}
