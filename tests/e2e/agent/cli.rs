//! `stead exec`, `cp`, `stat` and `logs -f` as a user types them.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use serde_json::json;

use super::waiting;
use crate::harness::{Harness, LISTEN};
use crate::invariants::settles;
use crate::namespace::in_namespace;

pub(super) fn command(site: &Harness, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stead"));
    command.args(arguments).env("STEAD_BASE_URL", format!("http://{LISTEN}"));
    command.env("STEAD_API_KEY", site.token()).stdin(Stdio::null());
    command
}

fn stead(site: &Harness, arguments: &[&str]) -> Output {
    command(site, arguments).output().expect("it runs")
}

pub(super) fn output_of(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

fn execs(site: &Harness) {
    let both = ["exec", "box", "sh", "-c", "echo out; echo err >&2; exit 7"];
    assert_eq!(output_of(&stead(site, &both)), (7, "out\n".to_owned(), "err\n".to_owned()));
    let full =
        ["exec", "-e", "A=b c", "-w", "/tmp", "-u", "12:34", "box", "sh", "-c", "echo $A $(pwd) $(id -u)"];
    assert_eq!(output_of(&stead(site, &full)), (0, "b c /tmp 12\n".to_owned(), String::new()));
    let (code, _, error) = output_of(&stead(site, &["exec", "box", "no-such-program"]));
    assert!(code == 127 && error.contains("command not found"), "{code}: {error}");
    let (code, _, error) = output_of(&stead(site, &["exec", "nobody", "true"]));
    assert!(code == 3 && error.contains("there is no instance \"nobody\""), "{code}: {error}");
    let mut child = command(site, &["exec", "-i", "box", "sort"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    child.stdin.take().expect("piped").write_all(b"b\na\n").expect("written");
    assert_eq!(output_of(&child.wait_with_output().expect("ended")), (0, "a\nb\n".to_owned(), String::new()));
    // Without -i the input of a script stays with the script.
    assert_eq!(output_of(&stead(site, &["exec", "box", "cat"])), (0, String::new(), String::new()));
    let tty = ["exec", "-t", "box", "sh", "-c", "test -t 0 && echo terminal"];
    assert_eq!(output_of(&stead(site, &tty)), (0, "terminal\r\n".to_owned(), String::new()));
}

fn copies(site: &Harness) {
    let scratch = site.scratch("cli");
    let tree = scratch.join("tree");
    std::fs::create_dir_all(tree.join("sub")).expect("made");
    std::fs::write(tree.join("file"), vec![5u8; 700_000]).expect("written");
    std::fs::set_permissions(tree.join("file"), std::fs::Permissions::from_mode(0o640)).expect("set");
    std::fs::write(tree.join("sub/o d d"), "two").expect("written");
    // A link that somebody put among the files does not decide what leaves this host.
    std::os::unix::fs::symlink("/etc/hostname", tree.join("link")).expect("made");
    let (from, to) = (tree.display().to_string(), scratch.join("back").display().to_string());
    let left_out = |output: Output| {
        let (code, out, warned) = output_of(&output);
        assert!(code == 0 && out.is_empty() && warned.contains("left out, a link"), "{code}: {out}{warned}");
    };
    left_out(stead(site, &["cp", &from, "box:/tmp/copied"]));
    // A copy into an existing directory keeps its own name.
    left_out(stead(site, &["cp", &from, "box:/tmp"]));
    assert_eq!(output_of(&stead(site, &["stat", "box:/tmp/tree/link"])).0, 3);
    std::fs::remove_file(tree.join("link")).expect("there");
    let script = "cd /tmp; stat -c '%n %a %s' copied/file tree/file 'copied/sub/o d d'";
    let (_, listed, _) = output_of(&stead(site, &["exec", "box", "sh", "-c", script]));
    assert_eq!(listed, "copied/file 640 700000\ntree/file 640 700000\ncopied/sub/o d d 644 3\n");
    let links = "cd /tmp/copied; ln -s sub/../file in; ln -s /etc/passwd out; mkdir empty";
    assert_eq!(output_of(&stead(site, &["exec", "box", "sh", "-c", links])).0, 0);
    let (code, _, warned) = output_of(&stead(site, &["cp", "box:/tmp/copied", &to]));
    assert!(
        code == 0 && warned.contains("/etc/passwd") && !warned.contains("sub/../file"),
        "{code}: {warned}"
    );
    let back = scratch.join("back");
    assert_eq!(std::fs::read(back.join("in")).expect("a link to a file").len(), 700_000);
    assert_eq!(std::fs::read_to_string(back.join("sub/o d d")).expect("copied"), "two");
    assert!(back.join("empty").is_dir() && std::fs::symlink_metadata(back.join("out")).is_err());
    assert_eq!(back.join("file").metadata().expect("copied").permissions().mode() & 0o777, 0o640);
    let (code, _, error) = output_of(&stead(site, &["cp", "box:/no/such", &to]));
    assert!(code != 0 && error.contains("No such file"), "{code}: {error}");
    let (code, shown, _) = output_of(&stead(site, &["stat", "box:/tmp/copied/file", "-o", "json"]));
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!((code, &shown["size"], &shown["is_file"]), (0, &json!(700_000), &json!(true)));
    assert_eq!(output_of(&stead(site, &["stat", "box:/nowhere"])).0, 3);
}

/// Copies names of any bytes in, inspects them, and copies them back, links to them as well.
fn odd_names(site: &Harness) {
    let scratch = site.scratch("odd");
    let odd = |text: &[u8]| OsString::from_vec(text.to_vec());
    let tree = scratch.join(odd(b"t\xff"));
    std::fs::create_dir_all(tree.join(odd(b"\xfe"))).expect("made");
    std::fs::write(tree.join(odd(b"\xfe")).join(odd(b"f\xfd")), "odd").expect("written");
    let run = |words: &[OsString]| {
        let mut command = command(site, &[]);
        output_of(&command.args(words).output().expect("it runs"))
    };
    let done = (0, String::new(), String::new());
    let (back, into) = (scratch.join("back"), odd(b"box:/tmp"));
    assert_eq!(run(&["cp".into(), tree.clone().into(), into]), done);
    let link = "cd /tmp/t$(printf '\\377'); ln -s $(printf '\\376')/$(printf 'f\\375') link";
    assert_eq!(output_of(&stead(site, &["exec", "box", "sh", "-c", link])).0, 0);
    assert_eq!(run(&["cp".into(), odd(b"box:/tmp/t\xff"), back.clone().into()]), done);
    assert_eq!(std::fs::read_to_string(back.join("link")).expect("a link to a file"), "odd");
    let target = std::fs::read_link(back.join("link")).expect("a link");
    assert_eq!(target.as_os_str(), odd(b"\xfe/f\xfd"));
    let (code, shown, _) = run(&["stat".into(), odd(b"box:/tmp/t\xff/\xfe/f\xfd")]);
    assert!(code == 0 && shown.contains("t\\xff") && shown.contains("file"), "{code}: {shown}");
}

/// Checks the usage figures of a VM that has computed and used its network.
fn uses(site: &Harness) {
    let busy = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; ping -c 1 -W 2 10.185.0.1 >/dev/null; true";
    assert_eq!(output_of(&stead(site, &["exec", "box", "sh", "-c", busy])).0, 0);
    let (code, shown, error) = output_of(&stead(site, &["top", "-o", "json"]));
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    let stats = &shown[0];
    assert_eq!(
        (code, &stats["instance_name"], &stats["allocated_vcpus"]),
        (0, &json!("box"), &json!(1)),
        "{error}"
    );
    let number = |key: &str| stats[key].as_f64().unwrap_or(0.0);
    assert!(number("cpu_seconds") > 0.5 && number("memory_rss_bytes") > 30e6, "{stats}");
    assert!(number("network_rx_bytes") > 50.0 && number("network_tx_bytes") > 50.0, "{stats}");
    assert!(number("memory_utilization_ratio") > 0.05, "{stats}");
    let (code, table, _) = output_of(&stead(site, &["top"]));
    assert!(code == 0 && table.contains("box") && table.contains('%'), "{table}");
}

fn updates(site: &Harness) {
    let words = [
        "update",
        "box",
        "--restart",
        "on_failure:3",
        "--restart-backoff",
        "7s",
        "--ttl",
        "3h",
        "-o",
        "json",
    ];
    let (code, shown, error) = output_of(&stead(site, &words));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap_or_default();
    let policy =
        json!({ "policy": "on_failure", "backoff": "7s", "max_attempts": 3, "stable_after": "10m0s" });
    assert_eq!((code, &shown[0]["restart_policy"]), (0, &policy), "{shown} {error}");
    assert!(shown[0]["expires_at"].is_string(), "{shown}");
    let (code, _, error) = output_of(&stead(site, &["update", "box", "--restart", "sometimes"]));
    assert!(code == 1 && error.contains("restart_policy.policy"), "{code}: {error}");
    let (code, _, error) = output_of(&stead(site, &["update", "box"]));
    assert!(code == 1 && error.contains("at least one field"), "{code}: {error}");
}

/// Follows a log line by line, through rotations, until its reader is gone.
fn follows(site: &Harness) {
    let writes = |line: &str| assert_eq!(output_of(&stead(site, &["exec", "box", "sh", "-c", line])).0, 0);
    writes("echo the line before >/dev/console");
    let mut child =
        command(site, &["logs", "-f", "--tail", "1", "box"]).stdout(Stdio::piped()).spawn().expect("it runs");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    // The first lines would be missed by a client that is not connected yet.
    while lines.next().expect("it goes on").expect("text").trim() != "the line before" {}
    writes("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line-$i; done >/dev/console");
    let mut expected = 1;
    while expected <= 2000 {
        let line = lines.next().expect("it goes on").expect("text");
        if let Some(number) = line.trim().strip_prefix("line-") {
            assert_eq!(number, expected.to_string(), "a line was lost or doubled");
            expected += 1;
        }
    }
    child.kill().expect("it runs");
    child.wait().expect("it ends");
}

#[test]
fn the_command_line_runs_copies_and_follows() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({})).await;
        execs(&site);
        uses(&site);
        updates(&site);
        copies(&site);
        odd_names(&site);
        follows(&site);
        site.delete("box").await;
        settles(&mut site, "the command line").await;
    });
}
