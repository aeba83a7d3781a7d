//! The table of copies and stat requests.

use reqwest::Method;
use serde_json::{Value, json};

use super::waiting;
use crate::harness::Harness;
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, shell};

/// Sends one entry. Returns the server's last message.
async fn to(site: &Harness, request: Value, contents: &[u8]) -> Value {
    let mut socket = Socket::cp(site, "box", &request).await;
    for part in contents.chunks(32 << 10) {
        socket.bytes(part).await;
    }
    socket.json(&json!({ "type": "end" })).await;
    match socket.next().await {
        Received::Json(reported) => reported,
        other => panic!("{request}: {other:?}"),
    }
}

/// Returns the received entries, each with its contents, or the error.
async fn from(site: &Harness, request: Value) -> Result<Vec<(Value, Vec<u8>)>, Value> {
    let mut socket = Socket::cp(site, "box", &request).await;
    let mut entries: Vec<(Value, Vec<u8>)> = Vec::new();
    loop {
        match socket.next().await {
            Received::Json(header) if header["type"] == "header" => entries.push((header, Vec::new())),
            Received::Bytes(bytes) => entries.last_mut().expect("a header comes first").1.extend(bytes),
            Received::Json(end) if end["type"] == "end" => {
                if end["final"] == true {
                    return Ok(entries);
                }
            }
            Received::Json(error) => return Err(error),
            Received::End => panic!("{request}: no last entry"),
        }
    }
}

fn request(path: &str, more: Value) -> Value {
    let mut request = json!({ "direction": "to", "guest_path": path });
    request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    request
}

fn result(bytes: usize) -> Value {
    if bytes == 0 {
        return json!({ "type": "result", "success": true });
    }
    json!({ "type": "result", "success": true, "bytes_written": bytes })
}

/// The columns of a case: path, additional request fields, contents, a shell line and its expected output.
type CopyCase<'a> = (&'a str, Value, &'a [u8], &'a str, &'a str);

fn cases_of_copies<'a>(large: &'a [u8], sparse: &'a [u8]) -> Vec<CopyCase<'a>> {
    vec![
        ("/tmp/a", json!({}), b"hello", "cat /tmp/a; stat -c ' %a %u %g' /tmp/a", "hello 644 0 0"),
        ("/tmp/empty", json!({}), b"", "stat -c %s /tmp/empty", "0"),
        ("/tmp/a", json!({ "mode": 0o755 }), b"again", "cat /tmp/a; stat -c ' %a' /tmp/a", "again 755"),
        (
            "/tmp/owned",
            json!({ "mode": 0o4750, "uid": 12, "gid": 34 }),
            b"x",
            "stat -c '%a %u %g' /tmp/owned",
            "4750 12 34",
        ),
        ("/tmp/old", json!({ "mtime": 1_000_000_000 }), b"x", "stat -c %Y /tmp/old", "1000000000"),
        (
            "/tmp/large",
            json!({}),
            large,
            "stat -c %s /tmp/large; od -An -tu1 -j2999999 -N1 /tmp/large | tr -d ' '",
            "3000001\n191",
        ),
        (
            "/tmp/sparse",
            json!({}),
            sparse,
            "stat -c %s /tmp/sparse; test $(du -k /tmp/sparse | cut -f1) -lt 100 && echo holes",
            "8388609\nholes",
        ),
        ("/tmp/made/on/the/way", json!({}), b"x", "cat /tmp/made/on/the/way", "x"),
        ("/tmp/o d\"d 'né", json!({}), b"x", "cat \"/tmp/o d\\\"d 'né\"", "x"),
        ("/tmp/new\nline", json!({}), b"x", "cat '/tmp/new\nline'", "x"),
        ("/tmp", json!({ "src_basename": "named" }), b"x", "cat /tmp/named", "x"),
        ("/tmp/d", json!({ "is_dir": true }), b"", "stat -c '%a %F' /tmp/d", "755 directory"),
        ("/tmp/d", json!({ "is_dir": true, "mode": 0o700 }), b"", "stat -c '%a' /tmp/d", "700"),
        ("/tmp/d/e/f", json!({ "is_dir": true, "uid": 5 }), b"", "stat -c '%u' /tmp/d/e/f", "5"),
        // These names are not UTF-8: /tmp/b, 0xff as bytes; also in a directory with such a name.
        ("", json!({ "guest_path_base64": "L3RtcC9i/w==" }), b"x", "cat /tmp/b$(printf '\\377')", "x"),
        (
            "/tmp/shown",
            json!({ "guest_path_base64": "L3RtcC/+L/8=", "mode": 0o600 }),
            b"y",
            "cd /tmp/$(printf '\\376'); cat $(printf '\\377'); stat -c ' %a' *; ls -A /tmp | grep -c shown || true",
            "y 600\n0",
        ),
        ("/tmp", json!({ "src_basename_base64": "/fw=" }), b"z", "cat /tmp/$(printf '\\375\\374')", "z"),
        (
            "",
            json!({ "guest_path_base64": "L3RtcC/6", "is_dir": true }),
            b"",
            "cd /tmp/$(printf '\\372')",
            "",
        ),
        // The file is written beside it and renamed: the target of a link of that name is not touched.
        (
            "/tmp/link",
            json!({}),
            b"new",
            "cat /tmp/link /tmp/target; test -L /tmp/link || echo replaced",
            "newoldreplaced",
        ),
    ]
}

