//! Ingresses over HTTP: their wire format, lookups, scopes and refusals.

use serde_json::{Value, json};

use crate::server::{IMAGE, Server, TAKEN_PORT, token};

fn rule(hostname: &str, port: u16, instance: &str) -> Value {
    json!({ "match": { "hostname": hostname, "port": port }, "target": { "instance": instance, "port": 80 } })
}

async fn refused(server: &Server, body: Value) -> (u16, String, Vec<String>) {
    let answer = server.send("POST", "/ingresses", Some(body)).await;
    let details = answer.body["details"].as_array().cloned().unwrap_or_default();
    let paths = details.iter().filter_map(|one| Some(one["message"].as_str()?.split(' ').next()?.to_owned()));
    (answer.status, answer.body["code"].as_str().unwrap_or_default().to_owned(), paths.collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ingress_lives_as_the_contract_has_it() {
    let server = Server::start().await;
    server.create(json!({ "name": "web", "image": IMAGE, "size": "256MB" })).await;
    let mut locked = rule("B.test", 81, "web");
    locked["request_header_auth"] = json!({ "header": "X-Key", "value": "k".repeat(32) });
    let bare =
        json!({ "match": { "hostname": "{app}.test" }, "target": { "instance": "{app}", "port": 8080 } });
    let body = json!({ "name": "one", "rules": [bare, locked], "tags": { "team": "a" } });
    let made = server.send("POST", "/ingresses", Some(body)).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let expected = json!([
        { "match": { "hostname": "{app}.test", "port": 80 }, "target": { "instance": "{app}", "port": 8080 },
          "tls": false, "redirect_http": false },
        { "match": { "hostname": "b.test", "port": 81 }, "target": { "instance": "web", "port": 80 },
          "tls": false, "redirect_http": false,
          "request_header_auth": { "header": "X-Key", "value": "k".repeat(32) } },
    ]);
    assert_eq!(made.body["rules"], expected);
    assert_eq!((&made.body["tags"], made.body["created_at"].is_string()), (&json!({ "team": "a" }), true));
    assert!(made.body["conditions"].to_string().contains("Converged"), "{}", made.body);
    let id = made.body["id"].as_str().expect("an id").to_owned();
    for word in [id.as_str(), "one", &id[..9]] {
        let got = server.send("GET", &format!("/ingresses/{word}"), None).await;
        assert_eq!((got.status, &got.body), (200, &made.body), "{word}");
    }
    let count = async |path: &str| server.send("GET", path, None).await.body.as_array().map(Vec::len);
    assert_eq!(count("/ingresses?tags[team]=a").await, Some(1));
    assert_eq!(count("/ingresses?tags[team]=b").await, Some(0));
    let reader = token(&server.keys, &["ingress:read"], 60);
    assert_eq!(server.send_as("GET", "/ingresses", None, &reader).await.status, 200);
    assert_eq!(server.send_as("DELETE", "/ingresses/one", None, &reader).await.status, 403);
    assert_eq!(server.send("DELETE", "/ingresses/one", None).await.status, 204);
    assert_eq!(server.send("GET", &format!("/ingresses/{id}"), None).await.status, 404);
    // Name and host names are free at once.
    let again = json!({ "name": "one", "rules": [rule("{x}.test", 80, "{x}")] });
    assert_eq!(server.send("POST", "/ingresses", Some(again)).await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_their_code_and_every_path() {
    let server = Server::start().await;
    server.create(json!({ "name": "web", "image": IMAGE, "size": "256MB" })).await;
    let first = json!({ "name": "one", "rules": [rule("a.test", 80, "web")] });
    assert_eq!(server.send("POST", "/ingresses", Some(first.clone())).await.status, 201);
    let mut tls = rule("b.test", 80, "web");
    (tls["tls"], tls["redirect_http"]) = (json!(true), json!(true));
    let many = json!({ "name": "No", "rules": [rule("*.test", 80, "web"), rule("b.test", 0, "{x}")] });
    let paths = ["name", "rules[0].match.hostname", "rules[1].match.port", "rules[1].target.instance"];
    for (body, status, code, expected) in [
        (first, 409, "already_exists", &[][..]),
        (
            json!({ "name": "two", "rules": [rule("a.test", 80, "web")] }),
            409,
            "hostname_in_use",
            &["rules[0].match.hostname"],
        ),
        (
            json!({ "name": "two", "rules": [rule("b.test", TAKEN_PORT, "web")] }),
            409,
            "port_in_use",
            &["rules[0].match.port"],
        ),
        (
            json!({ "name": "two", "rules": [rule("b.test", 80, "x"), rule("c.test", 80, "y")] }),
            400,
            "instance_not_found",
            &["rules[0].target.instance", "rules[1].target.instance"],
        ),
        (json!({ "name": "two", "rules": [tls] }), 400, "not_supported", &["rules[0].tls"]),
        (many, 400, "bad_request", &paths),
        (json!({}), 400, "bad_request", &["name", "rules"]),
        (json!([]), 400, "bad_request", &["body", "name", "rules"]),
    ] {
        let seen = refused(&server, body.clone()).await;
        let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
        assert_eq!(seen, (status, code.to_owned(), expected), "{body}");
    }
}
