//! The parts that make this guest distinct from its siblings: machine id and random numbers.
//!
//! They are set at boot, and again in a guest that takes over another identity (a fork). Both times the present root
//! is the program's. An image's own machine id is replaced, because all VMs of the image would share it.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::ioctl::{NoArg, Opcode, Setter, ioctl, opcode};

/// The file of machine-id(5). D-Bus had the id first, at its own path, where some images still have it as a file.
const MACHINE_ID: &str = "/etc/machine-id";
const MACHINE_ID_OF_DBUS: &str = "/var/lib/dbus/machine-id";
/// Directory of systemd-journald.service(8). Each journal is in a subdirectory named by a machine id.
const JOURNAL: &str = "/var/log/journal";
/// Mode of the machine-id file: read-only for all, as set by systemd.
const MACHINE_ID_MODE: u32 = 0o444;

/// Limit on the random bytes credited at once. The kernel's pool holds 256 bits.
const SEED_BYTES_MAX: usize = 64;

/// Sets the machine id of this boot. The journal that systemd kept on the disk under the previous id is renamed to
/// the new one: otherwise it would neither be shown nor ever be cleaned up.
pub(crate) fn begin_boot(id: &str) -> io::Result<()> {
    begin_boot_below(Path::new("/"), id)
}

fn begin_boot_below(root: &Path, id: &str) -> io::Result<()> {
    let before = fs::read_to_string(below(root, MACHINE_ID)).unwrap_or_default();
    set_machine_id_below(root, id)?;
    let journal = below(root, JOURNAL);
    let before = before.trim();
    if check(before).is_ok() && before != id && journal.join(before).is_dir() {
        // A journal that cannot be renamed is as lost as it would have been without the attempt.
        let _ = fs::rename(journal.join(before), journal.join(id));
    }
    Ok(())
}

/// Gives the guest its machine id: 32 lower-case hexadecimal digits.
pub(crate) fn set_machine_id(id: &str) -> io::Result<()> {
    set_machine_id_below(Path::new("/"), id)
}

fn set_machine_id_below(root: &Path, id: &str) -> io::Result<()> {
    check(id)?;
    replace(&below(root, MACHINE_ID), id)?;
    // A link to the other file, which current Debian has, gives the same id already.
    let dbus_id = below(root, MACHINE_ID_OF_DBUS);
    if fs::symlink_metadata(&dbus_id).is_ok_and(|meta| meta.is_file()) {
        replace(&dbus_id, id)?;
    }
    Ok(())
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn check(id: &str) -> io::Result<()> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if id.len() == 32 && id.bytes().all(is_digit) && !id.bytes().all(|byte| byte == b'0') {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "the machine id is not 32 hexadecimal digits"))
}

/// Replaces a file, whole or not at all. A link of the image is replaced, not followed.
fn replace(path: &Path, id: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let scratch = path.with_extension("stead");
    let _ = fs::remove_file(&scratch);
    fs::write(&scratch, format!("{id}\n"))?;
    fs::set_permissions(&scratch, Permissions::from_mode(MACHINE_ID_MODE))?;
    fs::rename(&scratch, path)
}

/// Layout of `struct rand_pool_info` of linux/random.h, with only the used part of its buffer.
#[repr(C)]
struct PoolInfo {
    /// Number of credited bits.
    entropy_count: i32,
    /// Size of the buffer, in bytes.
    buf_size: i32,
    buf: [u8; SEED_BYTES_MAX],
}

/// Request number `RNDADDENTROPY`. It contains the size of the fixed part only.
const ADD_ENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
/// Request number `RNDRESEEDCRNG`.
const RESEED: Opcode = opcode::none(b'R', 0x07);

