//! Authorities: the target of CONNECT, the field `Host`, and the authority of an absolute URI.
//!
//! Guarantees: a text is read in one way or refused. There is no user information, no percent-encoding, no
//! empty port and no number form of an address.

use std::fmt;

use super::host::Host;
use crate::names::NameError;

/// A host and a port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Authority {
    pub host: Host,
    pub port: u16,
}

impl Authority {
    /// Reads the target of a CONNECT request: the port is required.
    ///
    /// # Errors
    /// Returns a sentence that names the violated rule.
    pub fn of_connect(text: &str) -> Result<Self, NameError> {
        let (host, port) = split(text)?;
        let port = port.ok_or_else(|| NameError("must have a port".to_owned()))?;
        Ok(Self { host: host.parse()?, port })
    }

    /// Reads the value of a `Host` field, or the authority of a URI; the default port is that of a text without one.
    ///
    /// # Errors
    /// Returns a sentence that names the violated rule.
    pub fn of_host(text: &str, port_default: u16) -> Result<Self, NameError> {
        let (host, port) = split(text)?;
        Ok(Self { host: host.parse()?, port: port.unwrap_or(port_default) })
    }
}

/// Splits a text at the colon before its port.
fn split(text: &str) -> Result<(&str, Option<u16>), NameError> {
    let end = text.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match text[end..].find(':') {
        Some(at) => (&text[..end + at], Some(&text[end + at + 1..])),
        None => (text, None),
    };
    let read = |digits: &str| {
        let is_number = (1..=5).contains(&digits.len())
            && digits.bytes().all(|byte| byte.is_ascii_digit())
            && !digits.starts_with('0');
        digits.parse().ok().filter(|_| is_number)
    };
    match port {
        None => Ok((host, None)),
        Some(digits) => {
            let refused = || NameError("must have a port from 1 to 65535".to_owned());
            read(digits).map(|port| (host, Some(port))).ok_or_else(refused)
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_target_of_connect_has_a_host_and_a_port() {
        for (given, expected) in [
            ("example.com:443", "example.com:443"),
            ("EXAMPLE.com.:8443", "example.com:8443"),
            ("1.2.3.4:1", "1.2.3.4:1"),
            ("[::1]:443", "[::1]:443"),
            ("[::ffff:127.0.0.1]:443", "127.0.0.1:443"),
            ("localhost:65535", "localhost:65535"),
        ] {
            assert_eq!(Authority::of_connect(given).expect(given).to_string(), expected);
        }
    }

    #[test]
    fn a_malformed_target_of_connect_is_refused() {
        for given in [
            "",
            "host",
            ":443",
            "host:",
            "host:0",
            "host:65536",
            "host:99999",
            "host:000443",
            "host:0443",
            "host:+443",
            "host:-1",
            "host: 443",
            "host:443 ",
            " host:443",
            "host:44x",
            "::1:443",
            "[::1]",
            "[::1]443",
            "[::1]:",
            "[::1:443",
            "::1]:443",
            "[]:443",
            "[[::1]]:443",
            "[::1]]:443",
            "[1.2.3.4]:443",
            "[host]:443",
            "host:443/x",
            "host/x:443",
            "a b:443",
            "host:443@evil:443",
            "user@host:443",
            "user:pw@host:443",
            "%68ost:443",
            "host%00:443",
            "hôst:443",
            "host:44:443",
            "host:443#x",
            "host:443?x",
            "host\t:443",
            "2130706433:443",
            "0x7f.1:443",
            "127.1:443",
            "0177.0.0.1:443",
            "127.0.0.1.:443",
            "*.example.com:443",
            "http://host:443",
            "host..:443",
            ".:443",
            "host\r\n:443",
            "[fe80::1%25eth0]:443",
        ] {
            assert!(Authority::of_connect(given).is_err(), "{given:?} was accepted");
        }
    }

    #[test]
    fn a_host_field_may_omit_its_port() {
        for (given, expected) in [
            ("example.com", "example.com:80"),
            ("example.com:8080", "example.com:8080"),
            ("[::1]", "[::1]:80"),
            ("1.2.3.4", "1.2.3.4:80"),
        ] {
            assert_eq!(Authority::of_host(given, 80).expect(given).to_string(), expected);
        }
        for given in
            ["", "example.com:", "a@example.com", "a b", "::1", "example.com/", "example.com,example.org"]
        {
            assert!(Authority::of_host(given, 443).is_err(), "{given:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn an_authority_is_read_back_from_its_text(text in "\\PC{0,30}|[a-z0-9.:\\[\\]@/%-]{1,30}") {
            if let Ok(authority) = Authority::of_connect(&text) {
                prop_assert_eq!(Authority::of_connect(&authority.to_string()), Ok(authority));
                let is_strange = |byte: u8| b"@/%?# \\".contains(&byte) || !byte.is_ascii();
                prop_assert!(!text.bytes().any(is_strange));
            }
        }
    }
}
