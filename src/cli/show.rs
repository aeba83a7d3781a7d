//! Printing: tables for people, JSON and YAML for programs. The one place that writes to stdout.

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::{Failure, Output};

/// One line; a closed pipe is no error of ours.
pub(super) fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// The value as a program reads it, or the table that `rows` makes.
pub(super) fn print<T: Serialize>(
    value: &T,
    output: Output,
    header: &[&str],
    rows: impl FnOnce() -> Vec<Vec<String>>,
) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::Other(error.to_string());
    match output {
        Output::Json => line(&serde_json::to_string_pretty(value).map_err(|error| failed(&error))?),
        Output::Yaml => line(serde_norway::to_string(value).map_err(|error| failed(&error))?.trim_end()),
        Output::Table => {
            let mut table = Table::new();
            table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
            table.set_header(header.iter().map(ToString::to_string));
            table.add_rows(rows());
            for row in table.to_string().lines() {
                line(row.trim_end());
            }
        }
    }
    Ok(())
}

/// How long ago, in the largest unit that fits.
pub(super) fn age(since: jiff::Timestamp) -> String {
    let seconds = jiff::Timestamp::now().duration_since(since).as_secs().max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
