//! A stand-in for firecracker: its API, its order of states and its refusals, without a virtual machine.
//!
//! Requests and answers are those of a recorded run of firecracker 1.17. The RAM of the VM is a number that
//! grows while the VM runs, so a test sees whether a restored VM continues where it was saved.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// The name of the socket, by which the test below knows that it should be the program.
pub(super) const SOCKET: &str = "firecracker.sock";
/// The name of the test that is the program when it is run with a socket.
pub(super) const TEST: &str = "drivers::firecracker::program::answers_as_firecracker_does";

const NOT_SUPPORTED_AFTER: &str = "The requested operation is not supported after starting the microVM.";
const NOT_SUPPORTED_BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const VERSION: &str = "1.17.0";
/// Delay between two steps of the guest.
const STEP: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    NotStarted,
    Running,
    Paused,
}

/// The VM of the process.
#[derive(Debug)]
struct Vm {
    state: State,
    vcpus: u64,
    memory_mib: u64,
    kernel: Option<PathBuf>,
    drives: BTreeMap<String, PathBuf>,
    /// A kernel or a drive was configured, so no snapshot can be loaded.
    is_configured: bool,
    /// The first bytes of the RAM; the rest is zero.
    steps: u64,
}

/// The body of a successful answer, or the reason of a refusal.
type Outcome = Result<Value, String>;

impl Vm {
    fn new() -> Self {
        Self {
            state: State::NotStarted,
            vcpus: 1,
            memory_mib: 128,
            kernel: None,
            drives: BTreeMap::new(),
            is_configured: false,
            steps: 0,
        }
    }

