//! TAP devices by `/dev/net/tun`, the only links that netlink cannot create.
//!
//! Guarantees: until [`Tap::persist`] a new device lives only as long as its descriptor: a crash before that leaves
//! nothing.
//! Never: takes over an existing device (`IFF_TUN_EXCL`).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::ioctl::{Getter, IntegerSetter, Opcode, Setter, ioctl, opcode};
use stead_schemas::names::LinkName;

const TUNSETIFF: Opcode = opcode::write::<std::ffi::c_int>(b'T', 202);
const TUNGETIFF: Opcode = opcode::read::<std::ffi::c_uint>(b'T', 210);
const TUNSETOFFLOAD: Opcode = opcode::write::<std::ffi::c_uint>(b'T', 208);
const TUNSETPERSIST: Opcode = opcode::write::<std::ffi::c_int>(b'T', 203);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<std::ffi::c_int>(b'T', 216);
const TUNSETOWNER: Opcode = opcode::write::<std::ffi::c_int>(b'T', 204);

/// The user who may attach to our devices without the right to configure the network. Everybody could attach to a device
/// without an owner who has a descriptor of `/dev/net/tun`, such as a VMM whose own device was removed.
const OWNER: usize = 0;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
/// Flag that VMMs need: offloads are negotiated through a header before each frame.
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_TUN_EXCL: u16 = 0x8000;
/// Flag of a device that several descriptors can be attached to, each of which is a queue of its own. A device has it
/// from its creation on, and every descriptor has to ask for it.
const IFF_MULTI_QUEUE: u16 = 0x0100;

/// The form in which frames pass between a TAP and the process at its other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frames {
    /// Size of the virtio header before each frame, in bytes.
    pub header: u8,
    /// The work on frames that the reader takes over, as a set of the `OFFLOAD_` flags.
    pub offloads: u32,
}

impl Frames {
    /// The form of a new TAP: whole frames with their checksums behind the shortest header.
    pub const PLAIN: Self = Self { header: 10, offloads: 0 };
    /// Size of the header of which modern virtio cards have one before each frame, in bytes.
    pub const LONG_HEADER: u8 = 12;
}

/// The reader completes checksums. The other flags have no meaning without this one.
pub const OFFLOAD_CHECKSUM: u32 = 0x01;
/// The reader cuts long frames of TCP over IPv4.
pub const OFFLOAD_TCP4: u32 = 0x02;
/// The reader cuts long frames of TCP over IPv6.
pub const OFFLOAD_TCP6: u32 = 0x04;
/// The reader cuts long frames of TCP that report congestion.
pub const OFFLOAD_CONGESTION: u32 = 0x08;

/// The device by which the kernel moves frames between a TAP and a guest, without the VMM.
pub const VHOST_NET: &str = "/dev/vhost-net";

