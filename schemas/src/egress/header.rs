//! The header that carries a credential, and the format of its value.
//!
//! Guarantees: the header has no part in how a message is framed or routed, and the formatted value is a
//! legal field value.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::instance::Secret;
use crate::limits::{EGRESS_FORMAT_BYTES_MAX, HEADER_NAME_BYTES_MAX};
use crate::names::NameError;

/// The part of a format that the value replaces.
const VALUE: &str = "${value}";

/// Headers that frame or route a message, besides those that begin with `proxy-`.
const RESERVED: [&str; 9] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
    "expect",
];

macro_rules! checked_text {
    ($name:ident) => {
        impl $name {
            /// Returns the text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(checked: $name) -> String {
                checked.0
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// The name of a header that may carry a credential, in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InjectedHeader(String);

/// The format of a field value; it contains `${value}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Format(String);

checked_text!(InjectedHeader);
checked_text!(Format);

impl FromStr for InjectedHeader {
    type Err = NameError;

    /// Reads a name; blanks around it are ignored.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let name = text.trim().to_ascii_lowercase();
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if !(1..=HEADER_NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(is_token) {
            return Err(NameError("must be the name of a header".to_owned()));
        }
        if RESERVED.contains(&name.as_str()) || name.starts_with("proxy-") {
            return Err(NameError("must not be a header that frames or routes messages".to_owned()));
        }
        Ok(Self(name))
    }
}

impl Format {
    /// Returns the field value for a credential's value.
    ///
    /// # Errors
    /// Fails for a value that no header can carry, in words that do not repeat it.
    pub fn apply(&self, value: &Secret) -> Result<Secret, NameError> {
        let formatted = Secret(self.0.replace(VALUE, &value.0));
        if is_field_value(&formatted.0) {
            return Ok(formatted);
        }
        Err(NameError(
            "must have a value that a header can carry: printable ASCII without blanks around it".to_owned(),
        ))
    }
}

impl FromStr for Format {
    type Err = NameError;

    /// Reads a format; blanks around it are ignored.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        if !text.contains(VALUE) {
            return Err(NameError("must include ${value}".to_owned()));
        }
        if text.len() > EGRESS_FORMAT_BYTES_MAX {
            return Err(NameError(format!("must have at most {EGRESS_FORMAT_BYTES_MAX} bytes")));
        }
        if !is_field_value(text) {
            return Err(NameError("must be printable ASCII".to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Returns `true` for a text that arrives in a field as it is: servers disagree about bytes beyond ASCII and
/// remove blanks at the ends.
fn is_field_value(text: &str) -> bool {
    let is_fit = |byte: u8| byte == b' ' || byte == b'\t' || byte.is_ascii_graphic();
    !text.is_empty() && text.bytes().all(is_fit) && text.trim() == text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_frame_or_route_messages_are_refused() {
        for name in [
            "Host",
            "content-length",
            "Transfer-Encoding",
            "Connection",
            "TE",
            "Trailer",
            "Upgrade",
            "Expect",
            "Proxy-Authorization",
            "proxy-x",
            "Keep-Alive",
            "",
            " ",
            "a b",
            "a:b",
            "a\r\nb",
            "é",
            "(x)",
        ] {
            assert!(name.parse::<InjectedHeader>().is_err(), "{name:?} was accepted");
        }
        for name in ["Authorization", "x-api-key", "Cookie", " X-Key ", "x_key"] {
            assert!(name.parse::<InjectedHeader>().is_ok(), "{name:?} was refused");
        }
    }

    #[test]
    fn a_format_includes_the_value_and_stays_a_field_value() {
        for format in ["", "Bearer", "${VALUE}", "Bearer ${value}\r\nX: y", "${value}\0", "é${value}"] {
            assert!(format.parse::<Format>().is_err(), "{format:?} was accepted");
        }
        let longest = format!("{}{VALUE}", "a".repeat(EGRESS_FORMAT_BYTES_MAX - VALUE.len()));
        assert!(longest.parse::<Format>().is_ok() && format!("a{longest}").parse::<Format>().is_err());
        let format: Format = " Bearer ${value} ".parse().expect("a format");
        let apply = |value: &str| format.apply(&Secret(value.to_owned())).map(|secret| secret.0.clone());
        assert_eq!(apply("s3cret"), Ok("Bearer s3cret".to_owned()));
        for value in ["s3cret\nb", "s3cret\rb", "s3cret\0b", "s3cret ", "s3crét"] {
            let error = apply(value).expect_err("no header can carry it");
            assert!(!error.0.contains("s3cr"), "the message repeats the value");
        }
    }
}
