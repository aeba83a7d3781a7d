//! Printing: tables for people, JSON and YAML for programs. This is the only place that writes to stdout.

use std::io::{IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::{Failure, Output};

/// Prints a line; a missing reader is noticed elsewhere (`pipe`).
pub(super) fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// True if the output goes to a terminal, where a person reads it.
pub(super) fn is_for_people() -> bool {
    std::io::stdout().is_terminal()
}

/// Makes untrusted text safe for a terminal: nothing in it moves the cursor, sets a colour, changes the
/// reading direction or ends the line.
pub(super) fn shown(text: &str) -> String {
    let is_shown = |c: char| {
        c == '\t'
            || !(c.is_control()
                || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'))
    };
    text.chars().map(|c| if is_shown(c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
}

/// Escapes the control characters that JSON allows, which are those of C1.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\u{7f}'..='\u{9f}' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

/// Prints the value for a program, or the table that `rows` makes.
pub(super) fn print<T: Serialize>(
    value: &T,
    output: Output,
    header: &[&str],
    rows: impl FnOnce() -> Vec<Vec<String>>,
) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::Other(error.to_string());
    match output {
        Output::Json => {
            line(&escaped(&serde_json::to_string_pretty(value).map_err(|error| failed(&error))?));
        }
        Output::Yaml => line(serde_norway::to_string(value).map_err(|error| failed(&error))?.trim_end()),
        Output::Table => {
            let mut table = Table::new();
            table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(header.iter().map(ToString::to_string));
            let cells = rows().into_iter().map(|row| row.iter().map(|cell| shown(cell)).collect::<Vec<_>>());
            table.add_rows(cells);
            for row in table.to_string().lines() {
                line(row.trim_end());
            }
        }
    }
    Ok(())
}

/// Returns the time since then, in the largest unit that fits.
pub(super) fn age(since: jiff::Timestamp) -> String {
    let seconds = jiff::Timestamp::now().duration_since(since).as_secs().max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_foreign_text_reaches_a_terminal_as_a_command() {
        let hostile = "a\u{1b}]52;c;x\u{7}\u{9b}2J\r\n\u{202e}b\u{2066}\tc";
        assert!(shown(hostile).chars().all(|c| c == '\t' || !c.is_control()), "{:?}", shown(hostile));
        assert!(!shown(hostile).contains(['\u{202e}', '\u{2066}']));
        assert_eq!(shown("plain \u{e9} \u{65e5}"), "plain \u{e9} \u{65e5}");
        let json = escaped(&serde_json::to_string(hostile).expect("text"));
        assert!(json.chars().all(|c| !c.is_control()), "{json:?}");
        assert_eq!(serde_json::from_str::<String>(&json).expect("the same"), hostile);
    }
}
