//! The walls around the process that carries mediated egress: those of a VMM, but in the host's network.
//!
//! The process makes connections, so it may make sockets of IPv4 and IPv6. Rules of the firewall restrict where its
//! user connects to.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::build::{CORE_BYTES_MAX, LOCKED_BYTES_MAX, text};
use super::filters::Filters;
use super::spawn::{Spawned, spawn};
use super::{Jail, Jails, Walls, prepared};
use crate::host::cgroup::Group;

/// Largest number of descriptors: two for each connection.
const DESCRIPTORS_MAX: u64 = 65_536;
/// Largest number of threads: one for each processor, and those that write logs.
const THREADS_MAX: u64 = 1024;
/// Largest file that it writes, in bytes: a log of one instance has two files of half the size.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// The process and its needs.
#[derive(Debug)]
pub(crate) struct CarrierCommand {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// The descriptors that it gets, in the order of their numbers.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Files that it reads by their paths.
    pub(crate) files: Vec<PathBuf>,
    /// The file of its messages.
    pub(crate) log: File,
    pub(crate) group: Group,
}

impl Jails {
    /// Returns the user of the process, or `None` if it has no walls.
    pub(crate) fn carrier_user(&self) -> Option<u32> {
        self.has_walls().then(|| self.users.mediator())
    }

    /// Spawns the process behind its walls, and returns when its program runs. Waits for the child.
    ///
    /// # Errors
    /// The error of a step that failed, named. Nothing runs then.
    pub(crate) fn spawn_carrier(&self, command: CarrierCommand) -> io::Result<Spawned> {
        spawn(self.carrier(command)?)
    }

    fn carrier(&self, command: CarrierCommand) -> io::Result<Jail> {
        let CarrierCommand { program, arguments, descriptors, files, log, group } = command;
        let name = text(program.as_os_str().as_bytes())?;
        let mut all = vec![name.clone()];
        for argument in arguments {
            all.push(text(argument.as_bytes())?);
        }
        let walls = match self.carrier_user() {
            Some(user) => Some(Walls {
                user,
                namespaces: self.namespaces & !u64::from(libc::CLONE_NEWNET.cast_unsigned()),
                view: self.view(&program, files, true)?,
                filters: if self.has_filters { Some(Filters::for_carrier(&name)?) } else { None },
                opens: Vec::new(),
            }),
            None => None,
        };
        let given: io::Result<Vec<OwnedFd>> = descriptors.into_iter().map(prepared).collect();
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        let standard = [File::open("/dev/null")?, log.try_clone()?, log];
        let [input, output, errors] = standard;
        Ok(Jail {
            program: name,
            arguments: all,
            standard: [prepared(input)?, prepared(output)?, prepared(errors)?],
            given: given?,
            kept: None,
            limits: vec![
                (libc::RLIMIT_CORE, CORE_BYTES_MAX),
                (libc::RLIMIT_FSIZE, FILE_BYTES_MAX),
                (libc::RLIMIT_NOFILE, most.map_or(DESCRIPTORS_MAX, |most| most.min(DESCRIPTORS_MAX))),
                (libc::RLIMIT_NPROC, THREADS_MAX),
                (libc::RLIMIT_MEMLOCK, LOCKED_BYTES_MAX),
            ],
            group,
            walls,
        })
    }
}
