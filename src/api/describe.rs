//! `/spec.json` and `/spec.yaml`: the OpenAPI description of the routes that are served.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};

/// Method, path, summary and success status of every route.
const OPERATIONS: [(&str, &str, &str, &str); 46] = [
    ("get", "/health", "Liveness", "200"),
    ("get", "/capabilities", "What this server and host can do", "200"),
    ("get", "/instances", "List instances; watch=true streams changes", "200"),
    ("post", "/instances", "Create and start an instance", "201"),
    ("get", "/instances/{id}", "Read an instance", "200"),
    ("patch", "/instances/{id}", "Change restart policy, health check, expiry or auto-standby", "200"),
    ("delete", "/instances/{id}", "Stop and delete an instance", "204"),
    ("post", "/instances/{id}/start", "Start the next run", "200"),
    ("post", "/instances/{id}/stop", "Stop the VM", "200"),
    ("post", "/instances/{id}/standby", "Keep its memory and end its process", "200"),
    ("post", "/instances/{id}/restore", "Go on from the kept memory", "200"),
    ("post", "/instances/{id}/fork", "Make another instance of it, as it is now", "201"),
    ("post", "/instances/{id}/snapshots", "Take a snapshot of it", "201"),
    ("post", "/instances/{id}/snapshots/{snapshot}/restore", "Put it back to a snapshot", "200"),
    ("get", "/instances/{id}/snapshot-schedule", "When snapshots of it are taken by themselves", "200"),
    ("put", "/instances/{id}/snapshot-schedule", "Have them taken, and old ones deleted", "200"),
    ("delete", "/instances/{id}/snapshot-schedule", "Have no more taken; those there are stay", "204"),
    ("get", "/snapshots", "List snapshots", "200"),
    ("get", "/snapshots/{id}", "Read a snapshot", "200"),
    ("patch", "/snapshots/{id}", "Set how many forks are held ready", "200"),
    ("delete", "/snapshots/{id}", "Delete a snapshot", "204"),
    ("post", "/snapshots/{id}/fork", "Make an instance from a snapshot", "201"),
    ("get", "/instances/{id}/auto-standby/status", "Who is connected, and when it goes to standby", "200"),
    ("post", "/instances/{id}/auto-standby/hold", "Put its standby off for another idle timeout", "200"),
    ("get", "/instances/{id}/wait", "Wait for a state", "200"),
    ("get", "/instances/{id}/logs", "Lines of a log as server-sent events; follow=true goes on", "200"),
    ("get", "/instances/{id}/exec", "Run a program beside it; a WebSocket", "101"),
    ("get", "/instances/{id}/cp", "Copy files into or out of it; a WebSocket", "101"),
    ("get", "/instances/{id}/stat", "What is at a path in it", "200"),
    ("get", "/instances/{id}/stats", "What it uses now", "200"),
    ("get", "/volumes", "List volumes", "200"),
    ("post", "/volumes", "Make an empty volume", "201"),
    ("get", "/volumes/{id}", "Read a volume", "200"),
    ("delete", "/volumes/{id}", "Delete a volume", "204"),
    ("post", "/instances/{id}/volumes/{volume}", "Mount a volume in a stopped instance", "200"),
    ("delete", "/instances/{id}/volumes/{volume}", "Take a volume out of a stopped instance", "200"),
    ("get", "/ingresses", "List ingresses", "200"),
    ("post", "/ingresses", "Have host names at ports of this host lead to instances", "201"),
    ("get", "/ingresses/{id}", "Read an ingress", "200"),
    ("delete", "/ingresses/{id}", "Delete an ingress", "204"),
    ("get", "/images", "List images", "200"),
    ("post", "/images", "Pull an image", "202"),
    ("post", "/images/import", "Import an archive", "201"),
    ("get", "/images/{name}", "Read an image", "200"),
    ("delete", "/images/{name}", "Delete an image name", "204"),
    ("post", "/images/{name}/tag", "Give content another name", "201"),
];

fn document() -> Value {
    let mut paths = serde_json::Map::new();
    for (method, path, summary, success) in OPERATIONS {
        let parameters: Vec<Value> = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
            .collect();
        let error = json!({"description": "Error", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}});
        let operation = json!({
            "summary": summary,
            "parameters": parameters,
            "security": if path == "/health" { json!([]) } else { json!([{"bearer": []}]) },
            "responses": {success: {"description": "Success"}, "default": error},
        });
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[method] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Stead", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "schemas": {"Error": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {
                    "code": {"type": "string"},
                    "message": {"type": "string"},
                    "details": {"type": "array", "items": {"type": "object"}},
                },
            }},
        },
    })
}

/// The documents, made once, because any client may request them.
static JSON: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(document().to_string()));
static YAML: LazyLock<Bytes> =
    LazyLock::new(|| Bytes::from(serde_norway::to_string(&document()).unwrap_or_default()));

pub(super) async fn json() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], JSON.clone()).into_response()
}

pub(super) async fn yaml() -> Response {
    ([(header::CONTENT_TYPE, "application/yaml")], YAML.clone()).into_response()
}
