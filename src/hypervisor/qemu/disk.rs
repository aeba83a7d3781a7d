//! The disks of a VM as QEMU knows them: nodes over a file, and a device of the guest. They are the same on the command
//! line and on the monitor.

use std::path::Path;

use serde_json::{Map, Value};
use stead_schemas::guest::volume_disk;

use super::throttle::THROTTLE;
use crate::hypervisor::driver::VolumeFile;

/// Name of the controller of the volumes.
pub(super) const CONTROLLER: &str = "volumes";

/// The options of a node or a device, in their order.
pub(super) type Options = Vec<(&'static str, Value)>;

/// A disk.
#[derive(Debug)]
pub(super) struct Disk<'a> {
    pub(super) name: String,
    pub(super) serial: String,
    pub(super) path: &'a Path,
    pub(super) is_read_only: bool,
    /// True if its bytes count for the limit of the disks.
    is_limited: bool,
}

impl<'a> Disk<'a> {
    /// Describes the disk that the guest writes to.
    pub(super) fn overlay(serial: &str, path: &'a Path) -> Self {
        let (name, serial) = ("overlay".to_owned(), serial.to_owned());
        Self { name, serial, path, is_read_only: false, is_limited: true }
    }

    /// Describes the disk of a volume.
    pub(super) fn volume(volume: &'a VolumeFile) -> Self {
        Self {
            name: volume_name(volume.number),
            serial: volume_disk(volume.number),
            path: &volume.path,
            is_read_only: volume.is_read_only,
            is_limited: true,
        }
    }

    /// Describes a disk of files that instances share, which is only read.
    pub(super) fn shared(name: &str, serial: &str, path: &'a Path) -> Self {
        let (name, serial) = (name.to_owned(), serial.to_owned());
        Self { name, serial, path, is_read_only: true, is_limited: false }
    }

    /// Returns the nodes of the disk, whose file has this name for QEMU, from the file upwards.
    pub(super) fn nodes(&self, filename: &str) -> Vec<Options> {
        let [drive, format, file] = node_names(&self.name);
        let access = [("read-only", self.is_read_only.into()), ("discard", "unmap".into())];
        let node = |options: &[(&'static str, &str)], rest: &[(&'static str, Value)]| -> Options {
            let options = options.iter().map(|(key, value)| (*key, Value::from(*value)));
            options.chain(rest.iter().cloned()).collect()
        };
        let mut source = node(&[("driver", "file"), ("node-name", &file), ("filename", filename)], &access);
        // A file that is only read may be open in other VMMs, any of which could lock it against this one.
        if self.is_read_only {
            source.push(("locking", "off".into()));
        }
        let mut nodes =
            vec![source, node(&[("driver", "raw"), ("node-name", &format), ("file", &file)], &access)];
        if self.is_limited {
            // A filter drops discards, and refuses a device that only reads, unless its own node has these options.
            let filter = [("driver", "throttle"), ("node-name", &drive), ("throttle-group", THROTTLE)];
            nodes.push(node(&[filter.as_slice(), &[("file", &format)]].concat(), &access));
        }
        nodes
    }

    /// Returns the name of the node that the guest's device uses.
    pub(super) fn drive(&self) -> String {
        let [limited, format, _] = node_names(&self.name);
        if self.is_limited { limited } else { format }
    }

    /// Returns the device of a volume, which can come and go while the guest runs.
    pub(super) fn removable(&self, number: u32) -> Options {
        vec![
            ("driver", "scsi-hd".into()),
            ("id", self.name.clone().into()),
            ("bus", format!("{CONTROLLER}.0").into()),
            ("scsi-id", 0.into()),
            ("lun", number.into()),
            ("drive", self.drive().into()),
            ("serial", self.serial.clone().into()),
            // A disk that does not turn.
            ("rotation_rate", 1.into()),
        ]
    }
}

/// Returns the name of a volume's disk.
pub(super) fn volume_name(number: u32) -> String {
    format!("volume{number}")
}

/// Returns the names of the nodes of a disk, from the top downwards.
pub(super) fn node_names(disk: &str) -> [String; 3] {
    [format!("{disk}-limited"), disk.to_owned(), format!("{disk}-file")]
}

/// Writes options as a value of the command line.
pub(super) fn as_word(options: &Options) -> String {
    let text = |value: &Value| match value {
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let words: Vec<String> = options.iter().map(|(key, value)| format!("{key}={}", text(value))).collect();
    words.join(",")
}

/// Returns options as the arguments of a command of the monitor.
pub(super) fn as_arguments(options: Options) -> Map<String, Value> {
    options.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
