//! A minimal QMP client: it sends one line and reads one line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::daemon::DEADLINE;

const POLL: Duration = Duration::from_millis(1);

/// A negotiated connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    pub(crate) fn connect(socket: &Path) -> Self {
        let start = Instant::now();
        let writer = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() < DEADLINE => std::thread::sleep(POLL),
                Err(error) => panic!("no monitor: {error}"),
            }
        };
        let reader = BufReader::new(writer.try_clone().expect("cloned"));
        let mut qmp = Self { reader, writer };
        qmp.line();
        qmp.call("qmp_capabilities", json!({}));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("read");
        serde_json::from_str(&line).expect("QMP speaks JSON")
    }

    pub(crate) fn call(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}").expect("sent");
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    pub(crate) fn leave_ram_out(&mut self) {
        let capability = json!({ "capability": "x-ignore-shared", "state": true });
        self.call("migrate-set-capabilities", json!({ "capabilities": [capability] }));
    }

    pub(crate) fn until_migrated(&mut self) {
        loop {
            let info = self.call("query-migrate", json!({}));
            match info["status"].as_str() {
                Some("completed") => return,
                Some("failed" | "cancelled") => panic!("{info}"),
                _ => std::thread::sleep(POLL),
            }
        }
    }
}
