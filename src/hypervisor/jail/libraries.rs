//! The shared libraries of a program, as its dynamic loader finds them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use object::Endianness;
use object::elf::FileHeader64;
use object::read::elf::{FileHeader, ProgramHeader};

/// The index of libraries by which a loader finds them without a search.
const CACHE: &str = "/etc/ld.so.cache";

/// Returns the loader and the libraries of a program, at the paths by which the loader opens them. A program that
/// is linked statically has none.
///
/// # Errors
/// Returns an error when a library is missing, or the loader does not list them.
pub(super) fn libraries(program: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(loader) = loader(program)? else { return Ok(Vec::new()) };
    let mut command = Command::new(&loader);
    command.arg("--list").arg(program).env_clear().stdin(Stdio::null());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("list the libraries of {}: {}", program.display(), why.trim())));
    }
    let mut all = listed(&text)?;
    all.push(loader);
    all.extend(Some(PathBuf::from(CACHE)).filter(|cache| cache.exists()));
    Ok(all)
}

/// Returns the loader that a program names.
fn loader(program: &Path) -> io::Result<Option<PathBuf>> {
    let bytes = fs::read(program)?;
    let failed = |error| io::Error::other(format!("{} is no program: {error}", program.display()));
    let header = FileHeader64::<Endianness>::parse(&*bytes).map_err(failed)?;
    let endian = header.endian().map_err(failed)?;
    for segment in header.program_headers(endian, &*bytes).map_err(failed)? {
        if let Some(name) = segment.interpreter(endian, &*bytes).map_err(failed)? {
            return Ok(Some(PathBuf::from(String::from_utf8_lossy(name).into_owned())));
        }
    }
    Ok(None)
}

/// Parses lines such as `libc.so.6 => /lib/libc.so.6 (0x7f)`. The kernel's own library has no path.
fn listed(text: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        let target = line.split_once("=>").map_or(line, |(_, target)| target.trim());
        if target.starts_with("not found") {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("a library is missing: {line}")));
        }
        if let Some(path) = target.split(" (").next().filter(|path| path.starts_with('/')) {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_files_and_its_loader_is_among_them() {
        let all = libraries(Path::new("/bin/sh")).expect("listed");
        assert!(all.len() > 1 && all.iter().all(|path| path.is_file()), "{all:?}");
        assert!(libraries(Path::new("/etc/passwd")).is_err());
    }

    #[test]
    fn a_list_is_parsed_and_a_missing_library_is_an_error() {
        let text =
            "\tlinux-vdso.so.1 (0x7ff)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f00)\n\t/lib64/ld.so (0x7f01)\n";
        assert_eq!(listed(text).expect("valid"), ["/lib/libc.so.6", "/lib64/ld.so"].map(PathBuf::from));
        assert!(listed("\tlibx.so => not found\n").is_err());
    }
}
