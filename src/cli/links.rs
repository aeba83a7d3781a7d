//! Links that were copied out of a guest: a link leads to a path in the copy, or is not made.
//!
//! Guarantees: no link that is made leads out of the copy, through any other links, in the state in which
//! all links are made. The kernel decides this, which resolves a link in the same way as later readers do.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use super::Failure;
use super::show::shown;

/// Largest number of links that are followed on the way to one path, as in the kernel.
const FOLLOWED_MAX: usize = 40;

fn failed(link_path: &Path, error: impl Into<io::Error>) -> Failure {
    Failure::Other(format!("{}: {}", link_path.display(), error.into()))
}

/// Makes links below `root`, and then removes the links that lead out of it.
pub(super) fn make(root: &Path, links: Vec<(PathBuf, OsString)>) -> Result<(), Failure> {
    if links.is_empty() {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = openat(CWD, root, flags, Mode::empty()).map_err(|error| failed(root, error))?;
    let mut made = Vec::new();
    for (link_path, target) in links {
        let name = link_path
            .strip_prefix(root)
            .or_else(|_| link_path.strip_prefix(""))
            .unwrap_or(&link_path)
            .to_owned();
        // A link among the parents would make this link be created elsewhere.
        if !is_plain(root, &name) {
            warn(&link_path, &target, "through another link");
            continue;
        }
        // An existing entry of this name is replaced, as for files.
        let _ = fs::remove_file(&link_path);
        std::os::unix::fs::symlink(&target, &link_path).map_err(|error| failed(&link_path, error))?;
        made.push((link_path, name, target));
    }
    // A link that is removed may have kept another one inside, or led it out, so this repeats until none is
    // removed.
    loop {
        let before = made.len();
        let mut kept = Vec::new();
        for (link_path, name, target) in made {
            if stays(&top, &name, &target) {
                kept.push((link_path, name, target));
                continue;
            }
            warn(&link_path, &target, "outside of the copy");
            fs::remove_file(&link_path).map_err(|error| failed(&link_path, error))?;
        }
        made = kept;
        if made.len() == before {
            return Ok(());
        }
    }
}

fn warn(link_path: &Path, target: &OsStr, why: &str) {
    let text = format!("{}: left out, a link to {} {why}", link_path.display(), target.display());
    eprintln!("stead: {}", shown(&text));
}

/// True if all parents of a path are directories of the copy's own.
fn is_plain(root: &Path, name: &Path) -> bool {
    let parents = name.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
    parents.into_iter().all(|parent| fs::symlink_metadata(root.join(parent)).is_ok_and(|meta| meta.is_dir()))
}

/// True if a link leads to a path in the copy, and could lead nowhere else.
fn stays(top: &OwnedFd, name: &Path, target: &OsStr) -> bool {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match openat2(top, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
        Ok(_) => true,
        // The target does not exist yet but may exist later, so its text must not lead out.
        Err(Errno::NOENT | Errno::NOTDIR) => stays_by_words(top, name, target, FOLLOWED_MAX),
        // The link leads out or in a circle, or the kernel cannot resolve it.
        Err(_) => false,
    }
}

/// Resolves by hand a link that the kernel could not: each existing part that is a link is replaced by its
/// target, and a part that does not exist yet counts as a directory.
fn stays_by_words(top: &OwnedFd, name: &Path, target: &OsStr, left: usize) -> bool {
    let mut at: Vec<OsString> = name
        .parent()
        .into_iter()
        .flat_map(Path::components)
        .map(|part| part.as_os_str().to_owned())
        .collect();
    let mut left = left;
    let mut parts: Vec<OsString> = words(target);
    while let Some(part) = parts.pop() {
        match Path::new(&part).components().next() {
            None | Some(Component::CurDir) => {}
            Some(Component::ParentDir) => {
                if at.pop().is_none() {
                    return false;
                }
            }
            Some(Component::RootDir | Component::Prefix(_)) => return false,
            Some(Component::Normal(part)) => {
                at.push(part.to_owned());
                let link_path: PathBuf = at.iter().collect();
                let Ok(link) = rustix::fs::readlinkat(top, &link_path, Vec::new()) else { continue };
                let Some(fewer) = left.checked_sub(1) else { return false };
                left = fewer;
                at.pop();
                parts.extend(words(<OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(link.as_bytes())));
            }
        }
    }
    true
}

/// Returns the parts of a path in reverse order.
fn words(path: &OsStr) -> Vec<OsString> {
    Path::new(path).components().rev().map(|part| part.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes these links; returns those that exist afterwards.
    fn kept(links: &[(&str, &str)]) -> Vec<String> {
        let scratch = tempfile::tempdir().expect("scratch");
        fs::write(scratch.path().join("secret"), "s").expect("written");
        let root = scratch.path().join("copy");
        fs::create_dir_all(root.join("a/b/c")).expect("made");
        fs::write(root.join("a/file"), "x").expect("written");
        let links = links.iter().map(|(link_path, target)| (root.join(link_path), OsString::from(target)));
        make(&root, links.collect()).expect("made");
        let mut there = Vec::new();
        let mut pending = vec![root.clone()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(directory).expect("read") {
                let path = entry.expect("read").path();
                let meta = fs::symlink_metadata(&path).expect("there");
                if meta.is_symlink() {
                    let real = fs::canonicalize(&path).unwrap_or(root.clone());
                    assert!(
                        real.starts_with(fs::canonicalize(&root).expect("there")),
                        "{path:?} -> {real:?}"
                    );
                    there.push(path.strip_prefix(&root).expect("below").display().to_string());
                } else if meta.is_dir() {
                    pending.push(path);
                }
            }
        }
        there.sort();
        there
    }

    #[test]
    fn links_within_the_copy_are_made() {
        let links =
            [("up", "a/b/c"), ("a/b/back", "../file"), ("a/dot", "./b/../file"), ("later", "a/not-yet")];
        assert_eq!(kept(&links), ["a/b/back", "a/dot", "later", "up"]);
    }

    #[test]
    fn no_link_leads_out_whatever_it_goes_through() {
        assert_eq!(kept(&[("x", "/etc/passwd"), ("y", "../secret"), ("a/z", "../../secret")]), [""; 0]);
        // By the count of names alone, each of the two would be inside.
        let up = "a/b/c/up/".repeat(4);
        let deep = format!("{up}../../../../../etc/hostname");
        assert_eq!(
            kept(&[("a/b/c/up", "../../.."), ("leak", "a/b/c/up/../secret"), ("deep", &deep)]),
            ["a/b/c/up"]
        );
        // The text alone decides for a target that does not exist; links that the target goes through count.
        assert_eq!(kept(&[("a/b/c/up", "../../.."), ("none", "a/b/c/up/../nothing")]), ["a/b/c/up"]);
        // No link is made through another, in either order.
        assert_eq!(kept(&[("way", "a"), ("way/in", "b")]), ["way"]);
        // A circle is opened, and the rest of it leads to a path that does not exist.
        assert_eq!(kept(&[("one", "two"), ("two", "one")]), ["two"]);
        // A link that went through another leads nowhere when that other is gone.
        assert_eq!(kept(&[("out", ".."), ("by", "out/secret")]), ["by"]);
    }
}
