//! Health on the wire: `health_check` of requests and responses, `health_status` of responses.

use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fields::Fields;
use super::schema::Time;
use crate::health::{HealthCheck, Probe, Scheme, Tally, Verdict};
use crate::instance::{InstanceSpec, InstanceStatus, State};
use crate::limits;
use crate::quantity::GoDuration;
use crate::validate::FieldErrors;

pub(super) const INVALID: &str = "invalid_health_check";
const NO_NETWORK: &str = "of type http or tcp needs network.enabled";
const NO_AGENT: &str = "of type exec needs the guest agent, which skip_guest_agent leaves out";

/// Reads `health_check`: `None` when the field is absent, `Some(None)` when the request asks for no check.
pub(super) fn health_check(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Option<HealthCheck>> {
    let mut problems = FieldErrors::default();
    let mut given = fields.object("health_check", &mut problems);
    let check = given.as_mut().and_then(|check| read(check, &mut problems));
    let is_given = given.is_some();
    if let Some(check) = given {
        check.finish(&mut problems);
    }
    // All problems within this field get its code, whatever their own codes are.
    problems.iter().for_each(|problem| errors.push(problem.path.clone(), INVALID, &problem.message));
    is_given.then_some(check)
}

fn read(fields: &mut Fields, errors: &mut FieldErrors) -> Option<HealthCheck> {
    let kind = fields.text("type", errors);
    let kinds = [
        ("http", fields.object("http", errors)),
        ("tcp", fields.object("tcp", errors)),
        ("exec", fields.object("exec", errors)),
    ];
    let (mut http, mut tcp, mut exec) = (None, None, None);
    for (name, kind_fields) in kinds {
        match (name, kind_fields) {
            (_, None) => {}
            (name, Some(_)) if kind.as_deref() != Some(name) => {
                errors.push(fields.path(name), INVALID, format!("is only for a check of type {name}"));
            }
            ("http", kind_fields) => http = kind_fields,
            ("tcp", kind_fields) => tcp = kind_fields,
            (_, kind_fields) => exec = kind_fields,
        }
    }
    let probe = match kind.as_deref() {
        None | Some("none") => None,
        Some("http") => section(fields, "http", http, errors).and_then(|section| read_http(section, errors)),
        Some("tcp") => section(fields, "tcp", tcp, errors).and_then(|section| read_tcp(section, errors)),
        Some("exec") => section(fields, "exec", exec, errors).and_then(|section| read_exec(section, errors)),
        Some(_) => {
            errors.push(fields.path("type"), INVALID, "must be one of none, http, tcp, exec");
            None
        }
    };
    let interval =
        duration(fields, "interval", limits::HEALTH_INTERVAL_MIN, limits::HEALTH_PERIOD_MAX, errors);
    let timeout = duration(fields, "timeout", limits::HEALTH_TIMEOUT_MIN, limits::HEALTH_TIMEOUT_MAX, errors);
    let start_period = duration(fields, "start_period", Duration::ZERO, limits::HEALTH_PERIOD_MAX, errors);
    let failures = fields.number("failure_threshold", 1..=limits::HEALTH_THRESHOLD_MAX, errors);
    let successes = fields.number("success_threshold", 1..=limits::HEALTH_THRESHOLD_MAX, errors);
    let mut check = HealthCheck::of(probe?);
    check.interval = interval.unwrap_or(check.interval);
    check.timeout = timeout.unwrap_or(check.timeout);
    check.start_period = start_period.unwrap_or(check.start_period);
    check.failure_threshold = failures.unwrap_or(check.failure_threshold);
    check.success_threshold = successes.unwrap_or(check.success_threshold);
    Some(check)
}

fn section(fields: &Fields, name: &str, given: Option<Fields>, errors: &mut FieldErrors) -> Option<Fields> {
    if given.is_none() {
        errors.push(fields.path(name), INVALID, format!("is required for a check of type {name}"));
    }
    given
}

fn read_http(mut http: Fields, errors: &mut FieldErrors) -> Option<Probe> {
    let port = port(&mut http, errors);
    let scheme = match http.text("scheme", errors).as_deref() {
        None | Some("http") => Scheme::Http,
        Some("https") => Scheme::Https,
        Some(_) => {
            errors.push(http.path("scheme"), INVALID, "must be http or https");
            Scheme::Http
        }
    };
    let path = http.text("path", errors).unwrap_or_else(|| "/".to_owned());
    let is_path = path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
    if !is_path || path.len() > limits::HEALTH_PATH_BYTES_MAX {
        let message = format!(
            "must begin with / and have at most {} printable ASCII characters without spaces and #",
            limits::HEALTH_PATH_BYTES_MAX
        );
        errors.push(http.path("path"), INVALID, message);
    }
    let status = http.number("expected_status", 200..=599, errors).and_then(|code| u16::try_from(code).ok());
    http.finish(errors);
    Some(Probe::Http { scheme, port: port?, path, expected_status: status.unwrap_or(200) })
}

fn read_tcp(mut tcp: Fields, errors: &mut FieldErrors) -> Option<Probe> {
    let port = port(&mut tcp, errors);
    tcp.finish(errors);
    Some(Probe::Tcp { port: port? })
}

fn read_exec(mut exec: Fields, errors: &mut FieldErrors) -> Option<Probe> {
    let command = exec.texts("command", limits::ARGV_MAX, limits::ARG_BYTES_MAX, errors);
    let command = command.filter(|command| command.first().is_some_and(|program| !program.is_empty()));
    if command.is_none() {
        errors.push(exec.path("command"), INVALID, "must name a program");
    }
    let directory = exec.text("working_dir", errors).filter(|directory| !directory.is_empty());
    let is_path = |path: &String| {
        path.starts_with('/') && !path.contains('\0') && path.len() <= limits::HEALTH_PATH_BYTES_MAX
    };
    if directory.as_ref().is_some_and(|directory| !is_path(directory)) {
        errors.push(exec.path("working_dir"), INVALID, "must be an absolute path");
    }
    exec.finish(errors);
    Some(Probe::Exec { command: command?, working_dir: directory })
}

fn port(fields: &mut Fields, errors: &mut FieldErrors) -> Option<u16> {
    let path = fields.path("port");
    let before = errors.iter().count();
    let port = fields.number("port", 1..=u32::from(u16::MAX), errors);
    if port.is_none() && errors.iter().count() == before {
        errors.push(path, INVALID, "is required");
    }
    port.and_then(|port| u16::try_from(port).ok())
}

fn duration(
    fields: &mut Fields,
    key: &str,
    min: Duration,
    max: Duration,
    errors: &mut FieldErrors,
) -> Option<GoDuration> {
    let given: GoDuration = fields.parsed(key, INVALID, errors)?;
    if !(min..=max).contains(&given.0) {
        let message = format!("must be from {} to {}", GoDuration(min), GoDuration(max));
        errors.push(fields.path(key), INVALID, message);
        return None;
    }
    Some(given)
}

/// Checks that an instance with these features can be probed in this way.
///
/// # Errors
/// Returns the reason in words that follow the field's name.
pub fn check_fits(check: &HealthCheck, has_network: bool, has_agent: bool) -> Result<(), &'static str> {
    match &check.probe {
        probe if probe.needs_network() && !has_network => Err(NO_NETWORK),
        probe if probe.needs_agent() && !has_agent => Err(NO_AGENT),
        _ => Ok(()),
    }
}

