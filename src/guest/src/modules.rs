//! Kernel modules of the initrd: those of every boot, and those for volumes, which cost time and are loaded when a
//! volume needs them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::BootError;

/// Directory with the modules of every boot.
const BOOT_DIRECTORY: &str = "/modules";
/// Directory with the modules for the disks of volumes, which the modules of every boot come before.
const VOLUMES_DIRECTORY: &str = "/volume-modules";
/// File in such a directory that lists its modules in the order in which they are loaded.
const ORDER: &str = "order";

/// The directory with the modules for volumes, until they are loaded. No path leads there after the switch of the root.
static FOR_VOLUMES: Mutex<Option<OwnedFd>> = Mutex::new(None);

fn failed<'a, E: std::fmt::Display>(name: &'a str) -> impl FnOnce(E) -> BootError + 'a {
    move |error| BootError::new("modules", format!("{name}: {error}"))
}

/// Names the program that loads modules on the kernel's request, if it is not at its usual path.
pub(crate) fn name_module_loader() {
    let programs = ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe", "/usr/bin/modprobe"];
    if let Some(program) = programs.iter().find(|program| Path::new(program).exists()) {
        let _ = fs::write("/proc/sys/kernel/modprobe", program);
    }
}

/// Loads the modules that every boot needs.
pub(crate) fn load_for_boot() -> Result<(), BootError> {
    if let Some(directory) = open_directory(BOOT_DIRECTORY)? {
        load_from(&directory)?;
    }
    // The modes are those of an ordinary host: the kernel decides what a program may do with the devices.
    for device in ["/dev/net/tun", "/dev/fuse"] {
        let _ = fs::set_permissions(device, fs::Permissions::from_mode(0o666));
    }
    // The module files only occupy memory from here on.
    let _ = fs::remove_dir_all(BOOT_DIRECTORY);
    *FOR_VOLUMES.lock().unwrap_or_else(PoisonError::into_inner) = open_directory(VOLUMES_DIRECTORY)?;
    Ok(())
}

/// Loads the modules that the disks of volumes need, unless that was done before.
pub(crate) fn load_for_volumes() -> Result<(), BootError> {
    let mut directory = FOR_VOLUMES.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(opened) = directory.as_ref() else { return Ok(()) };
    for name in load_from(opened)? {
        // The file only occupies memory from here on.
        let _ = unlinkat(opened, name, AtFlags::empty());
    }
    *directory = None;
    Ok(())
}

/// Opens a directory of modules. An initrd for a kernel with built-in drivers has none.
fn open_directory(path: &str) -> Result<Option<OwnedFd>, BootError> {
    match openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(failed(path)(error)),
    }
}

/// Loads the modules of a directory in the order of its list. Returns their names.
fn load_from(directory: &OwnedFd) -> Result<Vec<String>, BootError> {
    let names = order(directory).map_err(failed(ORDER))?;
    for name in &names {
        let file = file_in(directory, name).map_err(failed(name))?;
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(name)(error)),
        }
    }
    Ok(names)
}

/// Reads the list of a directory, which is empty if there is no list.
fn order(directory: &OwnedFd) -> io::Result<Vec<String>> {
    let mut list = String::new();
    match file_in(directory, ORDER) {
        Ok(mut file) => file.read_to_string(&mut list)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    Ok(list.lines().map(ToOwned::to_owned).collect())
}

fn file_in(directory: &OwnedFd, name: &str) -> io::Result<File> {
    Ok(File::from(openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_through_its_directory_even_if_no_path_leads_there() {
        let path = std::env::temp_dir().join(format!("stead-modules-{}", std::process::id()));
        fs::create_dir_all(&path).expect("made");
        let directory = open_directory(path.to_str().expect("text")).expect("opened").expect("it is there");
        assert_eq!(order(&directory).expect("no list"), Vec::<String>::new());
        fs::write(path.join(ORDER), "b.ko\na.ko\n").expect("written");
        let moved = path.with_extension("moved");
        fs::rename(&path, &moved).expect("moved");
        assert_eq!(order(&directory).expect("read"), ["b.ko", "a.ko"]);
        assert!(load_from(&directory).is_err_and(|error| error.reason.starts_with("b.ko: ")));
        assert!(open_directory(path.to_str().expect("text")).expect("no error").is_none());
        fs::remove_dir_all(moved).expect("removed");
    }

    #[test]
    fn a_guest_without_modules_for_volumes_has_nothing_to_load() {
        assert!(load_for_volumes().is_ok());
    }
}