async fn copies_in(site: &Harness) {
    let large: Vec<u8> = (0..3_000_001u32).map(|at| at.to_le_bytes()[0]).collect();
    let sparse = [vec![0u8; 8 << 20], vec![1]].concat();
    shell(site, "box", "printf old >/tmp/target; ln -s /tmp/target /tmp/link").await;
    for (path, more, contents, script, outcome) in cases_of_copies(&large, &sparse) {
        let request = request(path, more);
        assert_eq!(to(site, request.clone(), contents).await, result(contents.len()), "{request}");
        assert_eq!(shell(site, "box", script).await, outcome, "{request}");
    }
    assert_eq!(
        shell(site, "box", "ls -A /tmp | grep -c stead-cp || true").await,
        "0",
        "scratch files are left"
    );
}

async fn copies_in_that_fail(site: &Harness) {
    shell(site, "box", "mkdir -p /tmp/dir; echo kept >/tmp/file; mkdir /tmp/small; mount -t tmpfs -o size=1m none /tmp/small").await;
    let large = vec![1u8; 4 << 20];
    for (path, more, contents, why) in [
        ("/tmp/dir", json!({}), &b"x"[..], "is a directory"),
        ("/tmp/file/below", json!({}), b"x", "File exists"),
        ("/tmp/file", json!({ "is_dir": true }), b"", "File exists"),
        ("/tmp/dir", json!({ "src_basename": "../up" }), b"x", "plain name"),
        ("/tmp/dir", json!({ "src_basename_base64": "/y8u" }), b"x", "plain name"),
        ("/proc/nothing/x", json!({}), b"x", "No such file"),
        ("/tmp/small/large", json!({}), &large, "No space left"),
    ] {
        let request = request(path, more);
        let reported = to(site, request.clone(), contents).await;
        assert_eq!(
            (&reported["type"], &reported["success"]),
            (&json!("result"), &json!(false)),
            "{request}: {reported}"
        );
        assert!(reported["error"].as_str().is_some_and(|error| error.contains(why)), "{request}: {reported}");
    }
    for (request, why) in [
        (json!({ "direction": "to", "guest_path": "relative" }), "guest_path"),
        (json!({ "direction": "to", "guest_path": "/tmp/x", "mode": 99999 }), "mode"),
        (json!({ "direction": "to", "guest_path_base64": "L3RtcC8A" }), "guest_path"),
        (json!({ "direction": "to", "guest_path_base64": "no base64" }), "guest_path_base64"),
        (json!({ "direction": "up", "guest_path": "/tmp/x" }), "direction"),
        (json!({ "direction": "to", "path": "/tmp/x" }), "path"),
    ] {
        let mut socket = Socket::cp(site, "box", &request).await;
        let Received::Json(reported) = socket.next().await else { panic!("{request}: no text") };
        let is_reported = reported["message"].as_str().is_some_and(|message| message.contains(why));
        assert!(reported["type"] == "error" && is_reported, "{request}: {reported}");
    }
    assert_eq!(
        shell(site, "box", "cat /tmp/file; ls -A /tmp/small").await,
        "kept",
        "a failed copy left something"
    );
}

