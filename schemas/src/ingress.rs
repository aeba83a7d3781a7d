//! Ingress: host names that lead to ports of instances.
//!
//! A host name is a literal or a pattern. Some labels of a pattern are captures: a capture matches any one
//! label, and may name the instance. Instances are looked up when a request arrives, so that an instance
//! that takes the name of another also takes its requests.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::instance::Secret;
use crate::limits::{HOSTNAME_BYTES_MAX, NAME_BYTES_MAX};
use crate::meta::{Kind, Object};
use crate::names::{Name, NameError};
use crate::numbers::Generation;
use crate::references::{Ref, Role, Target};

/// The kind of ingresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ingress {}

impl Kind for Ingress {
    const NAME: &'static str = "ingress";
    const FINALIZER: &'static str = "ingress";
    type Spec = IngressSpec;
    type Status = IngressStatus;

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let ports = object.spec.rules.iter().map(|rule| Target::HostPort(rule.port));
        ports.map(|target| Ref { role: Role::Serves, target }).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressSpec {
    pub rules: Vec<IngressRule>,
}

/// The target of requests to a host name at a port of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressRule {
    pub hostname: Hostname,
    /// The port on this host.
    pub port: u16,
    pub target: IngressTarget,
    #[serde(default)]
    pub auth: Option<HeaderAuth>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressTarget {
    pub instance: TargetName,
    /// The port on the instance.
    pub port: u16,
}

/// A header that a request must have, exactly once, with exactly this value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderAuth {
    pub header: String,
    pub value: Secret,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct IngressStatus {
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

/// An instance by id or name, or the capture of the host name that supplies it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TargetName {
    /// A name or an id; an id is a valid name as well.
    Instance(Name),
    Capture(String),
}

/// A host name in lower case; captures are in braces: `{instance}.example.com`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hostname(Vec<Label>);

/// A label of a host name. Labels are ordered by how specific they are: when two names match, the first
/// counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Literal(String),
    Capture(String),
}

impl Hostname {
    #[must_use]
    pub fn is_literal(&self) -> bool {
        self.captures().next().is_none()
    }

    pub fn captures(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|label| match label {
            Label::Literal(_) => None,
            Label::Capture(name) => Some(name.as_str()),
        })
    }

    /// Returns the shape of the name; names that match the same hosts have the same shape.
    #[must_use]
    pub fn shape(&self) -> String {
        let shapes = self.0.iter().map(|label| match label {
            Label::Literal(text) => text.as_str(),
            Label::Capture(_) => "{}",
        });
        shapes.collect::<Vec<_>>().join(".")
    }

    /// Returns the host's label at each capture, by the capture's name; `None` when the host (as [`host`]
    /// returns it) does not match.
    #[must_use]
    pub fn matched<'a>(&'a self, host: &'a str) -> Option<Vec<(&'a str, &'a str)>> {
        let mut captured = Vec::new();
        let mut parts = host.split('.');
        for label in &self.0 {
            let part = parts.next()?;
            match label {
                Label::Literal(text) if text == part => {}
                Label::Literal(_) => return None,
                Label::Capture(name) => captured.push((name.as_str(), part)),
            }
        }
        parts.next().is_none().then_some(captured)
    }
}

/// Returns the host that a request's authority (`Host`) names: in lower case, without port and final dot.
/// Returns `None` when no ingress could have such a host name.
#[must_use]
pub fn host(authority: &str) -> Option<String> {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        Some(_) => return None,
        None => authority,
    };
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let is_host = host.len() <= HOSTNAME_BYTES_MAX && host.split('.').all(is_label);
    is_host.then_some(host)
}

fn is_label(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    (1..=NAME_BYTES_MAX).contains(&bytes.len())
        && bytes.iter().all(|&byte| is_plain(byte) || byte == b'-')
        && bytes.first().is_some_and(|&byte| is_plain(byte))
        && bytes.last().is_some_and(|&byte| is_plain(byte))
}

/// Returns the text in the braces; `None` without braces.
fn capture(text: &str) -> Option<Result<&str, NameError>> {
    let name = text.strip_prefix('{')?.strip_suffix('}')?;
    let is_name = name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.len() <= NAME_BYTES_MAX
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    let refused = || NameError("a capture must be a word in braces, such as {instance}".to_owned());
    Some(if is_name { Ok(name) } else { Err(refused()) })
}

impl FromStr for Hostname {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.len() > HOSTNAME_BYTES_MAX {
            return Err(NameError(format!("must be at most {HOSTNAME_BYTES_MAX} characters")));
        }
        let mut names = BTreeSet::new();
        let mut labels = Vec::new();
        for part in text.split('.') {
            if let Some(name) = capture(part) {
                let name = name?;
                if !names.insert(name) {
                    return Err(NameError("must not have two captures of one name".to_owned()));
                }
                labels.push(Label::Capture(name.to_owned()));
                continue;
            }
            let part = part.to_ascii_lowercase();
            if !is_label(&part) {
                let rule = "must be labels of letters, digits and dashes joined by dots, \
                            or whole labels in braces, such as {instance}.example.com";
                return Err(NameError(rule.to_owned()));
            }
            labels.push(Label::Literal(part));
        }
        Ok(Self(labels))
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, label) in self.0.iter().enumerate() {
            let dot = if index == 0 { "" } else { "." };
            match label {
                Label::Literal(text) => write!(f, "{dot}{text}")?,
                Label::Capture(name) => write!(f, "{dot}{{{name}}}")?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for TargetName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match capture(text) {
            Some(name) => Ok(Self::Capture(name?.to_owned())),
            None => Name::resource(text).map(Self::Instance),
        }
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instance(name) => write!(f, "{name}"),
            Self::Capture(name) => write!(f, "{{{name}}}"),
        }
    }
}

