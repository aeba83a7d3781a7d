//! Streams: the work that the agent in the guest does for the host, many at once on one channel.
//!
//! The host opens a stream with an [`Open`]. Payloads of data, and of the guest's messages, flow within a
//! window that the receiver renews as it consumes, so that a slow reader stops only its own writer. The
//! guest ends every stream with its outcome and a close; a host that closes first wants the work undone.
//!
//! The host chooses the stream ids, and never reuses an id on one attachment.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{BytePath, Token};
use crate::instance::Secret;

/// Size of the largest payload of a data frame, in bytes: large enough that a frame's own cost is
/// negligible, small enough that streams alternate.
pub const DATA_BYTES_MAX: usize = 128 << 10;
/// Data that may be in flight on a stream, each way, before the receiver renews the window, in bytes. This
/// is the memory that a stream can bind on either side: as much as arrives while a copy waits for its disk.
pub const WINDOW_BYTES: u32 = 1 << 20;
/// Window that a stream from the guest begins with, in bytes. It doubles as long as the client consumes what
/// arrives, so that many sessions whose clients consume nothing bind little memory. It is twice the largest
/// data frame, so that a sender that waits for room for a frame gets it.
pub const FIRST_WINDOW_BYTES: u32 = 256 << 10;
/// Window of a side that does not report one, in bytes, such as a side of an earlier release: a guest keeps
/// the agent that it was booted with, through upgrades of the host and standbys.
pub const UNTOLD_WINDOW_BYTES: u32 = 512 << 10;
/// Size of the smallest portion in which consumed bytes are given back, in bytes: half of the smallest window
/// that a side has when it does not report one, so that a sender that waits for room for a frame gets it. The
/// host uses half of the window where that is smaller, as with [`FIRST_WINDOW_BYTES`].
pub const RENEWAL_BYTES: u32 = UNTOLD_WINDOW_BYTES / 2;

pub(super) fn untold_window() -> u32 {
    UNTOLD_WINDOW_BYTES
}

/// The request that begins a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    pub token: Token,
    pub request: Request,
    /// Window of the host, in bytes.
    #[serde(default = "untold_window")]
    pub window: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    Exec(Exec),
    CopyTo(CopyTo),
    CopyFrom(CopyFrom),
    Stat(Stat),
}

/// A request to run a program beside the instance's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; executed directly, without a shell.
    pub command: Vec<String>,
    pub has_terminal: bool,
    /// Variables that are added to the instance's own environment.
    pub env: BTreeMap<String, Secret>,
    /// The working directory; the instance's when absent.
    pub directory: Option<String>,
    /// The user; the instance's when absent.
    pub user: Option<String>,
    /// Time limit, in milliseconds. A program that runs longer gets SIGTERM, and SIGKILL after a grace.
    pub timeout_millis: Option<u64>,
    /// Rows of the terminal; 0 in `rows` and `columns` means the usual 24 by 80.
    pub rows: u16,
    pub columns: u16,
    /// True if standard error comes as frames of its own; otherwise both come in the order in which they
    /// were written.
    pub is_split: bool,
}

/// A request to make a file or a directory; the contents follow as data, then an end of file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyTo {
    /// The path to write to; it must be absolute.
    pub path: BytePath,
    pub is_directory: bool,
    /// Permission bits, with set-id and sticky bits; 0644 or 0755 when absent.
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Modification time, in seconds since the epoch; the current time when absent.
    pub mtime: Option<i64>,
    /// Name to use when `path` is an existing directory, as `cp` does.
    pub source_name: Option<BytePath>,
}

/// A request to read a file, or a directory with everything below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyFrom {
    /// The path to read; it must be absolute.
    pub path: BytePath,
    /// True if symbolic links are followed instead of reported.
    pub follows_links: bool,
}

/// A request to inspect a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    pub path: BytePath,
    pub follows_links: bool,
}

/// A message from host to guest, within a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToStream {
    Resize {
        rows: u16,
        columns: u16,
    },
    /// A signal for the program's process group, by name (`SIGINT`) or number.
    Signal {
        name: String,
    },
}

/// A message from guest to host, within a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromStream {
    /// The program ended; all its output was sent before.
    Exited {
        /// Exit code by shell convention: 128+n for signal n, 124 for a program that exceeded its time
        /// limit.
        code: i32,
    },
    /// The request could not be carried out; `code` follows the shell convention for programs (126, 127).
    Failed {
        message: String,
        code: Option<i32>,
        path: Option<String>,
    },
    /// A copy to the guest is complete and in place.
    Copied {
        bytes: u64,
    },
    /// The next entry of a copy from the guest; its contents follow as data.
    Entry(Entry),
    /// The entry is complete.
    EntryEnd {
        is_last: bool,
    },
    Info(PathInfo),
}

/// An entry of a copy from the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The path relative to the requested path, with `/` between names; for a single file, its last name.
    pub path: BytePath,
    pub kind: EntryKind,
    /// Permission bits only.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Modification time, in seconds since the epoch.
    pub mtime: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EntryKind {
    Directory,
    /// A file; exactly `size` bytes of data follow.
    File {
        size: u64,
    },
    Link {
        target: BytePath,
    },
}

/// The properties of what exists at a path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    pub exists: bool,
    pub is_directory: bool,
    pub is_file: bool,
    pub is_link: bool,
    pub link_target: Option<BytePath>,
    /// Permission bits only.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// The reason why the path could not be inspected, other than that it does not exist.
    pub error: Option<String>,
}