async fn copies_out(site: &Harness) {
    let make = "mkdir -p /tmp/t/sub/deep /tmp/t/none; cd /tmp/t; printf one >1; printf two >sub/2; chmod 640 1
        ln -s sub/2 link; ln -s /etc/passwd out; ln -s .. up; : >sub/deep/empty; mkfifo fifo; touch -d @1000000000 1
        chown 7:8 1; head -c 2000003 /dev/zero | tr '\\0' z >big; printf x >'o\"d d\n'";
    shell(site, "box", make).await;
    let entries = from(site, json!({ "direction": "from", "guest_path": "/tmp/t" })).await.expect("copied");
    let paths: Vec<&str> =
        entries.iter().map(|(header, _)| header["path"].as_str().expect("a path")).collect();
    let expected =
        ["1", "big", "link", "none", "o\"d d\n", "out", "sub", "sub/2", "sub/deep", "sub/deep/empty", "up"];
    assert_eq!(paths, expected);
    let of = |path: &str| entries.iter().find(|(header, _)| header["path"] == path).expect("it is there");
    let (header, contents) = of("1");
    let report = ["mode", "size", "mtime", "uid", "gid", "is_dir"].map(|key| header[key].clone());
    assert_eq!(report, [json!(0o640), json!(3), json!(1_000_000_000), json!(7), json!(8), json!(false)]);
    assert_eq!(contents, b"one");
    assert_eq!(of("big").1, vec![b'z'; 2_000_003]);
    assert_eq!((&of("link").0["is_symlink"], &of("link").0["link_target"]), (&json!(true), &json!("sub/2")));
    assert_eq!(of("none").0["is_dir"], true);

    // Links are followed: files are read, and a link to a parent directory is not followed forever.
    let followed = json!({ "direction": "from", "guest_path": "/tmp/t", "follow_links": true });
    let entries = from(site, followed).await.expect("copied");
    let link = entries.iter().find(|(header, _)| header["path"] == "link").expect("it is there");
    assert_eq!((&link.0["is_symlink"], &link.1[..]), (&json!(false), &b"two"[..]));
    assert!(entries.len() < 100, "{} entries", entries.len());

    let single =
        from(site, json!({ "direction": "from", "guest_path": "/tmp/t/sub/2" })).await.expect("copied");
    assert_eq!((single.len(), &single[0].0["path"], &single[0].1[..]), (1, &json!("2"), &b"two"[..]));
    for (path, why) in
        [("/tmp/no", "No such file"), ("/tmp/t/fifo", "neither a file"), ("relative", "guest_path")]
    {
        let error = from(site, json!({ "direction": "from", "guest_path": path })).await.expect_err(path);
        assert!(error["message"].as_str().is_some_and(|message| message.contains(why)), "{path}: {error}");
    }
}

