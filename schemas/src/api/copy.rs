//! The wire of cp and stat.
//!
//! Paths are strings. When a path is not UTF-8, an additive field beside it carries its bytes in base64
//! (`path_base64` beside `path`), and the string is a form for people to read; UTF-8 names look as they
//! always did. A client sends such a path in the same way.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::guest::{BytePath, CopyFrom, CopyTo, Entry, EntryKind, PathInfo, Request};

/// The first frame of a copy.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyRequest {
    /// Direction of the copy.
    pub direction: Direction,
    /// Absolute path in the guest.
    #[serde(default)]
    pub guest_path: String,
    /// An addition to Hypeman's API: replaces `guest_path` when that path is not UTF-8.
    #[serde(default)]
    pub guest_path_base64: Option<String>,
    /// True if a directory is copied into the guest; false by default.
    #[serde(default)]
    pub is_dir: bool,
    /// Permission bits of the entry, at most 07777.
    #[serde(default)]
    pub mode: Option<u32>,
    /// True to copy what a symbolic link leads to; false by default.
    #[serde(default)]
    pub follow_links: bool,
    /// Name of the entry, used when `guest_path` is a directory that exists.
    #[serde(default)]
    pub src_basename: Option<String>,
    /// An addition to Hypeman's API: replaces `src_basename` when that name is not UTF-8.
    #[serde(default)]
    pub src_basename_base64: Option<String>,
    /// User id of the entry.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Group id of the entry.
    #[serde(default)]
    pub gid: Option<u32>,
    /// An addition to Hypeman's API: modification time, in seconds since the epoch.
    #[serde(default)]
    pub mtime: Option<i64>,
}

/// The direction of a copy: into the guest, or out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "CopyDirection")]
pub enum Direction {
    To,
    From,
}

impl CopyRequest {
    /// Converts the frame to the request to the agent.
    ///
    /// # Errors
    /// Returns a sentence that names the field.
    pub fn into_request(self) -> Result<Request, String> {
        let path = named("guest_path", self.guest_path, self.guest_path_base64.as_deref())?;
        if !path.is_absolute() || path.has_nul() {
            return Err("guest_path must be absolute".to_owned());
        }
        if self.mode.is_some_and(|mode| mode > 0o7777) {
            return Err("mode must be permission bits, at most 07777".to_owned());
        }
        for (field, id) in [("uid", self.uid), ("gid", self.gid)] {
            // The kernel takes this number for "leave the owner as it is".
            if id == Some(u32::MAX) {
                return Err(format!("{field} must be at most {}", u32::MAX - 1));
            }
        }
        let name = self.src_basename.unwrap_or_default();
        let name = named("src_basename", name, self.src_basename_base64.as_deref())?;
        Ok(match self.direction {
            Direction::From => Request::CopyFrom(CopyFrom { path, follows_links: self.follow_links }),
            Direction::To => Request::CopyTo(CopyTo {
                path,
                is_directory: self.is_dir,
                mode: self.mode,
                uid: self.uid,
                gid: self.gid,
                mtime: self.mtime,
                source_name: Some(name).filter(|name| !name.0.is_empty()),
            }),
        })
    }
}

/// Returns the path that a pair of fields names.
///
/// # Errors
/// Returns a sentence that names the field when the second field is not base64.
pub fn named(field: &str, text: String, base64: Option<&str>) -> Result<BytePath, String> {
    let Some(word) = base64 else { return Ok(text.into()) };
    STANDARD.decode(word).map(BytePath).map_err(|_| format!("{field}_base64 must be base64"))
}

/// Converts a path to a pair of fields: a string for people, and the bytes in base64 when the path is not
/// UTF-8.
#[must_use]
pub fn path_fields(path: &BytePath) -> (String, Option<String>) {
    match path.text() {
        Some(text) => (text.to_owned(), None),
        None => (path.shown(), Some(STANDARD.encode(&path.0))),
    }
}

/// A text frame of a copy, after the request.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum CopyFrame {
    /// An entry of a copy out of the guest; its data follow.
    Header(CopyHeader),
    /// The end of an entry's data.
    End {
        /// True for the last entry of a copy out of the guest.
        #[serde(default, rename = "final", skip_serializing_if = "Option::is_none")]
        is_final: Option<bool>,
    },
    /// The result of a copy into the guest.
    Result {
        /// True if everything was written.
        success: bool,
        /// Reason of a failure.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
        /// Number of bytes that were written; absent for 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes_written: Option<u64>,
    },
    /// The failure of a copy.
    Error {
        /// Sentence for people.
        message: String,
        /// Path of the entry that failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
    },
}

/// An entry of a copy out of the guest.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq, JsonSchema)]
pub struct CopyHeader {
    /// Relative path of the entry.
    pub path: String,
    /// An addition to Hypeman's API: present only when the name is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_base64: Option<String>,
    /// Permission bits of the entry.
    pub mode: u32,
    /// True for a directory.
    pub is_dir: bool,
    /// True for a symbolic link.
    #[serde(default)]
    pub is_symlink: bool,
    /// Target of the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
    /// An addition to Hypeman's API: present only when the target is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target_base64: Option<String>,
    /// Size of the file, in bytes.
    pub size: u64,
    /// Modification time, in seconds since the epoch.
    pub mtime: i64,
    /// User id of the entry.
    #[serde(default)]
    pub uid: u32,
    /// Group id of the entry.
    #[serde(default)]
    pub gid: u32,
}

