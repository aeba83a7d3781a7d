//! The user ids of VMMs: one for each VM, which nobody else has.
//!
//! The id is the first of the range plus the guest context id of the instance. That number is allocated with the
//! instance, is unique among the instances of a store, and is free again only when the VM of the instance is gone.

use std::fs;
use std::io;

/// Number of ids in a range, and the multiple of which a range begins. So two ranges are the same, or have no id in
/// common.
pub const USERS: u32 = 1 << 20;

/// Files with user or group ids, as the third field of a line.
const ACCOUNTS: [&str; 2] = ["/etc/passwd", "/etc/group"];
/// Files with ranges of ids for containers: the first id and the number of ids are the second and third field.
const SUBORDINATES: [&str; 2] = ["/etc/subuid", "/etc/subgid"];

/// A range of user ids for VMMs; the group ids are the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
}

impl UserRange {
    /// Returns the range that begins at this id.
    ///
    /// # Errors
    /// A sentence on why it cannot be one.
    pub fn new(first: u32) -> Result<Self, String> {
        if first == 0 || !first.is_multiple_of(USERS) {
            return Err(format!("must be a multiple of {USERS}, and not 0"));
        }
        // The last id of all means "none" in system calls.
        if first.checked_add(USERS).is_none() {
            return Err("must leave room for all its ids".to_owned());
        }
        Ok(Self { first })
    }

    /// Checks that no account of this host has an id of the range.
    ///
    /// # Errors
    /// Returns an error that names the account.
    pub fn check_free(self) -> io::Result<()> {
        for (path, is_range) in
            ACCOUNTS.map(|path| (path, false)).into_iter().chain(SUBORDINATES.map(|path| (path, true)))
        {
            let text = match fs::read_to_string(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                text => text?,
            };
            if let Some(line) = text.lines().find(|line| self.overlaps(line, is_range)) {
                let name = line.split(':').next().unwrap_or_default();
                let why = format!("{name} in {path} has ids of VMMs, which begin at {}", self.first);
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
            }
        }
        Ok(())
    }

    fn overlaps(self, line: &str, is_range: bool) -> bool {
        let mut fields =
            line.split(':').skip(if is_range { 1 } else { 2 }).map(|field| field.parse::<u64>().ok());
        let Some(Some(start)) = fields.next() else { return false };
        let length = if is_range { fields.next().flatten().unwrap_or(0) } else { 1 };
        let (first, end) = (u64::from(self.first), u64::from(self.first) + u64::from(USERS));
        start < end && start.saturating_add(length) > first
    }

    /// Returns the id of the process that carries mediated egress. No VM has its number: vsock(7) reserves it.
    #[must_use]
    pub fn mediator(self) -> u32 {
        self.first + 1
    }

    /// Returns the id of the VM with this guest context id, or `None` when the range has too few.
    #[must_use]
    pub fn user(self, cid: u32) -> Option<u32> {
        (cid < USERS).then(|| self.first + cid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_equal_or_apart_and_each_vm_has_an_id_of_its_own() {
        for first in [0, 1, USERS + 1, u32::MAX, (u32::MAX / USERS) * USERS] {
            assert!(UserRange::new(first).is_err(), "{first}");
        }
        let range = UserRange::new(2 * USERS).expect("valid");
        assert_eq!((range.user(3), range.user(4)), (Some(2 * USERS + 3), Some(2 * USERS + 4)));
        assert_eq!(range.user(USERS), None);
    }

    #[test]
    fn an_account_or_a_range_of_containers_within_is_found() {
        let range = UserRange::new(USERS).expect("valid");
        for (line, is_range, overlaps) in [
            ("one:x:1048576:1048576::/:/bin/sh", false, true),
            ("one:x:1000:1048576::/:/bin/sh", false, false),
            ("one:100000:65536", true, false),
            ("one:100000:1000000", true, true),
            ("one:2097152:65536", true, false),
            ("", false, false),
        ] {
            assert_eq!(range.overlaps(line, is_range), overlaps, "{line}");
        }
        range.check_free().expect("hosts of tests have no such account");
    }
}
