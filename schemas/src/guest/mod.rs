//! Host to guest: the messages on the control channel of a VM.
//!
//! The channel is a byte stream each way, cut into frames ([`Frame`]). Stream 0 carries control messages as
//! JSON. The guest reports its whole state, and reports it again on every `Attach`, so a host that comes
//! back has missed nothing. Other streams carry the work that the agent does for the host, many at once
//! ([`Open`]).
//!
//! The guest is not trusted: after [`ToGuest::Configure`] its control frames must carry the token of this
//! boot, and the host drops all others.

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

/// The version of this protocol; a guest with another version is refused with a message that names both
/// numbers.
pub const PROTOCOL: u32 = 1;
/// Name of the control port inside the guest (`/sys/class/virtio-ports/*/name`).
pub const CONTROL_PORT: &str = "stead.control";
/// Serial number of the disk with the image, which is never written to.
pub const ROOT_DISK: &str = "stead.root";
/// Serial number of the disk that is layered over the image.
pub const OVERLAY_DISK: &str = "stead.overlay";
/// Serial number of the disk with the kernel's modules and headers, and the word on the kernel's command
/// line that announces it. The name is that of its first contents, and stays because of memories that were
/// saved then.
pub const KERNEL_FILES_DISK: &str = "stead.headers";
/// Returns the serial number of a volume's disk, by the number of the disk; virtio has room for 20 bytes.
#[must_use]
pub fn volume_disk(number: u32) -> String {
    format!("stead.volume.{number}")
}

/// Largest offset of a guest's clock that is left alone: a step disturbs programs more than such an offset
/// does.
pub const CLOCK_OFF_MAX: std::time::Duration = std::time::Duration::from_millis(500);
/// The configuration that the guest's PID 1 carries out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub hostname: String,
    /// The machine id in the form of machine-id(5). It belongs to this boot, whatever the image or an
    /// earlier boot left.
    pub machine_id: String,
    /// The instance's uid, which the ssh host keys belong to.
    pub instance: String,
    /// Program and arguments; executed directly, without a shell.
    pub argv: Vec<String>,
    pub env: BTreeMap<String, Secret>,
    /// The working directory; empty means `/`.
    pub working_dir: String,
    /// The user as the image names it: `user`, `uid` or `user:group`; looked up in the image's own files.
    pub user: String,
    pub stop_signal: Option<String>,
    /// Time that the program has between the stop signal and the kill, in milliseconds.
    pub shutdown_grace_millis: u64,
    pub network: Option<NetworkConfig>,
    /// The volumes, in the order in which they are mounted.
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// Mediated egress; `None` for a guest that reaches the outside by itself, and from hosts of earlier versions.
    #[serde(default)]
    pub egress: Option<EgressConfig>,
    pub has_agent: bool,
    /// Hotplug memory of the machine, in bytes: the guest reports how much of it is in use.
    #[serde(default)]
    pub hotplug_bytes: u64,
    /// Identifies the instance and its incarnation; the guest repeats it in its state.
    #[serde(default)]
    pub incarnation: String,
}

/// The parts of mediated egress that programs in the guest have to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressConfig {
    /// URL of the proxy, such as `http://10.100.0.1:18080`.
    pub proxy: String,
    /// Certificate in PEM of the authority that programs have to trust; `None` if no connection is intercepted.
    pub certificate: Option<String>,
}

/// A volume in the guest; disks are named by their serial numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    pub path: String,
    pub disk: String,
    pub is_read_only: bool,
    /// The disk for what is written over a disk that is only read.
    pub upper: Option<String>,
    /// Size of the disk, in bytes, which its file system should fill; `None` for volumes that are not written to
    /// directly, and from hosts of earlier versions.
    #[serde(default)]
    pub size: Option<u64>,
}

impl VolumeMount {
    /// Returns whether another mount is the same one, whatever the size of its disk.
    #[must_use]
    pub fn is_same_but_size(&self, other: &Self) -> bool {
        Self { size: None, ..self.clone() } == Self { size: None, ..other.clone() }
    }
}

/// The identity that a guest must take when it continues from the memory of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewIdentity {
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
    /// The card's MAC address; a guest whose card has another address sets this one.
    #[serde(default)]
    pub mac: Option<Mac>,
    pub gateway: Ipv4Addr,
    pub dns: Vec<Ipv4Addr>,
    #[serde(default)]
    pub resolver: Resolver,
    /// The MTU, in bytes; the kernel's default (1500) when absent.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// The secret of a VM. A message that carries it was sent after this boot was configured, by this boot. A
