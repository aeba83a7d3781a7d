//! Operations of users and agents inside a running guest: exec, cp, stat.

mod bulk;
mod cli;
mod cp;
mod exec;
mod faults;
mod sdk;

use serde_json::{Value, json};

use crate::harness::{Harness, image};

/// Creates a VM whose program waits.
pub(crate) async fn waiting(site: &Harness, name: &str, more: Value) -> String {
    let mut body = json!({ "cmd": ["sh", "-c", "while true; do sleep 1; done"] });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let id = site.create(name, &image("busybox"), body).await;
    site.until_state(name, "Running").await;
    id
}
