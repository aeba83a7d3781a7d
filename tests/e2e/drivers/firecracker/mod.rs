//! A driver of a VMM with an HTTP API on a socket, as firecracker has it.
//!
//! The driver differs from QEMU's wherever the boundary allows it: the VM is configured through the API and not by
//! the command line, the RAM is the VMM's own, the console is the standard output, and a TAP cannot be
//! replaced. Its program is a small stand-in, which this test binary runs as (`program`).

mod program;

use std::path::PathBuf;

use axum::body::Body;
use futures::FutureExt;
use futures::future::BoxFuture;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use stead::guest_channel::Transport;
use stead::hypervisor::driver::{
    Answer, Driver, MachineType, Notify, RamAccess, RunState, SaveFiles, Saved, Session, Start, VmmCommand,
};
use stead::hypervisor::record::VmPaths;
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;
use tokio::net::UnixStream;

/// Limit on the length of an answer, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Capabilities of a VMM that only runs VMs.
const NONE: VmmCapabilities =
    VmmCapabilities { volume_devices_max: 8, vcpus_max: 32, ..VmmCapabilities::NONE };

/// The second one declares nothing, so that its verbs have to be refused. Its hypervisor is any without a
/// driver.
const MACHINE_TYPES: [MachineType; 2] = [
    MachineType {
        name: "firecracker",
        hypervisor: Hypervisor::Firecracker,
        capabilities: VmmCapabilities { standby: true, fork_memory: true, ..NONE },
    },
    MachineType { name: "firecracker-without-snapshots", hypervisor: Hypervisor::Vz, capabilities: NONE },
];

#[derive(Debug)]
pub(super) struct Firecracker {
    program: PathBuf,
}

impl Firecracker {
    pub(super) fn new() -> Self {
        Self { program: std::env::current_exe().expect("this program has a path") }
    }
}

impl Driver for Firecracker {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    fn title(&self) -> &'static str {
        "Firecracker"
    }

    fn machine_types(&self) -> &'static [MachineType] {
        &MACHINE_TYPES
    }

    fn ram_access(&self) -> RamAccess {
        RamAccess::Vmm
    }

    fn reopens_console(&self) -> bool {
        false
    }

    fn probe(&self) -> BoxFuture<'_, Vec<Hypervisor>> {
        async { MACHINE_TYPES.map(|machine_type| machine_type.hypervisor).to_vec() }.boxed()
    }

    fn command(&self, start: &Start<'_>) -> VmmCommand {
        let arguments = [program::TEST, "--exact", "--nocapture", "--test-threads=1"];
        let socket = self.mark(start.paths);
        VmmCommand {
            program: self.program.clone(),
            arguments: arguments.map(ToOwned::to_owned).into_iter().chain([socket]).collect(),
            has_console_on_stdout: true,
            needs: None,
        }
    }

    fn mark(&self, paths: &VmPaths) -> String {
        self.socket(paths).display().to_string()
    }

    fn socket(&self, paths: &VmPaths) -> PathBuf {
        paths.socket(program::SOCKET)
    }

    fn transport(&self, paths: &VmPaths) -> Transport {
        Transport::VirtioSerial { socket: paths.control() }
    }

    fn connect<'a>(&'a self, paths: &'a VmPaths, _: &'a Notify) -> Answer<'a, Box<dyn Session>> {
        let api = Api { socket: self.socket(paths) };
        async move {
            api.get("/").await?;
            Ok(Box::new(api) as Box<dyn Session>)
        }
        .boxed()
    }
}

/// The API of one process; each request has a connection of its own.
struct Api {
    socket: PathBuf,
}

impl Api {
    async fn request(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, String> {
        let text = |error: &dyn std::error::Error| error.to_string();
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| text(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| text(&error))?;
        let connection = tokio::spawn(connection);
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let request = Request::builder().method(method).uri(path).header("host", "localhost").body(body);
        let answer = sender.send_request(request.map_err(|error| text(&error))?).await;
        let answer = answer.map_err(|error| text(&error))?;
        let status = answer.status();
        let bytes = axum::body::to_bytes(Body::new(answer.into_body()), ANSWER_BYTES_MAX).await;
        connection.abort();
        let bytes = bytes.map_err(|error| text(&error))?;
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if status.is_success() {
            return Ok(body);
        }
        Err(body["fault_message"].as_str().unwrap_or("it gave no reason").to_owned())
    }

    async fn get(&self, path: &str) -> Result<Value, String> {
        self.request(Method::GET, path, None).await
    }

    async fn put(&self, path: &str, body: Value) -> Result<(), String> {
        self.request(Method::PUT, path, Some(body)).await.map(drop)
    }

    fn set_state(&self, state: &'static str) -> Answer<'_, ()> {
        let body = json!({"state": state});
        async move { self.request(Method::PATCH, "/vm", Some(body)).await.map(drop) }.boxed()
    }

    async fn configure(&self, start: &Start<'_>) -> Result<(), String> {
        let (vcpus, memory) = (start.plan.vcpus, start.plan.memory.mib_ceil());
        self.put("/machine-config", json!({"vcpu_count": vcpus, "mem_size_mib": memory})).await?;
        let kernel = &start.kernel.vmlinux;
        self.put("/boot-source", json!({"kernel_image_path": kernel, "initrd_path": start.initrd})).await?;
        let mut disks = vec![(start.rootfs, true), (start.overlay, false)];
        disks.extend(start.volumes.iter().map(|volume| (volume.path.as_path(), volume.is_read_only)));
        for (index, (path, is_read_only)) in disks.into_iter().enumerate() {
            let id = format!("disk{index}");
            let drive = json!({
                "drive_id": id, "path_on_host": path, "is_root_device": index == 0,
                "is_read_only": is_read_only,
            });
            self.put(&format!("/drives/{id}"), drive).await?;
        }
        self.put("/actions", json!({"action_type": "InstanceStart"})).await
    }
}

impl Session for Api {
    fn is_spent(&self) -> bool {
        false
    }

    fn version(&self) -> Answer<'_, String> {
        async {
            let version = self.get("/version").await?;
            version["firecracker_version"].as_str().map(ToOwned::to_owned).ok_or("no version".to_owned())
        }
        .boxed()
    }

    fn state(&self) -> Answer<'_, RunState> {
        async {
            match self.get("/").await?["state"].as_str() {
                Some("Not started") => Ok(RunState::Created),
                Some("Running") => Ok(RunState::Running),
                Some("Paused") => Ok(RunState::Paused),
                other => Err(format!("the state {other:?} is not known")),
            }
        }
        .boxed()
    }

    fn set_up<'a>(&'a self, start: &'a Start<'a>) -> Answer<'a, ()> {
        self.configure(start).boxed()
    }

    fn pause(&self) -> Answer<'_, ()> {
        self.set_state("Paused")
    }

    fn resume(&self) -> Answer<'_, ()> {
        self.set_state("Resumed")
    }

    fn save<'a>(&'a self, to: &'a SaveFiles) -> Answer<'a, ()> {
        let body = json!({"snapshot_type": "Full", "snapshot_path": to.state, "mem_file_path": to.ram});
        self.put("/snapshot/create", body).boxed()
    }

    fn load<'a>(&'a self, from: &'a Saved<'a>) -> Answer<'a, ()> {
        // The very file that was checked, which may have no name.
        let ram = from.start.ram.map(|ram| format!("/proc/self/fd/{}", ram.descriptor));
        let backend = json!({"backend_path": ram, "backend_type": "File"});
        let body = json!({"snapshot_path": from.state_file, "mem_backend": backend, "resume_vm": false});
        self.put("/snapshot/load", body).boxed()
    }
}
