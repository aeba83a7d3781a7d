//! The operations of the document: parameters, bodies, responses and errors of each route.

use std::collections::{BTreeMap, BTreeSet};

use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::schemas::{Schemas, without_null};
use crate::api::operation::{Answer, Frames, JSON, Operation, Parameters, error_schema};
use crate::api::rule::Verb;

/// Returns the group of an operation: the first part of its path.
fn tag(operation: &Operation) -> &'static str {
    operation.path.split('/').nth(1).unwrap_or_default()
}

pub(super) fn tags(operations: &[Operation]) -> Value {
    let names: BTreeSet<_> = operations.iter().map(tag).collect();
    names.into_iter().map(|name| json!({"name": name})).collect()
}

pub(super) fn paths(operations: &[Operation], schemas: &mut Schemas) -> Value {
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for operation in operations {
        let method = operation.verb.name().to_ascii_lowercase();
        let described = described(operation, schemas);
        paths.entry(operation.shown_path()).or_default().insert(method, described);
    }
    json!(paths)
}

fn described(operation: &Operation, schemas: &mut Schemas) -> Value {
    let mut parameters: Vec<Value> =
        operation.path_parameters().iter().map(|name| path_parameter(operation, name)).collect();
    parameters.extend(query_parameters(operation, schemas));
    let mut value = json!({
        "operationId": operation.id,
        "tags": [tag(operation)],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": responses(operation, schemas),
        "security": match &operation.rule {
            None => json!([]),
            Some(rule) => json!([{"bearer": rule.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>()}]),
        },
    });
    if let Some(body) = &operation.body {
        let mut content = json!({});
        content[body.content] = json!({"schema": schemas.request(body.schema)});
        value["requestBody"] = json!({"required": body.is_required, "content": content});
    }
    if let Some(frames) = &operation.frames {
        value["x-websocket"] = websocket(frames, schemas);
    }
    value
}

/// Describes the text frames of a WebSocket, for which OpenAPI has no words of its own.
fn websocket(frames: &Frames, schemas: &mut Schemas) -> Value {
    let both: Vec<Value> = frames.both.iter().map(|&schema| schemas.response(schema)).collect();
    let mut client: Vec<Value> = frames.client.iter().map(|&schema| schemas.request(schema)).collect();
    let mut server: Vec<Value> = frames.server.iter().map(|&schema| schemas.response(schema)).collect();
    client.extend(both.clone());
    server.extend(both);
    json!({"client": client, "server": server})
}

fn path_parameter(operation: &Operation, name: &str) -> Value {
    let object = match (tag(operation), name) {
        ("images", _) => "Reference of the image, percent-encoded, or its id.",
        ("instances", "id") => {
            "Id or name of the instance, or the beginning of its id: 4 characters to read, 8 to change."
        }
        ("ingresses", _) => {
            "Id or name of the ingress, or the beginning of its id: 4 characters to read, 8 to change."
        }
        (_, "volume") | ("volumes", _) => "Id or name of the volume.",
        (_, "snapshot") | ("snapshots", _) => "Id of the snapshot.",
        _ => "Id of the object.",
    };
    let schema = json!({"type": "string", "minLength": 1});
    json!({"name": name, "in": "path", "required": true, "description": object, "schema": schema})
}

fn query_parameters(operation: &Operation, schemas: &mut Schemas) -> Vec<Value> {
    let Parameters::Fields(schema) = operation.query else { return Vec::new() };
    let schema = schemas.request(schema);
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let properties = schema["properties"].as_object().into_iter().flatten();
    let parameter = |(name, property): (&String, &Value)| {
        let mut property = property.clone();
        without_null(&mut property);
        let description = property.as_object_mut().and_then(|fields| fields.remove("description"));
        let mut parameter = json!({
            "name": name,
            "in": "query",
            "required": required.contains(&name.as_str()),
            "description": description,
        });
        if property["type"] == "object" {
            parameter["style"] = json!("deepObject");
            parameter["explode"] = json!(true);
        }
        parameter["schema"] = property;
        parameter
    };
    properties.map(parameter).collect()
}

