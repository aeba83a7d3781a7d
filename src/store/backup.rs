//! A backup of the control plane in one file: every record, and the keys that tokens are signed with.
//!
//! ```text
//! "stead-backup 1 ID\n"                     ID is drawn for each backup
//! length (u32, big-endian), sealed frame    any number, each sealed with the seal key and "ID/number"
//! frame = 'e' entries | 'z' summary         the summary is the last one
//! entry = 'r' or 'f', key length (u32), key, value length (u32), value
//! ```
//! Guarantees: a backup is one durable state of the store; a file that was cut, changed, or joined from two
//! backups is refused before anything is restored. Nothing in it can be read without `keys/seal.key`, which
//! is not part of it: keep a copy of that key elsewhere.
//! Never: contains disks, volumes, memories or images; instances restored from it start on new disks if
//! theirs are gone, and report that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stead_controllers::store::{Batch, Export, Kv, KvError, Sealer, StoreError};

use super::private::private_directory;
use super::seal::{ChaChaSealer, SealKeyError};
use super::sled::SledKv;
use super::sync::sync_directory;

const MAGIC: &str = "stead-backup 1 ";
/// Size at which a frame is closed, in bytes.
const FRAME_BYTES: usize = 256 << 10;
/// Size of the largest sealed frame that is read, in bytes: one frame and the largest record.
const FRAME_BYTES_MAX: u32 = 64 << 20;
/// Length of the longest first line that is read, in bytes.
const HEAD_BYTES_MAX: u64 = 256;
/// Number of records that are written to the new database with one commit.
const BATCH_RECORDS: usize = 256;
/// Files beside the database that belong to the control plane, below the data directory.
const FILES: [&str; 4] = ["keys/jwt.key", "keys/jwt.old.key", "keys/tokens.json", "store-id"];

/// The contents of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub created_at: jiff::Timestamp,
    /// Number of records of the database: objects, names, claims.
    pub records: usize,
    pub revision: u64,
    /// Number of records that could not be read when the backup was made, and are not part of it.
    pub unreadable: usize,
    pub version: String,
}