/// The `health_check` that clients read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "HealthCheck")]
pub struct HealthCheckView {
    /// Way of the check: http, tcp or exec.
    #[serde(rename = "type")]
    pub kind: String,
    /// Time between two probes.
    pub interval: GoDuration,
    /// Time limit of a probe.
    pub timeout: GoDuration,
    /// Time after the start in which failures do not count.
    pub start_period: GoDuration,
    /// Number of failures in a row after which the program is unhealthy.
    pub failure_threshold: u32,
    /// Number of successes in a row after which the program is healthy.
    pub success_threshold: u32,
    /// Request of a check of type `http`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpView>,
    /// Connection of a check of type `tcp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpView>,
    /// Program of a check of type `exec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecView>,
}

/// The request of a health check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "HealthCheckHttp")]
pub struct HttpView {
    /// Port of the instance.
    pub port: u16,
    /// Path of the request.
    pub path: String,
    /// Scheme of the request.
    pub scheme: Scheme,
    /// Status of the response of a healthy program.
    pub expected_status: u16,
}

/// The connection of a health check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "HealthCheckTcp")]
pub struct TcpView {
    /// Port of the instance.
    pub port: u16,
}

/// The program of a health check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "HealthCheckExec")]
pub struct ExecView {
    /// Program with its arguments.
    pub command: Vec<String>,
    /// Working directory of the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
}

