//! Host to guest: what travels on the control channel of a VM.
//!
//! A byte stream each way, cut into frames ([`Frame`]). Stream 0 carries control messages as JSON:
//! state is told whole and again on every `Attach`, so a host that comes back has missed nothing.
//! Other streams are what the agent does for the host, many at once ([`Open`]).
//!
//! The guest is not trusted: after [`ToGuest::Configure`] its control frames carry the token of this
//! boot, and the host drops the others.

mod frame;
mod path;
mod stream;

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::instance::{Exit, Secret};
use crate::network::{Mac, Resolver};

pub use frame::{Decoder, Frame, FrameKind, HEADER_BYTES, MAGIC, PAYLOAD_BYTES_MAX, TooLarge};
pub use path::BytePath;
pub use stream::{
    CopyFrom, CopyTo, DATA_BYTES_MAX, Entry, EntryKind, Exec, FIRST_WINDOW_BYTES, FromStream, Open, PathInfo,
    RENEWAL_BYTES, Request, Stat, ToStream, UNTOLD_WINDOW_BYTES, WINDOW_BYTES,
};

/// The version of this protocol; a guest of another one is refused with both numbers named.
pub const PROTOCOL: u32 = 1;
/// Name of the control port inside the guest (`/sys/class/virtio-ports/*/name`).
pub const CONTROL_PORT: &str = "stead.control";
/// Serial number of the disk with the image, which nobody writes to.
pub const ROOT_DISK: &str = "stead.root";
/// Serial number of the disk that lies over it.
pub const OVERLAY_DISK: &str = "stead.overlay";
/// Serial number of the disk with the kernel's modules and headers, and the word on the kernel's command line
/// that says it is there. It is named by what it had at first, for memories that were saved then.
pub const KERNEL_FILES_DISK: &str = "stead.headers";
/// Serial number of a volume's disk, by its place among them; virtio has room for 20 bytes.
#[must_use]
pub fn volume_disk(index: usize) -> String {
    format!("stead.volume.{index}")
}

/// A guest's clock that is off by less is left alone: a step disturbs programs more than that does.
pub const CLOCK_OFF_MAX: std::time::Duration = std::time::Duration::from_millis(500);
/// What the guest's PID 1 has to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub hostname: String,
    /// In the form of machine-id(5); of this boot, whatever the image or an earlier boot left.
    pub machine_id: String,
    /// The instance's uid, which its ssh host keys go by.
    pub instance: String,
    /// Program and arguments; executed directly, no shell.
    pub argv: Vec<String>,
    pub env: BTreeMap<String, Secret>,
    /// Empty means `/`.
    pub working_dir: String,
    /// As the image says: `user`, `uid`, `user:group`; looked up in the image's own files.
    pub user: String,
    pub stop_signal: Option<String>,
    /// How long the program has between the stop signal and the kill.
    pub shutdown_grace_millis: u64,
    pub network: Option<NetworkConfig>,
    /// In the order in which they are mounted.
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    pub has_agent: bool,
    /// Which life of which instance this is; the guest repeats it in its state.
    #[serde(default)]
    pub incarnation: String,
}

/// A volume in the guest; disks are named by their serial numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    pub path: String,
    pub disk: String,
    pub is_read_only: bool,
    /// What is written over a disk that is only read.
    pub upper: Option<String>,
}

/// What a guest that goes on from the memory of another has to become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assumed {
    pub incarnation: String,
    pub hostname: String,
    pub machine_id: String,
    pub instance: String,
    pub network: Option<NetworkConfig>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    pub address: Ipv4Addr,
    pub prefix: u8,
    /// The card's; a guest whose card has another sets it.
    #[serde(default)]
    pub mac: Option<Mac>,
    pub gateway: Ipv4Addr,
    pub dns: Vec<Ipv4Addr>,
    #[serde(default)]
    pub resolver: Resolver,
    /// In bytes; the kernel's default (1500) without one.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// Secret of one VM: what carries it was said after this boot was configured, by this boot. A guest that
/// goes on from another's memory is given one of its own.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Random bytes of the host for the guest's pool; other ones each time.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(pub Vec<u8>);

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    /// The host is (again) listening: tell the state. The nonce comes back with it.
    Attach { nonce: u64 },
    /// The host's time, nanoseconds since 1970 (UTC): a guest that was paused is behind by as much,
    /// and steps its clock.
    Clock { unix_nanos: i64 },
    /// Taken once; repeated ones are ignored.
    Configure { token: Token, seed: Seed, config: Box<Config> },
    /// Become another instance: names, addresses, keys, random numbers. Programs go on. With the state
    /// that tells so the new token takes the old one's place.
    Assume { token: Token, new_token: Token, seed: Seed, assumed: Box<Assumed> },
    /// End the program: stop signal, grace, kill.
    Shutdown { token: Token },
    /// The exit record is stored: power off.
    AcknowledgeExit { token: Token },
}

/// Guest to host: always the whole state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromGuest {
    pub protocol: u32,
    /// Of the last `Attach` that was seen; 0 before any.
    pub nonce: u64,
    /// None until configured.
    pub token: Option<Token>,
    pub phase: Phase,
    pub exit: Option<Exit>,
    /// The life that it was told last and has taken on.
    #[serde(default)]
    pub incarnation: Option<String>,
    /// Why it could not take on the one it was told.
    #[serde(default)]
    pub assume_error: Option<String>,
    /// Of its streams, in bytes.
    #[serde(default = "stream::untold_window")]
    pub window: u32,
}

/// A line for people, of the guest's PID 1 or of its kernel. It carries no meaning, and may be lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub token: Token,
    pub note: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    AwaitingConfig,
    Configured,
    Ready,
    Exited,
}
