//! Connections to checked addresses.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};

use stead_schemas::egress::{Host, Reason};
use stead_schemas::limits::{EGRESS_ADDRESSES_MAX, EGRESS_CONNECT_TIMEOUT};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::resolve::{Names, NamesError};
use crate::address_filter::AddressFilter;

/// A connection to a server.
#[derive(Debug)]
pub(crate) struct Dialed {
    pub(crate) stream: TcpStream,
    /// The address that was checked and connected to.
    pub(crate) address: IpAddr,
}

/// Makes connections to servers.
pub(crate) struct Dialer {
    names: Arc<dyn Names>,
    filter: RwLock<Arc<AddressFilter>>,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer").field("filter", &self.filter).finish_non_exhaustive()
    }
}

impl Dialer {
    pub(crate) fn new(names: Arc<dyn Names>, filter: AddressFilter) -> Self {
        Self { names, filter: RwLock::new(Arc::new(filter)) }
    }

    /// Replaces the filter of addresses.
    pub(crate) fn set_filter(&self, filter: AddressFilter) {
        *self.filter.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(filter);
    }

    fn filter(&self) -> Arc<AddressFilter> {
        self.filter.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Checks an address and a port.
    ///
    /// # Errors
    /// Fails for an address that guests may not reach, and for the proxy itself.
    pub(crate) fn check(&self, address: IpAddr, port: u16) -> Result<(), Reason> {
        check(&self.filter(), address, port)
    }

    /// Resolves a host for the guest with this address, checks its addresses, and connects to the first that takes a connection.
    ///
    /// # Errors
    /// Returns the reason after at most [`EGRESS_CONNECT_TIMEOUT`].
    pub(crate) async fn connect(&self, guest: IpAddr, host: &Host, port: u16) -> Result<Dialed, Reason> {
        let connecting = async {
            let addresses = self.addresses(guest, host, port).await?;
            connect_to_one(addresses, port).await
        };
        timeout(EGRESS_CONNECT_TIMEOUT, connecting).await.unwrap_or(Err(Reason::UpstreamTimeout))
    }

    /// Returns the addresses of a host that guests may reach, at least one and at most
    /// [`EGRESS_ADDRESSES_MAX`].
    async fn addresses(&self, guest: IpAddr, host: &Host, port: u16) -> Result<Vec<IpAddr>, Reason> {
        let mut addresses = match host {
            Host::Address(address) => vec![*address],
            Host::Name(name) => self.names.resolve(guest, name).await.map_err(|error| match error {
                NamesError::NotFound => Reason::NameNotFound,
                NamesError::NotAllowed => Reason::HostNotAllowed,
                NamesError::Denied => Reason::AddressDenied,
                NamesError::Failed => Reason::NamesFailed,
            })?,
        };
        if addresses.is_empty() {
            return Err(Reason::NameNotFound);
        }
        let filter = self.filter();
        let mut reason = Reason::AddressDenied;
        addresses.retain(|address| {
            let checked = check(&filter, *address, port);
            if let Err(refused) = checked {
                tracing::debug!(%host, reason = refused.as_str(), "an address is not for guests");
                reason = refused;
            }
            checked.is_ok()
        });
        addresses.truncate(EGRESS_ADDRESSES_MAX);
        if addresses.is_empty() { Err(reason) } else { Ok(addresses) }
    }
}

fn check(filter: &AddressFilter, address: IpAddr, port: u16) -> Result<(), Reason> {
    if filter.is_listener(address, port) {
        return Err(Reason::Loop);
    }
    filter.check(address).map_err(|_| Reason::AddressDenied)
}

async fn connect_to_one(addresses: Vec<IpAddr>, port: u16) -> Result<Dialed, Reason> {
    let mut reason = Reason::UpstreamUnreachable;
    for address in addresses {
        let address = address.to_canonical();
        match TcpStream::connect(SocketAddr::new(address, port)).await {
            Ok(stream) => {
                // Small pieces, such as events, are sent at once.
                let _ = stream.set_nodelay(true);
                return Ok(Dialed { stream, address });
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => reason = Reason::UpstreamTimeout,
            Err(error) => tracing::debug!(%address, port, %error, "cannot connect to a server"),
        }
    }
    Err(reason)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use stead_schemas::addresses::AddressRules;
    use stead_schemas::egress::HostName;
    use tokio::net::TcpListener;

    use super::super::resolve::Addresses;
    use super::*;

    const GUEST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 100, 0, 7));

