//! The keys of the database, their text form, and its parser.
//!
//! The keys of names and claims contain all of their information, so that they stay taken when the record of
//! their object (or their own value) cannot be read. The single writer guarantees uniqueness; the database
//! does not.
//!
//! ```text
//! o/<kind>/<uid>            an object
//! n/<kind>/<uid>/<name>     a live object's name
//! c/<table>/<uid>/<value>   a claim of an object on a value
//! m/revision                the last revision that was used
//! ```

use std::borrow::Cow;
use std::fmt;

use stead_schemas::names::{Name, Uid};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Object { kind: Cow<'static, str>, uid: Uid },
    Name { kind: Cow<'static, str>, uid: Uid, name: Name },
    Claim { table: Cow<'static, str>, uid: Uid, value: String },
    Revision,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object { kind, uid } => write!(f, "o/{kind}/{uid}"),
            Self::Name { kind, uid, name } => write!(f, "n/{kind}/{uid}/{name}"),
            Self::Claim { table, uid, value } => write!(f, "c/{table}/{uid}/{value}"),
            Self::Revision => f.write_str("m/revision"),
        }
    }
}

impl Key {
    /// Parses a key. Returns `None` for a key that no version of this file writes.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (space, rest) = text.split_once('/')?;
        if space == "m" {
            return (rest == "revision").then_some(Self::Revision);
        }
        let (first, rest) = rest.split_once('/')?;
        let first = Cow::Owned(first.to_owned());
        if space == "o" {
            return Some(Self::Object { kind: first, uid: rest.parse().ok()? });
        }
        let (uid, last) = rest.split_once('/')?;
        let uid = uid.parse().ok()?;
        match space {
            "n" => Some(Self::Name { kind: first, uid, name: last.parse().ok()? }),
            "c" => Some(Self::Claim { table: first, uid, value: last.to_owned() }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip_even_with_separators_in_their_last_part() {
        let uid: Uid = "abcdefghijklmnopqrstuvwx".parse().expect("valid");
        let kind = || Cow::Borrowed("image");
        let name: Name = "docker.io/library/busybox:latest".parse().expect("an image name");
        for key in [
            Key::Object { kind: kind(), uid: uid.clone() },
            Key::Name { kind: kind(), uid: uid.clone(), name },
            Key::Claim { table: Cow::Borrowed("tag"), uid, value: "a/b/c".to_owned() },
            Key::Revision,
        ] {
            assert_eq!(Key::parse(&key.to_string()), Some(key));
        }
        for text in
            ["", "o", "o/image", "o/image/short", "x/a/b", "m/other", "n/image/abcdefghijklmnopqrstuvwx"]
        {
            assert_eq!(Key::parse(text), None, "{text}");
        }
    }
}