    fn answer(&mut self, method: &Method, path: &str, body: &Value) -> Outcome {
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match (method.as_str(), parts.as_slice()) {
            ("GET", [""]) => {
                Ok(json!({"id": "stand-in", "state": self.state_name(), "vmm_version": VERSION}))
            }
            ("GET", ["version"]) => Ok(json!({"firecracker_version": VERSION})),
            ("GET", ["machine-config"]) => {
                Ok(json!({"vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib}))
            }
            ("PUT", ["machine-config"]) => self.before_start().and_then(|()| self.set_machine(body)),
            ("PUT", ["boot-source"]) => self.before_start().and_then(|()| self.set_kernel(body)),
            ("PUT", ["drives", id]) => self.before_start().and_then(|()| self.set_drive(id, body)),
            ("PUT", ["actions"]) => self.before_start().and_then(|()| self.start()),
            ("PATCH", ["vm"]) => self.set_state(body),
            ("PUT", ["snapshot", "create"]) => self.create_snapshot(body),
            ("PUT", ["snapshot", "load"]) => self.before_start().and_then(|()| self.load_snapshot(body)),
            _ => {
                Err(format!("Invalid request method and/or path: {method} {}.", path.trim_start_matches('/')))
            }
        }
    }

    fn state_name(&self) -> &'static str {
        match self.state {
            State::NotStarted => "Not started",
            State::Running => "Running",
            State::Paused => "Paused",
        }
    }

    fn before_start(&self) -> Result<(), String> {
        if self.state == State::NotStarted { Ok(()) } else { Err(NOT_SUPPORTED_AFTER.to_owned()) }
    }

    fn set_machine(&mut self, body: &Value) -> Outcome {
        let vcpus = body["vcpu_count"].as_u64().ok_or("missing field `vcpu_count`")?;
        let memory = body["mem_size_mib"].as_u64().ok_or("missing field `mem_size_mib`")?;
        if !(1..=32).contains(&vcpus) {
            return Err(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and \
                        must be 1 or an even number if SMT is enabled."
                    .to_owned(),
            );
        }
        (self.vcpus, self.memory_mib) = (vcpus, memory);
        Ok(Value::Null)
    }

    fn set_kernel(&mut self, body: &Value) -> Outcome {
        let path = path_in(body, "kernel_image_path")?;
        let open = File::open(&path);
        open.map_err(|error| format!("Boot source error: The kernel file cannot be opened: {error}"))?;
        (self.kernel, self.is_configured) = (Some(path), true);
        Ok(Value::Null)
    }

    fn set_drive(&mut self, id: &str, body: &Value) -> Outcome {
        if body["drive_id"].as_str() != Some(id) {
            return Err("The id from the path does not match the id from the body!".to_owned());
        }
        let path = path_in(body, "path_on_host")?;
        File::open(&path).map_err(|error| {
            format!(
                "Drive config error: Unable to create the virtio block device: Virtio backend error: Error \
                 manipulating the backing file: {error} {}",
                path.display()
            )
        })?;
        self.drives.insert(id.to_owned(), path);
        self.is_configured = true;
        Ok(Value::Null)
    }

    fn start(&mut self) -> Outcome {
        if self.kernel.is_none() {
            return Err("Start microvm error: Cannot start microvm without kernel configuration.".to_owned());
        }
        self.state = State::Running;
        Ok(Value::Null)
    }

    fn set_state(&mut self, body: &Value) -> Outcome {
        if self.state == State::NotStarted {
            return Err(NOT_SUPPORTED_BEFORE.to_owned());
        }
        self.state = match body["state"].as_str() {
            Some("Paused") => State::Paused,
            Some("Resumed") => State::Running,
            other => return Err(format!("unknown variant {other:?}")),
        };
        Ok(Value::Null)
    }

    fn create_snapshot(&self, body: &Value) -> Outcome {
        match self.state {
            State::NotStarted => return Err(NOT_SUPPORTED_BEFORE.to_owned()),
            State::Running => {
                return Err("Create snapshot error: Cannot save the microVM state: Operation not allowed: \
                            save/restore unavailable while running"
                    .to_owned());
            }
            State::Paused => {}
        }
        let (state, ram) = (path_in(body, "snapshot_path")?, path_in(body, "mem_file_path")?);
        let drives: Vec<&PathBuf> = self.drives.values().collect();
        let device_state = json!({"vcpus": self.vcpus, "memory_mib": self.memory_mib, "drives": drives});
        let write = || {
            fs::write(state, device_state.to_string())?;
            let mut file = File::create(ram)?;
            file.set_len(self.memory_mib << 20)?;
            file.write_all(&self.steps.to_le_bytes())
        };
        write().map_err(|error: io::Error| format!("Create snapshot error: {error}")).map(|()| Value::Null)
    }

    fn load_snapshot(&mut self, body: &Value) -> Outcome {
        if self.is_configured {
            return Err("Load snapshot error: Loading a microVM snapshot not allowed after configuring \
                        boot-specific resources."
                .to_owned());
        }
        let (state, ram) = (path_in(body, "snapshot_path")?, path_in(&body["mem_backend"], "backend_path")?);
        let failed = |error: &dyn std::fmt::Display| {
            format!("Load snapshot error: Failed to restore from snapshot: {error}")
        };
        let bytes = fs::read(state).map_err(|error| failed(&error))?;
        let device_state: Value = serde_json::from_slice(&bytes).map_err(|error| failed(&error))?;
        let mut steps = [0; 8];
        File::open(ram).and_then(|mut ram| ram.read_exact(&mut steps)).map_err(|error| failed(&error))?;
        self.vcpus = device_state["vcpus"].as_u64().unwrap_or_default();
        self.memory_mib = device_state["memory_mib"].as_u64().unwrap_or_default();
        self.steps = u64::from_le_bytes(steps);
        self.state = if body["resume_vm"] == json!(true) { State::Running } else { State::Paused };
        Ok(Value::Null)
    }
}

fn path_in(body: &Value, field: &str) -> Result<PathBuf, String> {
    body[field].as_str().map(PathBuf::from).ok_or_else(|| format!("missing field `{field}`"))
}

fn respond(outcome: Outcome) -> Response {
    match outcome {
        Ok(Value::Null) => StatusCode::NO_CONTENT.into_response(),
        Ok(body) => body.to_string().into_response(),
        Err(why) => (StatusCode::BAD_REQUEST, json!({"fault_message": why}).to_string()).into_response(),
    }
}

/// Serves the API, and runs the guest, until the process is killed.
async fn serve(socket: &Path) {
    let vm = Arc::new(Mutex::new(Vm::new()));
    let guest = vm.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(STEP).await;
            let mut vm = guest.lock().expect("whole");
            vm.steps += u64::from(vm.state == State::Running);
        }
    });
    let handle = move |method: Method, uri: Uri, body: Bytes| async move {
        let body = serde_json::from_slice(&body).unwrap_or_default();
        respond(vm.lock().expect("whole").answer(&method, uri.path(), &body))
    };
    let listener = tokio::net::UnixListener::bind(socket).expect("bound");
    axum::serve(listener, axum::Router::new().fallback(handle)).await.expect("served");
}

