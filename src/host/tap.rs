//! TAP devices by `/dev/net/tun`, the only links that netlink cannot create.
//!
//! Guarantees: until [`Tap::persist`] a new device lives only as long as its descriptor: a crash before that leaves
//! nothing.
//! Never: takes over an existing device (`IFF_TUN_EXCL`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Getter, IntegerSetter, Opcode, Setter, ioctl, opcode};
use stead_schemas::names::LinkName;

const TUNSETIFF: Opcode = opcode::write::<std::ffi::c_int>(b'T', 202);
const TUNGETIFF: Opcode = opcode::read::<std::ffi::c_uint>(b'T', 210);
const TUNSETOFFLOAD: Opcode = opcode::write::<std::ffi::c_uint>(b'T', 208);
const TUNSETPERSIST: Opcode = opcode::write::<std::ffi::c_int>(b'T', 203);
const TUNSETOWNER: Opcode = opcode::write::<std::ffi::c_int>(b'T', 204);

/// The user who may attach to our devices without the right to configure the network. Everybody could attach to a device
/// without an owner who has a descriptor of `/dev/net/tun`, such as a VMM whose own device was removed.
const OWNER: usize = 0;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
/// Flag that VMMs need: offloads are negotiated through a header before each frame.
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_TUN_EXCL: u16 = 0x8000;

/// A `struct ifreq` with flags as its value.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// A device that disappears when this is dropped.
#[derive(Debug)]
pub(super) struct Tap(File);

impl Tap {
    /// Creates the device. The error is `AlreadyExists` when a device of that name exists.
    pub(super) fn create(name: &LinkName) -> io::Result<Self> {
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL;
        match open(name, flags) {
            // The kernel returns this for a name that is in use.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                Err(io::ErrorKind::AlreadyExists.into())
            }
            other => other.map(Self),
        }
    }

    /// Keeps the device beyond the life of its creator.
    pub(super) fn persist(self) -> io::Result<()> {
        #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
        // SAFETY: TUNSETPERSIST takes its argument by value, and 1 is a valid one.
        let done = unsafe { ioctl(self.0.as_fd(), IntegerSetter::<TUNSETPERSIST>::new_usize(1)) };
        Ok(done?)
    }
}

/// Attaches to a device. A VMM that gets the descriptor reads and writes frames on it, each preceded by a header of
/// ten bytes.
///
/// # Errors
/// Returns an error when the device cannot be opened, or is in use.
pub fn attach(name: &LinkName) -> io::Result<File> {
    open(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
}

/// Requests whole frames with their checksums, whatever offloads an earlier reader accepted.
pub(super) fn take_plain_frames(tap: &File) -> io::Result<()> {
    #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
    // SAFETY: TUNSETOFFLOAD takes its argument, a set of flags, by value.
    let done = unsafe { ioctl(tap.as_fd(), IntegerSetter::<TUNSETOFFLOAD>::new_usize(0)) };
    Ok(done?)
}

/// Returns `true` if the device of this descriptor still exists. Its removal is not reported.
pub(super) fn is_attached(tap: impl AsFd) -> bool {
    #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
    // SAFETY: TUNGETIFF fills a `struct ifreq`, which `Request` lays out in full size and for which all bytes are
    // valid.
    let asked = unsafe { ioctl(tap.as_fd(), Getter::<TUNGETIFF, Request>::new()) };
    asked.is_ok()
}

fn open(name: &LinkName, flags: u16) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = Request { name: [0; 16], flags, rest: [0; 22] };
    let bytes = name.as_str().as_bytes();
    // `LinkName` has at most 15 bytes, so a terminating zero stays.
    request.name[..bytes.len()].copy_from_slice(bytes);
    let _ = (request.flags, request.rest);
    #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
    // SAFETY: TUNSETIFF reads (and writes back into) a `struct ifreq`, which `Request` lays out in
    // full size; `Setter` holds it in place during the call.
    unsafe { ioctl(file.as_fd(), Setter::<TUNSETIFF, Request>::new(request)) }?;
    #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
    // SAFETY: TUNSETOWNER takes its argument, a user id, by value.
    unsafe { ioctl(file.as_fd(), IntegerSetter::<TUNSETOWNER>::new_usize(OWNER)) }?;
    Ok(file)
}