macro_rules! stored_as_text {
    ($($name:ident),*) => { $(
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    )* };
}
stored_as_text!(Hostname, TargetName);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hostname(text: &str) -> Hostname {
        text.parse().expect("valid")
    }

    #[test]
    fn names_match_whole_labels_and_nothing_else() {
        let captured = |pattern: &str, authority: &str| {
            let host = host(authority)?;
            let pattern = hostname(pattern);
            let found = pattern.matched(&host)?;
            Some(found.iter().map(|(name, label)| format!("{name}={label}")).collect::<Vec<_>>().join(" "))
        };
        for (pattern, authority, expected) in [
            ("api.example.com", "api.example.com", Some("")),
            ("API.Example.com", "api.EXAMPLE.com:8080", Some("")),
            ("api.example.com", "api.example.com.", Some("")),
            ("api.example.com", "api.example.com.:80", Some("")),
            ("api.example.com", "xapi.example.com", None),
            ("api.example.com", "example.com", None),
            ("api.example.com", "api.example.com.evil", None),
            ("localhost", "localhost:", Some("")),
            ("{instance}.example.com", "web.example.com", Some("instance=web")),
            ("{instance}.example.com", "a.web.example.com", None),
            ("{instance}.example.com", ".example.com", None),
            ("{app}.{Instance_1}.test", "a.b.test", Some("app=a Instance_1=b")),
            ("{instance}", "web", Some("instance=web")),
            ("{instance}.test", "user@web.test", None),
            ("{instance}.test", "web_1.test", None),
            ("{instance}.test", "web.test:80x", None),
            ("{instance}.test", "[::1]:80", None),
            ("{instance}.test", "w\u{e9}b.test", None),
        ] {
            assert_eq!(captured(pattern, authority).as_deref(), expected, "{pattern} {authority}");
        }
    }

    #[test]
    fn malformed_names_are_refused() {
        let long = format!("{}.com", "a".repeat(64));
        for text in [
            "",
            ".",
            "a..b",
            "a.",
            ".a",
            "-a.com",
            "a-.com",
            "*.example.com",
            "a b.com",
            "a_b.com",
            "x{instance}.com",
            "{}.com",
            "{1}.com",
            "{a b}.com",
            "{a}.{a}.com",
            "{a",
            "a}",
            &long,
            &"a.".repeat(127).repeat(2),
        ] {
            assert!(text.parse::<Hostname>().is_err(), "{text} was accepted");
        }
        for text in ["", "{}", "{a}x", "Web", "a.b", "a/b"] {
            assert!(text.parse::<TargetName>().is_err(), "{text} was accepted");
        }
        assert_eq!("{a}".parse(), Ok(TargetName::Capture("a".to_owned())));
    }

    #[test]
    fn names_that_match_the_same_have_one_shape_and_the_more_literal_one_comes_first() {
        assert_eq!(hostname("{a}.x.{b}").shape(), hostname("{c}.X.{d}").shape());
        assert_ne!(hostname("{a}.x").shape(), hostname("a.x").shape());
        let mut all = [hostname("{a}.{b}.com"), hostname("{a}.x.com"), hostname("w.{b}.com")];
        all.sort();
        assert_eq!(all.map(|name| name.to_string()), ["w.{b}.com", "{a}.x.com", "{a}.{b}.com"]);
    }

    proptest! {
        #[test]
        fn any_text_is_taken_without_panic(text in "\\PC{0,80}", pattern in "[a-z{}.*-]{0,30}") {
            let host = host(&text);
            if let Ok(name) = pattern.parse::<Hostname>() {
                prop_assert_eq!(name.to_string().parse::<Hostname>(), Ok(name.clone()));
                if let Some(host) = &host {
                    let captures = name.captures().count();
                    prop_assert!(name.matched(host).is_none_or(|found| found.len() == captures));
                }
            }
        }

        #[test]
        fn a_host_fills_the_captures_of_a_pattern(labels in proptest::collection::vec("[a-z0-9]{1,8}", 1..6)) {
            let text = labels.join(".");
            prop_assert_eq!(host(&text.to_uppercase()), Some(text.clone()));
            let all: Vec<String> = (0..labels.len()).map(|index| format!("{{c{index}}}")).collect();
            let pattern = hostname(&all.join("."));
            let found = pattern.matched(&text).expect("as many labels");
            let found: Vec<&str> = found.into_iter().map(|(_, label)| label).collect();
            prop_assert_eq!(found, labels);
        }
    }
}
