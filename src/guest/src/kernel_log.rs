//! Lines for people: what we say, and what the kernel complains of. Neither stands among the program's own
//! on the console; both go to the host, which has a log of the instance for them.
//!
//! They meet in the kernel's log, which any of our processes can write to, in the order of what happened.
//! Whoever is root in the guest can write there too: they carry no meaning.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};

use crate::control::Control;

/// What our own lines begin with.
const OURS: &str = "stead: ";
/// The kernel's words from here on, as syslog(2) counts: emergencies, alerts and what is critical.
const CRITICAL: u32 = 2;
/// A record is never longer; one is read at a time.
const RECORD_BYTES: usize = 8192;
/// Only what the kernel says when it is dying is still printed on the console: nobody reads its log then.
const CONSOLE_DYING: &str = "1";
const CONSOLE_SILENT: &str = "0";
const CONSOLE_LEVEL: &str = "/proc/sys/kernel/printk";

/// Says a line; on the console where the kernel has no log.
pub(crate) fn say(line: &str) {
    // Six: for information, which is printed on no console.
    let said = File::options().write(true).open("/dev/kmsg");
    if said.and_then(|mut log| log.write_all(format!("<6>{OURS}{line}\n").as_bytes())).is_err() {
        let _ = writeln!(std::io::stderr(), "[stead] {line}");
    }
}

/// Sends lines to the host from here on; all of this boot, or those to come.
pub(crate) fn forward(control: &Control, is_from_start: bool) {
    let _ = fs::write(CONSOLE_LEVEL, CONSOLE_DYING);
    let Ok(mut log) = File::open("/dev/kmsg") else { return };
    if !is_from_start {
        let _ = log.seek(SeekFrom::End(0));
    }
    let control = control.clone();
    // Without it a guest is as good, and its host hears less.
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
                // Overwritten before it was read: it goes on with the oldest that is there.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
}

/// Nothing is printed on the console any more.
pub(crate) fn silence() {
    let _ = fs::write(CONSOLE_LEVEL, CONSOLE_SILENT);
}

/// What is of use of a record: `priority,number,time,flags;text`, and a newline.
fn line_of(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let text = text.lines().next()?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    match text.strip_prefix(OURS) {
        Some(ours) => Some(ours.to_owned()),
        // The three lowest bits are the level, the others who says it: zero for the kernel.
        None => (priority <= CRITICAL).then(|| format!("kernel: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_lines_and_the_kernels_grave_ones_are_told_and_no_others() {
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
