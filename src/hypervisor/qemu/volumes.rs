//! Volumes of a running VM, on the monitor.

use std::fs::File;
use std::time::Duration;

use qapi::qmp::{self, QmpCommand};
use serde::Serialize;
use serde_json::{Map, Value};
use stead_schemas::quantity::Bytes;
use tokio::time::Instant;

use super::disk::{Disk, as_arguments, node_names, volume_name};
use super::monitor::Monitor;
use crate::hypervisor::driver::VolumeFile;

/// Time in which QEMU releases the node of a removed device, which takes milliseconds.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);
const RELEASE_POLL: Duration = Duration::from_millis(5);

/// Name of the devices with an id among QEMU's objects.
const DEVICES: &str = "/machine/peripheral";

/// The command `blockdev-add`, whose arguments depend on the driver of the node.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct AddNode(Map<String, Value>);

impl QmpCommand for AddNode {}
impl qapi::Command for AddNode {
    type Ok = qapi::Empty;
    const NAME: &'static str = "blockdev-add";
    const ALLOW_OOB: bool = false;
}

/// The command `device_add`, whose arguments depend on the driver of the device.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct AddDevice(Map<String, Value>);

impl QmpCommand for AddDevice {}
impl qapi::Command for AddDevice {
    type Ok = qapi::Empty;
    const NAME: &'static str = "device_add";
    const ALLOW_OOB: bool = false;
}

impl Monitor {
    /// Adds the disk of a volume, with its open file. After an error a part of it may be there.
    pub(super) async fn add_volume(&self, volume: &VolumeFile, file: &File) -> Result<(), String> {
        let disk = Disk::volume(volume);
        // The description distinguishes the file from those that are passed for one command.
        let filename = self.pass_file(file, disk.name.clone()).await?;
        for node in disk.nodes(&filename) {
            self.execute(AddNode(as_arguments(node))).await?;
        }
        self.execute(AddDevice(as_arguments(disk.removable(volume.number)))).await.map(drop)
    }

    /// Removes all that is there of a volume's disk: the device at once, whatever the guest does with it, then the nodes
    /// from the top downwards, then the file.
    pub(super) async fn remove_volume(&self, number: u32) -> Result<(), String> {
        let name = volume_name(number);
        let devices = self.execute(qmp::qom_list { path: DEVICES.to_owned() }).await?;
        if devices.iter().any(|device| device.name == name) {
            self.execute(qmp::device_del { id: name.clone() }).await?;
        }
        let nodes = self.execute(qmp::query_named_block_nodes { flat: Some(true) }).await?;
        for node in node_names(&name) {
            if nodes.iter().any(|seen| seen.node_name.as_ref() == Some(&node)) {
                self.remove_node(node).await?;
            }
        }
        for set in self.execute(qmp::query_fdsets {}).await? {
            for file in set.fds.iter().filter(|file| file.opaque.as_ref() == Some(&name)) {
                let removal = qmp::remove_fd { fd: Some(file.fd), fdset_id: set.fdset_id };
                self.execute(removal).await?;
            }
        }
        Ok(())
    }

    /// Makes the disk of a volume have this size, in bytes, and tells the guest's controller that it changed.
    pub(super) async fn grow_volume(&self, number: u32, size: Bytes) -> Result<(), String> {
        let [drive, _, _] = node_names(&volume_name(number));
        let size = i64::try_from(size.0).map_err(|error| error.to_string())?;
        self.execute(qmp::block_resize { device: None, node_name: Some(drive), size }).await.map(drop)
    }

    /// Removes a node, which the removed device may have in use for a moment.
    async fn remove_node(&self, node: String) -> Result<(), String> {
        let deadline = Instant::now() + RELEASE_DEADLINE;
        loop {
            match self.execute(qmp::blockdev_del { node_name: node.clone() }).await {
                Ok(_) => return Ok(()),
                Err(why) if self.is_spent() || Instant::now() >= deadline => return Err(why),
                Err(_) => tokio::time::sleep(RELEASE_POLL).await,
            }
        }
    }
}
