//! Patterns of hosts in rules of egress.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::host::Host;
use super::name::HostName;
use crate::names::NameError;

/// A pattern: an exact name, `*.` and a name (matches exactly one more label), or an address.
///
/// Patterns are ordered by how specific they are: when several match a host, the least one counts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostPattern {
    Address(IpAddr),
    Name(HostName),
    /// Any single label before this name, which has at least two labels.
    Below(HostName),
}

impl HostPattern {
    /// Returns `true` if the pattern matches the host.
    #[must_use]
    pub fn matches(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::Address(address), Host::Address(other)) => address == other,
            (Self::Name(name), Host::Name(other)) => name == other,
            (Self::Below(base), Host::Name(other)) => other.parent() == Some(base.as_str()),
            (Self::Address(_), Host::Name(_)) | (Self::Name(_) | Self::Below(_), Host::Address(_)) => false,
        }
    }
}

impl FromStr for HostPattern {
    type Err = NameError;

    /// Reads a pattern; blanks around it are ignored.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        let refused = |why: &str| NameError(format!("invalid host pattern: {why}"));
        if let Some(base) = text.strip_prefix("*.") {
            let base: HostName = base.parse().map_err(|NameError(why)| refused(&why))?;
            if base.parent().is_none() {
                return Err(refused("must have at least two labels after '*.'"));
            }
            return Ok(Self::Below(base));
        }
        if text.contains('*') {
            return Err(refused("must have '*' only as its whole first label"));
        }
        if text.contains("://") {
            return Err(refused("must be a host without a scheme"));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Address(address.to_canonical()));
        }
        match text.parse() {
            Ok(Host::Name(name)) => Ok(Self::Name(name)),
            Ok(Host::Address(address)) => Ok(Self::Address(address)),
            Err(NameError(why)) => Err(refused(&why)),
        }
    }
}

impl TryFrom<String> for HostPattern {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<HostPattern> for String {
    fn from(pattern: HostPattern) -> String {
        pattern.to_string()
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name(name) => write!(f, "{name}"),
            Self::Below(base) => write!(f, "*.{base}"),
        }
    }
}

