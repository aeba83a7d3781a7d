//! Names and identifiers, parsed once: a value of these types is well formed.
//!
//! Sources: contract.md 2.1 for names and ids, the OCI distribution specification for references,
//! Linux IFNAMSIZ for link names.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits;

/// The reason why a name was refused; the text is suitable for a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub String);

macro_rules! parsed_string {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

parsed_string! {
    /// An object's identifier: CUID2, 24 characters `[a-z][a-z0-9]{23}`. Names of host objects derive from
    /// it, so that a pass after a crash recognises its own work.
    Uid
}
parsed_string! {
    /// A resource name: `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`, at most 63 characters; for images, the normalised
    /// reference instead (at most [`limits::IMAGE_REF_BYTES_MAX`]).
    Name
}
parsed_string! {
    /// A content digest, `sha256:` and 64 lower-case hexadecimal digits.
    Digest
}
parsed_string! {
    /// A network interface name: 1 to 15 characters of `[a-zA-Z0-9_.-]`, not `.` or `..`.
    LinkName
}

impl Uid {
    /// Returns the ten leading characters: enough to be unique on one host (36^9 * 26 values), and short
    /// enough for an interface name with its prefix.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..10]
    }
}

impl LinkName {
    /// Returns the name with its first letter in the other case. A name that begins with no letter stays as it is.
    #[must_use]
    pub fn with_other_first_case(&self) -> Self {
        let mut name = self.0.clone();
        let is_lower = name.starts_with(|first: char| first.is_ascii_lowercase());
        if let Some(first) = name.get_mut(..1) {
            if is_lower {
                first.make_ascii_uppercase();
            } else {
                first.make_ascii_lowercase();
            }
        }
        Self(name)
    }
}

/// A uid orders and compares as its text does, so that maps by uid can be searched by a prefix.
impl Borrow<str> for Uid {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for Uid {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = text.as_bytes();
        let is_well_formed = bytes.len() == limits::UID_BYTES
            && bytes[0].is_ascii_lowercase()
            && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if is_well_formed {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(
                "must be 24 characters, a lower-case letter first, then lower-case letters and digits"
                    .to_owned(),
            ))
        }
    }
}

impl Name {
    /// Parses the resource name of a new object. A name in the form of an id is refused: a client that uses
    /// the id of a removed object would otherwise reach this one.
    ///
    /// # Errors
    /// Returns a sentence that names the violated rule.
    pub fn new_resource(text: &str) -> Result<Self, NameError> {
        if text.parse::<Uid>().is_ok() {
            let rule = format!("must not have the form of an id: {} letters and digits", limits::UID_BYTES);
            return Err(NameError(rule));
        }
        Self::resource(text)
    }

    /// Parses a resource name (not an image reference), including that of an older object, which may have
    /// the form of an id.
    ///
    /// # Errors
    /// Returns a sentence that names the violated rule.
    pub fn resource(text: &str) -> Result<Self, NameError> {
        let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        if bytes.is_empty() {
            return Err(NameError("must not be empty".to_owned()));
        }
        if bytes.len() > limits::NAME_BYTES_MAX {
            return Err(NameError(format!("must be at most {} characters", limits::NAME_BYTES_MAX)));
        }
        let is_well_formed =
            bytes.iter().all(|&b| edge(b) || b == b'-') && edge(bytes[0]) && edge(bytes[bytes.len() - 1]);
        if !is_well_formed {
            return Err(NameError(
                "must contain only lower-case letters, digits and dashes, and neither start nor end with a dash"
                    .to_owned(),
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl From<&Uid> for Name {
    /// Names an owned object without a name of its own by its uid.
    fn from(uid: &Uid) -> Self {
        Self(uid.as_str().to_owned())
    }
}

impl From<&ImageRef> for Name {
    /// Names an image object by its normalised reference.
    fn from(reference: &ImageRef) -> Self {
        Self(reference.to_string())
    }
}

impl FromStr for Name {
    type Err = NameError;
    /// Accepts what either constructor accepts; used when a stored name is read back.
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::resource(text).or_else(|error| match text.parse::<ImageRef>() {
            Ok(reference) if reference.to_string() == text => Ok(Self(text.to_owned())),
            _ => Err(error),
        })
    }
}

impl Digest {
    /// Returns the hexadecimal part, which is suitable for a file name.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl FromStr for Digest {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let hex = text.strip_prefix("sha256:").unwrap_or("");
        let is_well_formed =
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if is_well_formed {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError("must be sha256: and 64 lower-case hexadecimal digits".to_owned()))
        }
    }
}

impl FromStr for LinkName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let is_well_formed = (1..=limits::LINK_NAME_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
            && text != "."
            && text != "..";
        if is_well_formed {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError("must be 1 to 15 characters of letters, digits, '_', '.' and '-'".to_owned()))
        }
    }
}

/// A normalised OCI reference: registry, repository, and a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    pub registry: String,
    pub repository: String,
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

