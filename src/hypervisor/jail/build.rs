//! Building a jail: from the needs of a driver to descriptors, limits and walls.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use stead_controllers::host::LaunchPlan;

use super::filters::Filters;
use super::libraries::libraries;
use super::view::View;
use super::{Jail, PREPARED_FIRST, UserRange, Walls, prepared};
use crate::host::cgroup::Group;
use crate::host::tap::{attach, attach_beside};
use crate::hypervisor::driver::{FIRST_DESCRIPTOR, Handed, Needs, VmmCommand};

/// Largest number of descriptors of a VMM: two for each disk and queue, those that wake its loops, and one for each
/// connection.
const DESCRIPTORS_MAX: u64 = 4096;
/// Memory that a VMM may lock, in bytes: the kernel's own default. Guests' RAM is not locked.
pub(super) const LOCKED_BYTES_MAX: u64 = 8 << 20;
/// Limit on a core dump, in bytes. The kernel gives none of this length, also where dumps go to a program, which a
/// limit of zero does not forbid.
pub(super) const CORE_BYTES_MAX: u64 = 1;

/// Number of views that are kept. A daemon needs one for each program, and others after its kernel was replaced.
const VIEWS_MAX: usize = 8;

/// Namespaces of a VMM, by their names below `/proc/PID/ns`. A kernel without one of them has no such file. The mount
/// namespace is that of the view.
const NAMESPACES: [(&str, libc::c_int); 5] = [
    ("pid", libc::CLONE_NEWPID),
    ("net", libc::CLONE_NEWNET),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
];

/// The files of a view, and whether programs in it have a network.
type ViewKey = (Vec<Seen>, bool);

/// The jails of one daemon. Clones share their views.
#[derive(Debug, Clone)]
pub struct Jails {
    pub(super) users: UserRange,
    /// A directory in which views are put together; nothing is seen there outside of them.
    point: PathBuf,
    pub(super) namespaces: u64,
    pub(super) has_filters: bool,
    has_walls: bool,
    views: Arc<Mutex<BTreeMap<ViewKey, Arc<View>>>>,
    programs: Arc<Mutex<BTreeMap<PathBuf, Vec<Seen>>>>,
}

/// A file as it was when it was seen. An upgrade replaces it, and a view goes on with the one that it has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    /// Time of the last change of a file, in seconds and nanoseconds. What is in a directory is seen as it is.
    changed: Option<(i64, i64)>,
}

impl Seen {
    fn of(path: PathBuf) -> io::Result<Self> {
        let meta = fs::metadata(&path)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        let changed = (!meta.is_dir()).then(|| (meta.ctime(), meta.ctime_nsec()));
        Ok(Self { path, identity: (meta.dev(), meta.ino()), changed })
    }

    fn is_current(&self) -> bool {
        Self::of(self.path.clone()).is_ok_and(|now| now == *self)
    }
}

/// The files of a VM that are open already, and its bounds.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) standard: [File; 3],
    pub(crate) ram: Option<OwnedFd>,
    /// A descriptor that keeps its number in a VMM without walls.
    pub(crate) kept: Option<RawFd>,
    pub(crate) group: Group,
    pub(crate) user: Option<u32>,
    /// Largest file that the VMM writes, in bytes.
    pub(crate) file_size_max: u64,
}

impl Jails {
    /// Prepares nothing yet: a view is made when it is first needed.
    #[must_use]
    pub fn new(users: UserRange, point: PathBuf) -> Self {
        let exists = |name: &str| Path::new("/proc/self/ns").join(name).exists();
        let flags = NAMESPACES.iter().filter(|(name, _)| exists(name));
        let namespaces = flags.fold(0, |all, (_, flag)| all | u64::from(flag.cast_unsigned()));
        let (views, programs) = (Arc::default(), Arc::default());
        Self { users, point, namespaces, has_filters: true, has_walls: true, views, programs }
    }

    /// Leaves out all walls.
    #[must_use]
    pub fn without_walls(self) -> Self {
        Self { has_walls: false, ..self }
    }

    /// Returns `true` if VMMs are put behind walls.
    pub(crate) fn has_walls(&self) -> bool {
        self.has_walls
    }

    /// Leaves out the filter that is the second wall, for tests that show that the other walls hold alone.
    #[must_use]
    pub fn without_filters(self) -> Self {
        Self { has_filters: false, ..self }
    }

    /// Returns the user of the VM of a plan.
    pub(crate) fn user(&self, plan: &LaunchPlan) -> io::Result<u32> {
        let user = self.users.user(plan.cid);
        user.ok_or_else(|| io::Error::other("the range of user ids for VMMs is too small"))
    }

