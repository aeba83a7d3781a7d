//! Lines for people: our messages and the kernel's complaints. They do not appear among the program's own output on
//! the console; both go to the host, which has a log of the instance for them.
//!
//! They meet in the kernel's log, which any of our processes can write to, in the order of the events. Root in the
//! guest can write there too, so the lines carry no meaning.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};

use crate::control::Control;

/// Prefix of our own lines.
const OURS: &str = "stead: ";
/// Highest syslog(2) level of kernel messages that are forwarded: emergencies, alerts and critical conditions.
const CRITICAL: u32 = 2;
/// Limit on the length of a record, in bytes. One record is read at a time.
const RECORD_BYTES: usize = 8192;
/// Console level at which only the messages of a dying kernel are printed: its log can no longer be read then.
const CONSOLE_DYING: &str = "1";
const CONSOLE_SILENT: &str = "0";
const CONSOLE_LEVEL: &str = "/proc/sys/kernel/printk";

/// Writes a line to the kernel's log, or to the console if the kernel has no log.
pub(crate) fn log_line(line: &str) {
    // Level 6 is informational, which no console prints.
    let reported = File::options().write(true).open("/dev/kmsg");
    if reported.and_then(|mut log| log.write_all(format!("<6>{OURS}{line}\n").as_bytes())).is_err() {
        let _ = writeln!(std::io::stderr(), "[stead] {line}");
    }
}

/// Forwards lines to the host from now on: all lines of this boot, or only new ones.
pub(crate) fn forward(control: &Control, is_from_start: bool) {
    let _ = fs::write(CONSOLE_LEVEL, CONSOLE_DYING);
    let Ok(mut log) = File::open("/dev/kmsg") else { return };
    if !is_from_start {
        let _ = log.seek(SeekFrom::End(0));
    }
    let control = control.clone();
    // A guest without this thread works as well, and only its host gets fewer lines.
    let _ = std::thread::Builder::new().name("notes".to_owned()).spawn(move || {
        let mut record = vec![0; RECORD_BYTES];
        loop {
            match log.read(&mut record) {
                Ok(0) => return,
                Ok(count) => {
                    if let Some(line) = line_of(&String::from_utf8_lossy(&record[..count])) {
                        control.note(line);
                    }
                }
                // The record was overwritten before it was read. Reading continues with the oldest record.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
}

/// Stops all kernel output on the console.
pub(crate) fn silence() {
    let _ = fs::write(CONSOLE_LEVEL, CONSOLE_SILENT);
}

/// Returns the useful part of a record: `priority,number,time,flags;text`, and a newline.
fn line_of(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let text = text.lines().next()?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    match text.strip_prefix(OURS) {
        Some(ours) => Some(ours.to_owned()),
        // The three lowest bits are the level. The others are the facility, which is zero for the kernel.
        None => (priority <= CRITICAL).then(|| format!("kernel: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_lines_and_severe_lines_of_the_kernel_are_reported_and_no_others() {
        let line = |record| line_of(record);
        assert_eq!(
            line("14,100,5,-;stead: the clock was stepped\n"),
            Some("the clock was stepped".to_owned())
        );
        assert_eq!(
            line("2,101,5,-;EXT4-fs error\n SUBSYSTEM=block\n"),
            Some("kernel: EXT4-fs error".to_owned())
        );
        for none in ["6,1,5,-;virtio_blk: ready\n", "8,1,5,-;a program's\n", "", "x;y", "2,1,5,-"] {
            assert_eq!(line(none), None, "{none}");
        }
    }
}
