//! The desired egress of one instance, as it is stored.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::credential::Credential;
use super::pattern::HostPattern;
use super::placeholder::placeholder;
use super::policy::{CertificateAuthority, EgressMode, Policy, PolicyCredential};
use crate::instance::Secret;
use crate::names::Uid;

/// The mediated egress of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressSpec {
    #[serde(default)]
    pub mode: EgressMode,
    /// True if the policy only observes: nothing is refused by host, and nothing is injected.
    #[serde(default)]
    pub is_observing: bool,
    /// The hosts that may be connected to; `None` means every host.
    #[serde(default)]
    pub allow_hosts: Option<Vec<HostPattern>>,
    /// Credentials by name.
    #[serde(default)]
    pub credentials: BTreeMap<String, Credential>,
    /// The certificate authority that the guest trusts. A copy of the instance has it too, because its programs may have
    /// the certificate in memory.
    pub authority: CertificateAuthority,
}

impl EgressSpec {
    /// Returns `true` if a variable of the request's `env` is the source of a credential.
    #[must_use]
    pub fn is_source(&self, variable: &str) -> bool {
        self.credentials.values().any(|credential| credential.source.env == variable)
    }

    /// Returns the variables of the guest: those of the request without the sources of credentials, and a placeholder
    /// for each credential.
    #[must_use]
    pub fn guest_env(&self, env: &BTreeMap<String, Secret>) -> BTreeMap<String, Secret> {
        let plain = env.iter().filter(|(name, _)| !self.is_source(name));
        let mut all: BTreeMap<String, Secret> =
            plain.map(|(name, value)| (name.clone(), value.clone())).collect();
        for name in self.credentials.keys() {
            all.insert(name.clone(), Secret(placeholder(name)));
        }
        all
    }

    /// Returns the policy of a guest with this address, with the values of the request's `env`. `digest` makes a
    /// fingerprint of the policy's text.
    #[must_use]
    pub fn policy(
        &self,
        owner: &Uid,
        address: IpAddr,
        env: &BTreeMap<String, Secret>,
        digest: impl FnOnce(&str) -> String,
    ) -> Policy {
        let value = |credential: &Credential| env.get(&credential.source.env).cloned();
        let with_value = |(name, credential): (&String, &Credential)| {
            let inject = credential.inject.clone();
            Some((name.clone(), PolicyCredential { value: value(credential)?, inject }))
        };
        let mut policy = Policy {
            owner: owner.clone(),
            address,
            mode: self.mode,
            is_observing: self.is_observing,
            allow_hosts: self.allow_hosts.clone(),
            credentials: self.credentials.iter().filter_map(with_value).collect(),
            authority: self.authority.clone(),
            fingerprint: String::new(),
        };
        let text = zeroize::Zeroizing::new(serde_json::to_string(&policy).unwrap_or_default());
        policy.fingerprint = digest(&text);
        policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egress::{Injection, Source, Target};

    fn spec(source: &str) -> EgressSpec {
        let (header, format) =
            ("authorization".parse().expect("valid"), "Bearer ${value}".parse().expect("valid"));
        let inject = vec![Injection { hosts: None, target: Target { header, format } }];
        let credential = Credential { source: Source { env: source.to_owned() }, inject };
        EgressSpec {
            mode: EgressMode::All,
            is_observing: false,
            allow_hosts: None,
            credentials: BTreeMap::from([("KEY".to_owned(), credential)]),
            authority: CertificateAuthority { certificate: String::new(), key: Secret(String::new()) },
        }
    }

    fn env() -> BTreeMap<String, Secret> {
        [("REAL", "s3cret"), ("MODE", "fast")]
            .map(|(name, value)| (name.to_owned(), Secret(value.to_owned())))
            .into()
    }

    #[test]
    fn a_guest_gets_placeholders_and_never_a_source() {
        let guest = spec("REAL").guest_env(&env());
        let placeholder = Secret(placeholder("KEY"));
        assert_eq!(guest.get("KEY"), Some(&placeholder));
        assert_eq!(guest.keys().map(String::as_str).collect::<Vec<_>>(), ["KEY", "MODE"]);
        // A credential may have the name of its source.
        let env = BTreeMap::from([("KEY".to_owned(), Secret("s3cret".to_owned()))]);
        assert_eq!(spec("KEY").guest_env(&env), BTreeMap::from([("KEY".to_owned(), placeholder)]));
    }

    #[test]
    fn another_value_makes_another_fingerprint() {
        let owner: Uid = format!("a{:023}", 0).parse().expect("a uid");
        let address = "10.0.0.2".parse().expect("an address");
        let print = |env: &BTreeMap<String, Secret>| spec("REAL").policy(&owner, address, env, str::to_owned);
        let (one, again) = (print(&env()), print(&env()));
        assert_eq!(one, again);
        assert_eq!(one.credentials.get("KEY").map(|credential| &credential.value.0[..]), Some("s3cret"));
        let rotated = BTreeMap::from([("REAL".to_owned(), Secret("n3w".to_owned()))]);
        assert_ne!(print(&rotated).fingerprint, one.fingerprint);
        assert!(print(&BTreeMap::new()).credentials.is_empty());
    }
}
