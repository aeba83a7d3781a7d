//! The end of a system with the image's own init, as reported by the init during its shutdown.

use stead_schemas::instance::Exit;

/// Program that a systemd executes as PID 1 at its end. Its first argument names the kind of end.
const SHUTDOWN: &str = "systemd-shutdown";
const EXIT_CODE: &str = "--exit-code=";

/// Returns the kind of end that PID 1 is carrying out, by its command line, or `None` while there is none.
pub(super) fn of_init(command_line: &[u8]) -> Option<Exit> {
    let text = String::from_utf8_lossy(command_line);
    let mut words = text.split('\0').filter(|word| !word.is_empty());
    if words.next()?.rsplit('/').next() != Some(SHUTDOWN) {
        return None;
    }
    let (options, verbs): (Vec<&str>, Vec<&str>) = words.partition(|word| word.starts_with('-'));
    let code_option = options.iter().find_map(|option| option.strip_prefix(EXIT_CODE)?.parse().ok());
    let (code, message) = match *verbs.first()? {
        "poweroff" => (Some(0), "the system powered off"),
        "halt" => (Some(0), "the system halted"),
        "exit" => (Some(code_option.unwrap_or(0)), "the system exited"),
        "reboot" => (None, "the system rebooted"),
        "soft-reboot" => (None, "the system rebooted its user space"),
        "kexec" => (None, "the system booted another kernel"),
        _ => (None, "the system went down"),
    };
    Some(exit(code, message))
}

/// Returns the end of an init of another kind, which ends all processes without giving the reason.
pub(super) fn of_unknown_kind(is_asked: bool) -> Exit {
    if is_asked {
        return exit(Some(0), "the system shut down");
    }
    exit(None, "the system went down; its init does not say whether it powers off or reboots")
}

/// Returns the end of a system that was asked to shut down and did not in time.
pub(super) fn overdue() -> Exit {
    exit(None, "the system did not shut down in time and was cut off")
}

fn exit(code: Option<i32>, message: &str) -> Exit {
    Exit { code, message: message.to_owned(), is_boot_failure: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_systemd_are_reported_unchanged() {
        let line = |words: &[&str]| {
            words.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect::<Vec<u8>>()
        };
        let path = "/usr/lib/systemd/systemd-shutdown";
        for (words, expected) in [
            (&[path, "poweroff", "--timeout", "90000000us"][..], Some((Some(0), "powered off"))),
            (&[path, "halt"], Some((Some(0), "halted"))),
            (&[path, "reboot", "--timeout"], Some((None, "rebooted"))),
            (&[path, "kexec"], Some((None, "another kernel"))),
            (&[path, "exit", "--exit-code=7"], Some((Some(7), "exited"))),
            (&[path, "exit", "--exit-code=x"], Some((Some(0), "exited"))),
            (&[path, "what"], Some((None, "went down"))),
            (&[path], None),
            (&["/sbin/init"], None),
            (&["/sbin/init", "poweroff"], None),
            (&["systemd-shutdownx", "poweroff"], None),
            (&[], None),
        ] {
            let reported = of_init(&line(words));
            let is_so = match (&reported, expected) {
                (None, None) => true,
                (Some(reported), Some((code, word))) => {
                    reported.code == code && reported.message.contains(word)
                }
                _ => false,
            };
            assert!(is_so, "{words:?}: {reported:?}");
            assert!(reported.is_none_or(|reported| !reported.is_boot_failure));
        }
    }
}
