//! The wire of exec.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::schema::EnvMap;
use crate::guest::{Exec, ToStream};
use crate::instance::Secret;
use crate::limits::{ENV_VAR_BYTES_MAX, EXEC_TIMEOUT_MAX, WAIT_MAX};
use crate::signal;

/// The first frame of an exec.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program with its arguments; `/bin/sh` by default.
    #[serde(default)]
    pub command: Vec<String>,
    /// True for a terminal; false by default.
    #[serde(default)]
    pub tty: bool,
    /// Environment variables in addition to the instance's own.
    #[serde(default)]
    #[schemars(with = "Option<EnvMap>")]
    pub env: Option<BTreeMap<String, Secret>>,
    /// Working directory.
    #[serde(default)]
    pub cwd: Option<String>,
    /// An addition to Hypeman's API: `user`, `uid` or `user:group`; the instance's own user when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// Time limit, in seconds; 0 means no limit.
    #[serde(default)]
    pub timeout: Option<u64>,
    /// Time to wait for the agent of an instance that is starting, in seconds.
    #[serde(default)]
    pub wait_for_agent: Option<u64>,
    /// Rows of the terminal.
    #[serde(default)]
    pub rows: Option<u16>,
    /// Columns of the terminal.
    #[serde(default)]
    pub cols: Option<u16>,
    /// An addition to Hypeman's API: binary frames begin with a byte that names the stream: 1 for standard output, 2 for
    /// standard error.
    #[serde(default)]
    pub split_output: bool,
}

/// The program of an exec without a command.
const SHELL: &str = "/bin/sh";

impl ExecRequest {
    /// Converts the frame to the request to the agent.
    ///
    /// # Errors
    /// Returns a sentence that names the field.
    pub fn into_request(self) -> Result<Exec, String> {
        let command = if self.command.is_empty() { vec![SHELL.to_owned()] } else { self.command };
        let strings = command.iter().chain(&self.cwd).chain(&self.user);
        if strings.into_iter().any(|text| text.contains('\0')) {
            return Err("command, cwd and user must not contain a NUL".to_owned());
        }
        if command.iter().any(|word| word.len() >= ENV_VAR_BYTES_MAX) {
            return Err(format!("command: a word is longer than {ENV_VAR_BYTES_MAX} bytes"));
        }
        let env = self.env.unwrap_or_default();
        for (key, value) in &env {
            if key.is_empty() || key.contains(['=', '\0']) || value.0.contains('\0') {
                return Err(format!("env.{key}: names must be without '=', neither may contain a NUL"));
            }
            if key.len() + value.0.len() + 2 > ENV_VAR_BYTES_MAX {
                return Err(format!("env.{key}: it is longer than {ENV_VAR_BYTES_MAX} bytes with its name"));
            }
        }
        let timeout = self.timeout.filter(|&seconds| seconds > 0);
        if timeout.is_some_and(|seconds| seconds > EXEC_TIMEOUT_MAX.as_secs()) {
            return Err(format!("timeout must be at most {} seconds", EXEC_TIMEOUT_MAX.as_secs()));
        }
        if self.wait_for_agent.is_some_and(|seconds| seconds > WAIT_MAX.as_secs()) {
            return Err(format!("wait_for_agent must be at most {} seconds", WAIT_MAX.as_secs()));
        }
        if !self.tty && (self.rows.is_some() || self.cols.is_some()) {
            return Err("rows and cols need tty".to_owned());
        }
        if self.tty && self.split_output {
            return Err("split_output: a terminal has one output".to_owned());
        }
        Ok(Exec {
            command,
            has_terminal: self.tty,
            env,
            directory: self.cwd.filter(|cwd| !cwd.is_empty()),
            user: self.user.filter(|user| !user.is_empty()),
            timeout_millis: timeout.map(|seconds| seconds * 1000),
            rows: self.rows.unwrap_or(0),
            columns: self.cols.unwrap_or(0),
            is_split: self.split_output,
        })
    }
}

/// A text frame during an exec.
#[derive(Debug, PartialEq, Eq)]
pub enum ExecControl {
    Message(ToStream),
    /// The end of standard input; additive `{"stdin_eof":true}`.
    Eof,
    /// A signal that does not exist.
    Unknown(String),
}

