//! Authorization: every route with its scopes, the reach of each scope, secrets, and the end of tokens.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use stead::api::auth::Scope;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::server::{IMAGE, Server, token};

/// Time limit for changes that take seconds on a busy machine.
const MOMENT: Duration = Duration::from_secs(60);

/// The routes and the scopes that they need. A new route must have its row here.
const ROUTES: &str = "
    GET /health
    GET /spec.json
    GET /spec.yaml
    GET /capabilities resource:read
    GET /backup backup:read
    GET /resources resource:read
    POST /resources/memory/reclaim resource:read instance:write
    GET /instances instance:read
    POST /instances instance:write
    GET /instances/{id} instance:read
    PATCH /instances/{id} instance:write
    DELETE /instances/{id} instance:delete
    POST /instances/{id}/start instance:write
    POST /instances/{id}/stop instance:write
    POST /instances/{id}/standby instance:write
    POST /instances/{id}/restore instance:write
    POST /instances/{id}/fork instance:write
    GET /instances/{id}/wait instance:read
    GET /instances/{id}/logs instance:read
    GET /instances/{id}/egress/log instance:read
    GET /instances/{id}/exec instance:write
    GET /instances/{id}/cp instance:write
    GET /instances/{id}/stat instance:read
    GET /instances/{id}/stats instance:read
    GET /instances/{id}/auto-standby/status instance:read
    POST /instances/{id}/auto-standby/hold instance:write
    POST /instances/{id}/volumes/{volume} volume:write instance:write
    DELETE /instances/{id}/volumes/{volume} volume:write instance:write
    POST /instances/{id}/snapshots snapshot:write
    POST /instances/{id}/snapshots/{snapshot}/restore snapshot:write instance:write
    GET /instances/{id}/snapshot-schedule snapshot:read
    PUT /instances/{id}/snapshot-schedule snapshot:write
    DELETE /instances/{id}/snapshot-schedule snapshot:delete
    GET /snapshots snapshot:read
    GET /snapshots/{id} snapshot:read
    PATCH /snapshots/{id} snapshot:write
    DELETE /snapshots/{id} snapshot:delete
    POST /snapshots/{id}/fork snapshot:write instance:write
    GET /volumes volume:read
    POST /volumes volume:write
    POST /volumes/from-archive volume:write
    GET /volumes/{id} volume:read
    PATCH /volumes/{id} volume:write
    DELETE /volumes/{id} volume:delete
    GET /ingresses ingress:read
    POST /ingresses ingress:write instance:write
    GET /ingresses/{id} ingress:read
    DELETE /ingresses/{id} ingress:delete
    GET /images image:read
    POST /images image:write
    POST /images/import image:write
    GET /images/{*name} image:read
    POST /images/{*name} image:write
    DELETE /images/{*name} image:delete
    GET /pushes image:read
    POST /pushes image:write
    GET /pushes/{id} image:read
    GET /devices device:read
    POST /devices device:write
    GET /devices/available device:read
    GET /devices/{id} device:read
    DELETE /devices/{id} device:delete
    GET /builds build:read
    POST /builds build:write
    GET /builds/{id} build:read
    DELETE /builds/{id} build:delete
    GET /builders build:read
    POST /builders build:write
    GET /builders/{id} build:read
    DELETE /builders/{id} build:delete
";

