//! The attempts of the escape table. Each returns `Ok` if it reached what it should not reach.
#![expect(unsafe_code, reason = "most attempts are system calls that no library has")]

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// The objects of the host that a process tries to reach.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// A directory of the host with files and sockets of others.
    pub(crate) directory: String,
    /// The port of the API.
    pub(crate) port: u16,
    /// A process of the host.
    pub(crate) pid: i32,
}

impl Target {
    pub(crate) fn text(&self) -> String {
        format!("{},{},{}", self.port, self.pid, self.directory)
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ',');
        let (port, pid, directory) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self { directory: directory.to_owned(), port: port.parse().ok()?, pid: pid.parse().ok()? })
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }
}

type Attempt = fn(&Target) -> io::Result<()>;

pub(crate) const ATTEMPTS: &[(&str, Attempt)] = &[
    ("read another VM's disk", |on| File::open(on.path("disk")).map(drop)),
    ("write another VM's disk", |on| File::options().write(true).open(on.path("disk")).map(drop)),
    ("read another VM's memory", |on| File::open(on.path("memory")).map(drop)),
    ("connect to another VM's monitor", |on| UnixStream::connect(on.path("qmp.sock")).map(drop)),
    ("connect to the API's port", |on| TcpStream::connect(("127.0.0.1", on.port)).map(drop)),
    ("connect to the API's socket", |on| UnixStream::connect(on.path("api.sock")).map(drop)),
    ("read a key file", |on| fs::read(on.path("key")).map(drop)),
    ("read /etc/shadow", |_| fs::read("/etc/shadow").map(drop)),
    ("read /etc/passwd", |_| fs::read("/etc/passwd").map(drop)),
    ("list the host's directories", |_| fs::read_dir("/var").map(drop)),
    ("make a raw socket", |_| socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)),
    ("make a packet socket", |_| socket(libc::AF_PACKET, libc::SOCK_RAW, 0)),
    ("list the host's links", |_| {
        // The loopback device is up on the host, and not in a new namespace.
        socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
        TcpStream::connect(("127.0.0.1", 9)).map(drop).or_else(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => Ok(()),
            _ => Err(error),
        })
    }),
    ("trace a process", |on| {
        call(libc::SYS_ptrace, [u32_flag(libc::PTRACE_SEIZE), u(on.pid), 0, 0, 0])?;
        call(libc::SYS_ptrace, [u32_flag(libc::PTRACE_DETACH), u(on.pid), 0, 0, 0]).or(Ok(()))
    }),
    ("read a process's memory", |on| File::open(format!("/proc/{}/mem", on.pid)).map(drop)),
    ("list processes", |on| fs::read(format!("/proc/{}/cmdline", on.pid)).map(drop)),
    ("signal a process", |on| call(libc::SYS_kill, [u(on.pid), 0, 0, 0, 0])),
    ("open a process's descriptor", |on| call(libc::SYS_pidfd_open, [u(on.pid), 0, 0, 0, 0])),
    ("mount a file system", |on| {
        let point = on.path("");
        mount(&point)?;
        call(libc::SYS_umount2, [c(&point).as_ptr() as usize, u(libc::MNT_DETACH), 0, 0, 0])
    }),
    ("make a mount namespace", |_| call(libc::SYS_unshare, [u(libc::CLONE_NEWNS), 0, 0, 0, 0])),
    ("make a network namespace", |_| call(libc::SYS_unshare, [u(libc::CLONE_NEWNET), 0, 0, 0, 0])),
    ("make a user namespace", |_| {
        // Of this thread alone it is not possible: a process of one thread is needed.
        let flags = u(libc::CLONE_NEWUSER | libc::SIGCHLD);
        in_child(call_for_child(libc::SYS_clone, flags))
    }),
    ("make a device node", |on| {
        let path = on.path("node");
        let made = node(&path);
        let _ = fs::remove_file(path);
        made
    }),
    ("open the kernel's log", |_| File::open("/dev/kmsg").map(drop)),
    ("open a device", |_| File::options().read(true).write(true).open("/dev/net/tun").map(drop)),
    ("become root", |_| {
        call(libc::SYS_setresuid, [0; 5])?;
        // SAFETY: the call has no arguments.
        if unsafe { libc::geteuid() } == 0 { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }),
    ("take groups", |_| call(libc::SYS_setgroups, [0; 5])),
    ("load a kernel module", |_| {
        // For root the error is that this is no module.
        let loaded = call(libc::SYS_init_module, [c"".as_ptr() as usize, 0, c"".as_ptr() as usize, 0, 0]);
        loaded.or_else(|error| if error.raw_os_error() == Some(libc::ENOEXEC) { Ok(()) } else { Err(error) })
    }),
    ("load a BPF program", |_| {
        // A map of the kind array: key 4, value 4, one entry.
        let map = [2_u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        call(libc::SYS_bpf, [0, map.as_ptr() as usize, size_of_val(&map), 0, 0])
    }),
    ("add a key", |_| {
        let (kind, name) = (c"user", c"escape");
        call(
            libc::SYS_add_key,
            [kind.as_ptr() as usize, name.as_ptr() as usize, name.as_ptr() as usize, 6, usize::MAX - 2],
        )
    }),
    ("make an io_uring", |_| {
        let parameters = [0_u32; 30];
        call(libc::SYS_io_uring_setup, [4, parameters.as_ptr() as usize, 0, 0, 0])
    }),
    ("set the host's name", |_| {
        let mut name = [0_u8; 65];
        // SAFETY: the length is that of the buffer.
        if unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let length = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        call(libc::SYS_sethostname, [name.as_ptr() as usize, length, 0, 0, 0])
    }),
    ("make a process", |_| in_child(call_for_child(libc::SYS_clone, u(libc::SIGCHLD)))),
    ("make threads without end", |_| threads()),
    ("run another program", |_| {
        // This program is there in any case.
        std::process::Command::new(std::env::args().next().unwrap_or_default())
            .arg("--list")
            .stdout(std::process::Stdio::null())
            .status()
            .map(drop)
    }),
    ("write into the root directory", |_| create("/escape-test")),
    ("write into /tmp", |_| create("/tmp/escape-test")),
    ("write beside the host's files", |on| create(&on.path("escape-test"))),
    ("reopen a read-only disk for writing", |_| {
        File::options().write(true).open("/proc/self/fd/0").map(drop)
    }),
];

fn c(text: &str) -> CString {
    CString::new(text).expect("no zero")
}

fn u(value: libc::c_int) -> usize {
    usize::try_from(value).expect("not negative")
}

fn u32_flag(value: u32) -> usize {
    usize::try_from(value).expect("fits")
}

fn call(number: libc::c_long, arguments: [usize; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the arguments are those of the call, and pointers among them are to values that outlive it.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes a process that ends at once. Returns its pid.
fn call_for_child(number: libc::c_long, flags: usize) -> io::Result<libc::pid_t> {
    // SAFETY: the child has a copy of the memory and only ends.
    let pid = unsafe { libc::syscall(number, flags, 0, 0, 0, 0) };
    if pid == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) }
    }
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(libc::pid_t::try_from(pid).expect("a pid")) }
}