impl ImageRef {
    /// Returns the same repository at this digest, without a tag.
    #[must_use]
    pub fn with_digest(&self, digest: &Digest) -> Self {
        Self { tag: None, digest: Some(digest.clone()), ..self.clone() }
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl From<ImageRef> for String {
    fn from(reference: ImageRef) -> String {
        reference.to_string()
    }
}

impl TryFrom<String> for ImageRef {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl FromStr for ImageRef {
    type Err = NameError;

    /// Normalises as container tools do: a first part with a dot, a colon or `localhost` is the registry;
    /// otherwise the registry is `docker.io`, whose one-part repositories live under `library/`; a reference
    /// without tag and digest means `latest`.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let refuse = |why: &str| NameError(format!("is not an image reference: {why}"));
        if text.is_empty() || text.len() > limits::IMAGE_REF_BYTES_MAX {
            return Err(refuse("it must have 1 to 512 characters"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|NameError(why)| refuse(&format!("its digest {why}")))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
            _ => ("docker.io", rest),
        };
        let registry = match registry {
            "index.docker.io" | "registry-1.docker.io" => "docker.io",
            other => other,
        };
        check_registry(registry).map_err(refuse)?;
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag.to_owned())),
            None => (path, None),
        };
        let repository = if registry == "docker.io" && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository.to_owned()
        };
        check_repository(&repository).map_err(refuse)?;
        if let Some(tag) = &tag {
            check_tag(tag).map_err(refuse)?;
        }
        let tag = if tag.is_none() && digest.is_none() { Some("latest".to_owned()) } else { tag };
        let reference = Self { registry: registry.to_owned(), repository, tag, digest };
        // The stored text is the normalised one, which is longer and is read back by this rule.
        if reference.to_string().len() > limits::IMAGE_REF_BYTES_MAX {
            return Err(refuse("with its registry and tag it must have at most 512 characters"));
        }
        Ok(reference)
    }
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (registry, None),
    };
    let is_host = !host.is_empty()
        && host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        });
    let is_port =
        port.is_none_or(|port| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok());
    if is_host && is_port { Ok(()) } else { Err("its registry is not a host name with an optional port") }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    let is_component = |part: &str| {
        let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = part.as_bytes();
        !bytes.is_empty()
            && edge(bytes[0])
            && edge(bytes[bytes.len() - 1])
            && bytes.iter().all(|&b| edge(b) || matches!(b, b'.' | b'_' | b'-'))
            && !part.contains("..")
    };
    if repository.split('/').all(is_component) {
        Ok(())
    } else {
        Err("its repository must be lower-case path components of letters, digits, '.', '_' and '-'")
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let bytes = tag.as_bytes();
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let is_tag = (1..=128).contains(&bytes.len())
        && word(bytes[0])
        && bytes.iter().all(|&b| word(b) || matches!(b, b'.' | b'-'));
    if is_tag { Ok(()) } else { Err("its tag must be 1 to 128 letters, digits, '_', '.' and '-'") }
}

/// A platform, as `os/architecture`: this server runs the two that the wire names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub enum Platform {
    #[serde(rename = "linux/amd64")]
    LinuxAmd64,
    #[serde(rename = "linux/arm64")]
    LinuxArm64,
}

impl Platform {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LinuxAmd64 => "linux/amd64",
            Self::LinuxArm64 => "linux/arm64",
        }
    }
    /// Returns the OCI architecture word.
    #[must_use]
    pub fn architecture(self) -> &'static str {
        match self {
            Self::LinuxAmd64 => "amd64",
            Self::LinuxArm64 => "arm64",
        }
    }
}

impl FromStr for Platform {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match text {
            "linux/amd64" => Ok(Self::LinuxAmd64),
            "linux/arm64" => Ok(Self::LinuxArm64),
            _ => Err(NameError("must be linux/amd64 or linux/arm64".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_that_is_too_long_when_it_is_normalised_is_refused() {
        let (before, after) = ("docker.io/library/", ":latest");
        let longest = limits::IMAGE_REF_BYTES_MAX - before.len() - after.len();
        let reference: ImageRef = "a".repeat(longest).parse().expect("it just fits");
        assert_eq!(reference.to_string().parse(), Ok(reference));
        "a".repeat(longest + 1).parse::<ImageRef>().expect_err("it could not be read back");
    }

    #[test]
    fn references_are_normalised_as_container_tools_do() {
        for (given, expected) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20"),
            ("acme/web", "docker.io/acme/web:latest"),
            ("docker.io/alpine", "docker.io/library/alpine:latest"),
            ("index.docker.io/library/alpine", "docker.io/library/alpine:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
        ] {
            let parsed: ImageRef = given.parse().expect(given);
            assert_eq!(parsed.to_string(), expected);
            assert_eq!(Name::from(&parsed).as_str().parse::<Name>(), Ok(Name::from(&parsed)));
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        for given in [
            "",
            "UPPER",
            "a//b",
            "a:b:c",
            "a@sha256:12",
            "reg.io:port/x",
            "a/../b",
            "-a",
            "a:",
            "reg.io:99999/x",
        ] {
            assert!(given.parse::<ImageRef>().is_err(), "{given} was accepted");
        }
    }

    #[test]
    fn resource_names_follow_the_wire_pattern() {
        assert!(Name::resource("my-workload-1").is_ok());
        assert!(Name::resource(&"a".repeat(63)).is_ok());
        let id = "a".repeat(limits::UID_BYTES);
        assert!(Name::resource(&id).is_ok() && Name::new_resource(&id).is_err());
        assert!(Name::new_resource(&id[1..]).is_ok() && Name::new_resource(&format!("{id}a")).is_ok());
        assert!(Name::new_resource("hotnn07qt6bezledxl1fw069").is_err());
        for given in ["", "-a", "a-", "A", "a_b", "a.b", &"a".repeat(64), "é"] {
            assert!(Name::resource(given).is_err(), "{given} was accepted");
        }
    }

    #[test]
    fn uids_are_cuid2() {
        assert!("tz4a98xxat96iws9zmbrgj3a".parse::<Uid>().is_ok());
        for given in ["", "1z4a98xxat96iws9zmbrgj3a", "tz4a98xxat96iws9zmbrgj3", "../../../../etc/passwd00"] {
            assert!(given.parse::<Uid>().is_err(), "{given} was accepted");
        }
    }
}
