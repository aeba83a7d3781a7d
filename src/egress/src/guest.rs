//! A connection of a guest: its instance, its number and its permits.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use stead_schemas::egress::{Host, Reason, TlsUse};
use tokio::sync::OwnedSemaphorePermit;

use crate::audit::Record;
use crate::policies::Lease;
use crate::proxy::Proxy;
use crate::upstream::Dialed;

/// A connection of a guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) lease: Lease,
    number: u64,
    client: SocketAddr,
    /// The permit of the first bytes or a handshake; `None` when the connection is settled.
    handshake: Mutex<Option<OwnedSemaphorePermit>>,
    /// The permits of the connection: of the instance, and of the process.
    _connection: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Guest {
    /// Takes the permits of a new connection. A refusal is noted in the audit log.
    pub(crate) fn new(
        proxy: &Arc<Proxy>,
        lease: Lease,
        client: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) -> Result<Arc<Self>, Reason> {
        let number = proxy.number();
        let taken = match (lease.connection(), lease.new_handshake()) {
            (None, _) => Err(Reason::TooManyConnections),
            (Some(_), None) => Err(Reason::TooManyHandshakes),
            (Some(connection), Some(handshake)) => Ok((connection, handshake)),
        };
        let (connection, handshake) = taken.inspect_err(|reason| {
            Record::new(lease.log().clone(), number, client.port()).refuse(*reason);
        })?;
        Ok(Arc::new(Self {
            proxy: proxy.clone(),
            lease,
            number,
            client,
            handshake: Mutex::new(Some(handshake)),
            _connection: (connection, permit),
        }))
    }

    /// Begins a record of a request or a tunnel.
    pub(crate) fn record(&self) -> Record {
        Record::new(self.lease.log().clone(), self.number, self.client.port())
    }

    /// Returns the address of the guest.
    fn address(&self) -> IpAddr {
        self.client.ip().to_canonical()
    }

    /// Connects to a host that the guest may reach.
    ///
    /// # Errors
    /// Returns the reason after a bounded time.
    pub(crate) async fn dial(&self, host: &Host, port: u16) -> Result<Dialed, Reason> {
        self.proxy.dialer.connect(self.address(), host, port).await
    }

    /// Notes the end of a connection of HTTP that belongs to no request, unless it is an ordinary one.
    pub(crate) fn note_end(&self, reason: Reason, tls: TlsUse) {
        if !matches!(reason, Reason::Idle | Reason::Broken) {
            let mut record = self.record();
            record.line().tls = tls;
            record.refuse(reason);
        }
    }

    /// Gives the permit of the handshake back.
    pub(crate) fn settle(&self) {
        drop(self.handshake.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Takes a permit for another handshake, after CONNECT.
    pub(crate) fn unsettle(&self) -> Result<(), Reason> {
        let permit = self.lease.handshake().ok_or(Reason::TooManyHandshakes)?;
        *self.handshake.lock().unwrap_or_else(PoisonError::into_inner) = Some(permit);
        Ok(())
    }
}