fn in_child(pid: io::Result<libc::pid_t>) -> io::Result<()> {
    let pid = pid?;
    // SAFETY: a status is not asked for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    Ok(())
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<()> {
    call(libc::SYS_socket, [u(family), u(kind | libc::SOCK_CLOEXEC), u(protocol), 0, 0])
}

fn mount(point: &str) -> io::Result<()> {
    let (point, kind) = (c(point), c("tmpfs"));
    call(libc::SYS_mount, [kind.as_ptr() as usize, point.as_ptr() as usize, kind.as_ptr() as usize, 0, 0])
}

fn node(path: &str) -> io::Result<()> {
    // The null device.
    let (path, mode, device) = (c(path), u32_flag(libc::S_IFCHR | 0o600), 0x103);
    call(libc::SYS_mknodat, [usize::MAX - 99, path.as_ptr() as usize, mode, device, 0])
}

fn create(path: &str) -> io::Result<()> {
    let created = File::create(path).map(drop);
    let _ = fs::remove_file(path);
    created
}

/// Makes more threads than a VMM may have.
fn threads() -> io::Result<()> {
    const MANY: usize = 200;
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let stopped = std::sync::Arc::new(std::sync::Mutex::new(stopped));
    let mut all = Vec::new();
    let mut result = Ok(());
    for _ in 0..MANY {
        let stopped = stopped.clone();
        let wait = move || drop(stopped.lock().map(|stopped| stopped.recv()));
        match std::thread::Builder::new().stack_size(64 << 10).spawn(wait) {
            Ok(thread) => all.push(thread),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    drop(stop);
    all.into_iter().for_each(|thread| drop(thread.join()));
    result
}
