//! Streams: what the agent in the guest does for the host, many at once on one channel.
//!
//! The host opens a stream with an [`Open`]; payloads of data, and of the guest's messages, flow
//! within a window that the receiver renews as it consumes, so that a slow reader stops its own writer and nobody else. The guest ends
//! every stream with its outcome and a close; a host that closes first wants the work undone.
//!
//! Stream ids are the host's choice and never reused on one attachment.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{BytePath, Token};
use crate::instance::Secret;

/// The largest payload of a data frame: large enough that a frame's own cost is none, small enough
/// that streams take turns.
pub const DATA_BYTES_MAX: usize = 128 << 10;
/// Data that may be under way on a stream, each way, before the receiver renews the window. The
/// memory that a stream can bind on either side: as much as comes while a copy waits for its disk.
pub const WINDOW_BYTES: u32 = 1 << 20;
/// The window that a stream from the guest begins with. It doubles as long as the client takes what comes, so that
/// many sessions whose clients take nothing bind little memory. Twice the largest frame, so that whoever waits
/// for room for a frame gets it.
pub const FIRST_WINDOW_BYTES: u32 = 256 << 10;
/// That of a side that does not say, as one of an earlier release: a guest keeps the agent that it
/// was booted with, through upgrades of the host and standbys.
pub const UNTOLD_WINDOW_BYTES: u32 = 512 << 10;
/// Consumed bytes are given back in portions of at least this size: half of the smallest window, so
/// that whoever waits for room for a frame gets it.
pub const RENEWAL_BYTES: u32 = UNTOLD_WINDOW_BYTES / 2;

pub(super) fn untold_window() -> u32 {
    UNTOLD_WINDOW_BYTES
}

/// Begins a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    pub token: Token,
    pub request: Request,
    /// In bytes, of the host.
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

/// Runs a program beside the instance's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; executed directly, no shell.
    pub command: Vec<String>,
    pub has_terminal: bool,
    /// On top of the instance's own environment.
    pub env: BTreeMap<String, Secret>,
    /// The instance's working directory when none is given.
    pub directory: Option<String>,
    /// The instance's user when none is given.
    pub user: Option<String>,
    /// The program gets SIGTERM, and SIGKILL after a grace, when it runs longer.
    pub timeout_millis: Option<u64>,
    /// Of the terminal; 0 for the usual 24 by 80.
    pub rows: u16,
    pub columns: u16,
    /// Standard error comes as frames of its own; else both come in the order they were written.
    pub is_split: bool,
}

/// Makes one file or directory; the contents follow as data, then an end of file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyTo {
    /// Absolute.
    pub path: BytePath,
    pub is_directory: bool,
    /// Permission bits, with set-id and sticky bits; 0644 or 0755 when none are given.
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Seconds since the epoch; now when none is given.
    pub mtime: Option<i64>,
    /// Name to use when `path` is a directory that is there, as `cp` has it.
    pub source_name: Option<BytePath>,
}

/// Reads a file, or a directory with everything below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyFrom {
    /// Absolute.
    pub path: BytePath,
    /// Symbolic links are read through instead of told.
    pub follows_links: bool,
}

/// Looks at one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    pub path: BytePath,
    pub follows_links: bool,
}

/// Host to guest, within a stream.
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

/// Guest to host, within a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromStream {
    /// The program ended; all its output was sent before.
    Exited {
        /// Shell convention: 128+n for signal n, 124 for one that ran out of its time.
        code: i32,
    },
    /// What was asked for could not be done; `code` by shell convention for programs (126, 127).
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

/// One entry of a copy from the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to what was asked for, `/` between names; the last name of that for a single file.
    pub path: BytePath,
    pub kind: EntryKind,
    /// Permission bits only.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EntryKind {
    Directory,
    /// Exactly so many bytes of data follow.
    File {
        size: u64,
    },
    Link {
        target: BytePath,
    },
}

/// What is at a path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    pub exists: bool,
    pub is_directory: bool,
    pub is_file: bool,
    pub is_link: bool,
    pub link_target: Option<BytePath>,
    /// Permission bits only.
    pub mode: u32,
    /// In bytes.
    pub size: u64,
    /// Why it could not be looked at, other than that it is not there.
    pub error: Option<String>,
}