/// The reason why a backup could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("cannot use {path}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot write the backup")]
    Write(#[source] io::Error),
    #[error("cannot read the backup")]
    Read(#[source] io::Error),
    #[error("this is not a backup of Stead, or of a later version")]
    Format,
    #[error("the backup is cut short or damaged in frame {frame}, or was sealed with another key")]
    Damaged { frame: u64 },
    #[error("{path} is not empty: restore into a new directory", path = path.display())]
    NotEmpty { path: PathBuf },
    #[error("cannot use the seal key")]
    SealKey(#[from] SealKeyError),
    #[error("cannot encode a record")]
    Encode(#[from] StoreError),
    #[error("cannot write the database")]
    Database(#[from] KvError),
}

/// Writes a backup of this state. Blocks; memory is bounded by one frame.
///
/// # Errors
/// Returns a [`BackupError`].
pub fn write(export: &Export, data_dir: &Path, out: &mut dyn Write) -> Result<Summary, BackupError> {
    let sealer = ChaChaSealer::existing(&data_dir.join("keys/seal.key"))?;
    let id = cuid2::create_id();
    out.write_all(format!("{MAGIC}{id}\n").as_bytes()).map_err(BackupError::Write)?;
    let mut frames = Frames { sealer: &sealer, id: &id, number: 0, out };
    let mut plain = vec![b'e'];
    for name in FILES {
        let path = data_dir.join(name);
        match fs::read(&path) {
            Ok(bytes) => append(&mut plain, b'f', name, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(BackupError::Io { path, source }),
        }
    }
    for pair in export.pairs(&sealer) {
        let (key, value) = pair?;
        append(&mut plain, b'r', &key, &value);
        if plain.len() >= FRAME_BYTES {
            frames.write(&plain)?;
            plain.truncate(1);
        }
    }
    frames.write(&plain)?;
    let summary = Summary {
        created_at: jiff::Timestamp::now(),
        records: export.len(),
        revision: export.revision,
        unreadable: export.unreadable,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let text = serde_json::to_vec(&summary).map_err(|error| BackupError::Write(error.into()))?;
    frames.write(&[b"z", text.as_slice()].concat())?;
    Ok(summary)
}

fn append(plain: &mut Vec<u8>, tag: u8, key: &str, value: &[u8]) {
    plain.push(tag);
    for part in [key.as_bytes(), value] {
        let length = u32::try_from(part.len()).expect("records are far smaller than 4 GiB");
        plain.extend(length.to_be_bytes());
        plain.extend(part);
    }
}

struct Frames<'a> {
    sealer: &'a ChaChaSealer,
    id: &'a str,
    number: u64,
    out: &'a mut dyn Write,
}

impl Frames<'_> {
    fn write(&mut self, plain: &[u8]) -> Result<(), BackupError> {
        let sealed = self.sealer.seal(plain, aad(self.id, self.number).as_bytes());
        let sealed = sealed.map_err(|error| BackupError::Write(io::Error::other(error.to_string())))?;
        self.number += 1;
        let length = u32::try_from(sealed.len()).expect("a frame is far smaller than 4 GiB");
        self.out.write_all(&length.to_be_bytes()).map_err(BackupError::Write)?;
        self.out.write_all(&sealed).map_err(BackupError::Write)
    }
}

fn aad(id: &str, number: u64) -> String {
    format!("stead-backup/{id}/{number}")
}

/// Reads the whole backup and checks it; writes nothing.
///
/// # Errors
/// Returns a [`BackupError`].
pub fn verify(backup: &Path, seal_key: &Path) -> Result<Summary, BackupError> {
    let sealer = ChaChaSealer::existing(seal_key)?;
    read(backup, &sealer, &mut |_, _, _| Ok(()))
}

/// Restores a backup into a data directory that is empty or does not exist yet. Blocks on the disk.
///
/// # Errors
/// Returns a [`BackupError`]; an incomplete backup leaves nothing.
pub async fn restore(backup: &Path, data_dir: &Path, seal_key: &Path) -> Result<Summary, BackupError> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| BackupError::Io { path, source }
    };
    let sealer = ChaChaSealer::existing(seal_key)?;
    read(backup, &sealer, &mut |_, _, _| Ok(()))?;
    private_directory(data_dir).map_err(io(data_dir))?;
    if fs::read_dir(data_dir).map_err(io(data_dir))?.next().is_some() {
        return Err(BackupError::NotEmpty { path: data_dir.to_path_buf() });
    }
    // The directory has another name until it is complete: a daemon that starts meanwhile finds no database.
    let new = data_dir.join("restoring");
    private_directory(&new.join("keys")).map_err(io(&new))?;
    write_file(&new.join("keys/seal.key"), &fs::read(seal_key).map_err(io(seal_key))?)?;
    let mut records = Vec::new();
    let summary = read(backup, &sealer, &mut |tag, key, value| {
        match tag {
            b'f' if FILES.contains(&key) => write_file(&new.join(key), value)?,
            b'r' => records.push((key.to_owned(), Some(value.to_vec()))),
            _ => return Err(BackupError::Format),
        }
        Ok(())
    })?;
    let database = SledKv::open(&new.join("db"))?;
    for writes in records.chunks(BATCH_RECORDS) {
        database.commit(Batch { writes: writes.to_vec() }).await?;
    }
    drop(database);
    // The database is moved last: a directory without a database is no data directory.
    for name in ["keys", "store-id", "db"] {
        match fs::rename(new.join(name), data_dir.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && name != "db" => {}
            moved => moved.map_err(io(&new))?,
        }
    }
    fs::remove_dir_all(&new).map_err(io(&new))?;
    sync_directory(data_dir).map_err(io(data_dir))?;
    Ok(summary)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), BackupError> {
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    written.map_err(|source| BackupError::Io { path: path.to_path_buf(), source })
}

/// A callback with the tag, key and value of every entry.
type Visit<'a> = dyn FnMut(u8, &str, &[u8]) -> Result<(), BackupError> + 'a;

fn read(backup: &Path, sealer: &ChaChaSealer, visit: &mut Visit<'_>) -> Result<Summary, BackupError> {
    let file = File::open(backup).map_err(|source| BackupError::Io { path: backup.to_path_buf(), source })?;
    read_from(&mut BufReader::new(file), sealer, visit)
}

fn read_from(
    input: &mut impl BufRead,
    sealer: &dyn Sealer,
    visit: &mut Visit<'_>,
) -> Result<Summary, BackupError> {
    let mut head = String::new();
    let read = Read::by_ref(input).take(HEAD_BYTES_MAX).read_line(&mut head);
    read.map_err(|_| BackupError::Format)?;
    let id = head.strip_prefix(MAGIC).and_then(|rest| rest.strip_suffix('\n'));
    let id = id.ok_or(BackupError::Format)?.to_owned();
    for number in 0.. {
        let sealed = frame(input).map_err(|_| BackupError::Damaged { frame: number })?;
        let plain = sealer.open(&sealed, aad(&id, number).as_bytes());
        let plain = plain.map_err(|_| BackupError::Damaged { frame: number })?;
        match plain.split_first() {
            Some((b'e', entries)) => visit_entries(entries, visit)?,
            Some((b'z', summary)) => {
                let is_over = input.fill_buf().map_err(BackupError::Read)?.is_empty();
                let summary = serde_json::from_slice(summary).ok().filter(|_| is_over);
                return summary.ok_or(BackupError::Damaged { frame: number });
            }
            _ => return Err(BackupError::Format),
        }
    }
    Err(BackupError::Format)
}

fn frame(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    if length > FRAME_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut sealed = Vec::new();
    let read = input.take(length.into()).read_to_end(&mut sealed)?;
    if u32::try_from(read) == Ok(length) { Ok(sealed) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn visit_entries(mut rest: &[u8], visit: &mut Visit<'_>) -> Result<(), BackupError> {
    fn part<'b>(rest: &mut &'b [u8]) -> Option<&'b [u8]> {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (part, after) = after.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        *rest = after;
        Some(part)
    }
    while let Some((&tag, after)) = rest.split_first() {
        rest = after;
        let entry = part(&mut rest).and_then(|key| Some((key, part(&mut rest)?)));
        let (key, value) = entry.ok_or(BackupError::Format)?;
        visit(tag, std::str::from_utf8(key).map_err(|_| BackupError::Format)?, value)?;
    }
    Ok(())
}

/// Makes a backup in a file that appears when it is complete.
///
/// # Errors
/// Returns a [`BackupError`]; no file is left then.
pub fn write_to_file(export: &Export, data_dir: &Path, path: &Path) -> Result<Summary, BackupError> {
    let io = |source| BackupError::Io { path: path.to_path_buf(), source };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(io)?;
    let summary = {
        let mut out = io::BufWriter::new(file.as_file_mut());
        let summary = write(export, data_dir, &mut out)?;
        out.flush().map_err(io)?;
        summary
    };
    file.as_file_mut().rewind().map_err(io)?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|error| io(error.error))?;
    sync_directory(directory).map_err(io)?;
    Ok(summary)
}

/// The entry point of the fuzzer.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    use stead_controllers::store::SealError;

    use super::{Sealer, read_from};

    /// A sealer that opens everything: the code behind the seal is fuzzed.
    struct Unsealed;

    impl Sealer for Unsealed {
        fn seal(&self, plain: &[u8], _: &[u8]) -> Result<Vec<u8>, SealError> {
            Ok(plain.to_vec())
        }
        fn open(&self, sealed: &[u8], _: &[u8]) -> Result<Vec<u8>, SealError> {
            Ok(sealed.to_vec())
        }
    }

    /// Reads the input as a backup whose frames are not sealed.
    pub fn backup(data: &[u8]) {
        let _ = read_from(&mut &data[..], &Unsealed, &mut |_, _, _| Ok(()));
    }
}
