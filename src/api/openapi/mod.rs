//! `/spec.json` and `/spec.yaml`: the OpenAPI document of all routes, made from the table of routes.

mod paths;
mod schemas;

use std::sync::{Arc, OnceLock};

use axum::Extension;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};

use super::operation::Operation;
use schemas::Schemas;

/// The document in both its forms. Each is made when it is first asked for, and kept, because any client may
/// ask for it.
#[derive(Debug)]
pub(super) struct Document {
    operations: Vec<Operation>,
    json: OnceLock<Bytes>,
    yaml: OnceLock<Bytes>,
}

impl Document {
    pub(super) fn of(operations: Vec<Operation>) -> Self {
        Self { operations, json: OnceLock::new(), yaml: OnceLock::new() }
    }

    fn value(&self) -> Value {
        let mut schemas = Schemas::default();
        let paths = paths::paths(&self.operations, &mut schemas);
        json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Stead",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "Declarative controller of micro-VMs. In the bodies of requests, null means the \
                                same as a missing field.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{
                "url": "http://127.0.0.1:8080",
                "description": "The default address of the daemon. Where `tls` is configured, it is https. The \
                    daemon serves the same API on a Unix socket, by default /run/stead/stead.sock.",
            }],
            "tags": paths::tags(&self.operations),
            "paths": paths,
            "components": {
                "securitySchemes": {"bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "A token of `stead token`. On the Unix socket, root and the users that \
                        `socket_users` in the configuration names need none. Each operation names the scopes that it \
                        always needs. Some bodies need further ones: volumes of an instance `volume:read` or \
                        `volume:write`, a pool of a snapshot `instance:write`, and an image under the name of \
                        another registry `image:publish`.",
                }},
                "schemas": schemas.finish(),
            },
        })
    }
}

pub(super) async fn json(Extension(document): Extension<Arc<Document>>) -> Response {
    let text = document.json.get_or_init(|| Bytes::from(document.value().to_string()));
    ([(header::CONTENT_TYPE, "application/json")], text.clone()).into_response()
}

pub(super) async fn yaml(Extension(document): Extension<Arc<Document>>) -> Response {
    let text = || Bytes::from(serde_norway::to_string(&document.value()).unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/yaml")], document.yaml.get_or_init(text).clone()).into_response()
}
