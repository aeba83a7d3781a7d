//! The seccomp programs of a VMM.
//!
//! The first refuses what no VMM needs: a second wall, should one of the others have a hole. The second stops the
//! opening of files for writing: while a VMM starts, the daemon answers (see `opens`), and afterwards no file can be
//! opened so at all. Reading needs no filter, because the view has nothing to hide.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

/// The two programs.
#[derive(Debug)]
pub(super) struct Filters {
    pub(super) refused: BpfProgram,
    pub(super) opens: BpfProgram,
}

/// System calls that are refused whatever their arguments.
const REFUSED: &[libc::c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_execveat,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_mount_setattr,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_setns,
    libc::SYS_unshare,
    // Interfaces of the kernel with many faults in the past.
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_fanotify_init,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    // The host.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    // Files by other ways than their descriptors.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_mknodat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_fchmodat,
    libc::SYS_fchmod,
    libc::SYS_fchownat,
    libc::SYS_fchown,
    libc::SYS_truncate,
    // Users and capabilities.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_personality,
    // The network: a VMM accepts connections on sockets that it was given, and makes none.
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
];

/// System calls that only x86-64 has.
#[cfg(target_arch = "x86_64")]
const REFUSED_OLD: &[libc::c_long] = &[
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_kexec_file_load,
    libc::SYS_mknod,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_unlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_creat,
    libc::SYS_fork,
    libc::SYS_vfork,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_OLD: &[libc::c_long] = &[];

/// Requests of ioctl(2) that change whose a TAP is, or take another one: TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETLINK,
/// TUNSETGROUP and TUNSETIFINDEX. The kernel asks for no capability, and the descriptor belongs to the host's network.
const TAP_REQUESTS: [u32; 6] = [0x4004_54ca, 0x4004_54cb, 0x4004_54cc, 0x4004_54cd, 0x4004_54ce, 0x4004_54da];
/// Group of the requests of sockets, and the bits of a request that are the group. They reach the host's network by a
/// listener or a TAP that a VMM was given: its links and addresses, and the hardware address of the TAP itself, which the
/// bridge then takes for one of the host's own.
const SOCKET_REQUESTS: u32 = 0x8900;
const REQUEST_GROUP: u32 = 0xff00;

/// Flags of clone(2) that make namespaces.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

impl Filters {
    /// Builds the programs for a child that runs the program of this name.
    ///
    /// # Errors
    /// Returns an error on a processor that is not supported.
    pub(super) fn new(program: &CStr) -> io::Result<Self> {
        Self::with(rules(program).map_err(io::Error::other)?)
    }

    /// Builds the programs for the process that carries egress, which runs the program of this name.
    ///
    /// # Errors
    /// Returns an error on a processor that is not supported.
    pub(super) fn for_carrier(program: &CStr) -> io::Result<Self> {
        let mut rules = rules(program).map_err(io::Error::other)?;
        allow_internet(&mut rules).map_err(io::Error::other)?;
        Self::with(rules)
    }

    fn with(rules: BTreeMap<i64, Vec<SeccompRule>>) -> io::Result<Self> {
        let action = SeccompAction::Errno(libc::EPERM as u32);
        let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch);
        let refused = filter.and_then(BpfProgram::try_from).map_err(io::Error::other)?;
        Ok(Self { refused, opens: opens() })
    }
}

/// Calls of the process that carries egress: it makes connections, and takes the sockets that it inherited by a
/// descriptor of itself. It sees no other process.
const OF_CARRIER: [libc::c_long; 5] =
    [libc::SYS_socket, libc::SYS_connect, libc::SYS_bind, libc::SYS_pidfd_open, libc::SYS_pidfd_getfd];

/// Adds the rule for sockets of other families than those of the Internet: they could load a module of the host.
fn allow_internet(rules: &mut BTreeMap<i64, Vec<SeccompRule>>) -> Result<(), seccompiler::BackendError> {
    for call in OF_CARRIER {
        rules.remove(&call);
    }
    let differs = |family: libc::c_int| {
        let family = u64::from(family.cast_unsigned());
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)
    };
    let other = SeccompRule::new(vec![differs(libc::AF_INET)?, differs(libc::AF_INET6)?])?;
    rules.insert(libc::SYS_socket, vec![other]);
    Ok(())
}