/// Returns method, path and scopes of each row.
fn rows() -> Vec<(&'static str, &'static str, Vec<&'static str>)> {
    let lines = ROUTES.lines().map(str::trim).filter(|line| !line.is_empty());
    let row = |line: &'static str| {
        let mut words = line.split(' ');
        let (method, path) = (words.next().expect("a method"), words.next().expect("a path"));
        (method, path, words.collect())
    };
    lines.map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_needs_its_scopes_and_a_scope_reaches_nothing_else() {
    let server = Server::start().await;
    let served: BTreeSet<_> =
        server.routes.iter().map(|one| (one.method, one.path, one.scopes.clone())).collect();
    let expected: BTreeSet<_> = rows().into_iter().collect();
    assert_eq!(served, expected);
    let location = |path: &str| path.replace("{*name}", "a/b/tag").replace(['{', '}'], "");
    let asks = async |method: &str, path: &str, token: &str| {
        server.send_as(method, &location(path), None, token).await.status
    };
    for (method, path, scopes) in rows() {
        let anonymous = asks(method, path, "").await;
        assert_eq!(anonymous == 401, !scopes.is_empty(), "{method} {path}: {anonymous}");
        let enough = asks(method, path, &token(&server.keys, &scopes, 600)).await;
        assert!(!matches!(enough, 401 | 403), "{method} {path} with {scopes:?}: {enough}");
    }
    for scope in Scope::ALL.map(Scope::as_str) {
        let bearer = token(&server.keys, &[scope], 600);
        for (method, path, scopes) in rows() {
            let status = asks(method, path, &bearer).await;
            let is_let_in = scopes.iter().all(|needed| *needed == scope);
            assert_eq!(status != 403, is_let_in, "{method} {path} with {scope} alone: {status}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_depend_on_what_is_asked_for_are_asked_for() {
    let server = Server::start().await;
    server.send("POST", "/volumes", Some(json!({"name": "data", "size_gb": 1}))).await;
    let with = |readonly: bool| {
        let mount = json!({"volume_id": "data", "mount_path": "/data", "readonly": readonly});
        json!({"name": "web", "image": IMAGE, "size": "256MB", "volumes": [mount]}).to_string()
    };
    let create = async |scopes: &[&str], readonly: bool| {
        let bearer = token(&server.keys, scopes, 600);
        let answer = server.send_as("POST", "/instances", Some(with(readonly)), &bearer).await;
        (answer.status, answer.body["message"].as_str().unwrap_or_default().to_owned())
    };
    let missing = |scope: &str| (403, format!("missing required scope: {scope}"));
    assert_eq!(create(&["instance:write"], true).await, missing("volume:read"));
    assert_eq!(create(&["instance:write", "volume:read"], false).await, missing("volume:write"));
    assert_eq!(create(&["instance:write", "volume:read"], true).await.0, 201);
    // A pool consists of running instances.
    let snapshots = token(&server.keys, &["snapshot:write"], 600);
    for (method, path) in [("PATCH", "/snapshots/none"), ("POST", "/instances/none/snapshots")] {
        for (pool, status) in [(1, 403), (0, 404)] {
            let body = match method {
                "PATCH" => json!({"pool_size": pool}),
                _ => json!({"kind": "Standby", "pool_size": pool}),
            };
            let answer = server.send_as(method, path, Some(body.to_string()), &snapshots).await;
            assert_eq!(answer.status, status, "{method} {path} {pool}: {}", answer.body);
        }
    }
    let writer = token(&server.keys, &["image:write"], 600);
    for (name, status) in
        [("docker.io/library/postgres:16", 403), ("registry.test/a", 403), ("localhost/a", 400)]
    {
        let path = format!("/images/import?name={name}");
        assert_eq!(
            server.send_as("POST", &path, Some(String::new()), &writer).await.status,
            status,
            "{name}"
        );
        let target = Some(json!({"target": format!("{}:x", name.trim_end_matches(":16"))}).to_string());
        let tagged = server.send_as("POST", &format!("/images/{IMAGE}/tag"), target, &writer).await;
        assert_eq!(tagged.status == 403, status == 403, "{name}: {}", tagged.body);
    }
    let publisher = token(&server.keys, &["image:write", "image:publish"], 600);
    let path = "/images/import?name=docker.io/library/postgres:16";
    assert_eq!(server.send_as("POST", path, Some(String::new()), &publisher).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_returned_only_to_permitted_clients() {
    let server = Server::start().await;
    let body = json!({"name": "web", "image": IMAGE, "size": "256MB", "env": {"KEY": "hidden"}});
    let writer = token(&server.keys, &["instance:write"], 600);
    let created = server.send_as("POST", "/instances", Some(body.to_string()), &writer);
    assert_eq!(created.await.body["env"], json!({"KEY": "***"}));
    let rule = json!({"match": {"hostname": "a.test"}, "target": {"instance": "web", "port": 80},
        "request_header_auth": {"header": "X-Key", "value": "k".repeat(32)}});
    let made = server.send("POST", "/ingresses", Some(json!({"name": "one", "rules": [rule]}))).await;
    assert_eq!(made.status, 201, "{}", made.body);
    for (scopes, is_reported) in [
        (&["instance:read", "ingress:read"][..], false),
        (&["instance:read", "instance:secrets", "ingress:read", "ingress:secrets"], true),
        (&["*"], true),
    ] {
        let bearer = token(&server.keys, scopes, 600);
        for path in ["/instances", "/instances/web"] {
            let text = server.send_as("GET", path, None, &bearer).await.body.to_string();
            assert_eq!(text.contains("hidden"), is_reported, "{path} {scopes:?}");
            assert!(text.contains("KEY"), "{path} {scopes:?}");
        }
        for path in ["/ingresses", "/ingresses/one"] {
            let text = server.send_as("GET", path, None, &bearer).await.body.to_string();
            assert_eq!(text.contains("kkkk"), is_reported, "{path} {scopes:?}");
        }
        let url =
            format!("{}/instances?watch=true&resource_version={}", server.base, server.store.revision());
        let mut watch = server.http.get(url).bearer_auth(&bearer).send().await.expect("an answer");
        server.send("PATCH", "/instances/web", Some(json!({"ttl": "1h"}))).await;
        let report = tokio::time::timeout(MOMENT, watch.chunk()).await.expect("in time").expect("read");
        let text = String::from_utf8(report.expect("open").to_vec()).expect("text");
        assert_eq!(text.contains("hidden"), is_reported, "{text}");
    }
}

/// Reads a stream to its end.
async fn ends(mut stream: reqwest::Response) {
    let whole = async { while let Ok(Some(_)) = stream.chunk().await {} };
    tokio::time::timeout(MOMENT, whole).await.expect("it ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_by_a_token_ends_with_it() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    *server.host.log.lock().expect("not poisoned") = vec!["a line".to_owned()];
    let paths = [
        "/instances?watch=true",
        "/instances/web/logs?follow=true",
        "/instances/web/wait?state=Paused&timeout=5m",
    ];
    let begin = async |path: &str, bearer: &str| {
        let request = server.http.get(format!("{}{path}", server.base)).bearer_auth(bearer);
        tokio::time::timeout(MOMENT, request.send()).await.expect("in time").expect("an answer")
    };
    // This token expires.
    for path in paths {
        ends(begin(path, &token(&server.keys, &["*"], 2)).await).await;
    }
    // The session ends without a message: the message that would come later reports that no request came.
    let running = server.send("GET", "/instances/web/wait?state=Running", None).await;
    assert_eq!(running.body["state"], "Running");
    let url = format!("{}/instances/web/exec", server.base.replacen("http", "ws", 1));
    let mut request = url.into_client_request().expect("a request");
    let bearer = format!("Bearer {}", token(&server.keys, &["*"], 2)).parse().expect("a header");
    request.headers_mut().insert("authorization", bearer);
    let (mut session, _) = tokio_tungstenite::connect_async(request).await.expect("a session");
    let reported = tokio::time::timeout(MOMENT, session.next()).await.expect("it ends");
    assert!(!matches!(&reported, Some(Ok(Message::Text(_)))), "{reported:?}");
    // This token is revoked; the test chooses its name.
    let revoked = token(&server.keys, &["*"], 601);
    let (watch, logs) = (begin(paths[0], &revoked).await, begin(paths[1], &revoked).await);
    let revoke = async {
        server.keys.trust(&[[7; 32]], ["test-601".to_owned()].into());
    };
    let (wait, ()) = tokio::join!(begin(paths[2], &revoked), revoke);
    assert_eq!(wait.status(), 401);
    ends(watch).await;
    ends(logs).await;
    let refused = server.send_as("GET", "/instances", None, &revoked).await;
    assert_eq!((refused.status, refused.body["message"].as_str()), (401, Some("the token was revoked")));
    assert_eq!(server.send("GET", "/instances", None).await.status, 200);
    // A previously used key is trusted until it is removed.
    server.keys.trust(&[[9; 32], [7; 32]], BTreeSet::new());
    assert_eq!(server.send("GET", "/instances", None).await.status, 200);
    let new = token(&server.keys, &["*"], 600);
    let watch = begin(paths[0], &server.token).await;
    server.keys.trust(&[[9; 32]], BTreeSet::new());
    ends(watch).await;
    assert_eq!(server.send("GET", "/instances", None).await.status, 401);
    assert_eq!(server.send_as("GET", "/instances", None, &new).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_claims_of_a_token_on_its_use_are_honoured() {
    use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
    let server = Server::start().await;
    let now = jiff::Timestamp::now().as_second();
    let asks = async |header: Header, more: Value| {
        let mut claims = json!({"sub": "a", "iat": now, "exp": now + 600});
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let token = encode(&header, &claims, &EncodingKey::from_secret(&[7; 32])).expect("signed");
        let answer = server.send_as("GET", "/instances", None, &token).await;
        (answer.status, answer.body["message"].as_str().unwrap_or_default().to_owned())
    };
    let plain = || Header::new(Algorithm::HS256);
    assert_eq!(asks(plain(), json!({})).await.0, 200, "as other services sign it");
    assert_eq!(asks(plain(), json!({"aud": "stead"})).await.0, 200);
    assert_eq!(asks(plain(), json!({"aud": ["other"]})).await.1, "the token is for somebody else");
    assert_eq!(asks(plain(), json!({"nbf": now + 300})).await.1, "the token is not valid yet");
    assert_eq!(asks(plain(), json!({"exp": now - 60})).await.1, "the token has expired");
    let critical = Header { crit: Some(vec!["b64".to_owned()]), ..plain() };
    assert_eq!(asks(critical, json!({})).await.0, 401);
    let other = Header { kid: Some("other".to_owned()), ..plain() };
    assert_eq!(asks(other, json!({})).await.1, "the token is not signed by this server");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_without_permissions_is_refused_where_the_configuration_requires_them() {
    use jsonwebtoken::{EncodingKey, Header, encode};
    let now = jiff::Timestamp::now().as_second();
    let (strict, lenient) =
        (Server::start_with(|config, _| config.requires_permissions = true).await, Server::start().await);
    let mut claims = json!({"sub": "a", "iat": now, "exp": now + 600});
    let sign = |claims: &Value| encode(&Header::default(), claims, &EncodingKey::from_secret(&[7; 32]));
    for permissions in [None, Some(Value::Null)] {
        claims
            .as_object_mut()
            .expect("an object")
            .extend(permissions.map(|none| ("permissions".to_owned(), none)));
        let token = sign(&claims).expect("signed");
        let refused = strict.send_as("GET", "/instances", None, &token).await;
        assert_eq!((refused.status, refused.body["code"].as_str()), (403, Some("Forbidden")));
        assert_eq!(lenient.send_as("GET", "/instances", None, &token).await.status, 200);
    }
    claims["permissions"] = json!(["instance:read"]);
    let named = sign(&claims).expect("signed");
    assert_eq!(strict.send_as("GET", "/instances", None, &named).await.status, 200);
    assert_eq!(strict.send("GET", "/instances", None).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_records_who_changed_what() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    server.send("GET", "/instances/web", None).await;
    let reader = token(&server.keys, &["instance:read"], 602);
    server.send_as("DELETE", "/instances/web", None, &reader).await;
    server.send_as("DELETE", "/instances/web", None, "").await;
    server.send("GET", "/instances/web/exec", None).await;
    server.send("DELETE", "/instances/web", None).await;
    let report = audited(&server, "audit", 3).await;
    assert_eq!(report[0], "test-3600 POST /instances /instances web 201");
    // The way in which the session is refused depends on whether the instance runs by then.
    assert!(
        report[1].starts_with("test-3600 GET /instances/{id}/exec /instances/web/exec  "),
        "{}",
        report[1]
    );
    assert_eq!(report[2..], ["test-3600 DELETE /instances/{id} /instances/web  204"]);
    // Refusals have their own log, so that clients without scopes cannot flood the record of actions.
    let report = audited(&server, "refused", 2).await;
    let refused = [
        "test-602 DELETE /instances/{id} /instances/web  403",
        " DELETE /instances/{id} /instances/web  401",
    ];
    assert_eq!(report, refused);
}

/// Waits until a request log has `count` lines. Returns them: token, verb, route, object, name, status.
async fn audited(server: &Server, log: &str, count: usize) -> Vec<String> {
    let path = server.directory.path().join(format!("audit/{log}.log"));
    let lines = async {
        loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            if text.lines().count() >= count {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let text = tokio::time::timeout(MOMENT, lines).await.expect("written");
    let report = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let word = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        assert_eq!(line["client"], "127.0.0.1");
        assert_eq!(line["subject"].as_str(), line["token"].as_str().map(|_| "test"));
        assert!(word("time").parse::<jiff::Timestamp>().is_ok() && line["millis"].is_u64(), "{line}");
        let words = ["token", "verb", "route", "object", "name"].map(word).join(" ");
        format!("{words} {}", line["status"])
    };
    text.lines().map(report).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_client_leaves_before_the_answer_is_in_the_audit_log() {
    let server = Server::start().await;
    // Without an image it never runs, so that a start is never answered.
    server.create(json!({"name": "web", "image": "registry.test/none:v1", "size": "256MB"})).await;
    server.send("POST", "/instances/web/stop", None).await;
    let (run, token) =
        (server.send("GET", "/instances/web", None).await.body["generation"].clone(), &server.token);
    let mut client = TcpStream::connect(server.address).await.expect("connected");
    let head =
        format!("POST /instances/web/start HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n");
    client.write_all(head.as_bytes()).await.expect("sent");
    let started = async {
        while server.send("GET", "/instances/web", None).await.body["generation"] == run {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MOMENT, started).await.expect("it is carried out");
    drop(client);
    let report = audited(&server, "audit", 3).await;
    assert_eq!(report[2], "test-3600 POST /instances/{id}/start /instances/web/start  499");
}
