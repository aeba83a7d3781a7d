//! Validation of the credentials of a request.
//!
//! Guarantees: all problems are reported together with the paths of their fields; no message repeats a value.

use std::collections::{BTreeMap, BTreeSet};

use super::credential::{Credential, Injection, Source, Target};
use super::pattern::HostPattern;
use crate::instance::Secret;
use crate::limits::{
    EGRESS_CREDENTIAL_NAME_BYTES_MAX, EGRESS_CREDENTIALS_MAX, EGRESS_HOSTS_MAX, EGRESS_INJECTIONS_MAX,
    EGRESS_VALUE_BYTES_MAX,
};
use crate::validate::{FieldErrors, printable};

const INVALID: &str = "invalid_request";
/// Number of characters of a name that a path repeats.
const NAME_CHARS_MAX: usize = 64;

/// A credential as a request has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AskedCredential {
    pub source_env: String,
    pub inject: Vec<AskedInjection>,
}

/// An injection as a request has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AskedInjection {
    pub hosts: Option<Vec<String>>,
    pub header: String,
    pub format: String,
}

/// The parts of a request that depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskedEgress {
    /// True if the instance has a network.
    pub has_network: bool,
    /// True if its egress is mediated.
    pub is_mediated: bool,
    pub has_credentials: bool,
}

/// Checks that a request has what mediated egress and credentials need.
pub fn requirements(asked: AskedEgress, errors: &mut FieldErrors) {
    if asked.is_mediated && !asked.has_network {
        errors.push("network.egress", INVALID, "requires network.enabled=true");
    }
    if asked.has_credentials && !asked.is_mediated {
        errors.push("credentials", INVALID, "require network.egress.enabled=true");
    }
}

/// Reads `network.egress.allow_hosts`; an empty list allows no host.
pub fn allow_hosts(asked: &[String], errors: &mut FieldErrors) -> Vec<HostPattern> {
    patterns("network.egress.allow_hosts", asked, errors)
}

/// Checks the credentials of a request against its `env`, and returns those that are valid.
pub fn credentials(
    asked: &BTreeMap<String, AskedCredential>,
    env: &BTreeMap<String, Secret>,
    errors: &mut FieldErrors,
) -> BTreeMap<String, Credential> {
    if asked.len() > EGRESS_CREDENTIALS_MAX {
        let message = format!("has {} entries; at most {EGRESS_CREDENTIALS_MAX} are allowed", asked.len());
        errors.push("credentials", INVALID, message);
        return BTreeMap::new();
    }
    let mut taken = BTreeMap::new();
    let mut valid = BTreeMap::new();
    for (name, asked) in asked {
        let path = format!("credentials[{}]", printable(name, NAME_CHARS_MAX));
        let name = name.trim();
        check_name(&path, name, errors);
        let value = source(&path, asked.source_env.trim(), env, errors);
        let inject = injections(&path, &asked.inject, value, errors);
        report_conflicts(&path, name, &inject, &mut taken, errors);
        let source = Source { env: asked.source_env.trim().to_owned() };
        if valid.insert(name.to_owned(), Credential { source, inject }).is_some() {
            errors.push(path, INVALID, "has the name of another credential, apart from blanks");
        }
    }
    valid
}

/// Checks a name. It is the name of a variable in the guest and part of the placeholder.
fn check_name(path: &str, name: &str, errors: &mut FieldErrors) {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let is_name = (1..=EGRESS_CREDENTIAL_NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(is_letter)
        && !name.starts_with(|first: char| first.is_ascii_digit());
    if !is_name {
        let most = EGRESS_CREDENTIAL_NAME_BYTES_MAX;
        errors.push(
            path,
            INVALID,
            format!("must be named by 1 to {most} letters, digits and '_', a digit not first"),
        );
    }
}

/// Returns the value of a credential's source.
fn source<'a>(
    path: &str,
    name: &str,
    env: &'a BTreeMap<String, Secret>,
    errors: &mut FieldErrors,
) -> Option<&'a Secret> {
    let path = format!("{path}.source.env");
    let Some(value) = env.get(name) else {
        errors.push(path, INVALID, "must be present in env");
        return None;
    };
    if value.0.trim().is_empty() {
        errors.push(path, INVALID, "must be non-empty");
        return None;
    }
    if value.0.len() > EGRESS_VALUE_BYTES_MAX {
        errors.push(path, INVALID, format!("has a value of more than {EGRESS_VALUE_BYTES_MAX} bytes"));
        return None;
    }
    Some(value)
}

