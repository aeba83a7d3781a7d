//! A connection to the kernel by rtnetlink, which is opened again when it breaks.
//!
//! Guarantees: a request never fails because of an earlier one.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rtnetlink::Handle;
use rtnetlink::sys::AsyncSocket;
use stead_controllers::host::{HostError, HostErrorKind};

/// Error that Linux returns when a bridge has no port number left.
const EXFULL: i32 = 54;
pub(super) const ENODEV: i32 = 19;

/// A netlink socket with its own thread: the kernel executes requests while they are sent, and may wait for its
/// configuration lock meanwhile.
#[derive(Debug)]
pub(super) struct Connection(Mutex<Open>);

#[derive(Debug)]
struct Open {
    handle: Handle,
    /// Number of the socket, unique in the network namespace.
    port_number: u32,
}

impl Connection {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self(Mutex::new(Self::connect()?)))
    }

    /// Opens a connection. The thread ends when the last handle is dropped.
    fn connect() -> io::Result<Open> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => return drop(sender.send(Err(error))),
            };
            runtime.block_on(async {
                let opened = rtnetlink::new_connection().and_then(|(mut connection, handle, _)| {
                    let address = connection.socket_mut().socket_mut().bind_auto()?;
                    Ok((connection, Open { handle, port_number: address.port_number() }))
                });
                match opened {
                    Ok((connection, open)) => {
                        // The receiver is gone only if `connect` itself was unwound.
                        let _ = sender.send(Ok(open));
                        drop(sender);
                        connection.await;
                    }
                    Err(error) => drop(sender.send(Err(error))),
                }
            });
        };
        std::thread::Builder::new().name("netlink".to_owned()).spawn(run)?;
        receiver.recv().unwrap_or_else(|_| Err(io::Error::other("the netlink thread ended")))
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn handle(&self) -> Handle {
        self.lock().handle.clone()
    }

    pub(super) fn port_number(&self) -> u32 {
        self.lock().port_number
    }

    /// Converts the error into the port's terms. A closed socket is opened again for the next request.
    pub(super) fn failed(
        &self,
        operation: &'static str,
        subject: &str,
        error: rtnetlink::Error,
    ) -> HostError {
        if let (rtnetlink::Error::RequestFailed, Ok(fresh)) = (&error, Self::connect()) {
            *self.lock() = fresh;
        }
        let kind = match errno(&error) {
            Some(ENODEV) => HostErrorKind::Missing,
            Some(EXFULL) => HostErrorKind::Exhausted,
            Some(_) => HostError::kind_of_io(&io_error(&error)),
            None => HostErrorKind::Transient,
        };
        match errno(&error) {
            Some(_) => HostError::new(kind, operation, subject).because(io_error(&error)),
            None => HostError::new(kind, operation, subject).because(error),
        }
    }
}

pub(super) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().wrapping_neg()),
        _ => None,
    }
}

pub(super) fn io_error(error: &rtnetlink::Error) -> io::Error {
    errno(error).map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
}
