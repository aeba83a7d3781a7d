//! Connections that the kernel redirected to the proxy.

use std::net::IpAddr;
use std::sync::Arc;

use stead_schemas::egress::Reason;
use tokio::net::TcpStream;

use crate::connection::{self, Target};
use crate::guest::Guest;
use crate::stream::GuestStream;

/// Serves one connection.
pub(super) async fn serve(guest: Arc<Guest>, stream: TcpStream) {
    let original = match guest.proxy.destinations.original(&stream) {
        Ok(original) => original,
        Err(error) => {
            tracing::debug!(%error, "a connection has no original destination");
            return guest.record().refuse(Reason::Loop);
        }
    };
    // A guest that connects to the listener itself was not redirected.
    if stream.local_addr().is_ok_and(|local| {
        canonical(local.ip()) == canonical(original.ip()) && local.port() == original.port()
    }) {
        let mut record = guest.record();
        record.set_destination(&original.ip().into(), original.port());
        return record.refuse(Reason::Loop);
    }
    connection::serve(guest, GuestStream::new(stream), Target::Captured(original)).await;
}

fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}
