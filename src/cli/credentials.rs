//! Mediated egress as flags of `run`, and as a line of `describe`.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use stead_schemas::api::EgressView;

use super::Failure;

/// The field and the format of a credential that names none.
const BEARER: (&str, &str) = ("Authorization", "Bearer ${value}");

#[derive(Debug, Args)]
pub(crate) struct Egress {
    /// Carry the connections of the guest: all of them, those of HTTP and HTTPS, or all of them without refusing any.
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    egress: Option<Mode>,
    /// A host that may be connected to, exact or with one leading `*.`; all by default.
    #[arg(long = "allow-host", requires = "egress")]
    allow_hosts: Vec<String>,
    /// A credential: NAME[=VARIABLE]@HOST[,HOST...][@HEADER: FORMAT]. The guest has a placeholder as NAME, and requests to
    /// the hosts get the value of VARIABLE, which is taken from --env or from this program's own environment. The header
    /// is `Authorization: Bearer ${value}` by default.
    #[arg(long = "credential", requires = "egress")]
    credentials: Vec<Credential>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    All,
    HttpHttpsOnly,
    Observe,
}

/// A credential as it is written on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Credential {
    name: String,
    variable: String,
    hosts: Vec<String>,
    header: String,
    format: String,
}

impl FromStr for Credential {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "must be NAME[=VARIABLE]@HOST[,HOST...][@HEADER: FORMAT]";
        let (names, rest) = text.split_once('@').ok_or(FORM)?;
        let (name, variable) = names.split_once('=').unwrap_or((names, names));
        let (hosts, field) = match rest.split_once('@') {
            Some((hosts, field)) => (hosts, Some(field.split_once(':').ok_or(FORM)?)),
            None => (rest, None),
        };
        if name.is_empty() || variable.is_empty() || hosts.is_empty() {
            return Err(FORM.to_owned());
        }
        let (header, format) = field.unwrap_or(BEARER);
        Ok(Self {
            name: name.to_owned(),
            variable: variable.to_owned(),
            hosts: hosts.split(',').map(str::to_owned).collect(),
            header: header.trim().to_owned(),
            format: format.trim().to_owned(),
        })
    }
}

impl Egress {
    /// Adds the given flags to a request; the server validates the values.
    ///
    /// # Errors
    /// Fails for a credential whose variable is neither in the request nor in the environment.
    pub(super) fn put(&self, body: &mut Value) -> Result<(), Failure> {
        let Some(mode) = self.egress else { return Ok(()) };
        let mode = match mode {
            Mode::All => "all",
            Mode::HttpHttpsOnly => "http_https_only",
            Mode::Observe => "observe",
        };
        body["network"]["egress"] = json!({ "enabled": true, "enforcement": { "mode": mode } });
        if !self.allow_hosts.is_empty() {
            body["network"]["egress"]["allow_hosts"] = json!(self.allow_hosts);
        }
        for credential in &self.credentials {
            let Credential { name, variable, hosts, header, format } = credential;
            if body["env"].get(variable).is_none() {
                let value = std::env::var(variable).map_err(|_| {
                    Failure::Usage(format!(
                        "credential {name}: {variable} is neither in --env nor in the environment"
                    ))
                })?;
                body["env"][variable] = value.into();
            }
            body["credentials"][name] = json!({
                "source": { "env": variable },
                "inject": [{ "hosts": hosts, "as": { "header": header, "format": format } }],
            });
        }
        Ok(())
    }
}

/// Returns mediated egress in words.
pub(super) fn summary(egress: &EgressView) -> String {
    let mut words = egress.enforcement.mode.clone();
    if let Some(hosts) = &egress.allow_hosts {
        words.push_str(&format!(
            ", to {}",
            if hosts.is_empty() { "no host".to_owned() } else { hosts.join(", ") }
        ));
    }
    if !egress.credentials.is_empty() {
        words.push_str(&format!(", with {}", egress.credentials.join(", ")));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_is_read_with_and_without_its_variable_and_its_header() {
        let read = |text: &str| {
            let read: Result<Credential, String> = text.parse();
            read.map(|one| {
                format!(
                    "{}={} {} {}: {}",
                    one.name,
                    one.variable,
                    one.hosts.join("+"),
                    one.header,
                    one.format
                )
            })
        };
        let bearer = "Authorization: Bearer ${value}";
        assert_eq!(read("KEY@a.test"), Ok(format!("KEY=KEY a.test {bearer}")));
        assert_eq!(read("KEY=REAL@a.test,*.b.test"), Ok(format!("KEY=REAL a.test+*.b.test {bearer}")));
        assert_eq!(read("K@a.test@X-Key: ${value}"), Ok("K=K a.test X-Key: ${value}".to_owned()));
        for wrong in ["", "KEY", "KEY@", "@a.test", "=R@a.test", "K=@a.test", "K@a.test@X-Key"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