fn injections(
    path: &str,
    asked: &[AskedInjection],
    value: Option<&Secret>,
    errors: &mut FieldErrors,
) -> Vec<Injection> {
    let path = format!("{path}.inject");
    if asked.is_empty() {
        errors.push(&path, INVALID, "needs at least one entry");
    }
    if asked.len() > EGRESS_INJECTIONS_MAX {
        let message = format!("has {} entries; at most {EGRESS_INJECTIONS_MAX} are allowed", asked.len());
        errors.push(&path, INVALID, message);
        return Vec::new();
    }
    let asked = asked.iter().enumerate();
    asked.filter_map(|(index, one)| injection(&format!("{path}[{index}]"), one, value, errors)).collect()
}

fn injection(
    path: &str,
    asked: &AskedInjection,
    value: Option<&Secret>,
    errors: &mut FieldErrors,
) -> Option<Injection> {
    let at_hosts = format!("{path}.hosts");
    if asked.hosts.as_ref().is_some_and(Vec::is_empty) {
        errors.push(&at_hosts, INVALID, "needs at least one entry, or must be left out for every host");
    }
    let hosts = asked.hosts.as_ref().map(|hosts| patterns(&at_hosts, hosts, errors));
    let header = errors.take(&format!("{path}.as.header"), INVALID, asked.header.parse());
    let at_format = format!("{path}.as.format");
    let format = errors.take(&at_format, INVALID, asked.format.parse());
    let target = Target { header: header?, format: format? };
    if let Some(value) = value {
        errors.take(&at_format, INVALID, target.format.apply(value).map(drop))?;
    }
    Some(Injection { hosts, target })
}

/// Reads patterns, sorted and each once.
fn patterns(path: &str, asked: &[String], errors: &mut FieldErrors) -> Vec<HostPattern> {
    if asked.len() > EGRESS_HOSTS_MAX {
        let message = format!("has {} entries; at most {EGRESS_HOSTS_MAX} are allowed", asked.len());
        errors.push(path, INVALID, message);
        return Vec::new();
    }
    let asked = asked.iter().enumerate();
    let read =
        asked.filter_map(|(index, text)| errors.take(&format!("{path}[{index}]"), INVALID, text.parse()));
    read.collect::<BTreeSet<HostPattern>>().into_iter().collect()
}

/// The hosts and the header of an injection.
type Slot = (Option<Vec<HostPattern>>, String);

