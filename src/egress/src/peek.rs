//! The first bytes of a guest's connection, which decide how it is handled.
//!
//! Guarantees: at most [`EGRESS_HELLO_BYTES_MAX`] are read in at most [`EGRESS_HELLO_TIMEOUT`]; nothing that was
//! read is lost; one parser reads the ClientHello for the decision and for the handshake.

use rustls::server::{Accepted, Acceptor};
use stead_schemas::egress::{HostName, Reason};
use stead_schemas::limits::{EGRESS_HELLO_BYTES_MAX, EGRESS_HELLO_TIMEOUT};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::stream::GuestStream;

/// First byte of a TLS record of the handshake.
const HANDSHAKE_RECORD: u8 = 22;
/// Longest method of HTTP that is recognised, in bytes.
const METHOD_BYTES_MAX: usize = 20;
/// Number of bytes that one read takes at most.
const READ_BYTES_MAX: usize = 4 << 10;

/// A ClientHello.
pub(crate) struct Hello {
    /// The parsed message, with which the handshake goes on.
    pub(crate) accepted: Accepted,
    /// All bytes that were read, for a server that gets them instead.
    pub(crate) bytes: Vec<u8>,
    pub(crate) name: Option<HostName>,
    /// The protocols that the client offers.
    pub(crate) protocols: Vec<Vec<u8>>,
}

/// The kind of a connection.
pub(crate) enum First {
    Tls(Box<Hello>),
    Http,
    /// A protocol that only a tunnel may carry.
    Other,
    /// The guest sent nothing and waits for the server.
    Silent,
    /// The guest closed the connection.
    Closed,
}

/// Reads until the kind of the connection is known. Bytes of other kinds than TLS are put back.
///
/// # Errors
/// Returns the reason for which a ClientHello is refused.
pub(crate) async fn first(stream: &mut GuestStream) -> Result<First, Reason> {
    let mut bytes = Vec::new();
    let kind = match timeout(EGRESS_HELLO_TIMEOUT, read(stream, &mut bytes)).await {
        Ok(kind) => kind?,
        Err(_) if bytes.is_empty() => First::Silent,
        Err(_) if bytes[0] == HANDSHAKE_RECORD => return Err(Reason::HelloTimeout),
        Err(_) => First::Other,
    };
    match kind {
        First::Tls(mut hello) => {
            hello.bytes = bytes;
            Ok(First::Tls(hello))
        }
        other => {
            stream.put_back(bytes.into());
            Ok(other)
        }
    }
}

/// Reads into `bytes` until the kind is known.
async fn read(stream: &mut GuestStream, bytes: &mut Vec<u8>) -> Result<First, Reason> {
    let mut acceptor = Acceptor::default();
    loop {
        let before = bytes.len();
        if before >= EGRESS_HELLO_BYTES_MAX {
            return Err(Reason::HelloTooLarge);
        }
        let most = READ_BYTES_MAX.min(EGRESS_HELLO_BYTES_MAX - before);
        match stream.take(u64::try_from(most).unwrap_or(u64::MAX)).read_buf(bytes).await {
            Ok(0) | Err(_) if before == 0 => return Ok(First::Closed),
            Ok(0) | Err(_) if bytes[0] == HANDSHAKE_RECORD => return Err(Reason::BadHello),
            Ok(0) | Err(_) => return Ok(First::Other),
            Ok(_) => {}
        }
        if bytes[0] == HANDSHAKE_RECORD {
            if let Some(hello) = feed(&mut acceptor, &bytes[before..])? {
                return Ok(First::Tls(Box::new(hello)));
            }
        } else if let Some(is_http) = is_http(bytes) {
            return Ok(if is_http { First::Http } else { First::Other });
        }
    }
}

/// Gives bytes to the parser. Returns the ClientHello when it is complete.
fn feed(acceptor: &mut Acceptor, mut bytes: &[u8]) -> Result<Option<Hello>, Reason> {
    while !bytes.is_empty() {
        match acceptor.read_tls(&mut bytes) {
            Ok(0) | Err(_) => return Err(Reason::BadHello),
            Ok(_) => {}
        }
    }
    let Some(accepted) = acceptor.accept().map_err(|_| Reason::BadHello)? else { return Ok(None) };
    let hello = accepted.client_hello();
    let name = hello.server_name().map(str::parse).transpose().map_err(|_| Reason::BadHello)?;
    let protocols = hello.alpn().map(|names| names.map(<[u8]>::to_vec).collect()).unwrap_or_default();
    Ok(Some(Hello { accepted, bytes: Vec::new(), name, protocols }))
}

/// Returns whether the bytes begin with a method of HTTP, or `None` while that is not known.
fn is_http(bytes: &[u8]) -> Option<bool> {
    let is_of_method = |byte: &u8| byte.is_ascii_uppercase() || *byte == b'-';
    match bytes.iter().position(|byte| !is_of_method(byte)) {
        Some(at) => Some(at > 0 && at <= METHOD_BYTES_MAX && bytes[at] == b' '),
        None => (bytes.len() > METHOD_BYTES_MAX).then_some(false),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_method_of_http_is_recognised_by_its_end() {
        for (bytes, expected) in [
            ("GET / HTTP/1.1", Some(true)),
            ("M-SEARCH *", Some(true)),
            ("PRI * HTTP/2.0", Some(true)),
            ("GE", None),
            ("SSH-2.0-OpenSSH_9 x", Some(false)),
            ("get / HTTP/1.1", Some(false)),
            (" GET /", Some(false)),
            ("EHLO\r\n", Some(false)),
            ("AAAAAAAAAAAAAAAAAAAAAAAAA", Some(false)),
            ("\0\0", Some(false)),
        ] {
            assert_eq!(is_http(bytes.as_bytes()), expected, "{bytes:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_hello_are_refused() {
        for bytes in [&[22, 3, 1, 0, 1, 0][..], &[22, 9, 9, 255, 255, 1], &[22, 3, 1, 0, 4, 2, 0, 0, 0]] {
            let mut acceptor = Acceptor::default();
            match feed(&mut acceptor, bytes) {
                Ok(None) => {
                    let more = [0; 512];
                    assert!(feed(&mut acceptor, &more).is_err(), "{bytes:?}");
                }
                Ok(Some(_)) => panic!("{bytes:?} is no hello"),
                Err(reason) => assert_eq!(reason, Reason::BadHello),
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic_and_in_the_same_way_however_they_are_split(
            bytes in proptest::collection::vec(any::<u8>(), 1..200), at in 0usize..200,
        ) {
            let message = [&[HANDSHAKE_RECORD, 3, 1, 0, 120, 1, 0, 0, 116][..], &bytes].concat();
            let at = at.min(message.len());
            let outcome = |parts: &[&[u8]]| {
                let mut acceptor = Acceptor::default();
                for part in parts {
                    match feed(&mut acceptor, part) {
                        Ok(None) => {}
                        Ok(Some(hello)) => return Some(Ok(hello.name)),
                        Err(reason) => return Some(Err(reason)),
                    }
                }
                None
            };
            prop_assert_eq!(outcome(&[&message]), outcome(&[&message[..at], &message[at..]]));
            let _ = is_http(&bytes);
        }
    }
}