    struct Table(BTreeMap<&'static str, Vec<&'static str>>);

    impl Names for Table {
        fn resolve<'a>(&'a self, _: IpAddr, name: &'a HostName) -> Addresses<'a> {
            let found = self.0.get(name.as_str()).ok_or(NamesError::NotFound);
            let read =
                |texts: &Vec<&str>| texts.iter().map(|text| text.parse().expect("an address")).collect();
            let found = found.map(read);
            Box::pin(async move { found })
        }
    }

    fn filter(allow: &[&str]) -> AddressFilter {
        let allow = allow.iter().map(|net| net.parse().expect("a network")).collect();
        AddressFilter::new(AddressRules { allow, own: [].into() }, [])
    }

    fn dialer(names: &[(&'static str, &[&'static str])], allow: &[&str]) -> Dialer {
        let names = names.iter().map(|(name, addresses)| (*name, addresses.to_vec())).collect();
        Dialer::new(Arc::new(Table(names)), filter(allow))
    }

    async fn reason(dialer: &Dialer, host: &str, port: u16) -> Option<Reason> {
        dialer.connect(GUEST, &host.parse().expect("a host"), port).await.err()
    }

    #[tokio::test]
    async fn a_name_with_denied_addresses_only_is_refused() {
        let dialer = dialer(
            &[
                ("metadata.example", &["169.254.169.254"]),
                ("mixed.example", &["10.0.0.1", "::1"]),
                ("none.example", &[]),
            ],
            &[],
        );
        for host in ["127.0.0.1", "[::1]", "0.0.0.0", "metadata.example", "mixed.example"] {
            assert_eq!(reason(&dialer, host, 80).await, Some(Reason::AddressDenied), "{host}");
        }
        for host in ["none.example", "absent.example"] {
            assert_eq!(reason(&dialer, host, 80).await, Some(Reason::NameNotFound), "{host}");
        }
    }

    #[tokio::test]
    async fn of_mixed_addresses_only_the_allowed_are_connected_to() {
        let listener = TcpListener::bind("127.0.0.2:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        // Something listens at a denied address too; it comes first and must not be reached.
        let _denied = TcpListener::bind(("127.0.0.1", port)).await;
        let dialer = dialer(&[("mixed.example", &["127.0.0.1", "127.0.0.2"])], &["127.0.0.2/32"]);
        let host = "mixed.example".parse().expect("a host");
        let dialed = dialer.connect(GUEST, &host, port).await.expect("connected");
        assert_eq!(dialed.address.to_string(), "127.0.0.2");
        dialer.set_filter(AddressFilter::default());
        assert_eq!(reason(&dialer, "mixed.example", port).await, Some(Reason::AddressDenied));
    }

    /// A resolver whose answers follow each other.
    struct Alternating(std::sync::Mutex<std::vec::IntoIter<&'static str>>);

    impl Names for Alternating {
        fn resolve<'a>(&'a self, _: IpAddr, _: &'a HostName) -> Addresses<'a> {
            let next = self.0.lock().expect("not poisoned").next().ok_or(NamesError::NotFound);
            Box::pin(async move { Ok(vec![next?.parse().expect("an address")]) })
        }
    }

    #[tokio::test]
    async fn row_21_each_answer_is_checked_and_the_checked_address_is_connected_to() {
        let allowed = TcpListener::bind("127.0.0.2:0").await.expect("bound");
        let port = allowed.local_addr().expect("bound").port();
        let answers = vec!["127.0.0.2", "127.0.0.1", "127.0.0.2"].into_iter();
        let names = Arc::new(Alternating(std::sync::Mutex::new(answers)));
        let dialer = Dialer::new(names, filter(&["127.0.0.2/32"]));
        let host = "rebind.example".parse().expect("a host");
        assert!(dialer.connect(GUEST, &host, port).await.is_ok());
        assert_eq!(dialer.connect(GUEST, &host, port).await.err(), Some(Reason::AddressDenied));
        assert!(dialer.connect(GUEST, &host, port).await.is_ok());
    }

    #[tokio::test]
    async fn a_server_that_does_not_listen_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let dialer = dialer(&[], &["127.0.0.0/8"]);
        assert_eq!(reason(&dialer, "127.0.0.1", port).await, Some(Reason::UpstreamUnreachable));
    }
}
