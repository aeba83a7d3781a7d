//! Configuration of who reaches the API, and how: the Unix socket and its users, and TLS of the TCP listener.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::api::auth::Scope;

/// A user or group of this host, by number or name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AccountId {
    Number(u32),
    Name(String),
}

/// A user or group that needs no token at the Unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketUser {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<AccountId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<AccountId>,
    /// The scopes; by default all.
    #[serde(default = "all_scopes")]
    pub scopes: Vec<String>,
}

fn all_scopes() -> Vec<String> {
    vec!["*".to_owned()]
}

/// The certificate of the TCP listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "must be `self-signed`, or a map with `certificate` and `key`")]
pub enum TlsConfig {
    /// A certificate that the daemon makes at its first start.
    Own(SelfSigned),
    /// Files in PEM, which are read again when they change.
    Files(CertificateFiles),
}

/// The word for a certificate that the daemon makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SelfSigned {
    #[serde(rename = "self-signed")]
    SelfSigned,
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Longest path of a Unix socket, in bytes: the field of the kernel's address less the final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Largest number of entries of `socket_users`: each connection is compared with all of them.
const SOCKET_USERS_MAX: usize = 64;

/// Returns the problem of a TCP address of the API that other hosts reach without TLS, or `None`.
#[must_use]
pub fn exposure(key: &str, address: IpAddr, has_tls: bool, is_meant: bool) -> Option<String> {
    if address.to_canonical().is_loopback() || has_tls || is_meant {
        return None;
    }
    Some(format!(
        "{key}: {address} is not an address of loopback, so tokens would be sent unencrypted: set tls: self-signed or \
         tls: {{certificate: FILE, key: FILE}}; or insecure_without_tls: true where the way there is encrypted"
    ))
}

/// Checks the path of the socket.
pub(crate) fn check_socket(path: &Path, problems: &mut Vec<String>) {
    if !path.is_absolute() {
        problems.push("socket: must be an absolute path".to_owned());
    }
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        let most = SOCKET_PATH_BYTES_MAX;
        problems.push(format!("socket: {} has more than {most} bytes; set a shorter one", path.display()));
    }
}

/// Checks the users of the socket.
pub(crate) fn check_users(users: &[SocketUser], has_group: bool, problems: &mut Vec<String>) {
    if users.len() > SOCKET_USERS_MAX {
        problems.push(format!("socket_users: must have at most {SOCKET_USERS_MAX} entries"));
    }
    if !users.is_empty() && !has_group {
        problems.push("socket_users: set socket_group too: only its users and root can connect".to_owned());
    }
    for (index, user) in users.iter().enumerate() {
        if user.user.is_some() == user.group.is_some() {
            problems.push(format!("socket_users[{index}]: must have either user or group"));
        }
        let is_known = |scope: &str| scope == "*" || Scope::ALL.iter().any(|known| known.as_str() == scope);
        for scope in user.scopes.iter().filter(|scope| !is_known(scope)) {
            problems.push(format!("socket_users[{index}].scopes: there is no scope {scope:?}"));
        }
    }
}
