//! Mediated egress of an instance on the wire.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fields::Fields;
use crate::egress::{
    AskedCredential, AskedEgress, AskedInjection, CertificateAuthority, Credential, EgressMode, EgressSpec,
    Enforcement, HostPattern, allow_hosts, credentials, requirements,
};
use crate::instance::Secret;
use crate::limits::{EGRESS_HOSTS_MAX, HOSTNAME_BYTES_MAX};
use crate::validate::FieldErrors;

const INVALID: &str = "invalid_request";

/// Mediated egress as clients read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EgressView {
    /// True always: an instance without mediated egress has no such object.
    pub enabled: bool,
    /// Rule for connections that the proxy does not handle.
    pub enforcement: EnforcementView,
    /// The hosts that may be connected to; absent if all may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_hosts: Option<Vec<String>>,
    /// Names of the credentials that are injected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub credentials: Vec<String>,
}

/// The rule for connections that the egress proxy does not handle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EnforcementView {
    /// `all`, `http_https_only` or `observe`.
    pub mode: String,
}

impl From<&EgressSpec> for EgressView {
    fn from(spec: &EgressSpec) -> Self {
        let mode = match (spec.is_observing, spec.mode) {
            (true, _) => "observe",
            (false, EgressMode::All) => "all",
            (false, EgressMode::HttpHttpsOnly) => "http_https_only",
        };
        let shown = |hosts: &Vec<HostPattern>| hosts.iter().map(ToString::to_string).collect();
        Self {
            enabled: true,
            enforcement: EnforcementView { mode: mode.to_owned() },
            allow_hosts: spec.allow_hosts.as_ref().map(shown),
            credentials: spec.credentials.keys().cloned().collect(),
        }
    }
}

/// The `network.egress` of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct EgressAsked {
    pub(super) enabled: bool,
    enforcement: Enforcement,
    allow_hosts: Option<Vec<HostPattern>>,
}

impl EgressAsked {
    /// Reads the field `egress` of `network`.
    pub(super) fn read(network: &mut Fields, errors: &mut FieldErrors) -> Self {
        let Some(mut egress) = network.object("egress", errors) else { return Self::default() };
        let enabled = egress.flag("enabled", errors).unwrap_or(false);
        let enforcement = egress.object("enforcement", errors).map(|mut enforcement| {
            let mode = enforcement.text("mode", errors).map(|word| word.parse());
            let mode = mode.and_then(|mode| errors.take(&enforcement.path("mode"), INVALID, mode));
            enforcement.finish(errors);
            mode.unwrap_or_default()
        });
        let hosts = egress.texts("allow_hosts", EGRESS_HOSTS_MAX, HOSTNAME_BYTES_MAX, errors);
        let allow_hosts = hosts.map(|hosts| allow_hosts(&hosts, errors));
        if allow_hosts.is_some() && !enabled {
            errors.push(egress.path("allow_hosts"), INVALID, "requires network.egress.enabled=true");
        }
        egress.finish(errors);
        Self { enabled, enforcement: enforcement.unwrap_or_default(), allow_hosts }
    }

    /// Reads the `credentials` of a request with this `env`, and returns the egress that the request asks for. Its
    /// authority is empty: making one needs random numbers.
    pub(super) fn with_credentials(
        self,
        fields: &mut Fields,
        env: &BTreeMap<String, Secret>,
        has_network: bool,
        errors: &mut FieldErrors,
    ) -> Option<EgressSpec> {
        let asked = asked_credentials(fields, errors);
        let has_credentials = !asked.is_empty();
        requirements(AskedEgress { has_network, is_mediated: self.enabled, has_credentials }, errors);
        let credentials: BTreeMap<String, Credential> = credentials(&asked, env, errors);
        self.enabled.then(|| EgressSpec {
            mode: self.enforcement.mode,
            is_observing: self.enforcement.is_observing,
            allow_hosts: self.allow_hosts,
            credentials,
            authority: CertificateAuthority { certificate: String::new(), key: Secret(String::new()) },
        })
    }
}

fn asked_credentials(fields: &mut Fields, errors: &mut FieldErrors) -> BTreeMap<String, AskedCredential> {
    let Some(credentials) = fields.object("credentials", errors) else { return BTreeMap::new() };
    let mut all = BTreeMap::new();
    for (name, mut credential) in credentials.entries(errors) {
        let source = credential.object("source", errors).and_then(|mut source| {
            let env = source.required_text("env", errors);
            source.finish(errors);
            env
        });
        if source.is_none() {
            errors.push(credential.path("source"), INVALID, "is required, with env");
        }
        let asked = credential.objects("inject", errors);
        let inject: Vec<AskedInjection> =
            asked.into_iter().filter_map(|inject| asked_injection(inject, errors)).collect();
        credential.finish(errors);
        if let Some(source_env) = source {
            all.insert(name, AskedCredential { source_env, inject });
        }
    }
    all
}

fn asked_injection(mut inject: Fields, errors: &mut FieldErrors) -> Option<AskedInjection> {
    let hosts = inject.texts("hosts", EGRESS_HOSTS_MAX, HOSTNAME_BYTES_MAX, errors);
    let Some(mut target) = inject.object("as", errors) else {
        errors.push(inject.path("as"), INVALID, "is required");
        return None;
    };
    let header = target.required_text("header", errors);
    let format = target.required_text("format", errors);
    target.finish(errors);
    inject.finish(errors);
    Some(AskedInjection { hosts, header: header?, format: format? })
}
