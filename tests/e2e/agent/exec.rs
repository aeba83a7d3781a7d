//! The table of execs, and the cases that do not fit into a table.

use serde_json::{Value, json};

use super::waiting;
use crate::harness::Harness;
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, run, shell};

/// A case: request, input, expected output, expected end.
type Case = (Value, Vec<u8>, Vec<u8>, Value);

fn case(request: Value, input: &[u8], output: &[u8], code: i32) -> Case {
    (request, input.to_vec(), output.to_vec(), json!({ "exitCode": code }))
}

fn line(line: &str, output: &str, code: i32) -> Case {
    case(json!({ "command": ["sh", "-c", line] }), b"", output.as_bytes(), code)
}

fn cases() -> Vec<Case> {
    let all_bytes: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[at as usize % 4]).collect();
    let mut cases = vec![
        case(json!({ "command": ["true"] }), b"", b"", 0),
        case(json!({ "command": ["false"] }), b"", b"", 1),
        line("exit 42", "", 42),
        line("echo hi", "hi\n", 0),
        line("printf 'no end of line'", "no end of line", 0),
        // The ends: signals, and programs that do not start.
        line("kill -9 $$", "", 137),
        line("kill -TERM $$", "", 143),
        case(json!({ "command": ["/no/such"] }), b"", b"Error: command not found: /no/such\r\n", 127),
        case(json!({ "command": ["no-such-name"] }), b"", b"Error: command not found: no-such-name\r\n", 127),
        // The environment: the request's variables override the instance's, which override the defaults.
        line("echo $OF_INSTANCE", "kept\n", 0),
        case(
            json!({ "command": ["sh", "-c", "echo $OF_INSTANCE $MORE"], "env": { "OF_INSTANCE": "new", "MORE": "a b" } }),
            b"",
            b"new a b\n",
            0,
        ),
        case(
            json!({ "command": ["sh", "-c", "echo \"$A\""], "env": { "A": "two\nlines" } }),
            b"",
            b"two\nlines\n",
            0,
        ),
        line("echo $HOSTNAME $HOME", "box /root\n", 0),
        // The directory and the user.
        case(json!({ "command": ["pwd"], "cwd": "/tmp" }), b"", b"/tmp\n", 0),
        case(json!({ "command": ["pwd"] }), b"", b"/\n", 0),
        case(
            json!({ "command": ["pwd"], "cwd": "/nowhere" }),
            b"",
            b"Error: working directory /nowhere: there is no such directory\r\n",
            126,
        ),
        case(json!({ "command": ["id", "-u"], "user": "1234:99" }), b"", b"1234\n", 0),
        case(json!({ "command": ["id", "-g"], "user": "1234:99" }), b"", b"99\n", 0),
        // The arguments are passed unchanged, because no shell parses them.
        case(
            json!({ "command": ["printf", "%s|", "a b", "$HOME", "*", "'", "é\n"] }),
            b"",
            "a b|$HOME|*|'|é\n|".as_bytes(),
            0,
        ),
        // The input: its end, bytes of any value, more than any buffer, a program that does not read it.
        case(json!({ "command": ["cat"] }), b"", b"", 0),
        case(json!({ "command": ["cat"] }), b"one line\n", b"one line\n", 0),
        case(json!({ "command": ["cat"] }), &all_bytes, &all_bytes, 0),
        case(json!({ "command": ["cat"] }), &large, &large, 0),
        case(json!({ "command": ["wc", "-c"] }), &large, b"1048576\n", 0),
        case(json!({ "command": ["true"] }), &large, b"", 0),
        case(json!({ "command": ["head", "-c", "3"] }), b"abcdef", b"abc", 0),
        case(json!({ "command": [] }), b"echo from a shell; exit 7\n", b"from a shell\n", 7),
        // Both outputs appear in the order in which they were written.
        line("echo 1; echo 2 >&2; echo 3; echo 4 >&2", "1\n2\n3\n4\n", 0),
        // A process that keeps running in the background delays nothing.
        line("sleep 1000 & echo started", "started\n", 0),
        line("cat /proc/self/environ | tr '\\0' '\\n' | grep -c '^PATH='", "1\n", 0),
    ];
    let split = json!({ "command": ["sh", "-c", "echo out; echo err >&2"], "split_output": true });
    cases.push(case(split, b"", b"", 0));
    cases.extend(terminal_cases());
    cases
}

fn terminal_cases() -> Vec<Case> {
    vec![
        // The terminal.
        case(terminal(&["sh", "-c", "test -t 0 && test -t 1 && echo yes"]), b"", b"yes\r\n", 0),
        case(terminal(&["stty", "size"]), b"", b"24 80\r\n", 0),
        case(
            json!({ "command": ["stty", "size"], "tty": true, "rows": 50, "cols": 132 }),
            b"",
            b"50 132\r\n",
            0,
        ),
        case(terminal(&["sh", "-c", "echo $TERM"]), b"", b"xterm\r\n", 0),
        case(terminal(&["sh", "-c", "exit 9"]), b"", b"", 9),
        // The timeout.
        case(json!({ "command": ["sleep", "1000"], "timeout": 1 }), b"", b"", 124),
        case(json!({ "command": ["true"], "timeout": 0 }), b"", b"", 0),
    ]
}

/// Returns a request for a program with a terminal.
fn terminal(command: &[&str]) -> Value {
    json!({ "command": command, "tty": true })
}

