//! The OpenAPI document: it has every route with its scopes and schemas, a public validator accepts it, and a
//! typed client that is generated from it works.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::generated::interpreter;
use crate::node::node;
use crate::python::{done, once};
use crate::server::{IMAGE, Server};

/// Directory with the packages and the program of the typed client.
const TYPED: &str = "tests/sdk/typed";

async fn document(server: &Server) -> Value {
    server.send_as("GET", "/spec.json", None, "").await.body
}

/// Returns method, path and operation of each operation of the document.
fn operations(document: &Value) -> Vec<(String, &str, &Value)> {
    let paths = document["paths"].as_object().expect("paths");
    paths
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().expect("methods");
            methods.iter().map(move |(method, operation)| (method.to_uppercase(), path.as_str(), operation))
        })
        .collect()
}

/// Returns the words of a list.
fn words(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_in_the_document_with_its_scopes_and_its_schemas() {
    let server = Server::start().await;
    let document = document(&server).await;
    let operations = operations(&document);
    let ids: BTreeSet<_> =
        operations.iter().filter_map(|(_, _, operation)| operation["operationId"].as_str()).collect();
    assert_eq!((ids.len(), operations.len()), (server.routes.len(), server.routes.len()));
    for route in &server.routes {
        let found =
            operations.iter().find(|(_, _, operation)| operation["operationId"] == route.operation_id);
        let (method, path, operation) = found.unwrap_or_else(|| panic!("{route:?} is not in the document"));
        assert_eq!(method, route.method, "{route:?}");
        assert!(path.starts_with(&route.path.replace("{*", "{")), "{route:?}: {path}");
        assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{route:?}");
        let scopes =
            operation["security"].as_array().expect("a list").first().map(|one| words(&one["bearer"]));
        assert_eq!(scopes.unwrap_or_default(), route.scopes, "{route:?}");
        has_schemas(operation, &format!("{method} {path}"));
    }
}

/// Paths of kinds that the server does not have yet; routes to them may have only refusals.
const OF_LATER: [&str; 4] = ["/devices", "/builds", "/builders", "/pushes"];

/// Checks that the body of the request and all bodies of responses have schemas.
fn has_schemas(operation: &Value, name: &str) {
    let is_described = |content: &Value| {
        let contents = content.as_object().into_iter().flatten();
        let mut schemas = contents.map(|(_, content)| content["schema"].as_object()).peekable();
        schemas.peek().is_some() && schemas.all(|schema| schema.is_some_and(|schema| !schema.is_empty()))
    };
    let body = &operation["requestBody"];
    assert!(body.is_null() || is_described(&body["content"]), "{name}: {body}");
    let responses = operation["responses"].as_object().expect("responses");
    for (status, response) in responses {
        let has_none = matches!(status.as_str(), "101" | "204");
        assert_eq!(is_described(&response["content"]), !has_none, "{name}: {status}");
    }
    let is_served = responses.keys().any(|status| status.as_str() < "300");
    assert!(is_served || OF_LATER.iter().any(|path| name.contains(path)), "{name}: {responses:?}");
    let takes_body = name.starts_with("PATCH") || name.starts_with("PUT");
    assert!(!is_served || !takes_body || !body.is_null(), "{name} takes a body");
}

/// Collects the places of fields without a description.
fn undescribed(schema: &Value, location: &str, found: &mut Vec<String>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let location = format!("{location}.{name}");
        let is_fixed = property.get("const").is_some();
        if !is_fixed && property["description"].as_str().is_none_or(str::is_empty) {
            found.push(location.clone());
        }
        undescribed(property, &location, found);
    }
    for form in ["oneOf", "anyOf"].iter().flat_map(|form| schema[form].as_array()).flatten() {
        undescribed(form, location, found);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_and_parameter_has_a_description_in_one_sentence_or_more() {
    let server = Server::start().await;
    let document = document(&server).await;
    let mut found = Vec::new();
    let schemas = document["components"]["schemas"].as_object().expect("schemas");
    assert!(
        schemas.contains_key("InstanceCreate") && schemas.contains_key("Instance"),
        "{:?}",
        schemas.keys()
    );
    for (name, schema) in schemas {
        undescribed(schema, name, &mut found);
        found.extend(schema["description"].is_null().then(|| name.clone()));
    }
    for (method, path, operation) in operations(&document) {
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let is_described = parameter["description"]
                .as_str()
                .is_some_and(|text| text.ends_with('.') || text.ends_with('`'));
            found.extend((!is_described).then(|| format!("{method} {path}: {}", parameter["name"])));
        }
    }
    assert!(found.is_empty(), "without a description:\n{}", found.join("\n"));
    // Doc comments have links of Rust, which mean nothing to clients.
    let text = document.to_string();
    assert!(!text.contains("crate::") && !text.contains("[`"), "a description has a link of Rust");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_public_validator_accepts_the_document() {
    let server = Server::start().await;
    let document = document(&server).await.to_string();
    let output = tokio::task::spawn_blocking(move || {
        let directory = tempfile::tempdir().expect("scratch");
        let path = directory.path().join("spec.json");
        std::fs::write(&path, document).expect("written");
        let python = interpreter();
        done(
            Command::new(python)
                .args(["-m", "openapi_spec_validator", "--subschema-errors", "all"])
                .arg(path),
        )
    });
    let out = output.await.expect("it ran");
    assert!(out.contains("OK"), "{out}");
}

/// Installs the packages of the typed client, once for this target directory. Returns their directory.
fn packages(bin: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(TYPED);
    let made_of = std::fs::read_to_string(source.join("package-lock.json")).expect("the lock of packages");
    once("typed-client", &made_of, |root| {
        std::fs::create_dir_all(root).expect("created");
        for name in ["package.json", "package-lock.json"] {
            std::fs::copy(source.join(name), root.join(name)).expect("copied");
        }
        // Scripts of packages are not run, as for the SDK.
        let mut npm = Command::new(bin.join("npm"));
        done(npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(root));
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_typed_client_generated_from_the_document_works() {
    let server = Server::start().await;
    let document = document(&server).await.to_string();
    let (base, token) = (server.base.clone(), server.token.clone());
    let out = tokio::task::spawn_blocking(move || {
        let node = node().node;
        let packages = packages(node.parent().expect("a directory"));
        let directory = tempfile::tempdir_in(&packages).expect("scratch");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(TYPED);
        for name in ["tsconfig.json", "round_trip.ts", "package.json"] {
            std::fs::copy(source.join(name), directory.path().join(name)).expect("copied");
        }
        std::fs::write(directory.path().join("spec.json"), document).expect("written");
        let in_place = |script: &str| {
            let mut command = Command::new(&node);
            command.arg(packages.join("node_modules").join(script)).current_dir(directory.path());
            command
        };
        done(in_place("openapi-typescript/bin/cli.js").args(["spec.json", "-o", "schema.ts"]));
        done(&mut in_place("typescript/bin/tsc"));
        let mut program = Command::new(&node);
        program.arg("round_trip.ts").current_dir(directory.path());
        program.env("STEAD_BASE_URL", base).env("STEAD_API_KEY", token).env("STEAD_TEST_IMAGE", IMAGE);
        done(&mut program)
    });
    let out = out.await.expect("it ran");
    assert!(out.contains("typed client: everything passed"), "{out}");
}