/// The answers are those of the recorded run. With a socket among its arguments this is the program.
#[tokio::test]
async fn answers_as_firecracker_does() {
    let socket = std::env::args().map(PathBuf::from).find(|path| path.ends_with(SOCKET));
    if let Some(socket) = socket.filter(|socket| socket.is_absolute()) {
        return serve(&socket).await;
    }
    let dir = tempfile::tempdir().expect("scratch");
    let [kernel, disk, state, ram] = ["kernel", "disk", "state", "ram"].map(|name| dir.path().join(name));
    fs::write(&kernel, "").and_then(|()| fs::write(&disk, "")).expect("written");
    let create = json!({"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": ram});
    let load = json!({"snapshot_path": state, "mem_backend": {"backend_path": ram, "backend_type": "File"}});
    let drive = |path: &Path| json!({"drive_id": "d0", "path_on_host": path, "is_root_device": false});
    let start = json!({"action_type": "InstanceStart"});
    let mut vm = Vm::new();
    // Each request with a part of the refusal, or nothing when it succeeds.
    let requests = [
        ("PUT", "/actions", start.clone(), "without kernel configuration"),
        ("PATCH", "/vm", json!({"state": "Paused"}), "not supported before starting"),
        ("PUT", "/machine-config", json!({"mem_size_mib": 64}), "missing field `vcpu_count`"),
        ("PUT", "/machine-config", json!({"vcpu_count": 0, "mem_size_mib": 64}), "number of vCPUs"),
        ("PUT", "/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64}), ""),
        ("PUT", "/boot-source", json!({"kernel_image_path": "/nonexistent"}), "No such file or directory"),
        ("PUT", "/boot-source", json!({"kernel_image_path": kernel}), ""),
        ("PUT", "/drives/d0", drive(Path::new("/nonexistent")), "No such file or directory"),
        ("PUT", "/drives/d1", drive(&disk), "does not match"),
        ("PUT", "/drives/d0", drive(&disk), ""),
        ("PUT", "/snapshot/load", load.clone(), "not allowed after configuring"),
        ("PUT", "/actions", start.clone(), ""),
        ("PUT", "/actions", start, "not supported after starting"),
        ("PUT", "/snapshot/create", create.clone(), "unavailable while running"),
        ("PATCH", "/vm", json!({"state": "Paused"}), ""),
        ("PATCH", "/vm", json!({"state": "Paused"}), ""),
        ("PUT", "/snapshot/create", create, ""),
        ("PUT", "/snapshot/load", load.clone(), "not supported after starting"),
        ("GET", "/bogus", Value::Null, "Invalid request method and/or path: GET bogus."),
        ("DELETE", "/vm", Value::Null, "Invalid request method and/or path: DELETE vm."),
    ];
    for (method, path, body, refusal) in requests {
        let outcome = vm.answer(&method.parse().expect("a method"), path, &body);
        match outcome {
            Ok(_) => assert_eq!(refusal, "", "{method} {path} {body}"),
            Err(why) => assert!(!refusal.is_empty() && why.contains(refusal), "{method} {path}: {why}"),
        }
    }
    let mut restored = Vm::new();
    restored.answer(&Method::PUT, "/snapshot/load", &load).expect("loaded");
    assert_eq!((restored.state, restored.vcpus, restored.memory_mib), (State::Paused, 2, 64));
}