    /// Opens what a VMM gets, and describes its process. Waits for the disk.
    pub(crate) fn build(&self, command: VmmCommand, given: Given) -> io::Result<Jail> {
        let VmmCommand { program, arguments, needs, .. } = command;
        let name = text(program.as_os_str().as_bytes())?;
        let ram = given.ram.as_ref();
        let mut all = vec![name.clone()];
        for argument in arguments {
            all.push(text(argument.as_bytes())?);
        }
        let mut limits = vec![(libc::RLIMIT_CORE, CORE_BYTES_MAX), (libc::RLIMIT_FSIZE, given.file_size_max)];
        let (mut descriptors, mut walls) = (Vec::new(), None);
        if let Some(needs) = &needs {
            descriptors = self.descriptors(needs, ram)?;
        }
        if let (Some(needs), Some(user)) = (needs, given.user) {
            limits.extend([
                (libc::RLIMIT_NOFILE, DESCRIPTORS_MAX),
                (libc::RLIMIT_NPROC, needs.threads_max),
                (libc::RLIMIT_MEMLOCK, LOCKED_BYTES_MAX),
            ]);
            walls = Some(self.walls(&program, &name, needs, user, ram)?);
        }
        let [input, output, errors] = given.standard;
        Ok(Jail {
            program: name,
            arguments: all,
            standard: [prepared(input)?, prepared(output)?, prepared(errors)?],
            given: descriptors,
            kept: given.kept,
            limits,
            group: given.group,
            walls,
        })
    }

    fn descriptors(&self, needs: &Needs, ram: Option<&OwnedFd>) -> io::Result<Vec<OwnedFd>> {
        let room = usize::try_from(PREPARED_FIRST - FIRST_DESCRIPTOR).unwrap_or(0);
        if needs.descriptors.len() > room {
            return Err(io::Error::other(format!("a VMM gets {room} descriptors at most")));
        }
        needs.descriptors.iter().map(|handed| prepared(open(handed, ram)?)).collect()
    }

    fn walls(
        &self,
        program: &Path,
        name: &CString,
        needs: Needs,
        user: u32,
        ram: Option<&OwnedFd>,
    ) -> io::Result<Walls> {
        let view = self.view(program, needs.files, false)?;
        let mut opens = Vec::new();
        for (path, handed) in &needs.opens {
            opens.push((text(path.as_os_str().as_bytes())?, open(handed, ram)?));
        }
        let filters = if self.has_filters { Some(Filters::new(name)?) } else { None };
        Ok(Walls { user, namespaces: self.namespaces, view, filters, opens })
    }

    /// Returns the view of a program with its libraries and these files, which is made once until one is replaced.
    pub(super) fn view(
        &self,
        program: &Path,
        files: Vec<PathBuf>,
        has_network: bool,
    ) -> io::Result<Arc<View>> {
        let mut all = self.files_of(program)?;
        all.extend(files);
        // A directory comes before what is below it, which is seen in it already.
        all.sort();
        all.dedup();
        let directories: Vec<PathBuf> = all.iter().filter(|path| path.is_dir()).cloned().collect();
        all.retain(|path| !directories.iter().any(|above| path != above && path.starts_with(above)));
        // Before the view is made: a file that is replaced meanwhile makes another view necessary.
        let seen = all.iter().cloned().map(Seen::of).collect::<io::Result<Vec<_>>>()?;
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (seen, has_network);
        if let Some(view) = views.get(&key) {
            return Ok(view.clone());
        }
        let view = Arc::new(View::make(&self.point, all, has_network)?);
        // Views of an earlier kernel or program are not needed again. Their VMMs keep them.
        if views.len() >= VIEWS_MAX {
            views.clear();
        }
        views.insert(key, view.clone());
        Ok(view)
    }

    /// Returns a program with its libraries, which are listed again when one of them is replaced.
    fn files_of(&self, program: &Path) -> io::Result<Vec<PathBuf>> {
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = programs.get(program)
            && known.iter().all(Seen::is_current)
        {
            return Ok(known.iter().map(|file| file.path.clone()).collect());
        }
        let before = Seen::of(program.to_owned())?;
        let mut known = libraries(program)?.into_iter().map(Seen::of).collect::<io::Result<Vec<_>>>()?;
        known.push(before);
        let files = known.iter().map(|file| file.path.clone()).collect();
        programs.insert(program.to_owned(), known);
        Ok(files)
    }
}

/// Opens a file as the VMM should have it.
fn open(handed: &Handed, ram: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let named = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"))
    };
    Ok(match handed {
        Handed::Disk { path, is_read_only } => {
            File::options().read(true).write(!is_read_only).open(path).map_err(named(path))?.into()
        }
        Handed::Log(path) => {
            File::options().append(true).create(true).open(path).map_err(named(path))?.into()
        }
        Handed::Ram => ram.ok_or_else(|| io::Error::other("the VM has no RAM of the host"))?.try_clone()?,
        Handed::Tap(name) => attach(name).map_err(named(Path::new(name.as_str())))?.into(),
        Handed::TapQueue(name) => attach_beside(name).map_err(named(Path::new(name.as_str())))?.into(),
        Handed::Listener(path) => UnixListener::bind(path).map_err(named(path))?.into(),
        Handed::Device(path) => {
            File::options().read(true).write(true).open(path).map_err(named(path))?.into()
        }
    })
}

pub(super) fn text(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_replaced_or_changed_is_another_one() {
        let scratch = tempfile::tempdir().expect("scratch");
        let [path, new] = ["program", "new"].map(|name| scratch.path().join(name));
        fs::write(&path, "one").expect("written");
        let seen = Seen::of(path.clone()).expect("there");
        assert!(seen.is_current());
        fs::write(&new, "one").expect("written");
        fs::rename(&new, &path).expect("replaced");
        assert!(!seen.is_current(), "an upgrade renames");
        let directory = Seen::of(scratch.path().to_owned()).expect("there");
        fs::remove_file(&path).expect("removed");
        assert!(!seen.is_current() && directory.is_current());
        Seen::of(path).expect_err("it is gone");
    }
}