/// Returns `true` if VMMs of this host can leave the moving of frames to the kernel.
#[must_use]
pub fn has_vhost_net() -> bool {
    // The kernel loads its module at the first open.
    OpenOptions::new().read(true).write(true).open(VHOST_NET).is_ok()
}

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
    pub(super) fn create(name: &LinkName, has_queues: bool) -> io::Result<Self> {
        let queues = if has_queues { IFF_MULTI_QUEUE } else { 0 };
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL | queues;
        match open(|file| attach_to(file, name, flags)) {
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

/// Attaches to a device that nobody else reads. The device keeps the form of frames that its last reader chose.
///
/// # Errors
/// Returns an error when the device cannot be opened, or `ResourceBusy` when it is in use.
pub fn attach(name: &LinkName) -> io::Result<File> {
    let mut form = Form::OneQueue;
    let file = open(|file| attach_queue(file, name).map(|found| form = found))?;
    // The kernel refuses a second reader only of a device that cannot have several queues.
    let is_shared = form == Form::Queues && queues_of(name)? > 1;
    if is_shared { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(file) }
}

/// Attaches to a device, as one of its readers if the device can have several queues.
///
/// # Errors
/// Returns an error when the device cannot be opened, or can have one reader only and has one.
pub fn attach_beside(name: &LinkName) -> io::Result<File> {
    open(|file| attach_queue(file, name).map(drop))
}

/// Returns the number of readers of a device, and 1 if it has none.
fn queues_of(name: &LinkName) -> io::Result<usize> {
    let mut queues = 0;
    for entry in fs::read_dir(Path::new("/sys/class/net").join(name.as_str()).join("queues"))? {
        queues += usize::from(entry?.file_name().as_encoded_bytes().starts_with(b"tx-"));
    }
    Ok(queues)
}

/// Attaches a descriptor whose device was removed to the device of this name, which nobody reads. Every process that has
/// the same open file reads and writes frames of this form again.
///
/// # Errors
/// Returns an error when the device is in use, or the descriptor is attached already.
pub fn attach_again(file: impl AsFd, name: &LinkName, frames: Frames) -> io::Result<()> {
    // The form belongs to the device. It is set while nobody reads, so that no frame is read in another form.
    set_frames(attach(name)?, frames)?;
    attach_queue(file, name).map(drop)
}

/// Sets the form of the frames of the device of this descriptor.
///
/// # Errors
/// Returns an error when the device of the descriptor was removed.
pub fn set_frames(tap: impl AsFd, frames: Frames) -> io::Result<()> {
    let offloads = usize::try_from(frames.offloads).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "rustix has no safe form of these requests")]
    // SAFETY: TUNSETVNETHDRSZ reads an integer, which `Setter` holds in place during the call. TUNSETOFFLOAD takes
    // its argument, a set of flags, by value.
    unsafe {
        ioctl(tap.as_fd(), Setter::<TUNSETVNETHDRSZ, std::ffi::c_int>::new(frames.header.into()))?;
        ioctl(tap.as_fd(), IntegerSetter::<TUNSETOFFLOAD>::new_usize(offloads))?;
    }
    Ok(())
}

/// Returns `true` if the device of this descriptor still exists. Its removal is not reported.
pub(super) fn is_attached(tap: impl AsFd) -> bool {
    #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
    // SAFETY: TUNGETIFF fills a `struct ifreq`, which `Request` lays out in full size and for which all bytes are
    // valid.
    let asked = unsafe { ioctl(tap.as_fd(), Getter::<TUNGETIFF, Request>::new()) };
    asked.is_ok()
}

fn open(attach: impl FnOnce(&File) -> io::Result<()>) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    attach(&file)?;
    #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
    // SAFETY: TUNSETOWNER takes its argument, a user id, by value.
    unsafe { ioctl(file.as_fd(), IntegerSetter::<TUNSETOWNER>::new_usize(OWNER)) }?;
    Ok(file)
}

/// Attaches a descriptor as the only queue of a device, or as one of several, whichever the device was made for.
///
/// # Errors
/// Returns an error when the descriptor is attached already, or the device can have no further queue.
pub fn attach_queue(file: impl AsFd, name: &LinkName) -> io::Result<Form> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    match attach_to(&file, name, flags) {
        // The kernel returns this for the other kind of device.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            attach_to(file, name, flags | IFF_MULTI_QUEUE).map(|()| Form::Queues)
        }
        done => done.map(|()| Form::OneQueue),
    }
}

/// The number of readers that a device can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    OneQueue,
    Queues,
}

fn attach_to(file: impl AsFd, name: &LinkName, flags: u16) -> io::Result<()> {
    let mut request = Request { name: [0; 16], flags, rest: [0; 22] };
    let bytes = name.as_str().as_bytes();
    // `LinkName` has at most 15 bytes, so a terminating zero stays.
    request.name[..bytes.len()].copy_from_slice(bytes);
    let _ = (request.flags, request.rest);
    #[expect(unsafe_code, reason = "rustix has no safe form of this request")]
    // SAFETY: TUNSETIFF reads (and writes back into) a `struct ifreq`, which `Request` lays out in
    // full size; `Setter` holds it in place during the call.
    unsafe { ioctl(file.as_fd(), Setter::<TUNSETIFF, Request>::new(request)) }?;
    Ok(())
}