fn rules(program: &CStr) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().chain(REFUSED_OLD).map(|&call| (call, Vec::new())).collect();
    let masked = |mask: libc::c_int, value: libc::c_int| {
        let (mask, value) = (u64::from(mask.cast_unsigned()), u64::from(value.cast_unsigned()));
        let condition =
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)?;
        SeccompRule::new(vec![condition])
    };
    // A VMM makes threads, and no processes.
    let mut clones = vec![masked(libc::CLONE_THREAD, 0)?];
    for flag in NAMESPACES {
        clones.push(masked(flag, flag)?);
    }
    rules.insert(libc::SYS_clone, clones);
    let word = |argument: u8, comparison: SeccompCmpOp, value: u64| {
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, comparison, value)?])
    };
    let mut requests = vec![word(1, SeccompCmpOp::MaskedEq(REQUEST_GROUP.into()), SOCKET_REQUESTS.into())?];
    for request in TAP_REQUESTS {
        requests.push(word(1, SeccompCmpOp::Eq, request.into())?);
    }
    rules.insert(libc::SYS_ioctl, requests);
    // Blocks beyond the end of a file count for no limit on files, so they could fill the host's disk. A hole is made with
    // both flags.
    let (keeps, punches) = (libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE);
    let both = u64::from((keeps | punches).cast_unsigned());
    let reserves = word(1, SeccompCmpOp::MaskedEq(both), u64::from(keeps.cast_unsigned()))?;
    rules.insert(libc::SYS_fallocate, vec![reserves]);
    // A pair of another family could load a module of the host.
    let family = u64::from(libc::AF_UNIX.cast_unsigned());
    rules.insert(libc::SYS_socketpair, vec![word(0, SeccompCmpOp::Ne, family)?]);
    // The child runs the program by a name at this address; afterwards nothing is there.
    let address = program.as_ptr() as u64;
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, address)?;
    rules.insert(libc::SYS_execve, vec![SeccompRule::new(vec![other])?]);
    Ok(rules)
}

/// Offsets in `struct seccomp_data`: of the number of the call, the architecture, and the arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

#[cfg(target_arch = "x86_64")]
const OWN_ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const OWN_ARCHITECTURE: u32 = 0xc000_00b7;
/// First number of the calls of x86-64 with addresses of 32 bits. Other architectures have none that high.
const SHORT_ADDRESSES: u32 = 0x4000_0000;

/// Builds the second program. clone3 and openat2 have their flags in memory, where a filter cannot read them: with
/// "no such call" the C library uses the older calls.
fn opens() -> BpfProgram {
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    let mut program = vec![
        load(ARCHITECTURE),
        jump(libc::BPF_JEQ, OWN_ARCHITECTURE, 1),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
        // Jumps over the answer when the number is below.
        sock_filter { jt: 0, jf: 1, ..jump(libc::BPF_JGE, SHORT_ADDRESSES, 0) },
        answer(unknown),
    ];
    for call in [libc::SYS_clone3, libc::SYS_openat2] {
        program.extend([unless(call, 1), answer(unknown)]);
    }
    for (call, flags) in opening() {
        program.extend([
            unless(call, 5),
            load(ARGUMENTS + 8 * flags),
            statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, libc::O_ACCMODE as u32),
            // Reading is allowed.
            sock_filter { jt: 0, jf: 1, ..jump(libc::BPF_JEQ, libc::O_RDONLY as u32, 0) },
            answer(libc::SECCOMP_RET_ALLOW),
            answer(libc::SECCOMP_RET_USER_NOTIF),
        ]);
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}

/// Returns the calls that open a file, each with the index of the argument that has the flags.
fn opening() -> Vec<(libc::c_long, u32)> {
    #[cfg(target_arch = "x86_64")]
    let old = Some((libc::SYS_open, 1));
    #[cfg(not(target_arch = "x86_64"))]
    let old = None;
    [Some((libc::SYS_openat, 2)), old].into_iter().flatten().collect()
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap_or(0), jt: 0, jf: 0, k }
}

/// Jumps over this many instructions if the comparison is true.
fn jump(comparison: u32, k: u32, over: u8) -> sock_filter {
    sock_filter { jt: over, ..statement(libc::BPF_JMP | comparison | libc::BPF_K, k) }
}

/// Jumps over this many instructions unless the call is this one.
fn unless(call: libc::c_long, over: u8) -> sock_filter {
    sock_filter { jt: 0, jf: over, ..jump(libc::BPF_JEQ, u32::try_from(call).unwrap_or(u32::MAX), 0) }
}

fn answer(action: u32) -> sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, action)
}