fn responses(operation: &Operation, schemas: &mut Schemas) -> Value {
    let mut responses = Map::new();
    for Answer { status, contents } in &operation.answers {
        let mut answer = json!({"description": success(*status)});
        for &(content, schema) in contents {
            answer["content"][content] = json!({"schema": schemas.response(schema)});
        }
        responses.insert(status.as_u16().to_string(), answer);
    }
    for status in errors(operation) {
        let mut error = json!({"description": meaning(status)});
        if let Some(headers) = headers(status) {
            error["headers"] = headers;
        }
        error["content"][JSON] = json!({"schema": schemas.response(error_schema)});
        responses.insert(status.as_u16().to_string(), error);
    }
    Value::Object(responses)
}

fn success(status: StatusCode) -> &'static str {
    match status {
        StatusCode::SWITCHING_PROTOCOLS => "The connection becomes a WebSocket.",
        StatusCode::CREATED => "The object was created.",
        StatusCode::ACCEPTED => "The object was created; the work for it continues.",
        StatusCode::NO_CONTENT => "The object is deleted.",
        StatusCode::SERVICE_UNAVAILABLE => "The server cannot do its work.",
        _ => "Success.",
    }
}

/// Returns the statuses of all errors of an operation: its own, and those of every operation of its form.
fn errors(operation: &Operation) -> BTreeSet<StatusCode> {
    let mut errors: BTreeSet<StatusCode> = operation.errors.iter().copied().collect();
    if operation.rule.is_none() {
        return errors;
    }
    errors.extend([
        StatusCode::BAD_REQUEST,
        StatusCode::UNAUTHORIZED,
        StatusCode::FORBIDDEN,
        StatusCode::INTERNAL_SERVER_ERROR,
        StatusCode::SERVICE_UNAVAILABLE,
    ]);
    if let Some(body) = &operation.body {
        errors.insert(StatusCode::REQUEST_TIMEOUT);
        errors.extend((body.content == JSON).then_some(StatusCode::PAYLOAD_TOO_LARGE));
    }
    if !operation.path_parameters().is_empty() {
        errors.insert(StatusCode::NOT_FOUND);
    }
    if matches!(tag(operation), "instances" | "ingresses") && !operation.path_parameters().is_empty() {
        // The beginning of an id may be that of several.
        errors.insert(StatusCode::CONFLICT);
    }
    if !matches!(operation.verb, Verb::Get) {
        errors.insert(StatusCode::INSUFFICIENT_STORAGE);
        // Hypervisors differ in their capabilities.
        errors.extend(
            matches!(tag(operation), "instances" | "snapshots").then_some(StatusCode::NOT_IMPLEMENTED),
        );
    }
    errors
}

fn meaning(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "The request is invalid; `details` has an entry for each problem.",
        StatusCode::UNAUTHORIZED => "The token is missing, invalid, expired or revoked.",
        StatusCode::FORBIDDEN => "The token lacks a scope.",
        StatusCode::NOT_FOUND => "An object that the request names does not exist.",
        StatusCode::REQUEST_TIMEOUT => "The body came too slowly.",
        StatusCode::CONFLICT => "The state of the object, or of another one, does not allow it.",
        StatusCode::PAYLOAD_TOO_LARGE => "The body is larger than 1 MiB.",
        StatusCode::INTERNAL_SERVER_ERROR => "The server failed; its log has the reason.",
        StatusCode::NOT_IMPLEMENTED => "The server, or the hypervisor of the instance, does not support it.",
        StatusCode::SERVICE_UNAVAILABLE => "The server is overloaded or is shutting down.",
        StatusCode::GATEWAY_TIMEOUT => "The guest does not answer.",
        StatusCode::INSUFFICIENT_STORAGE => "The disk of the host is full.",
        _ => "The request failed.",
    }
}

fn headers(status: StatusCode) -> Option<Value> {
    match status {
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::INSUFFICIENT_STORAGE => Some(json!({"Retry-After": {
            "description": "Time after which the request may be repeated, in seconds.",
            "schema": {"type": "integer", "minimum": 0},
        }})),
        StatusCode::CONFLICT | StatusCode::NOT_IMPLEMENTED | StatusCode::INTERNAL_SERVER_ERROR => {
            Some(json!({"X-Should-Retry": {
                "description": "The word `false` where a repeat of the request cannot succeed.",
                "schema": {"type": "string", "enum": ["false"]},
            }}))
        }
        _ => None,
    }
}
