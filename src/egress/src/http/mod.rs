//! HTTP between a guest and a server, one connection to one connection.
//!
//! Guarantees: messages are parsed and written anew, so that what a server reads is what was checked; a
//! request is sent only to the host that it names; nothing is translated between versions of HTTP; bodies
//! stream with backpressure.
//! Never: keeps a connection for another guest.

mod answer;
mod body;
mod check;
mod exchange;
mod fields;
mod inject;
mod sender;
mod server;

pub(crate) use answer::refusal;
pub(crate) use body::Body;
pub(crate) use check::Expected;
pub(crate) use exchange::{Exchange, Plain, Scope, describe};
pub(crate) use sender::{Life, Sender};
pub(crate) use server::{serve_http1, serve_http2};
