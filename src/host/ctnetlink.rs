//! Parsing of one message of the kernel's table of connections from a datagram.

use std::io;

use netlink_packet_netfilter::NetfilterMessage;
use rtnetlink::packet_core::{ErrorMessage, NetlinkMessage};

/// Number of the connection table among the netfilter subsystems (`nfnetlink.h`).
const SUBSYSTEM_CONNECTIONS: u8 = 1;
/// Position of a message's type, in bytes. The subsystem is in its second byte. Types without a subsystem are control
/// messages.
const TYPE: std::ops::Range<usize> = 4..6;

/// Parses the first message. A message that is not about connections is an error: the parser for the rest of
/// netfilter panics on malformed messages.
pub(super) fn first(datagram: &[u8]) -> io::Result<NetlinkMessage<NetfilterMessage>> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    match datagram.get(TYPE) {
        Some([_, 0 | SUBSYSTEM_CONNECTIONS]) => {}
        _ => return Err(invalid("it is not about connections")),
    }
    NetlinkMessage::deserialize(datagram).map_err(|error| invalid(&error.to_string()))
}

/// Returns the error that the kernel reported. The crate's own conversion negates any number.
pub(super) fn error_of(message: &ErrorMessage) -> io::Error {
    io::Error::from_raw_os_error(message.raw_code().saturating_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_code_of_an_error_is_taken() {
        let mut message = ErrorMessage::default();
        for (code, expected) in [(i32::MIN, i32::MAX), (-2, 2)] {
            message.code = std::num::NonZeroI32::new(code);
            assert_eq!(error_of(&message).raw_os_error(), Some(expected));
        }
    }

    #[test]
    fn a_malformed_message_of_another_part_of_netfilter_is_an_error() {
        // This is a set element (NFT_MSG_DELSETELEM) whose key claims more bytes than its item has.
        let mut datagram = vec![0; 65];
        datagram[..8].copy_from_slice(&[0x40, 0, 0, 0, 0x0e, 0x0a, 2, 0]);
        datagram[16] = 2;
        datagram[20..32].copy_from_slice(b"\x0a\0\x01\0stead\0\0\0");
        datagram[32..48]
            .copy_from_slice(&[0x20, 0, 3, 0x80, 0x1c, 0, 1, 0x80, 0x14, 0, 1, 0x80, 0x18, 0, 1, 0]);
        first(&datagram).expect_err("it is about sets");
        first(&datagram[..5]).expect_err("it is cut");
    }
}
