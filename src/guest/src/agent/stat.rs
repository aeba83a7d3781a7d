//! Looks at one path.

use std::fs::{self, Metadata};
use std::os::unix::fs::PermissionsExt;

use stead_schemas::guest::{PathInfo, Stat};

pub(super) fn look(request: &Stat) -> PathInfo {
    let found =
        if request.follows_links { fs::metadata(&request.path) } else { fs::symlink_metadata(&request.path) };
    match found {
        Ok(meta) => describe(request, &meta),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => PathInfo::default(),
        Err(error) => PathInfo { error: Some(error.to_string()), ..PathInfo::default() },
    }
}

fn describe(request: &Stat, meta: &Metadata) -> PathInfo {
    let is_link = meta.file_type().is_symlink();
    let target = is_link.then(|| fs::read_link(&request.path).ok()).flatten();
    PathInfo {
        exists: true,
        is_directory: meta.is_dir(),
        is_file: meta.is_file(),
        is_link,
        link_target: target.map(|target| target.to_string_lossy().into_owned()),
        mode: meta.permissions().mode() & 0o777,
        size: meta.len(),
        error: None,
    }
}
