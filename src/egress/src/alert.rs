//! Alerts to guests whose TLS connections are refused before their handshake.
//!
//! Until the ServerHello an alert is not encrypted, so it can be written without a handshake.

use stead_schemas::egress::Reason;
use tokio::io::{AsyncWrite, AsyncWriteExt};

/// Record type of an alert.
const RECORD: u8 = 21;
/// Level of an alert that ends the connection.
const FATAL: u8 = 2;

/// Returns the code of the alert for a reason (RFC 8446, section 6.2).
fn code(reason: Reason) -> u8 {
    match reason {
        Reason::NameMismatch => 112,
        Reason::HostNotAllowed | Reason::AddressDenied | Reason::PolicyChanged | Reason::Loop => 49,
        Reason::BadHello | Reason::HelloTooLarge | Reason::BadHost => 50,
        Reason::UpstreamCertificate => 42,
        Reason::ClientCertificate => 40,
        Reason::NoCommonProtocol => 120,
        _ => 80,
    }
}

/// Writes the alert for a reason. A guest that does not take it is closed without one.
pub(crate) async fn send<Stream: AsyncWrite + Unpin>(stream: &mut Stream, reason: Reason) {
    let record = [RECORD, 3, 3, 0, 2, FATAL, code(reason)];
    // The socket's buffer of a new connection takes these few bytes at once.
    let _ = stream.write_all(&record).await;
    let _ = stream.shutdown().await;
}