impl fmt::Debug for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Rows of: pattern, host, and whether they match. `None` means that the pattern is refused.
    type Row = (&'static str, &'static str, Option<bool>);

    const ROWS: &[Row] = &[
        ("example.com", "example.com", Some(true)),
        ("example.com", "EXAMPLE.com", Some(true)),
        ("EXAMPLE.com", "example.com", Some(true)),
        ("example.com", "example.com.", Some(true)),
        ("example.com.", "example.com", Some(true)),
        (" example.com ", "example.com", Some(true)),
        ("example.com", "www.example.com", Some(false)),
        ("example.com", "aexample.com", Some(false)),
        ("example.com", "example.com.evil.org", Some(false)),
        ("example.com", "example.co", Some(false)),
        ("example.com", "com", Some(false)),
        ("example.com", "1.2.3.4", Some(false)),
        ("*.example.com", "a.example.com", Some(true)),
        ("*.example.com", "A.Example.Com", Some(true)),
        ("*.EXAMPLE.com", "a.example.com", Some(true)),
        ("*.example.com.", "a.example.com.", Some(true)),
        ("*.example.com", "example.com", Some(false)),
        ("*.example.com", "a.b.example.com", Some(false)),
        ("*.example.com", "aexample.com", Some(false)),
        ("*.example.com", "example.com.evil.org", Some(false)),
        ("*.example.com", "a.example.com.evil.org", Some(false)),
        ("*.example.com", "xn--bcher-kva.example.com", Some(true)),
        ("*.example.com", "a-b.example.com", Some(true)),
        ("*.example.com", "_a.example.com", Some(true)),
        ("*.example.com", "1.example.com", Some(true)),
        ("*.example.com", "1.2.3.4", Some(false)),
        ("*.example.com", "[::1]", Some(false)),
        ("*.co.uk", "evil.co.uk", Some(true)),
        ("*.a.example.com", "b.a.example.com", Some(true)),
        ("*.a.example.com", "a.example.com", Some(false)),
        ("localhost", "localhost", Some(true)),
        ("localhost", "localhost.", Some(true)),
        ("localhost", "127.0.0.1", Some(false)),
        ("1.2.3.4", "1.2.3.4", Some(true)),
        ("1.2.3.4", "1.2.3.5", Some(false)),
        ("1.2.3.4", "[::ffff:1.2.3.4]", Some(true)),
        ("::ffff:1.2.3.4", "1.2.3.4", Some(true)),
        ("::1", "[::1]", Some(true)),
        ("[::1]", "[::1]", Some(true)),
        ("[0:0:0:0:0:0:0:1]", "[::1]", Some(true)),
        ("::1", "[::2]", Some(false)),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", Some(true)),
        ("_srv.example.com", "_srv.example.com", Some(true)),
        ("a.b.c.d.e.f", "a.b.c.d.e.f", Some(true)),
        ("a.b.c.d.e.f", "x.b.c.d.e.f", Some(false)),
        ("", "example.com", None),
        (" ", "example.com", None),
        (".", "example.com", None),
        ("*", "example.com", None),
        ("*.", "example.com", None),
        ("*.com", "example.com", None),
        ("*.com.", "example.com", None),
        ("**.example.com", "a.example.com", None),
        ("*.*.example.com", "a.b.example.com", None),
        ("a.*.com", "a.b.com", None),
        ("a*.example.com", "ab.example.com", None),
        ("*a.example.com", "ba.example.com", None),
        ("example.*", "example.com", None),
        (".example.com", "a.example.com", None),
        ("*..example.com", "a.example.com", None),
        ("example..com", "example.com", None),
        ("example.com..", "example.com", None),
        ("-a.example.com", "a.example.com", None),
        ("a-.example.com", "a.example.com", None),
        ("bücher.example", "xn--bcher-kva.example", None),
        ("*.bücher.example", "a.xn--bcher-kva.example", None),
        ("https://example.com", "example.com", None),
        ("//example.com", "example.com", None),
        ("example.com/", "example.com", None),
        ("example.com/path", "example.com", None),
        ("example.com:443", "example.com", None),
        ("*.example.com:443", "a.example.com", None),
        ("user@example.com", "example.com", None),
        ("example.com?x", "example.com", None),
        ("example.com#x", "example.com", None),
        ("exa mple.com", "example.com", None),
        ("example.com\0", "example.com", None),
        ("example.com\n.evil", "example.com", None),
        ("1.2.3.4:443", "1.2.3.4", None),
        ("[::1]:443", "[::1]", None),
        ("[::1", "[::1]", None),
        ("*.1.2.3.4", "1.2.3.4", None),
        ("1.2.3", "1.2.3.4", None),
        ("0177.0.0.1", "127.0.0.1", None),
        ("2130706433", "127.0.0.1", None),
        ("0x7f.1", "127.0.0.1", None),
        ("fe80::1%eth0", "[fe80::1]", None),
        ("10.0.0.0/8", "10.0.0.1", None),
        ("%65xample.com", "example.com", None),
    ];

    #[test]
    fn patterns_match_as_the_attack_table_states() {
        assert!(ROWS.len() >= 80);
        for (pattern, host, expected) in ROWS {
            let host: Host = host.parse().expect(host);
            let found = pattern.parse::<HostPattern>().ok().map(|pattern| pattern.matches(&host));
            assert_eq!(found, *expected, "{pattern:?} against {host}");
        }
    }

    #[test]
    fn names_beyond_the_limits_of_dns_are_refused() {
        let name = |labels: usize| vec!["a".repeat(63); labels].join(".");
        assert!(format!("*.{}", name(3)).parse::<HostPattern>().is_ok());
        for text in [name(4), format!("*.{}", name(4)), format!("{}.example.com", "a".repeat(64))] {
            assert!(text.parse::<HostPattern>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_more_specific_pattern_comes_first() {
        let pattern = |text: &str| text.parse::<HostPattern>().expect(text);
        assert!(pattern("z.example.com") < pattern("*.example.com"));
        assert!(pattern("1.2.3.4") < pattern("a.example.com"));
    }

    /// Decides slowly and label by label, without the code above.
    fn oracle(pattern: &str, host: &str) -> bool {
        let lower = |text: &str| text.trim_end_matches('.').to_lowercase();
        let (pattern, host) = (lower(pattern), lower(host));
        let (pattern, host): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), host.split('.').collect());
        pattern.len() == host.len()
            && pattern
                .iter()
                .zip(&host)
                .enumerate()
                .all(|(at, (one, other))| one == other || (at == 0 && *one == "*" && !other.is_empty()))
    }

    proptest! {
        #[test]
        fn a_match_agrees_with_the_slow_oracle(
            pattern in "(\\*\\.)?[ab]{1,2}(\\.[abA]{1,2}){1,3}\\.?",
            host in "[ab]{1,2}(\\.[abB]{1,2}){0,4}\\.?",
        ) {
            if let (Ok(parsed), Ok(named)) = (pattern.parse::<HostPattern>(), host.parse::<Host>()) {
                prop_assert_eq!(parsed.matches(&named), oracle(&pattern, &host));
                if let (HostPattern::Below(base), true) = (&parsed, parsed.matches(&named)) {
                    let name = named.to_string();
                    let suffix = format!(".{base}");
                    prop_assert!(name.ends_with(&suffix));
                    prop_assert!(!name[..name.len() - suffix.len()].contains('.'));
                }
            }
        }

        #[test]
        fn a_pattern_is_read_back_from_its_text(text in "\\PC{0,30}|(\\*\\.)?[a-zA-Z0-9.:\\[\\]-]{1,30}") {
            if let Ok(pattern) = text.parse::<HostPattern>() {
                prop_assert_eq!(pattern.to_string().parse::<HostPattern>(), Ok(pattern));
            }
        }
    }
}