/// Reports injections of the same hosts and header: which of them counts would depend on names.
fn report_conflicts(
    path: &str,
    name: &str,
    inject: &[Injection],
    taken: &mut BTreeMap<Slot, String>,
    errors: &mut FieldErrors,
) {
    for injection in inject {
        let header = injection.target.header.as_str().to_owned();
        if let Some(other) = taken.insert((injection.hosts.clone(), header), name.to_owned()) {
            let other = printable(&other, NAME_CHARS_MAX);
            errors.push(
                format!("{path}.inject"),
                INVALID,
                format!("has the hosts and the header of credential {other}"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn injection(hosts: Option<&[&str]>, header: &str, format: &str) -> AskedInjection {
        let hosts = hosts.map(|hosts| hosts.iter().map(|&host| host.to_owned()).collect());
        AskedInjection { hosts, header: header.to_owned(), format: format.to_owned() }
    }

    fn credential(inject: Vec<AskedInjection>) -> AskedCredential {
        AskedCredential { source_env: " REAL ".to_owned(), inject }
    }

    fn plain() -> AskedInjection {
        injection(Some(&["api.example.com"]), "Authorization", "Bearer ${value}")
    }

    fn problems_with(value: &str, asked: &[(&str, AskedCredential)]) -> Vec<String> {
        let env = BTreeMap::from([("REAL".to_owned(), Secret(value.to_owned()))]);
        let asked = asked.iter().map(|(name, one)| ((*name).to_owned(), one.clone())).collect();
        let mut errors = FieldErrors::default();
        credentials(&asked, &env, &mut errors);
        errors.iter().map(|error| format!("{} {}", error.path, error.message)).collect()
    }

    fn problems(asked: &[(&str, AskedCredential)]) -> Vec<String> {
        problems_with("s3cret", asked)
    }

    #[test]
    fn names_hosts_and_headers_are_trimmed_and_hosts_lowered_and_unique() {
        let hosts: &[&str] = &[" API.example.com", "api.example.com. ", "*.Example.org"];
        let asked = credential(vec![injection(Some(hosts), " Authorization ", " Bearer ${value} ")]);
        let env = BTreeMap::from([("REAL".to_owned(), Secret("s3cret".to_owned()))]);
        let mut errors = FieldErrors::default();
        let valid = credentials(&BTreeMap::from([(" KEY ".to_owned(), asked)]), &env, &mut errors);
        assert!(errors.is_empty(), "{errors}");
        let stored = serde_json::to_value(&valid).expect("stored");
        let expected = serde_json::json!({"KEY": {
            "source": {"env": "REAL"},
            "inject": [{
                "hosts": ["api.example.com", "*.example.org"],
                "as": {"header": "authorization", "format": "Bearer ${value}"},
            }],
        }});
        assert_eq!(stored, expected);
    }

    #[test]
    fn each_problem_is_reported_with_the_path_of_its_field() {
        let mut absent = credential(vec![plain()]);
        absent.source_env = "ABSENT".to_owned();
        assert_eq!(problems(&[("A", absent)]), ["credentials[A].source.env must be present in env"]);
        for blank in ["", " \t"] {
            let found = problems_with(blank, &[("A", credential(vec![plain()]))]);
            assert_eq!(found, ["credentials[A].source.env must be non-empty"]);
        }
        let scheme = injection(Some(&["ok.example", "https://x.example"]), "a", "${value}");
        let found = problems(&[("A", credential(vec![plain(), scheme]))]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("credentials[A].inject[1].hosts[1] invalid host pattern"), "{found:?}");
        let found = problems(&[("A", credential(vec![injection(None, "a", "Bearer")]))]);
        assert_eq!(found, ["credentials[A].inject[0].as.format must include ${value}"]);
        let found = problems(&[("A", credential(vec![injection(None, "Host", "${value}")]))]);
        assert!(found[0].starts_with("credentials[A].inject[0].as.header"), "{found:?}");
        assert_eq!(
            problems(&[("A", credential(vec![]))]),
            ["credentials[A].inject needs at least one entry"]
        );
        assert_eq!(
            problems(&[
                ("a b", credential(vec![plain()])),
                ("1", credential(vec![injection(None, "a", "${value}")]))
            ])
            .len(),
            2
        );
    }

    #[test]
    fn a_value_that_no_header_can_carry_is_refused_and_not_repeated() {
        for value in ["s3cret\nX: y", "s3cret\r", "s3cret\0", "ends with a blank "] {
            let found = problems_with(value, &[("A", credential(vec![plain()]))]);
            assert_eq!(found.len(), 1, "{value:?}");
            assert!(
                !found[0].contains("s3cret") && found[0].starts_with("credentials[A].inject[0].as.format")
            );
        }
    }

    #[test]
    fn two_credentials_for_the_same_hosts_and_header_are_refused() {
        let again = injection(Some(&["API.example.com"]), "AUTHORIZATION", "${value}");
        let found = problems(&[("A", credential(vec![plain()])), ("B", credential(vec![again]))]);
        assert_eq!(found, ["credentials[B].inject has the hosts and the header of credential A"]);
        let other = injection(Some(&["api.example.com"]), "x-key", "${value}");
        assert!(problems(&[("A", credential(vec![plain()])), ("B", credential(vec![other]))]).is_empty());
    }

    #[test]
    fn mediation_needs_a_network_and_credentials_need_mediation() {
        let problems = |has_network, is_mediated, has_credentials| {
            let mut errors = FieldErrors::default();
            requirements(AskedEgress { has_network, is_mediated, has_credentials }, &mut errors);
            errors.to_string()
        };
        assert_eq!(problems(true, true, true), "");
        assert_eq!(problems(false, false, false), "");
        assert_eq!(problems(false, true, false), "network.egress requires network.enabled=true");
        assert_eq!(problems(true, false, true), "credentials require network.egress.enabled=true");
    }

    #[test]
    fn allowed_hosts_are_read_with_their_paths() {
        let read = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
            let mut errors = FieldErrors::default();
            let hosts: Vec<String> =
                allow_hosts(&texts, &mut errors).iter().map(ToString::to_string).collect();
            (hosts, errors.iter().map(|error| error.path.clone()).collect::<Vec<_>>())
        };
        assert_eq!(read(&["B.example", "*.a.example", "b.example."]).0, ["b.example", "*.a.example"]);
        assert_eq!(read(&["ok.example", "*.com"]).1, ["network.egress.allow_hosts[1]"]);
        assert_eq!(read(&[]), (vec![], vec![]));
        let many: Vec<String> = (0..=EGRESS_HOSTS_MAX).map(host_number).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(read(&many[1..]).1.len(), 0);
        assert_eq!(read(&many).1, ["network.egress.allow_hosts"]);
    }

    fn host_number(index: usize) -> String {
        format!("h{index}.example.com")
    }

    #[test]
    fn limits_are_tested_at_the_limit_and_one_beyond() {
        let host = host_number;
        let many = |count: usize| {
            let make = |index| {
                (format!("K{index}"), credential(vec![injection(Some(&[&host(index)]), "a", "${value}")]))
            };
            let all: Vec<(String, AskedCredential)> = (0..count).map(make).collect();
            problems(&all.iter().map(|(name, one)| (name.as_str(), one.clone())).collect::<Vec<_>>()).len()
        };
        assert_eq!((many(EGRESS_CREDENTIALS_MAX), many(EGRESS_CREDENTIALS_MAX + 1)), (0, 1));
        assert_eq!(many(10_000), 1);
        let injections = |count: usize| {
            let all = (0..count).map(|index| injection(None, &format!("h{index}"), "${value}")).collect();
            problems(&[("A", credential(all))]).len()
        };
        assert_eq!((injections(EGRESS_INJECTIONS_MAX), injections(EGRESS_INJECTIONS_MAX + 1)), (0, 1));
        let hosts = |count: usize| {
            let names: Vec<String> = (0..count).map(host).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            problems(&[("A", credential(vec![injection(Some(&names), "a", "${value}")]))]).len()
        };
        assert_eq!((hosts(EGRESS_HOSTS_MAX), hosts(EGRESS_HOSTS_MAX + 1), hosts(0)), (0, 1, 1));
        let value =
            |bytes: usize| problems_with(&"v".repeat(bytes), &[("A", credential(vec![plain()]))]).len();
        assert_eq!((value(EGRESS_VALUE_BYTES_MAX), value(EGRESS_VALUE_BYTES_MAX + 1)), (0, 1));
    }
}
