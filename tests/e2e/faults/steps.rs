//! The clients' actions while calls fail: each step creates an object, uses it, and removes it again.

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::image;

/// An action or a wait of a client.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// A request, which is repeated until it is answered with one of these codes.
    Ask(Method, String, Value, &'static [u16]),
    /// A request with the archive of an image as its body, repeated like [`Act::Ask`].
    Import(String),
    /// A verb that is requested until the object at the second path satisfies the condition.
    Bring(String, String, fn(&Value) -> bool),
    /// A wait until the object at this path satisfies the condition.
    See(String, fn(&Value) -> bool),
    /// A deletion of all objects in the first list, each at the second path with its id, until the list is empty.
    Clear(String, String),
    /// A wait until the object is gone.
    Gone(String),
    /// A request whose answer is not JSON.
    Take(String),
    /// A token that is created, used, revoked, and then refused.
    Token,
}

/// The steps, by name.
pub(crate) const STEPS: [&str; 7] = ["image", "import", "volume", "instance", "ingress", "token", "backup"];

/// The steps beside a VM that keeps running, and must be the same VM after each.
pub(crate) const OF_A_VM: [&str; 4] = ["watch", "sleep", "snapshot", "run"];

const CREATED: &[u16] = &[201, 202];
const DELETED: &[u16] = &[204, 404];
const DONE: &[u16] = &[200, 204];

fn is_ready(seen: &Value) -> bool {
    seen["status"] == "ready"
}

fn is_converged(seen: &Value) -> bool {
    seen["conditions"].to_string().contains("Converged")
}

/// Returns `true` if an instance has everything that it can have without a guest kernel.
fn waits_for_a_kernel(seen: &Value) -> bool {
    seen["conditions"].to_string().contains("kernel")
}

fn is_stopped(seen: &Value) -> bool {
    seen["state"] == "Stopped"
}

fn is_running(seen: &Value) -> bool {
    seen["state"] == "Running"
}

fn is_in_standby(seen: &Value) -> bool {
    seen["state"] == "Standby"
}

fn is_listed(seen: &Value) -> bool {
    seen.as_array().is_some_and(|all| !all.is_empty())
}

fn post(path: &str, body: Value) -> Act {
    Act::Ask(Method::POST, path.to_owned(), body, CREATED)
}

fn delete(path: String) -> Act {
    Act::Ask(Method::DELETE, path, Value::Null, DELETED)
}

/// Returns the actions of a step. `tag` is part of the names of its objects.
pub(crate) fn acts(step: &str, tag: &str) -> Vec<Act> {
    match step {
        "image" => {
            let path = format!("/images/{}", image("other").replace('/', "%2F"));
            let made = post("/images", json!({ "name": image("other") }));
            vec![made, Act::See(path.clone(), is_ready), delete(path.clone()), Act::Gone(path)]
        }
        "import" => {
            let name = format!("localhost/imported-{tag}:latest");
            let path = format!("/images/{}", name.replace('/', "%2F"));
            let import = Act::Import(format!("/images/import?name={name}"));
            vec![import, Act::See(path.clone(), is_ready), delete(path.clone()), Act::Gone(path)]
        }
        "volume" => {
            let path = format!("/volumes/volume-{tag}");
            let made = post("/volumes", json!({ "name": format!("volume-{tag}"), "size_gb": 1 }));
            vec![made, Act::See(path.clone(), is_converged), delete(path.clone()), Act::Gone(path)]
        }
        "instance" => {
            let path = format!("/instances/box-{tag}");
            let made = post("/instances", instance(&format!("box-{tag}")));
            let update = json!({ "ttl": "2h" });
            let patched = Act::Ask(Method::PATCH, path.clone(), update, DONE);
            let stopped = Act::Ask(Method::POST, format!("{path}/stop"), Value::Null, DONE);
            let log = Act::Take(format!("{path}/logs?source=stead&tail=5"));
            let waits = Act::See(path.clone(), waits_for_a_kernel);
            let stops = Act::See(path.clone(), is_stopped);
            vec![made, waits, patched, log, stopped, stops, delete(path.clone()), Act::Gone(path)]
        }
        "ingress" => {
            let path = format!("/ingresses/way-{tag}");
            let rule = json!({ "match": { "hostname": format!("{tag}.test"), "port": 8082 },
                "target": { "instance": "kept", "port": 80 } });
            let made = post("/ingresses", json!({ "name": format!("way-{tag}"), "rules": [rule] }));
            vec![made, Act::See(path.clone(), is_converged), delete(path.clone()), Act::Gone(path)]
        }
        "watch" => vec![Act::See("/instances/kept".to_owned(), is_running)],
        "sleep" => {
            let path = || "/instances/kept".to_owned();
            vec![
                Act::Bring(format!("{}/standby", path()), path(), is_in_standby),
                Act::Bring(format!("{}/restore", path()), path(), is_running),
            ]
        }
        "snapshot" => {
            let list = format!("/snapshots?name=snap-{tag}");
            let body = json!({ "kind": "Standby", "name": format!("snap-{tag}") });
            let made = post("/instances/kept/snapshots", body);
            vec![made, Act::See(list.clone(), is_listed), Act::Clear(list, "/snapshots".to_owned())]
        }
        "run" => {
            let path = format!("/instances/box-{tag}");
            let made = post("/instances", instance(&format!("box-{tag}")));
            vec![made, Act::See(path.clone(), is_running), delete(path.clone()), Act::Gone(path)]
        }
        "token" => vec![Act::Token],
        "backup" => vec![Act::Take("/backup".to_owned())],
        other => panic!("there is no step {other}"),
    }
}

/// Returns the request for an instance of the kept image.
pub(crate) fn instance(name: &str) -> Value {
    json!({ "name": name, "image": image("busybox"), "size": "128MB", "vcpus": 1, "overlay_size": "64MB",
        "cmd": ["sleep", "1000"] })
}