/// Checks the outputs of a case whose frames are labelled by output.
fn is_split(output: &[u8]) -> bool {
    // The frames come in either order, because there are two pipes.
    output == b"\x01out\n\x02err\n" || output == b"\x02err\n\x01out\n"
}

#[test]
fn every_exec_of_the_table_has_its_output_and_its_end() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({ "env": { "OF_INSTANCE": "kept" } })).await;
        for (request, input, output, end) in cases() {
            let (reported, last) = run(&site, "box", request.clone(), &input).await;
            let is_as_expected =
                if request["split_output"] == true { is_split(&reported) } else { reported == output };
            let shown = String::from_utf8_lossy(&reported[..reported.len().min(200)]).into_owned();
            assert!(
                is_as_expected && last == end,
                "{request}: {} bytes {shown:?}, then {last}",
                reported.len()
            );
        }
        a_terminal_takes_keys_and_sizes(&site).await;
        signals_and_text_reach_the_program(&site).await;
        wrong_requests_are_refused_with_the_field(&site).await;
        a_reader_who_takes_nothing_stops_the_writer(&site).await;
        site.request(reqwest::Method::POST, "/instances/box/stop", None).await;
        let refused = Socket::open(&site, "/instances/box/exec").await.err();
        let (status, body) = refused.expect("a stopped instance has no agent");
        assert_eq!((status, &body["code"]), (409, &json!("invalid_state")));
        site.delete("box").await;
        settles(&mut site, "execs").await;
    });
}

async fn a_terminal_takes_keys_and_sizes(site: &Harness) {
    // These are two programs: a shell's `read` that a trap interrupts may fail, which ends its loop with 0.
    let sized = "trap 'stty size; exit 3' WINCH; echo ready; while true; do sleep 0.1; done";
    let mut socket = Socket::exec(site, "box", &terminal(&["sh", "-c", sized])).await;
    socket.until("ready").await;
    socket.json(&json!({ "resize": { "rows": 11, "cols": 22 } })).await;
    socket.until("11 22").await;
    let (_, end) = socket.finish().await;
    assert_eq!(end, json!({ "exitCode": 3 }));

    let echo = "while read x; do echo got $x; done";
    let mut socket = Socket::exec(site, "box", &terminal(&["sh", "-c", echo])).await;
    socket.bytes(b"keys\n").await;
    socket.until("got keys").await;
    socket.json(&json!({ "resize": { "rows": 11, "cols": 22 } })).await;
    socket.bytes(b"more\n").await;
    socket.until("got more").await;
    socket.bytes(b"\x03").await;
    let (_, end) = socket.finish().await;
    assert_eq!(end, json!({ "exitCode": 130 }));
}

async fn signals_and_text_reach_the_program(site: &Harness) {
    let request = json!({ "command": ["sh", "-c", "trap 'echo caught; exit 5' INT; echo ready; while true; do sleep 0.1; done"] });
    let mut socket = Socket::exec(site, "box", &request).await;
    socket.until("ready").await;
    socket.json(&json!({ "signal": "SIGINT" })).await;
    let (output, end) = socket.finish().await;
    assert_eq!((&output[..], end), (&b"caught\n"[..], json!({ "exitCode": 5 })));
    // Text that is no control frame is input, as always on this wire.
    let mut socket = Socket::exec(site, "box", &json!({ "command": ["head", "-n", "1"] })).await;
    socket.text("plain words\n").await;
    let (output, _) = socket.finish().await;
    assert_eq!(output, b"plain words\n");
}

async fn wrong_requests_are_refused_with_the_field(site: &Harness) {
    for (request, field) in [
        (json!({ "command": "true" }), "command"),
        (json!({ "comand": ["true"] }), "comand"),
        (json!({ "command": ["true"], "rows": 3 }), "rows"),
        (json!({ "command": ["true"], "env": { "": "x" } }), "env"),
        (json!([]), "not understood"),
    ] {
        let mut socket = Socket::exec(site, "box", &request).await;
        let Received::Json(reported) = socket.next().await else { panic!("{request}: no text") };
        assert!(
            reported["error"].as_str().is_some_and(|error| error.contains(field)),
            "{request}: {reported}"
        );
        assert_eq!(socket.next().await, Received::End, "{request}");
    }
    let answer = site.request(reqwest::Method::GET, "/instances/box/exec", None).await;
    assert_eq!((answer.status.as_u16(), &answer.body["code"]), (400, &json!("invalid_request")));
    let (status, _) = Socket::open(site, "/instances/nobody/exec").await.err().expect("there is none");
    assert_eq!(status, 404);
}

/// Checks that the window stops the guest's program, so that the daemon holds almost nothing of its 64 MiB.
async fn a_reader_who_takes_nothing_stops_the_writer(site: &Harness) {
    let request = json!({ "command": ["sh", "-c", "head -c 67108864 /dev/zero; echo done >/tmp/done"] });
    let before = resident_kib(site.daemon_pid());
    let mut socket = Socket::exec(site, "box", &request).await;
    // While the client does not read, other streams continue, and the writer does not finish.
    for _ in 0..5 {
        assert_eq!(shell(site, "box", "ls /tmp/done 2>/dev/null || echo not yet").await, "not yet");
    }
    let grown = resident_kib(site.daemon_pid()).saturating_sub(before);
    assert!(grown < 16 << 10, "the daemon grew by {grown} KiB");
    let (output, end) = socket.finish().await;
    assert_eq!((output.len(), end), (64 << 20, json!({ "exitCode": 0 })));
    assert_eq!(shell(site, "box", "cat /tmp/done").await, "done");
}

pub(super) fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("reported");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number")
}
