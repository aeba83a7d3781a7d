//! Credentials that the proxy injects, in the form that is stored and on the wire.

use serde::{Deserialize, Serialize};

use super::header::{Format, InjectedHeader};
use super::host::Host;
use super::pattern::HostPattern;

/// A credential. Its name is the variable in the guest, which has a placeholder as its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    pub source: Source,
    pub inject: Vec<Injection>,
}

/// The source of a credential's value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The variable of the request's `env`, which the guest does not get.
    pub env: String,
}

/// The requests that get the credential, and the field that carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injection {
    /// The hosts; `None` means every host that has a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<HostPattern>>,
    #[serde(rename = "as")]
    pub target: Target,
}

/// The field that carries a credential.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    pub header: InjectedHeader,
    pub format: Format,
}

impl Injection {
    /// Returns the most specific pattern that matches the host: `Some(None)` for an injection into the requests
    /// of every host, and `None` when the injection does not concern the host. An address must be named.
    #[must_use]
    pub fn matching(&self, host: &Host) -> Option<Option<&HostPattern>> {
        match &self.hosts {
            Some(patterns) => patterns.iter().filter(|pattern| pattern.matches(host)).min().map(Some),
            None => host.name().map(|_| None),
        }
    }
}