impl CopyHeader {
    /// Makes the header of an entry that a guest named.
    ///
    /// # Errors
    /// Fails when the name leads out of the directory that the client copies to; only a faulty or hostile
    /// guest sends such a name.
    pub fn of(entry: Entry) -> Result<Self, String> {
        let mut names = entry.path.0.split(|&byte| byte == b'/');
        if !names.all(|name| BytePath(name.to_vec()).is_plain_name()) || entry.path.has_nul() {
            return Err("the guest named an entry outside of what was asked for".to_owned());
        }
        let (size, target) = match &entry.kind {
            EntryKind::File { size } => (*size, None),
            EntryKind::Directory => (0, None),
            EntryKind::Link { target } => (0, Some(path_fields(target))),
        };
        let (path, path_base64) = path_fields(&entry.path);
        let (link_target, link_target_base64) = target.unzip();
        Ok(Self {
            path,
            path_base64,
            mode: entry.mode & 0o777,
            is_dir: entry.kind == EntryKind::Directory,
            is_symlink: link_target.is_some(),
            link_target,
            link_target_base64: link_target_base64.flatten(),
            size,
            // The wire has no times before the epoch.
            mtime: entry.mtime.max(0),
            uid: entry.uid,
            gid: entry.gid,
        })
    }

    /// Returns the entry's name.
    ///
    /// # Errors
    /// Fails when the name cannot be decoded.
    pub fn name(&self) -> Result<BytePath, String> {
        named("path", self.path.clone(), self.path_base64.as_deref())
    }

    /// Returns the target of a link; `None` when the entry is not a link.
    ///
    /// # Errors
    /// Fails when the target cannot be decoded.
    pub fn target(&self) -> Result<Option<BytePath>, String> {
        let target = self.link_target.clone().filter(|_| self.is_symlink);
        target.map(|text| named("link_target", text, self.link_target_base64.as_deref())).transpose()
    }
}

/// The response to stat.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "PathInfo")]
pub struct PathView {
    /// True if there is something at the path.
    pub exists: bool,
    /// True for a directory.
    pub is_dir: bool,
    /// True for a regular file.
    pub is_file: bool,
    /// True for a symbolic link.
    pub is_symlink: bool,
    /// Target of the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
    /// An addition to Hypeman's API: present only when the target is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target_base64: Option<String>,
    /// Permission bits.
    pub mode: u32,
    /// Size, in bytes.
    pub size: u64,
    /// Reason why the path could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl From<PathInfo> for PathView {
    fn from(info: PathInfo) -> Self {
        let (link_target, link_target_base64) = info.link_target.as_ref().map(path_fields).unzip();
        Self {
            exists: info.exists,
            is_dir: info.is_directory,
            is_file: info.is_file,
            is_symlink: info.is_link,
            link_target,
            link_target_base64: link_target_base64.flatten(),
            mode: info.mode & 0o777,
            size: info.size,
            error: info.error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &[u8], kind: EntryKind) -> Entry {
        Entry { path: BytePath(path.to_vec()), kind, mode: 0o40755, uid: 0, gid: 0, mtime: -1 }
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        for path in [&b""[..], b"/etc", b"..", b"a/../b", b"a//b", b"./a", b"a/", b"a\0", b"\xff/.."] {
            assert!(CopyHeader::of(entry(path, EntryKind::Directory)).is_err(), "{path:?}");
        }
        let header = CopyHeader::of(entry(b"a/b..c", EntryKind::Directory)).expect("fine");
        assert_eq!((header.mode, header.mtime), (0o755, 0));
    }

    #[test]
    fn names_that_are_utf_8_have_no_more_fields_than_ever_and_others_keep_their_bytes() {
        let link = |path: &[u8], target: &[u8]| {
            let kind = EntryKind::Link { target: BytePath(target.to_vec()) };
            CopyHeader::of(entry(path, kind)).expect("fine")
        };
        let plain = serde_json::to_string(&link("é".as_bytes(), b"t")).expect("JSON");
        assert!(!plain.contains("base64"), "{plain}");
        let odd = link(b"d/b\xff", b"\xfe");
        assert_eq!((&*odd.path, odd.path_base64.as_deref()), ("d/b\\xff", Some("ZC9i/w==")));
        assert_eq!(odd.name(), Ok(BytePath(b"d/b\xff".to_vec())));
        assert_eq!(odd.target(), Ok(Some(BytePath(b"\xfe".to_vec()))));
        let lie = CopyHeader { path_base64: Some("?".to_owned()), ..odd };
        assert!(lie.name().is_err());
    }

    #[test]
    fn requests_name_any_bytes_but_nul_and_are_refused_with_the_field() {
        let read = |text: &str| {
            let request: CopyRequest = serde_json::from_str(text).expect("JSON");
            request.into_request()
        };
        // The base64 text is /b followed by 0xff.
        let odd = read(r#"{"direction":"from","guest_path_base64":"L2L/"}"#).expect("fine");
        let from = CopyFrom { path: BytePath(b"/b\xff".to_vec()), follows_links: false };
        assert_eq!(odd, Request::CopyFrom(from));
        for (text, field) in [
            (r#"{"direction":"to"}"#, "guest_path"),
            (r#"{"direction":"to","guest_path":"a"}"#, "guest_path"),
            (r#"{"direction":"to","guest_path_base64":"L2IA"}"#, "guest_path"),
            (r#"{"direction":"to","guest_path_base64":"!"}"#, "guest_path_base64"),
            (r#"{"direction":"to","guest_path":"/a","src_basename_base64":"!"}"#, "src_basename_base64"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(field), "{text}: {error}");
        }
    }
}