impl From<&HealthCheck> for HealthCheckView {
    fn from(check: &HealthCheck) -> Self {
        let HealthCheck { probe, interval, timeout, start_period, failure_threshold, success_threshold } =
            check.clone();
        let (mut http, mut tcp, mut exec) = (None, None, None);
        let kind = match probe {
            Probe::Http { scheme, port, path, expected_status } => {
                http = Some(HttpView { port, path, scheme, expected_status });
                "http"
            }
            Probe::Tcp { port } => {
                tcp = Some(TcpView { port });
                "tcp"
            }
            Probe::Exec { command, working_dir } => {
                exec = Some(ExecView { command, working_dir });
                "exec"
            }
        };
        Self {
            kind: kind.to_owned(),
            interval,
            timeout,
            start_period,
            failure_threshold,
            success_threshold,
            http,
            tcp,
            exec,
        }
    }
}

/// The verdict of a health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "HealthState")]
pub enum HealthWord {
    Disabled,
    Starting,
    Healthy,
    Unhealthy,
    /// The instance does not run, so it is not probed.
    Unknown,
}

/// The `health_status` that clients read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "InstanceHealthStatus")]
pub struct HealthView {
    /// Verdict of the check.
    pub status: HealthWord,
    /// Number of failures in a row.
    pub consecutive_failures: u32,
    /// Number of successes in a row.
    pub consecutive_successes: u32,
    /// Time of the last probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_checked_at: Option<Timestamp>,
    /// Time of the last successful probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_success_at: Option<Timestamp>,
    /// Time of the last failed probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_failure_at: Option<Timestamp>,
    /// Error of the last failed probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

impl HealthView {
    pub(super) fn of(spec: &InstanceSpec, status: &InstanceStatus) -> Self {
        let health = &status.health;
        // The verdict counts only when it was made with the check that is now in the spec.
        let is_current = health.of.is_some_and(|of| of.version == spec.health_version);
        let status = match (spec.health.is_some(), status.state) {
            (false, _) => HealthWord::Disabled,
            (true, State::Created | State::Initializing) => HealthWord::Starting,
            (true, State::Running) => match health.verdict {
                Verdict::Healthy if is_current => HealthWord::Healthy,
                Verdict::Unhealthy if is_current => HealthWord::Unhealthy,
                Verdict::Starting | Verdict::Healthy | Verdict::Unhealthy => HealthWord::Starting,
            },
            (true, State::Paused | State::Shutdown | State::Stopped | State::Standby | State::Unknown) => {
                HealthWord::Unknown
            }
        };
        let tally = if is_current { health.tally.clone() } else { Tally::default() };
        Self { status, ..Self::counted(&tally) }
    }

    fn counted(tally: &Tally) -> Self {
        Self {
            status: HealthWord::Unknown,
            consecutive_failures: tally.failures,
            consecutive_successes: tally.successes,
            last_checked_at: tally.last_checked_at,
            last_success_at: tally.last_success_at,
            last_failure_at: tally.last_failure_at,
            last_error: tally.last_error.clone(),
        }
    }

