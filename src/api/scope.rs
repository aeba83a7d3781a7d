//! Scopes: those that the contract lists, and those that this server adds.

/// A scope, which is one right of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    InstanceRead,
    InstanceWrite,
    InstanceDelete,
    ImageRead,
    ImageWrite,
    ImageDelete,
    VolumeRead,
    VolumeWrite,
    VolumeDelete,
    SnapshotRead,
    SnapshotWrite,
    SnapshotDelete,
    BuildRead,
    BuildWrite,
    BuildDelete,
    DeviceRead,
    DeviceWrite,
    DeviceDelete,
    IngressRead,
    IngressWrite,
    IngressDelete,
    ResourceRead,
    /// The right to put content under a name of a remote registry; beyond the contract.
    ImagePublish,
    /// The right to see values of environment variables; beyond the contract.
    InstanceSecrets,
    /// The right to see values of headers that let a request in; beyond the contract.
    IngressSecrets,
    /// The right to read a sealed backup of everything that is stored; beyond the contract.
    BackupRead,
}

impl Scope {
    /// All scopes: the contract's in its order, then ours.
    pub const ALL: [Self; 26] = [
        Self::InstanceRead,
        Self::InstanceWrite,
        Self::InstanceDelete,
        Self::ImageRead,
        Self::ImageWrite,
        Self::ImageDelete,
        Self::VolumeRead,
        Self::VolumeWrite,
        Self::VolumeDelete,
        Self::SnapshotRead,
        Self::SnapshotWrite,
        Self::SnapshotDelete,
        Self::BuildRead,
        Self::BuildWrite,
        Self::BuildDelete,
        Self::DeviceRead,
        Self::DeviceWrite,
        Self::DeviceDelete,
        Self::IngressRead,
        Self::IngressWrite,
        Self::IngressDelete,
        Self::ResourceRead,
        Self::ImagePublish,
        Self::InstanceSecrets,
        Self::IngressSecrets,
        Self::BackupRead,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InstanceRead => "instance:read",
            Self::InstanceWrite => "instance:write",
            Self::InstanceDelete => "instance:delete",
            Self::ImageRead => "image:read",
            Self::ImageWrite => "image:write",
            Self::ImageDelete => "image:delete",
            Self::VolumeRead => "volume:read",
            Self::VolumeWrite => "volume:write",
            Self::VolumeDelete => "volume:delete",
            Self::SnapshotRead => "snapshot:read",
            Self::SnapshotWrite => "snapshot:write",
            Self::SnapshotDelete => "snapshot:delete",
            Self::BuildRead => "build:read",
            Self::BuildWrite => "build:write",
            Self::BuildDelete => "build:delete",
            Self::DeviceRead => "device:read",
            Self::DeviceWrite => "device:write",
            Self::DeviceDelete => "device:delete",
            Self::IngressRead => "ingress:read",
            Self::IngressWrite => "ingress:write",
            Self::IngressDelete => "ingress:delete",
            Self::ResourceRead => "resource:read",
            Self::ImagePublish => "image:publish",
            Self::InstanceSecrets => "instance:secrets",
            Self::IngressSecrets => "ingress:secrets",
            Self::BackupRead => "backup:read",
        }
    }
}
