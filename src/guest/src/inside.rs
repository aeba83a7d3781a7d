//! Paths below a root whose links come from an image. No link leads outside of the root.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Limit on followed links, as in the kernel.
const LINKS_MAX: usize = 40;

/// Resolves a path as if `root` were the root. The result has no links, and its last components may not exist yet.
pub(crate) fn resolve(root: &Path, path: &str) -> io::Result<PathBuf> {
    let mut rest = parts(Path::new(path));
    let (mut at, mut links) = (Vec::<OsString>::new(), 0);
    while let Some(part) = rest.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        at.push(part);
        let here = root.join(at.iter().collect::<PathBuf>());
        let Ok(target) = fs::read_link(&here) else { continue };
        links += 1;
        if links > LINKS_MAX {
            return Err(rustix::io::Errno::LOOP.into());
        }
        at.pop();
        if target.is_absolute() {
            at.clear();
        }
        rest.extend(parts(&target));
    }
    Ok(root.join(at.into_iter().collect::<PathBuf>()))
}

/// Returns the components of a path, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(name).rev().collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_lead_where_the_image_means_and_never_out_of_its_root() {
        let dir = std::env::temp_dir().join(format!("stead-inside-{}", std::process::id()));
        fs::create_dir_all(dir.join("var/real")).expect("made");
        for (link, target) in [
            ("tmp", "/var/tmp"),
            ("up", "../../../../etc"),
            ("data", "var/./real"),
            ("loop", "loop"),
            ("var/back", "../data/x"),
        ] {
            let _ = fs::remove_file(dir.join(link));
            symlink(target, dir.join(link)).expect("made");
        }
        for (path, expected) in [
            ("/tmp", "var/tmp"),
            ("/tmp/a/../b", "var/tmp/b"),
            ("/up/passwd", "etc/passwd"),
            ("/data", "var/real"),
            ("/var/back/y", "var/real/x/y"),
            ("/../..", ""),
            ("/new/path", "new/path"),
        ] {
            assert_eq!(resolve(&dir, path).expect("resolved"), dir.join(expected), "{path}");
        }
        assert!(resolve(&dir, "/loop/a").is_err());
        fs::remove_dir_all(&dir).expect("removed");
    }
}
