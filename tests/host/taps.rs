//! TAPs whose device is removed while a process reads them.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::UdpSocket;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stead::host::tap::{
    Frames, OFFLOAD_CHECKSUM, OFFLOAD_TCP4, attach, attach_again, attach_beside, attach_queue, set_frames,
};
use stead_controllers::host::{LinkChange, LinkKind, LinkPlan, Links};
use stead_schemas::names::LinkName;

use crate::namespace::{PATIENCE, in_namespace, link_name, netlink, shell, uid};

const WORDS: &[u8] = b"to a guest";
/// Lengths of the headers of Ethernet, IPv4 and UDP, in bytes.
const HEADERS: usize = 14 + 20 + 8;

async fn make(name: &LinkName, has_queues: bool) {
    let links = netlink("test");
    let plan = LinkPlan { name: name.clone(), owner: uid('t'), kind: LinkKind::Tap, has_queues };
    links.create(&plan).await.unwrap_or_else(|error| panic!("{}", error.chain()));
    links.change(name, &LinkChange::Up).await.expect("raised");
    shell(&format!(
        "ip addr add 10.97.0.1/24 dev {name}; ip neigh replace 10.97.0.2 lladdr 02:0:0:0:0:2 dev {name}"
    ));
}

/// Returns the size of the header before a frame that the host sends through the TAP.
fn header(reader: &mut File) -> usize {
    let socket = UdpSocket::bind("10.97.0.1:0").expect("bound");
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "no frame came");
        // The kernel drops frames until it has noticed that the device has a reader.
        socket.send_to(WORDS, "10.97.0.2:9").expect("sent");
        let timeout = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        while poll(&mut [PollFd::new(&*reader, PollFlags::IN)], Some(&timeout)).expect("polled") > 0 {
            let mut frame = [0; 2048];
            let length = reader.read(&mut frame).expect("read");
            // Other frames are of the kernel itself.
            if frame[..length].ends_with(WORDS) {
                return length - HEADERS - WORDS.len();
            }
        }
    }
}

#[test]
fn a_descriptor_whose_tap_was_removed_is_attached_to_a_new_one_with_the_same_frames() {
    in_namespace(async || {
        let name = link_name("st-tap");
        let long = Frames { header: 12, offloads: OFFLOAD_CHECKSUM | OFFLOAD_TCP4 };
        make(&name, false).await;
        let mut reader = attach(&name).expect("attached");
        set_frames(&reader, long).expect("set");
        assert_eq!(header(&mut reader), 12);
        shell("ip link del st-tap");
        reader.read(&mut [0; 64]).expect_err("its device is gone");
        set_frames(&reader, long).expect_err("its device is gone");
        let duplicate = reader.try_clone().expect("duplicated");
        make(&name, false).await;
        attach_again(&duplicate, &name, long).unwrap_or_else(|error| panic!("{error}"));
        drop(duplicate);
        assert_eq!(header(&mut reader), 12);
        attach_again(&reader, &name, long).expect_err("it is attached already");
        attach(&name).expect_err("it has a reader");
        // A device keeps the form of its last reader: the next one chooses its own.
        drop(reader);
        let mut next = attach(&name).expect("attached");
        set_frames(&next, Frames::PLAIN).expect("set");
        assert_eq!(header(&mut next), 10);
    });
}

#[test]
fn a_tap_with_queues_has_one_owner_whose_queues_are_attached_to_a_new_one() {
    in_namespace(async || {
        let name = link_name("st-tap");
        let long = Frames { header: 12, offloads: OFFLOAD_CHECKSUM | OFFLOAD_TCP4 };
        make(&name, true).await;
        let first = attach(&name).expect("attached");
        let second = attach_beside(&name).expect("a further queue");
        let in_use = attach(&name).expect_err("it has an owner");
        assert_eq!(in_use.kind(), ErrorKind::ResourceBusy);
        shell("ip link del st-tap");
        make(&name, true).await;
        attach_again(&first, &name, long).unwrap_or_else(|error| panic!("{error}"));
        attach_queue(&second, &name).unwrap_or_else(|error| panic!("{error}"));
        attach(&name).expect_err("it has an owner again");
        drop(second);
        let mut first = first;
        assert_eq!(header(&mut first), 12);
        drop(first);
        attach(&name).expect("it is free");
        // A device for one reader has no further queue.
        shell("ip link del st-tap");
        make(&name, false).await;
        let _only = attach(&name).expect("attached");
        attach_beside(&name).expect_err("it has a reader");
    });
}
