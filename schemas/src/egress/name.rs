//! DNS host names in one normal form.
//!
//! Guarantees: two names that DNS regards as equal are equal here; a text that a resolver or a C library could
//! read as an address, such as `127.1`, `2130706433` or `0x7f.1`, is no name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits::{DNS_LABEL_BYTES_MAX, HOSTNAME_BYTES_MAX};
use crate::names::NameError;

/// A DNS host name: lower case, ASCII, without a final dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

impl HostName {
    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the labels from left to right.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }

    /// Returns the name without its first label, or `None` for a name of one label.
    #[must_use]
    pub fn parent(&self) -> Option<&str> {
        self.0.split_once('.').map(|(_, parent)| parent)
    }
}

impl FromStr for HostName {
    type Err = NameError;

    /// Normalises a name: upper case becomes lower case, and one final dot is removed.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let refuse = |why: &str| Err(NameError(why.to_owned()));
        if !text.is_ascii() {
            return refuse(
                "must be ASCII: write an international name in its A-label form, such as xn--bcher-kva.example",
            );
        }
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return refuse("must not be empty");
        }
        if text.len() > HOSTNAME_BYTES_MAX {
            return refuse("must have at most 253 characters");
        }
        if !text.split('.').all(is_label) {
            return refuse(
                "must be labels of 1 to 63 letters, digits, '-' and '_', joined by dots, and no label may begin or end with '-'",
            );
        }
        if text.rsplit('.').next().is_some_and(is_number) {
            return refuse(
                "must not end in a number: that is neither a name nor the canonical form of an address",
            );
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

fn is_label(label: &str) -> bool {
    (1..=DNS_LABEL_BYTES_MAX).contains(&label.len())
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Returns `true` for a last label that programs read as a part of an IPv4 address: decimal, octal or
/// hexadecimal.
fn is_number(label: &str) -> bool {
    let is_hexadecimal = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    label.bytes().all(|byte| byte.is_ascii_digit())
        || label.strip_prefix("0x").or_else(|| label.strip_prefix("0X")).is_some_and(is_hexadecimal)
}

impl TryFrom<String> for HostName {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> String {
        name.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_normalised_once() {
        for (given, expected) in [
            ("example.com", "example.com"),
            ("Example.COM", "example.com"),
            ("example.com.", "example.com"),
            ("localhost.", "localhost"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_acme.example.com", "_acme.example.com"),
            ("1.example", "1.example"),
            ("0x.example", "0x.example"),
            ("a-b.c--d", "a-b.c--d"),
        ] {
            assert_eq!(given.parse::<HostName>().expect(given).as_str(), expected);
        }
    }

    #[test]
    fn a_text_that_is_no_name_is_refused() {
        let long_label = format!("{}.com", "a".repeat(64));
        let long_name = vec!["a".repeat(49); 6].join(".");
        for given in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a.b..",
            "-a.com",
            "a-.com",
            "a b",
            "a\0b",
            "a/b",
            "a:1",
            "a@b",
            "a%41.com",
            "*",
            "*.example.com",
            "bücher.example",
            "127.1",
            "127.0.0.1",
            "0177.0.0.1",
            "2130706433",
            "0x7f.1",
            "0x7f000001",
            "a.0x",
            "a.1.",
            "[::1]",
            "::1",
            "example.com\r\n",
            &long_label,
            &long_name,
        ] {
            assert!(given.parse::<HostName>().is_err(), "{given:?} was accepted");
        }
    }

    #[test]
    fn the_bounds_of_labels_and_names_are_those_of_dns() {
        let label = |count: usize| "a".repeat(count);
        assert!(format!("{}.com", label(63)).parse::<HostName>().is_ok());
        let name = format!("{0}.{0}.{0}.{1}", label(63), label(61));
        assert_eq!(name.len(), 253);
        assert!(name.parse::<HostName>().is_ok() && format!("{name}.").parse::<HostName>().is_ok());
        assert!(format!("{name}a").parse::<HostName>().is_err());
    }

    proptest! {
        #[test]
        fn a_parsed_name_is_its_own_normal_form(text in "\\PC{0,40}|[a-zA-Z0-9._-]{1,40}") {
            if let Ok(name) = text.parse::<HostName>() {
                prop_assert_eq!(name.as_str().parse::<HostName>(), Ok(name.clone()));
                prop_assert!(name.as_str().parse::<std::net::IpAddr>().is_err());
                prop_assert!(!name.as_str().bytes().any(|byte| byte.is_ascii_uppercase()));
            }
        }
    }
}
