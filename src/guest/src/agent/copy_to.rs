//! Copies one file or directory into the guest.
//!
//! Guarantees: a file appears whole under its name, or not at all: it is written to a temporary file beside it and
//! renamed. A symbolic link under the name is replaced, never written through.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, fchown, lchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use stead_schemas::guest::{CopyTo, FromStream};

use super::sparse::SparseFile;
use super::stream::{Input, Stream};

const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

pub(super) fn run(stream: &Stream, request: &CopyTo) {
    let copied = match target(request) {
        Ok(target) if request.is_directory => make_directory(stream, request, &target),
        Ok(target) => copy_file(stream, request, &target),
        Err(error) => Err(error),
    };
    match copied {
        Ok(Some(bytes)) => drop(stream.message(&FromStream::Copied { bytes })),
        // The host closed the stream: there is no one to send a result to.
        Ok(None) => {}
        Err(error) => stream.failed(error.to_string(), None, Some(&request.path.shown())),
    }
}

fn refuse(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why.to_owned())
}

/// Returns the path of the copy: inside the directory at the requested path, if there is one and the source's name is
/// known.
fn target(request: &CopyTo) -> io::Result<PathBuf> {
    let path = Path::new(OsStr::from_bytes(&request.path.0));
    if !path.is_absolute() {
        return Err(refuse("the path must be absolute"));
    }
    let is_directory = fs::metadata(path).is_ok_and(|meta| meta.is_dir());
    match &request.source_name {
        Some(name) if is_directory => {
            if name.is_plain_name() {
                Ok(path.join(OsStr::from_bytes(&name.0)))
            } else {
                Err(refuse("the source's name must be one plain name"))
            }
        }
        _ if is_directory && !request.is_directory => Err(refuse("is a directory")),
        _ => Ok(path.to_owned()),
    }
}

fn make_directory(stream: &Stream, request: &CopyTo, target: &Path) -> io::Result<Option<u64>> {
    loop {
        match stream.wait_next() {
            None => return Ok(None),
            Some(Input::Eof) => break,
            Some(Input::Data(_)) => return Err(refuse("a directory has no contents of its own")),
            Some(Input::Message(_)) => {}
        }
    }
    let is_new = !fs::metadata(target).is_ok_and(|meta| meta.is_dir());
    if is_new {
        fs::create_dir_all(target)?;
    }
    // An existing directory keeps its mode unless the request names a mode.
    if let Some(mode) = request.mode.or(is_new.then_some(DIRECTORY_MODE)) {
        fs::set_permissions(target, Permissions::from_mode(mode & 0o7777))?;
    }
    if request.uid.is_some() || request.gid.is_some() {
        lchown(target, request.uid, request.gid)?;
    }
    if let Some(mtime) = request.mtime {
        File::open(target)?.set_modified(time(mtime))?;
    }
    Ok(Some(0))
}

/// A temporary file that is removed again unless it was kept.
struct Scratch {
    path: PathBuf,
    is_kept: bool,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn copy_file(stream: &Stream, request: &CopyTo, target: &Path) -> io::Result<Option<u64>> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(refuse("the path names no file"));
    };
    fs::create_dir_all(parent)?;
    let (file, mut scratch) = scratch_file(parent, name)?;
    let mut file = SparseFile::new(file);
    loop {
        match stream.wait_next() {
            None => return Ok(None),
            Some(Input::Eof) => break,
            Some(Input::Data(data)) => {
                file.write(&data)?;
                stream.done_with(data);
            }
            Some(Input::Message(_)) => {}
        }
    }
    let (file, bytes) = file.finish()?;
    if request.uid.is_some() || request.gid.is_some() {
        fchown(&file, request.uid, request.gid)?;
    }
    // The mode is set after the owner: a change of owner clears the set-id bits.
    file.set_permissions(Permissions::from_mode(request.mode.unwrap_or(FILE_MODE) & 0o7777))?;
    if let Some(mtime) = request.mtime {
        file.set_modified(time(mtime))?;
    }
    fs::rename(&scratch.path, target)?;
    scratch.is_kept = true;
    Ok(Some(bytes))
}

fn scratch_file(parent: &Path, name: &OsStr) -> io::Result<(File, Scratch)> {
    for attempt in 0..1000u32 {
        // A long name is cut, because the prefix has to fit into the file name as well.
        let mut scratch = OsString::from(format!(".stead-cp-{attempt}-"));
        scratch.push(name.to_string_lossy().chars().take(40).collect::<String>());
        let path = parent.join(scratch);
        match File::options().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((file, Scratch { path, is_kept: false })),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "too many copies into one directory at once"))
}

fn time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let at = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    at.unwrap_or(SystemTime::UNIX_EPOCH)
}
