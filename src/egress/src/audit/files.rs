//! The two files of an audit log.
//!
//! Guarantees: together they never exceed twice [`EGRESS_AUDIT_FILE_BYTES_MAX`], and hold at least the latest
//! lines of that size; a line is written whole into one file. The process gets both files open and needs no
//! path: a reader puts the file first whose first line is older.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::time::SystemTime;

use stead_schemas::egress::AuditLine;
use stead_schemas::limits::EGRESS_AUDIT_FILE_BYTES_MAX;

/// Two files that are filled alternately.
#[derive(Debug)]
pub struct LogFiles {
    /// The file that is being filled, and the other one.
    files: [File; 2],
    /// Size of the file that is being filled, in bytes.
    bytes: u64,
}

impl LogFiles {
    /// Goes on with the file that was written last.
    ///
    /// # Errors
    /// Fails when the files cannot be inspected.
    pub fn new(one: File, other: File) -> io::Result<Self> {
        let changed =
            |file: &File| Ok::<_, io::Error>(file.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH));
        let is_other_later = changed(&other)? > changed(&one)? && other.metadata()?.len() > 0;
        let mut files = if is_other_later { [other, one] } else { [one, other] };
        let bytes = files[0].seek(SeekFrom::End(0))?;
        Ok(Self { files, bytes })
    }

    /// Writes lines. When the file is full, the other one is emptied and filled next.
    pub(super) fn append(&mut self, lines: &[AuditLine]) -> io::Result<()> {
        let mut text = Vec::new();
        for line in lines {
            let start = text.len();
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
            let end = u64::try_from(text.len()).unwrap_or(u64::MAX);
            if self.bytes + end > EGRESS_AUDIT_FILE_BYTES_MAX {
                self.write(&text[..start])?;
                text.drain(..start);
                self.rotate()?;
            }
        }
        self.write(&text)
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        self.files[0].write_all(text)?;
        self.bytes += u64::try_from(text.len()).unwrap_or(u64::MAX);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.files.swap(0, 1);
        self.files[0].set_len(0)?;
        self.bytes = self.files[0].seek(SeekFrom::Start(0))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::super::record::tests::line;
    use super::*;

    fn lines_in(file: &mut File) -> Vec<AuditLine> {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).expect("at its start");
        file.read_to_string(&mut text).expect("read");
        text.lines().map(|line| serde_json::from_str(line).expect("a line")).collect()
    }

    #[test]
    fn the_files_keep_the_latest_lines_within_their_bound() {
        let open = || tempfile::tempfile().expect("a file");
        let (mut one, mut other) = (open(), open());
        let copy = |file: &File| file.try_clone().expect("cloned");
        let mut files = LogFiles::new(copy(&one), copy(&other)).expect("opened");
        let mut written = 0;
        // A path makes a line large, so that three files are filled quickly.
        let large = |conn: u64| AuditLine { path: Some("p".repeat(64 << 10)), conn, ..line() };
        while written < 3 * 130 {
            files.append(&[large(written), large(written + 1)]).expect("written");
            written += 2;
            for file in [&one, &other] {
                assert!(file.metadata().expect("known").len() <= EGRESS_AUDIT_FILE_BYTES_MAX);
            }
        }
        drop(files);
        let mut numbers: Vec<u64> =
            [lines_in(&mut one), lines_in(&mut other)].concat().iter().map(|line| line.conn).collect();
        numbers.sort_unstable();
        assert!(numbers.len() > 127, "{}", numbers.len());
        let first = written - u64::try_from(numbers.len()).expect("few");
        assert_eq!(numbers, (first..written).collect::<Vec<_>>(), "the latest lines without a gap");
    }

    #[test]
    fn a_log_goes_on_where_it_ended() {
        let open = || tempfile::tempfile().expect("a file");
        let (mut one, other) = (open(), open());
        for _ in 0..2 {
            let copy = |file: &File| file.try_clone().expect("cloned");
            LogFiles::new(copy(&one), copy(&other)).expect("opened").append(&[line()]).expect("written");
        }
        assert_eq!(lines_in(&mut one).len(), 2);
    }
}
