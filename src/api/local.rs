//! Processes of this host that connect to a Unix socket, and their rights.
//!
//! Guarantees: user, groups and process are those that the kernel recorded when the connection was made; root has
//! all scopes, and other users have the scopes that the configuration gives them or their groups.
//! Never: trusts a name or number that the client itself sends.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use tokio::net::UnixStream;

/// A user or group that needs no token, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Account {
    User(u32),
    Group(u32),
}

/// The users who need no token at a Unix socket, with their scopes. Root needs none and has all scopes.
#[derive(Debug, Clone, Default)]
pub struct LocalUsers(pub Vec<(Account, Vec<String>)>);

/// The process at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) uid: u32,
    /// The id of the process; `None` for a process that this daemon cannot see.
    pub(super) pid: Option<i32>,
    /// The scopes of a request without a token; `None` if it needs a token.
    pub(super) scopes: Option<Arc<[String]>>,
}

/// Number of supplementary groups that are read at the first attempt; few users have more.
const GROUPS_EXPECTED: usize = 64;
/// Largest number of supplementary groups of a process (NGROUPS_MAX of Linux).
const GROUPS_MAX: usize = 65_536;

impl LocalUsers {
    /// Identifies the process that connected.
    pub(super) fn peer(&self, stream: &UnixStream) -> io::Result<Peer> {
        let credentials = stream.peer_cred()?;
        let has_groups = self.0.iter().any(|(account, _)| matches!(account, Account::Group(_)));
        let mut groups = BTreeSet::from([credentials.gid()]);
        if has_groups && credentials.uid() != 0 {
            groups.extend(groups_of(stream.as_fd())?);
        }
        let scopes = self.scopes(credentials.uid(), &groups);
        Ok(Peer { uid: credentials.uid(), pid: credentials.pid(), scopes })
    }

    /// Returns the scopes of a user; `None` if the user needs a token.
    fn scopes(&self, uid: u32, groups: &BTreeSet<u32>) -> Option<Arc<[String]>> {
        if uid == 0 {
            return Some(Arc::from(["*".to_owned()]));
        }
        let is_named = |account: &Account| match account {
            Account::User(user) => *user == uid,
            Account::Group(group) => groups.contains(group),
        };
        let named: Vec<&(Account, Vec<String>)> =
            self.0.iter().filter(|(account, _)| is_named(account)).collect();
        let scopes: BTreeSet<&String> = named.iter().flat_map(|(_, scopes)| scopes).collect();
        (!named.is_empty()).then(|| scopes.into_iter().cloned().collect())
    }
}

/// Returns the supplementary groups that the process had when it connected.
#[expect(unsafe_code, reason = "no library reads this option of a socket")]
fn groups_of(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut room = GROUPS_EXPECTED;
    loop {
        let mut groups: Vec<libc::gid_t> = vec![0; room];
        let bytes = groups.len() * size_of::<libc::gid_t>();
        let mut length = libc::socklen_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: the buffer is writable for `length` bytes, and the kernel writes no more than that.
        let outcome = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if outcome == 0 {
            let count = usize::try_from(length).map_err(io::Error::other)? / size_of::<libc::gid_t>();
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || room == GROUPS_MAX {
            return Err(error);
        }
        room = GROUPS_MAX;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_everything_and_others_have_what_they_and_their_groups_are_given() {
        let entry = |account, scopes: &[&str]| (account, scopes.iter().map(ToString::to_string).collect());
        let users = LocalUsers(vec![
            entry(Account::User(1000), &["image:read"]),
            entry(Account::Group(50), &["instance:read", "image:read"]),
            entry(Account::Group(60), &[]),
        ]);
        let scopes = |uid: u32, groups: &[u32]| {
            users.scopes(uid, &groups.iter().copied().collect()).map(|scopes| scopes.join(" "))
        };
        assert_eq!(scopes(0, &[0]).as_deref(), Some("*"));
        assert_eq!(scopes(1000, &[1000]).as_deref(), Some("image:read"));
        assert_eq!(scopes(1000, &[7, 50]).as_deref(), Some("image:read instance:read"));
        assert_eq!(scopes(1001, &[60]).as_deref(), Some(""), "it is known, and may do nothing");
        assert_eq!(scopes(1001, &[1000]), None, "the number of a user is no group");
        assert_eq!(scopes(50, &[51]), None);
    }

    #[tokio::test]
    async fn the_kernel_names_the_process_and_its_groups() {
        let (near, _far) = UnixStream::pair().expect("made");
        let users = LocalUsers(vec![(Account::Group(50), Vec::new())]);
        let peer = users.peer(&near).expect("identified");
        assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        let own: Vec<u32> =
            rustix::process::getgroups().expect("read").into_iter().map(|group| group.as_raw()).collect();
        assert_eq!(groups_of(near.as_fd()).expect("read"), own);
    }
}