/// Mixes the host's random bytes into the guest's pool, credits them and reseeds the generator. Without the reseed,
/// two guests with the same memory would produce the same numbers for minutes.
#[expect(unsafe_code, reason = "no library has these two requests")]
pub(crate) fn credit_entropy(seed: &[u8]) -> io::Result<()> {
    let seed = &seed[..seed.len().min(SEED_BYTES_MAX)];
    let count = i32::try_from(seed.len()).unwrap_or(0);
    let mut info = PoolInfo { entropy_count: count * 8, buf_size: count, buf: [0; SEED_BYTES_MAX] };
    info.buf[..seed.len()].copy_from_slice(seed);
    let pool = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the two counts and `buf_size` bytes after them, which are there.
    unsafe { ioctl(&pool, Setter::<ADD_ENTROPY, PoolInfo>::new(info)) }?;
    // SAFETY: the request takes no argument.
    unsafe { ioctl(&pool, NoArg::<RESEED>::new()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef";

    fn root(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("stead-identity-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("etc")).expect("made");
        root
    }

    #[test]
    fn an_images_machine_id_is_replaced_and_its_links_are_not_followed() {
        let root = root("links");
        let id = || fs::read_to_string(root.join("etc/machine-id")).expect("there");
        set_machine_id_below(&root, ID).expect("an image without one");
        assert_eq!(id(), format!("{ID}\n"));
        let victim = root.join("victim");
        fs::write(&victim, "kept").expect("written");
        fs::remove_file(root.join("etc/machine-id")).expect("removed");
        std::os::unix::fs::symlink(&victim, root.join("etc/machine-id")).expect("linked");
        fs::create_dir_all(root.join("var/lib/dbus")).expect("made");
        fs::write(root.join("var/lib/dbus/machine-id"), "shared\n").expect("written");
        set_machine_id_below(&root, ID).expect("an image with a link");
        assert_eq!(
            (id(), fs::read_to_string(&victim).expect("there")),
            (format!("{ID}\n"), "kept".to_owned())
        );
        assert_eq!(fs::read_to_string(root.join("var/lib/dbus/machine-id")).expect("there"), id());
        let mode = fs::metadata(root.join("etc/machine-id")).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, MACHINE_ID_MODE);
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn the_journal_of_the_last_boot_goes_on_under_the_new_id_and_no_other_path_is_touched() {
        const NEXT: &str = "fedcba9876543210fedcba9876543210";
        let root = root("journal");
        let journal = root.join("var/log/journal");
        begin_boot_below(&root, ID).expect("the first, without a journal");
        fs::create_dir_all(journal.join(ID)).expect("made");
        fs::write(journal.join(ID).join("system.journal"), "said").expect("written");
        begin_boot_below(&root, NEXT).expect("the next");
        begin_boot_below(&root, NEXT).expect("again");
        assert_eq!(fs::read_to_string(journal.join(NEXT).join("system.journal")).expect("there"), "said");
        assert_eq!(fs::read_dir(&journal).expect("there").count(), 1);
        // The file's contents, set by an image or a guest, are not used as a path.
        fs::remove_file(root.join("etc/machine-id")).expect("removed");
        fs::write(root.join("etc/machine-id"), "../../../etc").expect("written");
        begin_boot_below(&root, ID).expect("whatever was there");
        assert!(root.join("etc").is_dir() && !journal.join(ID).exists());
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn what_is_no_machine_id_is_not_written() {
        let root = root("refused");
        for id in
            ["", "0123", &"0".repeat(32), &"A".repeat(32), &"g".repeat(32), &format!("{ID}0"), "../../etc/x"]
        {
            assert!(set_machine_id_below(&root, id).is_err(), "{id:?}");
        }
        assert_eq!(fs::read_dir(root.join("etc")).expect("there").count(), 0);
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn the_kernel_takes_what_root_credits() {
        // There is nothing to mix, so the test's host keeps its own numbers.
        let credited = credit_entropy(&[]);
        // Without the privilege the kernel refuses, which shows that it understood the request.
        let is_refused = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        assert!(credited.as_ref().is_ok() || credited.as_ref().is_err_and(is_refused), "{credited:?}");
    }
}
