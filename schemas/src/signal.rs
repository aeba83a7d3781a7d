//! Signals by all names that images and clients use, with Linux's numbers on the processors that guests
//! have.

/// The signals of POSIX and Linux, with their alternative names.
const NAMES: [(&str, i32); 36] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    // systemd and Docker count the real-time signals from here: the two numbers before it belong to the C
    // library.
    ("RTMIN", RTMIN),
    ("RTMAX", RTMAX),
];
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// Returns the number of a signal from a name with or without `SIG`, in letters of either case, from
/// `RTMIN+n`, `RTMAX-n`, or from the number itself. Returns `None` when the word is no signal that can be
/// sent.
#[must_use]
pub fn number(word: &str) -> Option<i32> {
    let word = word.trim().to_ascii_uppercase();
    let name = word.strip_prefix("SIG").unwrap_or(&word);
    let offset = |text: &str| text.parse::<u8>().ok().map(i32::from);
    let number = match (name.strip_prefix("RTMIN+"), name.strip_prefix("RTMAX-")) {
        (Some(above), _) => RTMIN + offset(above)?,
        (_, Some(below)) => RTMAX - offset(below)?,
        (None, None) => match NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, number)) => return Some(*number),
            // A plain number is the only valid word that is not a name.
            None => word.parse().ok()?,
        },
    };
    let is_realtime = (RTMIN..=RTMAX).contains(&number);
    let is_offset = name.starts_with("RT");
    (is_realtime || (!is_offset && (1..32).contains(&number))).then_some(number)
}

/// Returns the common name of a signal.
#[must_use]
pub fn name(number: i32) -> String {
    let known = NAMES.iter().find(|(_, known)| *known == number);
    known.map_or_else(|| format!("signal {number}"), |(name, _)| format!("SIG{name}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_spelling_that_docker_knows_is_known_and_no_other() {
        for (word, expected) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("sigwinch", 28),
            ("WINCH", 28),
            ("28", 28),
            ("SIGRTMIN+3", 37),
            ("RTMIN+3", 37),
            ("SIGRTMIN", 34),
            ("SIGRTMAX", 64),
            ("RTMAX-14", 50),
            (" 9 ", 9),
            ("64", 64),
        ] {
            assert_eq!(number(word), Some(expected), "{word}");
        }
        for word in
            ["", "SIG", "0", "32", "33", "65", "-1", "SIGFOO", "RTMIN+31", "RTMAX-31", "RTMIN+", "SIG-9"]
        {
            assert_eq!(number(word), None, "{word}");
        }
        assert_eq!(
            (name(9), name(28), name(37)),
            ("SIGKILL".to_owned(), "SIGWINCH".to_owned(), "signal 37".to_owned())
        );
    }

    proptest! {
        #[test]
        fn a_word_is_a_signal_that_can_be_sent_or_none(word in "(SIG|sig)?[A-Z0-9+-]{0,8}") {
            if let Some(number) = number(&word) {
                prop_assert!((1..=64).contains(&number) && ![32, 33].contains(&number));
            }
        }
    }
}