/// Checks that names and targets that are not UTF-8 come with their bytes, and all others unchanged.
async fn odd_names_out(site: &Harness) {
    let make = "mkdir -p /tmp/bytes/$(printf 'd\\376'); cd /tmp/bytes; printf 1 >$(printf 'b\\377')
        printf 2 >$(printf 'd\\376')/é; ln -s $(printf 't\\375') link; printf 3 >z";
    shell(site, "box", make).await;
    let entries = from(site, json!({ "direction": "from", "guest_path": "/tmp/bytes" })).await;
    let report: Vec<_> = entries
        .expect("copied")
        .into_iter()
        .map(|(header, contents)| {
            let field = |key: &str| header.get(key).and_then(Value::as_str).map(ToOwned::to_owned);
            let names =
                [field("path"), field("path_base64"), field("link_target"), field("link_target_base64")];
            (names.map(Option::unwrap_or_default), contents)
        })
        .collect();
    let expected = [
        (["b\\xff", "Yv8=", "", ""], &b"1"[..]),
        (["d\\xfe", "ZP4=", "", ""], b""),
        (["d\\xfe/é", "ZP4vw6k=", "", ""], b"2"),
        (["link", "", "t\\xfd", "dP0="], b""),
        (["z", "", "", ""], b"3"),
    ];
    let expected: Vec<_> =
        expected.into_iter().map(|(names, contents)| (names.map(str::to_owned), contents.to_vec())).collect();
    assert_eq!(report, expected);
    // The same name is copied alone and inspected.
    let single = json!({ "direction": "from", "guest_path_base64": "L3RtcC9ieXRlcy9i/w==" });
    let single = from(site, single).await.expect("copied");
    assert_eq!((single.len(), &single[0].0["path_base64"], &single[0].1[..]), (1, &json!("Yv8="), &b"1"[..]));
    let missing = json!({ "direction": "from", "guest_path_base64": "L3RtcC9ieXRlcy/+" });
    let error = from(site, missing).await.expect_err("not there");
    assert_eq!(error["path"], "/tmp/bytes/\\xfe", "{error}");
}

async fn observes(site: &Harness) {
    shell(
        site,
        "box",
        "mkdir -p /tmp/s; printf 12345 >/tmp/s/f; chmod 604 /tmp/s/f; ln -s f /tmp/s/l; ln -s no /tmp/s/b",
    )
    .await;
    for (query, expected) in [
        (
            "path=/tmp/s/f",
            json!({ "exists": true, "is_dir": false, "is_file": true, "is_symlink": false, "mode": 0o604, "size": 5 }),
        ),
        ("path=/tmp/s", json!({ "exists": true, "is_dir": true, "is_file": false, "is_symlink": false })),
        (
            "path=/tmp/s/l",
            json!({ "exists": true, "is_symlink": true, "link_target": "f", "is_file": false }),
        ),
        (
            "path=/tmp/s/l&follow_links=true",
            json!({ "exists": true, "is_symlink": false, "is_file": true, "size": 5 }),
        ),
        ("path=/tmp/s/b&follow_links=true", json!({ "exists": false, "size": 0 })),
        ("path=/tmp/s/none", json!({ "exists": false })),
        ("path=/tmp/s/f/below", json!({ "exists": false })),
        ("path_base64=L3RtcC9ieXRlcy9i%2Fw==", json!({ "exists": true, "is_file": true, "size": 1 })),
        (
            "path=/tmp/bytes/link",
            json!({ "is_symlink": true, "link_target": "t\\xfd", "link_target_base64": "dP0=" }),
        ),
    ] {
        let answer = site.request(Method::GET, &format!("/instances/box/stat?{query}"), None).await;
        assert_eq!(answer.status, 200, "{query}: {answer:?}");
        for (key, value) in expected.as_object().expect("an object") {
            assert_eq!(&answer.body[key], value, "{query}: {key} in {}", answer.body);
        }
    }
    for (query, status) in [
        ("", 400),
        ("?path=x", 400),
        ("?path_base64=!", 400),
        ("?path_base64=Lw", 400),
        ("?path=/&follow_links=maybe", 400),
    ] {
        let answer = site.request(Method::GET, &format!("/instances/box/stat{query}"), None).await;
        assert_eq!(answer.status, status, "{query}");
    }
}

#[test]
fn every_copy_of_the_table_is_exact_and_every_failure_leaves_nothing() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({})).await;
        copies_in(&site).await;
        copies_in_that_fail(&site).await;
        copies_out(&site).await;
        odd_names_out(&site).await;
        observes(&site).await;
        site.delete("box").await;
        settles(&mut site, "copies").await;
    });
}