/// guest that continues from another's memory is given a token of its own.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Random bytes of the host for the guest's entropy pool; different ones each time.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(pub Vec<u8>);

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A control message from host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    /// The host is listening (again), and the guest should report its state. The nonce comes back with the
    /// state.
    Attach { nonce: u64 },
    /// The host's time, in nanoseconds since 1970 (UTC). A guest that was paused is behind by the length of
    /// the pause, and steps its clock.
    Clock { unix_nanos: i64 },
    /// The configuration. The guest takes it once; repeated ones are ignored.
    Configure { token: Token, seed: Seed, config: Box<Config> },
    /// The guest must take the identity of another instance: names, addresses, keys, random numbers.
    /// Programs keep running. The new token replaces the old one with the state that reports the new identity.
    #[serde(rename = "assume")]
    Identity {
        token: Token,
        new_token: Token,
        seed: Seed,
        #[serde(rename = "assumed")]
        identity: Box<NewIdentity>,
    },
    /// The guest must use so much of its hotplug memory, and give the rest back.
    Memory { token: Token, hotplugged_bytes: u64 },
    /// The guest must have exactly these volumes mounted. The disks of volumes that it must unmount are taken out of
    /// the machine when it has reported that they are unmounted.
    Volumes { token: Token, volumes: Vec<VolumeMount> },
    /// The guest must end the program: stop signal, grace, kill.
    Shutdown { token: Token },
    /// The exit record is stored, and the guest must power off.
    AcknowledgeExit { token: Token },
}

/// A message from guest to host: always the whole state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromGuest {
    pub protocol: u32,
    /// The nonce of the last `Attach` that was received; 0 before any.
    pub nonce: u64,
    /// The token of this boot; `None` until the guest is configured.
    pub token: Option<Token>,
    pub phase: Phase,
    pub exit: Option<Exit>,
    /// The incarnation that the guest was given last and has taken.
    #[serde(default)]
    pub incarnation: Option<String>,
    /// The reason why the guest could not take the identity that it was given.
    #[serde(default)]
    #[serde(rename = "assume_error")]
    pub identity_error: Option<String>,
    /// Window of the guest's streams, in bytes.
    #[serde(default = "stream::untold_window")]
    pub window: u32,
    /// The guest's hotplug memory; `None` without any, and from guests of earlier versions.
    #[serde(default)]
    pub memory: Option<HotplugMemory>,
    /// The guest's volumes; `None` before they are mounted, and from guests of earlier versions, which mount no volumes
    /// while their program runs.
    #[serde(default)]
    pub volumes: Option<MountedVolumes>,
}

/// The volumes of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountedVolumes {
    /// The volumes of the last request that the guest has carried out as far as it could, at first those of its
    /// configuration.
    pub requested: Vec<VolumeMount>,
    /// The volumes that are mounted. The guest has no use of any other disk of a volume.
    pub mounted: Vec<VolumeMount>,
    /// The reasons why volumes are mounted that should not be, or are not mounted that should be, by path.
    #[serde(default)]
    pub problems: BTreeMap<String, String>,
    /// True if the guest fills disks that grow while they are mounted. Guests of earlier versions do so at their start.
    #[serde(default)]
    pub fills_disks: bool,
}

/// The hotplug memory of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotplugMemory {
    /// The bytes that the guest was last asked to use; `None` before it was asked.
    pub target_bytes: Option<u64>,
    /// The bytes that it uses.
    pub used_bytes: u64,
    /// The reason why it uses more or less than it was asked to.
    pub error: Option<String>,
    /// Numbers of the blocks that it does not use, of [`MEMORY_BLOCK`](crate::limits::MEMORY_BLOCK) bytes, counted from
    /// the physical address 0. Nobody reads or writes them until the guest is asked to use more.
    #[serde(default)]
    pub unused_blocks: Vec<u64>,
    /// Number of the last change of these blocks.
    #[serde(default)]
    pub change: u64,
}

impl HotplugMemory {
    /// Returns the state of a guest that was asked for this part since. While it follows, it reports no unused blocks: the
    /// host could take back what is being put to use.
    #[must_use]
    pub fn asked(self, target_bytes: Option<u64>) -> Self {
        let unused_blocks = if self.target_bytes == target_bytes { self.unused_blocks } else { Vec::new() };
        Self { target_bytes, unused_blocks, ..self }
    }
}

/// A line for people, from the guest's PID 1 or its kernel. It carries no meaning, and may be lost.
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