/// A text frame of a client during an exec, with exactly one of its fields.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ExecControl")]
pub struct ControlFrame {
    /// New size of the terminal.
    #[serde(default)]
    resize: Option<Resize>,
    /// Name of a signal for the program, such as `SIGINT`. It is an addition to the contract.
    #[serde(default)]
    signal: Option<String>,
    /// True at the end of standard input. It is an addition to the contract.
    #[serde(default)]
    stdin_eof: Option<bool>,
}

/// The size of a terminal.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ExecResize")]
struct Resize {
    /// Number of rows.
    rows: u16,
    /// Number of columns.
    cols: u16,
}

impl ExecControl {
    /// Parses a text frame; returns `None` for any other text, which is input according to the wire
    /// contract.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let frame: ControlFrame = serde_json::from_str(text).ok()?;
        match (frame.resize, frame.signal, frame.stdin_eof) {
            (Some(Resize { rows, cols }), None, None) => {
                Some(Self::Message(ToStream::Resize { rows, columns: cols }))
            }
            (None, Some(name), None) if signal::number(&name).is_none() => Some(Self::Unknown(name)),
            (None, Some(name), None) => Some(Self::Message(ToStream::Signal { name })),
            (None, None, Some(true)) => Some(Self::Eof),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(text: &str) -> Result<Exec, String> {
        let request: ExecRequest = serde_json::from_str(text).map_err(|error| error.to_string())?;
        request.into_request()
    }

    #[test]
    fn exec_requests_are_read_as_the_wire_has_them_and_refused_with_the_field() {
        assert_eq!(exec(r#"{"command":[]}"#).expect("fine").command, ["/bin/sh"]);
        let full = exec(
            r#"{"command":["id"],"tty":true,"env":{"A":"b"},"cwd":"/tmp","timeout":3,"wait_for_agent":1,"rows":5,"cols":6}"#,
        )
        .expect("fine");
        assert_eq!((full.rows, full.columns, full.timeout_millis), (5, 6, Some(3000)));
        for (text, field) in [
            (r#"{"command":["a\u0000"]}"#, "command"),
            (r#"{"command":["a"],"env":{"A=":"b"}}"#, "env"),
            (r#"{"command":["a"],"rows":4}"#, "rows"),
            (r#"{"command":["a"],"timeout":99999999}"#, "timeout"),
            (r#"{"command":["a"],"wait_for_agent":99999}"#, "wait_for_agent"),
            (r#"{"command":"a"}"#, "sequence"),
            (r#"{"comand":["a"]}"#, "comand"),
            (r#"{"command":["a"],"tty":true,"split_output":true}"#, "split_output"),
        ] {
            let error = exec(text).expect_err(text);
            assert!(error.contains(field), "{text}: {error}");
        }
    }

    #[test]
    fn text_during_an_exec_is_control_only_when_it_is_exactly_that() {
        let resize = ToStream::Resize { rows: 3, columns: 4 };
        assert_eq!(
            ExecControl::read(r#"{"resize":{"rows":3,"cols":4}}"#),
            Some(ExecControl::Message(resize))
        );
        assert_eq!(ExecControl::read(r#"{"stdin_eof":true}"#), Some(ExecControl::Eof));
        assert_eq!(ExecControl::read(r#"{"stdin_eof":false}"#), None);
        assert_eq!(ExecControl::read(r#"{"resize":{"rows":3,"cols":4},"more":1}"#), None);
        assert_eq!(ExecControl::read("ls\n"), None);
        let signal = ToStream::Signal { name: "SIGWINCH".to_owned() };
        assert_eq!(ExecControl::read(r#"{"signal":"SIGWINCH"}"#), Some(ExecControl::Message(signal)));
        let unknown = ExecControl::Unknown("SIGFOO".to_owned());
        assert_eq!(ExecControl::read(r#"{"signal":"SIGFOO"}"#), Some(unknown));
    }

    #[test]
    fn a_string_that_no_program_can_be_given_is_refused_with_its_name() {
        let value =
            |length: usize| format!(r#"{{"command":["a"],"env":{{"LONG":"{}"}}}}"#, "x".repeat(length));
        assert!(exec(&value(ENV_VAR_BYTES_MAX - 6)).is_ok());
        assert!(exec(&value(ENV_VAR_BYTES_MAX - 5)).is_err_and(|error| error.contains("env.LONG")));
        let word = format!(r#"{{"command":["a","{}"]}}"#, "x".repeat(ENV_VAR_BYTES_MAX));
        assert!(exec(&word).is_err_and(|error| error.contains("command")));
    }
}
