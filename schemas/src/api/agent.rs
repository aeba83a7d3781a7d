//! The wire of what happens inside a guest: exec, cp, stat.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::guest::{CopyFrom, CopyTo, Entry, EntryKind, Exec, PathInfo, Request, ToStream};
use crate::instance::Secret;
use crate::limits::{EXEC_TIMEOUT_MAX, WAIT_MAX};

/// First frame of an exec.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    #[serde(default)]
    pub command: Vec<String>,
    #[serde(default)]
    pub tty: bool,
    #[serde(default)]
    pub env: Option<BTreeMap<String, Secret>>,
    #[serde(default)]
    pub cwd: Option<String>,
    /// Additive: `user`, `uid`, `user:group`; the instance's own when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// Seconds; 0 for none.
    #[serde(default)]
    pub timeout: Option<u64>,
    /// Seconds to wait for the agent of an instance that is on its way up.
    #[serde(default)]
    pub wait_for_agent: Option<u64>,
    #[serde(default)]
    pub rows: Option<u16>,
    #[serde(default)]
    pub cols: Option<u16>,
    /// Additive: binary frames begin with a byte that names the stream, 1 for standard output, 2 for
    /// standard error.
    #[serde(default)]
    pub split_output: bool,
}

/// What an exec without a command runs.
const SHELL: &str = "/bin/sh";

impl ExecRequest {
    /// The request to the agent.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn into_request(self) -> Result<Exec, String> {
        let command = if self.command.is_empty() { vec![SHELL.to_owned()] } else { self.command };
        let strings = command.iter().chain(&self.cwd).chain(&self.user);
        if strings.into_iter().any(|text| text.contains('\0')) {
            return Err("command, cwd and user must not contain a NUL".to_owned());
        }
        let env = self.env.unwrap_or_default();
        for (key, value) in &env {
            if key.is_empty() || key.contains(['=', '\0']) || value.0.contains('\0') {
                return Err(format!("env.{key}: names must be without '=', neither may contain a NUL"));
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
    /// Additive `{"stdin_eof":true}`.
    Eof,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ControlFrame {
    #[serde(default)]
    resize: Option<Resize>,
    #[serde(default)]
    signal: Option<String>,
    #[serde(default)]
    stdin_eof: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    rows: u16,
    cols: u16,
}

impl ExecControl {
    /// `None` for text that is none of these: the wire has it that such text is input.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let frame: ControlFrame = serde_json::from_str(text).ok()?;
        match (frame.resize, frame.signal, frame.stdin_eof) {
            (Some(Resize { rows, cols }), None, None) => {
                Some(Self::Message(ToStream::Resize { rows, columns: cols }))
            }
            (None, Some(name), None) => Some(Self::Message(ToStream::Signal { name })),
            (None, None, Some(true)) => Some(Self::Eof),
            _ => None,
        }
    }
}

/// First frame of a copy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyRequest {
    pub direction: Direction,
    pub guest_path: String,
    #[serde(default)]
    pub is_dir: bool,
    #[serde(default)]
    pub mode: Option<u32>,
    #[serde(default)]
    pub follow_links: bool,
    #[serde(default)]
    pub src_basename: Option<String>,
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: Option<u32>,
    /// Additive: seconds since the epoch.
    #[serde(default)]
    pub mtime: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    To,
    From,
}

impl CopyRequest {
    /// The request to the agent.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn into_request(self) -> Result<Request, String> {
        if !self.guest_path.starts_with('/') || self.guest_path.contains('\0') {
            return Err("guest_path must be absolute".to_owned());
        }
        if self.mode.is_some_and(|mode| mode > 0o7777) {
            return Err("mode must be permission bits, at most 07777".to_owned());
        }
        let path = self.guest_path;
        Ok(match self.direction {
            Direction::From => Request::CopyFrom(CopyFrom { path, follows_links: self.follow_links }),
            Direction::To => Request::CopyTo(CopyTo {
                path,
                is_directory: self.is_dir,
                mode: self.mode,
                uid: self.uid,
                gid: self.gid,
                mtime: self.mtime,
                source_name: self.src_basename.filter(|name| !name.is_empty()),
            }),
        })
    }
}

/// A text frame of a copy, after the request.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum CopyFrame {
    Header(CopyHeader),
    End {
        #[serde(default, rename = "final", skip_serializing_if = "Option::is_none")]
        is_final: Option<bool>,
    },
    Result {
        success: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes_written: Option<u64>,
    },
    Error {
        message: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
    },
}

#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct CopyHeader {
    pub path: String,
    pub mode: u32,
    pub is_dir: bool,
    #[serde(default)]
    pub is_symlink: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
    pub size: u64,
    pub mtime: i64,
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
}

impl CopyHeader {
    /// The header of an entry that a guest named.
    ///
    /// # Errors
    /// When the name leads out of where the client copies to: no guest in its senses sends it.
    pub fn of(entry: Entry) -> Result<Self, String> {
        let is_name = |part: &str| !part.is_empty() && part != "." && part != "..";
        if !entry.path.split('/').all(is_name) || entry.path.contains('\0') {
            return Err("the guest named an entry outside of what was asked for".to_owned());
        }
        let (size, link_target) = match &entry.kind {
            EntryKind::File { size } => (*size, None),
            EntryKind::Directory => (0, None),
            EntryKind::Link { target } => (0, Some(target.clone())),
        };
        Ok(Self {
            path: entry.path,
            mode: entry.mode & 0o777,
            is_dir: entry.kind == EntryKind::Directory,
            is_symlink: link_target.is_some(),
            link_target,
            size,
            // The wire has no times before the epoch.
            mtime: entry.mtime.max(0),
            uid: entry.uid,
            gid: entry.gid,
        })
    }
}

/// Answer of stat.
#[derive(Debug, Serialize, Deserialize)]
pub struct PathView {
    pub exists: bool,
    pub is_dir: bool,
    pub is_file: bool,
    pub is_symlink: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
    pub mode: u32,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl From<PathInfo> for PathView {
    fn from(info: PathInfo) -> Self {
        Self {
            exists: info.exists,
            is_dir: info.is_directory,
            is_file: info.is_file,
            is_symlink: info.is_link,
            link_target: info.link_target,
            mode: info.mode & 0o777,
            size: info.size,
            error: info.error,
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
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        let entry = |path: &str| Entry {
            path: path.to_owned(),
            kind: EntryKind::Directory,
            mode: 0o40755,
            uid: 0,
            gid: 0,
            mtime: -1,
        };
        for path in ["", "/etc", "..", "a/../b", "a//b", "./a", "a/"] {
            assert!(CopyHeader::of(entry(path)).is_err(), "{path:?}");
        }
        let header = CopyHeader::of(entry("a/b..c")).expect("fine");
        assert_eq!((header.mode, header.mtime), (0o755, 0));
    }
}
