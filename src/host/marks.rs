//! Marks: they record the owner of objects on the host.
//!
//! Links carry `stead:SCOPE:UID` as their alias. Objects that must be recognised before an alias can be set, or
//! inside the kernel's filter, get values derived from names by hash.

use sha2::{Digest, Sha256};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::Mac;

/// The scope of one daemon on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope(String);

impl Scope {
    /// Creates a scope.
    ///
    /// # Errors
    /// Returns an error when the text is not 1 to 32 letters, digits, dashes and underscores: it becomes part of
    /// aliases, in which colons separate.
    pub fn new(text: &str) -> Result<Self, HostError> {
        let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if (1..=32).contains(&text.len()) && text.bytes().all(is_fit) {
            return Ok(Self(text.to_owned()));
        }
        Err(HostError::new(HostErrorKind::Permanent, "use the scope", text)
            .because("a scope has 1 to 32 letters, digits, '-' and '_'"))
    }

    /// Returns the alias of a link made for `owner`.
    pub(super) fn alias(&self, owner: &Uid) -> String {
        format!("stead:{}:{owner}", self.0)
    }

    /// Returns the object that a link with this alias was made for, if it is of this scope.
    pub(super) fn owner(&self, alias: &str) -> Option<Uid> {
        alias.strip_prefix("stead:")?.strip_prefix(&self.0)?.strip_prefix(':')?.parse().ok()
    }

    /// Returns the hardware address with which we create a bridge or an IFB. Until the link has its alias, this
    /// address distinguishes it from a foreign one.
    pub(super) fn creation_mac(&self, link: &LinkName) -> Mac {
        let hash = Sha256::digest(format!("stead bridge {} {link}", self.0));
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&hash[..6]);
        bytes[0] = bytes[0] & 0xfc | 0x02; // locally administered, unicast
        Mac(bytes)
    }
}

/// Returns the device group of all TAPs on a bridge. The filter matches it: a frame from such a TAP that no port rule
/// allows is dropped, also while the rules are being restored.
pub(super) fn port_group(bridge: &LinkName) -> u32 {
    let hash = Sha256::digest(format!("stead ports of {bridge}"));
    // People give names and uses to small group numbers.
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) & 0x7fff_ffff | 0x4000_0000
}

/// Device group of the bridges of all daemons on a host. The filter distinguishes packets of guests from others by
/// it.
pub(super) const BRIDGES: u32 = 0x2057_ead0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_is_read_back_by_its_own_scope_only() {
        let uid: Uid = "a23456789012345678901234".parse().expect("valid");
        let scope = Scope::new("one").expect("valid");
        assert_eq!(scope.owner(&scope.alias(&uid)), Some(uid.clone()));
        assert_eq!(Scope::new("on").expect("valid").owner(&scope.alias(&uid)), None);
        for alias in ["", "stead:one:", "stead:one:x", "other:one:a23456789012345678901234"] {
            assert_eq!(scope.owner(alias), None, "{alias}");
        }
        for text in ["", "a:b", "a b", &"x".repeat(33)] {
            assert!(Scope::new(text).is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn derived_addresses_differ_by_scope_and_bridge_and_are_local() {
        let (one, two) = (Scope::new("one").expect("valid"), Scope::new("two").expect("valid"));
        let [a, b]: [LinkName; 2] = ["br-a", "br-b"].map(|name| name.parse().expect("valid"));
        let macs = [one.creation_mac(&a), one.creation_mac(&b), two.creation_mac(&a)];
        assert!(macs[0] != macs[1] && macs[0] != macs[2]);
        assert!(macs.iter().all(|mac| mac.0[0] & 3 == 2));
        assert!(port_group(&a) != port_group(&b) && port_group(&a) >= 1 << 30);
    }
}
