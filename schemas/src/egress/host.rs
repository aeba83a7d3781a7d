//! The host of a connection: a name or an address.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::name::HostName;
use crate::names::NameError;

/// A host in its normal form. An IPv4 address that is mapped into IPv6 is the IPv4 address.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Host {
    Name(HostName),
    Address(IpAddr),
}

impl Host {
    /// Returns the name, or `None` for an address.
    #[must_use]
    pub fn name(&self) -> Option<&HostName> {
        match self {
            Self::Name(name) => Some(name),
            Self::Address(_) => None,
        }
    }
}

impl From<IpAddr> for Host {
    fn from(address: IpAddr) -> Self {
        Self::Address(address.to_canonical())
    }
}

impl FromStr for Host {
    type Err = NameError;

    /// Reads a name, an IPv4 address of four decimal numbers, or an IPv6 address in brackets.
    fn from_str(text: &str) -> Result<Self, NameError> {
        if let Some(rest) = text.strip_prefix('[') {
            let address = rest.strip_suffix(']').and_then(|inner| inner.parse::<Ipv6Addr>().ok());
            let refused = || NameError("must be an IPv6 address in brackets".to_owned());
            return address.map(|address| IpAddr::from(address).into()).ok_or_else(refused);
        }
        match text.parse::<IpAddr>() {
            Ok(address @ IpAddr::V4(_)) => Ok(address.into()),
            // Without brackets the end of the address and the colon before a port could be confused.
            Ok(IpAddr::V6(_)) => Err(NameError("must have brackets around an IPv6 address".to_owned())),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

impl TryFrom<String> for Host {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Host> for String {
    fn from(host: Host) -> String {
        host.to_string()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name}"),
            Self::Address(IpAddr::V4(address)) => write!(f, "{address}"),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
