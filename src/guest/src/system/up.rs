//! The wait until a systemd is up: its start-up jobs are done, whether or not all of them succeeded.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use stead_schemas::guest::Config;

use super::rule;
use crate::children::Children;
use crate::program;
use crate::user::User;

/// Socket on which systemd listens from its first seconds on.
const SOCKET: &str = "/run/systemd/private";
const SOCKET_POLL: Duration = Duration::from_millis(50);
/// Time between two queries if systemd cannot be asked to answer only when it is up (before version 240).
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Limit on the length of the answer, in bytes. It is one word.
const ANSWER_BYTES_MAX: u64 = 64;

/// The answer of `systemctl is-system-running`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Up,
    NotYet,
    /// An unknown word: the query may not have been understood.
    None,
}

pub(super) fn wait(config: &Config, children: &Children) {
    while !Path::new(SOCKET).exists() {
        std::thread::sleep(SOCKET_POLL);
    }
    let root = User { uid: 0, gid: 0, groups: vec![0], home: "/root".to_owned() };
    let environment = program::environment(config, &root);
    let path = environment.iter().find(|(key, _)| key == "PATH").map_or("", |(_, value)| value.as_str());
    // Without systemctl, the running systemd is all that can be known.
    let Some(systemctl) = rule::search("systemctl", path) else { return };
    loop {
        // With `--wait` the answer comes when the system is up. The second form is for versions that do not know the
        // option.
        for arguments in [&["is-system-running", "--wait"][..], &["is-system-running"]] {
            let mut command = Command::new(&systemctl);
            command.args(arguments).env_clear().envs(environment.iter().cloned()).current_dir("/");
            program::set_user(&mut command, User { groups: vec![0], home: String::new(), ..root }, false);
            match ask(&mut command, children).as_deref().map_or(Answer::None, understood) {
                Answer::Up => return,
                Answer::NotYet => break,
                Answer::None => {}
            }
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

fn ask(command: &mut Command, children: &Children) -> io::Result<String> {
    let (reader, writer) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(Stdio::from(writer)).stderr(Stdio::null());
    children.spawn(command, |_| ())?;
    // Our copy of the writer's end is closed here. With it open the read would never end.
    command.stdout(Stdio::null());
    let mut answer = String::new();
    File::from(OwnedFd::from(reader)).take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

fn understood(answer: &str) -> Answer {
    match answer.trim() {
        // With failed units or a rescue shell, the system is as far up as it gets.
        "running" | "degraded" | "maintenance" => Answer::Up,
        "initializing" | "starting" | "stopping" => Answer::NotYet,
        _ => Answer::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn degraded_is_up_and_starting_is_not() {
        for (word, answer) in [
            ("running\n", Answer::Up),
            ("degraded\n", Answer::Up),
            ("maintenance", Answer::Up),
            ("starting\n", Answer::NotYet),
            ("initializing\n", Answer::NotYet),
            ("stopping\n", Answer::NotYet),
            ("offline\n", Answer::None),
            ("unknown\n", Answer::None),
            ("", Answer::None),
        ] {
            assert_eq!(understood(word), answer, "{word}");
        }
    }

    #[test]
    fn an_answer_is_read_to_its_end() {
        let children = Children::of_tests();
        let mut command = Command::new("/bin/echo");
        assert_eq!(ask(command.arg("running"), &children).expect("asked"), "running\n");
        assert!(ask(&mut Command::new("/no/such/program"), &children).is_err());
    }
}
