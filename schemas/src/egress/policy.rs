//! The policy of one instance, as the proxy gets it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::credential::Injection;
use super::host::Host;
use super::pattern::HostPattern;
use super::reason::Reason;
use crate::instance::Secret;
use crate::names::{NameError, Uid};

/// The connections of an instance that must pass through the proxy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EgressMode {
    /// All TCP connections.
    #[default]
    #[serde(alias = "all_traffic")]
    All,
    /// Connections of HTTP and HTTPS only; others pass beside the proxy.
    HttpHttpsOnly,
}

/// The enforcement that a request asks for, in one word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Enforcement {
    pub mode: EgressMode,
    pub is_observing: bool,
}

impl FromStr for Enforcement {
    type Err = NameError;

    /// Reads the word: `all` (or `all_traffic`), `http_https_only`, or `observe`.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let (mode, is_observing) = match text.trim() {
            "all" | "all_traffic" => (EgressMode::All, false),
            "http_https_only" => (EgressMode::HttpHttpsOnly, false),
            "observe" => (EgressMode::All, true),
            _ => {
                let rule = "invalid network.egress.enforcement.mode: must be all, http_https_only or observe";
                return Err(NameError(rule.to_owned()));
            }
        };
        Ok(Self { mode, is_observing })
    }
}

/// The certificate authority of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateAuthority {
    /// The certificate in PEM, which the guest trusts.
    pub certificate: String,
    /// The private key in PEM, which the guest never gets.
    pub key: Secret,
}

/// A credential with its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyCredential {
    pub value: Secret,
    pub inject: Vec<Injection>,
}

/// The policy of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The instance.
    pub owner: Uid,
    /// Address of the guest.
    pub address: IpAddr,
    #[serde(default)]
    pub mode: EgressMode,
    /// True if the policy only observes: nothing is refused by host, and nothing is injected.
    #[serde(default)]
    pub is_observing: bool,
    /// The hosts that may be connected to; `None` means every host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_hosts: Option<Vec<HostPattern>>,
    /// Credentials by name.
    #[serde(default)]
    pub credentials: BTreeMap<String, PolicyCredential>,
    pub authority: CertificateAuthority,
    /// Salted digest of the policy, by which the reconciler compares it with the stored one.
    pub fingerprint: String,
}

/// The treatment of the TLS connections to one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The bytes pass unread.
    Pass,
    /// TLS ends at the proxy, which injects credentials.
    Intercept,
    Refuse(Reason),
}

impl Policy {
    /// Returns `true` if `allow_hosts` lists the host, or is not given.
    #[must_use]
    pub fn lists(&self, host: &Host) -> bool {
        self.allow_hosts.as_ref().is_none_or(|patterns| patterns.iter().any(|pattern| pattern.matches(host)))
    }

    /// Returns `true` if connections to the host are allowed; an observing policy allows all.
    #[must_use]
    pub fn allows(&self, host: &Host) -> bool {
        self.is_observing || self.lists(host)
    }

    /// Returns the names of the credentials that are injected into requests to the host.
    pub fn credentials_for(&self, host: &Host) -> impl Iterator<Item = &str> {
        let concerns = |credential: &PolicyCredential| {
            credential.inject.iter().any(|injection| injection.matching(host).is_some())
        };
        self.credentials
            .iter()
            .filter(move |(_, credential)| concerns(credential))
            .map(|(name, _)| name.as_str())
    }

    /// Returns the treatment of TLS connections to the host.
    #[must_use]
    pub fn route(&self, host: &Host) -> Route {
        if !self.allows(host) {
            return Route::Refuse(Reason::HostNotAllowed);
        }
        let has_credential = self.credentials_for(host).next().is_some();
        if has_credential && !self.is_observing { Route::Intercept } else { Route::Pass }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow_hosts: Option<&[&str]>, hosts: Option<&[&str]>) -> Policy {
        let patterns = |list: &[&str]| list.iter().map(|text| text.parse().expect("a pattern")).collect();
        let (header, format) =
            ("authorization".parse().expect("a header"), "Bearer ${value}".parse().expect("a format"));
        let injection = Injection {
            hosts: hosts.map(patterns),
            target: super::super::credential::Target { header, format },
        };
        let credential = PolicyCredential { value: Secret("s3cret".to_owned()), inject: vec![injection] };
        Policy {
            owner: format!("a{:023}", 0).parse().expect("a uid"),
            address: "10.0.0.2".parse().expect("an address"),
            mode: EgressMode::All,
            is_observing: false,
            allow_hosts: allow_hosts.map(patterns),
            credentials: BTreeMap::from([("KEY".to_owned(), credential)]),
            authority: CertificateAuthority { certificate: String::new(), key: Secret("key".to_owned()) },
            fingerprint: String::new(),
        }
    }

    fn host(text: &str) -> Host {
        text.parse().expect("a host")
    }

    #[test]
    fn an_enforcement_is_one_word() {
        let read = |text: &str| text.parse().map(|Enforcement { mode, is_observing }| (mode, is_observing));
        assert_eq!(read("all"), Ok((EgressMode::All, false)));
        assert_eq!(read("all_traffic"), Ok((EgressMode::All, false)));
        assert_eq!(read(" http_https_only "), Ok((EgressMode::HttpHttpsOnly, false)));
        assert_eq!(read("observe"), Ok((EgressMode::All, true)));
        for text in ["", "ALL", "none", "some"] {
            assert!(
                read(text).is_err_and(|error| error.0.starts_with("invalid network.egress.enforcement.mode"))
            );
        }
    }

    #[test]
    fn only_hosts_of_credentials_are_intercepted() {
        let policy = policy(None, Some(&["api.example.com", "1.2.3.4"]));
        assert_eq!(policy.route(&host("api.example.com")), Route::Intercept);
        assert_eq!(policy.route(&host("1.2.3.4")), Route::Intercept);
        assert_eq!(policy.route(&host("example.com")), Route::Pass);
        assert_eq!(policy.route(&host("1.2.3.5")), Route::Pass);
    }

    #[test]
    fn a_credential_without_hosts_is_for_every_name_and_no_address() {
        let policy = policy(None, None);
        assert_eq!(policy.route(&host("any.example")), Route::Intercept);
        assert_eq!(policy.route(&host("1.2.3.4")), Route::Pass);
    }

    #[test]
    fn a_host_that_is_not_listed_is_refused_unless_the_policy_observes() {
        let mut policy = policy(Some(&["*.example.com"]), Some(&["api.example.org"]));
        assert_eq!(policy.route(&host("a.example.com")), Route::Pass);
        assert_eq!(policy.route(&host("api.example.org")), Route::Refuse(Reason::HostNotAllowed));
        policy.is_observing = true;
        assert_eq!(policy.route(&host("api.example.org")), Route::Pass);
        assert!(!policy.lists(&host("api.example.org")));
    }

    #[test]
    fn a_policy_is_read_back_and_its_debug_output_has_no_secret() {
        let policy = policy(Some(&["a.example"]), Some(&["*.example.com"]));
        let stored = serde_json::to_string(&policy).expect("stored");
        assert_eq!(serde_json::from_str::<Policy>(&stored).expect("read back"), policy);
        assert!(!format!("{policy:?}").contains("s3cret"));
        assert!(stored.contains(r#""as":{"header":"authorization","format":"Bearer ${value}"}"#));
    }
}
