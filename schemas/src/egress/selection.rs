//! Selection of the credential for each header of a request.

use std::collections::BTreeMap;

use super::credential::Target;
use super::host::Host;
use super::pattern::HostPattern;
use super::placeholder::placeholders_in;
use super::policy::{Policy, PolicyCredential};

/// A credential that was selected for a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selected<'a> {
    /// Name of the credential.
    pub name: &'a str,
    pub credential: &'a PolicyCredential,
    pub target: &'a Target,
}

/// The rank of a candidate; the least one is selected. A placeholder in the field counts most, then the more
/// specific pattern (a pattern before no pattern), then the name.
type Rank<'a> = (bool, bool, Option<&'a HostPattern>, &'a str, &'a Target);

/// Selects one credential for each header of a request to the host. `fields` returns the values that the
/// request has in a header, joined in any way.
#[must_use]
pub fn select<'a>(policy: &'a Policy, host: &Host, fields: impl Fn(&str) -> Vec<u8>) -> Vec<Selected<'a>> {
    let mut best: BTreeMap<&str, (Rank<'a>, Selected<'a>)> = BTreeMap::new();
    for (name, credential) in &policy.credentials {
        for injection in &credential.inject {
            let Some(pattern) = injection.matching(host) else { continue };
            let target = &injection.target;
            let header = target.header.as_str();
            let value = fields(header);
            let has_placeholder = placeholders_in(&value, std::iter::once(name.as_str())).next().is_some();
            // The pattern is borrowed from the policy, like the injection.
            let rank = (!has_placeholder, pattern.is_none(), pattern, name.as_str(), target);
            let candidate = (rank, Selected { name, credential, target });
            match best.get(header) {
                Some((other, _)) if *other <= candidate.0 => {}
                _ => drop(best.insert(header, candidate)),
            }
        }
    }
    best.into_values().map(|(_, selected)| selected).collect()
}

#[cfg(test)]
mod tests {
    use super::super::credential::Injection;
    use super::super::policy::{CertificateAuthority, EgressMode};
    use super::*;
    use crate::instance::Secret;

    fn policy(rows: &[(&str, Option<&str>, &str)]) -> Policy {
        let credential = |(name, host, header): &(&str, Option<&str>, &str)| {
            let target = Target {
                header: header.parse().expect("a header"),
                format: "${value}".parse().expect("a format"),
            };
            let hosts = host.map(|host| vec![host.parse().expect("a pattern")]);
            let inject = vec![Injection { hosts, target }];
            ((*name).to_owned(), PolicyCredential { value: Secret((*name).to_owned()), inject })
        };
        Policy {
            owner: format!("a{:023}", 0).parse().expect("a uid"),
            address: "10.0.0.2".parse().expect("an address"),
            mode: EgressMode::All,
            is_observing: false,
            allow_hosts: None,
            credentials: rows.iter().map(credential).collect(),
            authority: CertificateAuthority { certificate: String::new(), key: Secret(String::new()) },
            fingerprint: String::new(),
        }
    }

    fn names(policy: &Policy, host: &str, field: &str) -> Vec<String> {
        let host: Host = host.parse().expect("a host");
        select(policy, &host, |_| field.as_bytes().to_vec()).iter().map(|one| one.name.to_owned()).collect()
    }

    #[test]
    fn each_header_gets_one_credential() {
        let policy = policy(&[("A", Some("x.example.com"), "authorization"), ("B", None, "x-key")]);
        assert_eq!(names(&policy, "x.example.com", ""), ["A", "B"]);
        assert_eq!(names(&policy, "y.example.com", ""), ["B"]);
        assert!(names(&policy, "1.2.3.4", "").is_empty());
    }

    #[test]
    fn a_placeholder_then_the_pattern_then_the_name_decides() {
        let rows = [
            ("Z", Some("x.example.com"), "x-key"),
            ("A", Some("*.example.com"), "x-key"),
            ("B", Some("*.example.com"), "x-key"),
            ("C", None, "x-key"),
        ];
        let policy = policy(&rows);
        assert_eq!(names(&policy, "x.example.com", ""), ["Z"]);
        assert_eq!(names(&policy, "x.example.com", "mock-C"), ["C"]);
        assert_eq!(names(&policy, "x.example.com", "Bearer mock-B"), ["B"]);
        assert_eq!(names(&policy, "y.example.com", "mock-Z"), ["A"]);
        assert_eq!(names(&policy, "example.org", ""), ["C"]);
    }
}
