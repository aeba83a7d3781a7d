//! Inspects one path.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use stead_schemas::guest::{BytePath, PathInfo, Stat};

pub(super) fn observe(request: &Stat) -> PathInfo {
    let path = Path::new(OsStr::from_bytes(&request.path.0));
    let found = if request.follows_links { fs::metadata(path) } else { fs::symlink_metadata(path) };
    match found {
        Ok(meta) => describe(path, &meta),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => PathInfo::default(),
        Err(error) => PathInfo { error: Some(error.to_string()), ..PathInfo::default() },
    }
}

fn describe(path: &Path, meta: &Metadata) -> PathInfo {
    let is_link = meta.file_type().is_symlink();
    let target = is_link.then(|| fs::read_link(path).ok()).flatten();
    PathInfo {
        exists: true,
        is_directory: meta.is_dir(),
        is_file: meta.is_file(),
        is_link,
        link_target: target.map(|target| BytePath(target.into_os_string().into_vec())),
        mode: meta.permissions().mode() & 0o777,
        size: meta.len(),
        error: None,
    }
}