    /// Replaces the recorded counts by the current ones.
    pub fn count(&mut self, tally: &Tally) {
        *self = Self { status: self.status, ..Self::counted(tally) };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn given(check: Value) -> Result<Option<Option<HealthCheck>>, Vec<(String, &'static str)>> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(json!({ "health_check": check }), &mut errors);
        let read = health_check(&mut fields, &mut errors);
        if errors.is_empty() {
            Ok(read)
        } else {
            Err(errors.iter().map(|e| (e.path.clone(), e.code)).collect())
        }
    }

    #[test]
    fn a_check_gets_the_contracts_defaults_and_is_returned_as_stored() {
        let check = given(json!({ "type": "http", "http": { "port": 80 } })).expect("valid");
        let check = check.flatten().expect("a check");
        let reported = serde_json::to_value(HealthCheckView::from(&check)).expect("JSON");
        let expected = json!({
            "type": "http", "interval": "10s", "timeout": "2s", "start_period": "30s",
            "failure_threshold": 3, "success_threshold": 1,
            "http": { "port": 80, "path": "/", "scheme": "http", "expected_status": 200 },
        });
        assert_eq!(reported, expected);
        // The view, read as a request, means the same check.
        assert_eq!(given(reported), Ok(Some(Some(check))));
        for body in [
            json!({ "type": "tcp", "tcp": { "port": 65535 }, "http": null, "interval": "1s" }),
            json!({ "type": "exec", "exec": { "command": ["true"], "working_dir": "/srv" }, "start_period": "0s" }),
        ] {
            let check = given(body.clone()).expect("valid").flatten().expect("a check");
            let reported = serde_json::to_value(HealthCheckView::from(&check)).expect("JSON");
            assert_eq!(given(reported), Ok(Some(Some(check))), "{body}");
        }
    }

    #[test]
    fn a_check_of_none_is_a_value_and_a_missing_check_is_not() {
        assert_eq!(given(Value::Null), Ok(None));
        for none in [json!({}), json!({ "type": "none" }), json!({ "type": "none", "interval": "5s" })] {
            assert_eq!(given(none), Ok(Some(None)));
        }
    }

    #[test]
    fn every_problem_has_its_path_and_the_one_code() {
        let long = format!("/{}", "x".repeat(limits::HEALTH_PATH_BYTES_MAX));
        for (check, path) in [
            (json!("http"), "health_check"),
            (json!({ "type": "ping" }), "health_check.type"),
            (json!({ "type": "http" }), "health_check.http"),
            (json!({ "type": "http", "http": {} }), "health_check.http.port"),
            (json!({ "type": "http", "http": { "port": 0 } }), "health_check.http.port"),
            (json!({ "type": "tcp", "tcp": { "port": 65536 } }), "health_check.tcp.port"),
            (json!({ "type": "tcp", "tcp": { "port": 1 }, "http": { "port": 1 } }), "health_check.http"),
            (json!({ "type": "http", "http": { "port": 1, "path": "x" } }), "health_check.http.path"),
            (json!({ "type": "http", "http": { "port": 1, "path": "/a b" } }), "health_check.http.path"),
            (json!({ "type": "http", "http": { "port": 1, "path": "/\r\nX: y" } }), "health_check.http.path"),
            (json!({ "type": "http", "http": { "port": 1, "path": long } }), "health_check.http.path"),
            (json!({ "type": "http", "http": { "port": 1, "scheme": "ftp" } }), "health_check.http.scheme"),
            (
                json!({ "type": "http", "http": { "port": 1, "expected_status": 600 } }),
                "health_check.http.expected_status",
            ),
            (json!({ "type": "exec", "exec": { "command": [] } }), "health_check.exec.command"),
            (json!({ "type": "exec", "exec": { "command": [""] } }), "health_check.exec.command"),
            (
                json!({ "type": "exec", "exec": { "command": ["a"], "working_dir": "b" } }),
                "health_check.exec.working_dir",
            ),
            (json!({ "type": "none", "interval": "999ms" }), "health_check.interval"),
            (json!({ "type": "none", "interval": "24h1s" }), "health_check.interval"),
            (json!({ "type": "none", "timeout": "0s" }), "health_check.timeout"),
            (json!({ "type": "none", "timeout": "5m1s" }), "health_check.timeout"),
            (json!({ "type": "none", "start_period": "-1s" }), "health_check.start_period"),
            (json!({ "type": "none", "failure_threshold": 0 }), "health_check.failure_threshold"),
            (json!({ "type": "none", "success_threshold": 1001 }), "health_check.success_threshold"),
            (json!({ "type": "none", "surprise": 1 }), "health_check.surprise"),
        ] {
            assert_eq!(given(check.clone()), Err(vec![(path.to_owned(), INVALID)]), "{check}");
        }
    }

    #[test]
    fn a_check_is_of_what_the_instance_has() {
        let http = HealthCheck::of(Probe::Tcp { port: 1 });
        let exec = HealthCheck::of(Probe::Exec { command: vec!["a".to_owned()], working_dir: None });
        assert!(check_fits(&http, true, false).is_ok() && check_fits(&exec, false, true).is_ok());
        assert!(check_fits(&http, false, true).is_err() && check_fits(&exec, true, false).is_err());
    }
}
