//! The address of the server: a Unix socket of this host, or an HTTP URL.
//!
//! Guarantees: the address is chosen once; a server that does not answer at it is not sought elsewhere, where another
//! program would get the token. A token goes to no socket of another user.

use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use reqwest::Url;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::Failure;

/// The socket of a daemon with the default configuration.
const DEFAULT_SOCKET: &str = "/run/stead/stead.sock";
/// The TCP address of a daemon with the default configuration. It is no name: a name may have further addresses, at
/// which another program listens.
const DEFAULT_URL: &str = "http://127.0.0.1:8080";
/// URL of requests over a Unix socket, where the host has no meaning.
const URL_OVER_SOCKET: &str = "http://localhost";
/// Beginning of addresses that are paths of sockets.
const SOCKET_SCHEME: &str = "unix://";

/// A stream of bytes of any kind.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug> Duplex for T {}

/// The address of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Base {
    Socket(PathBuf),
    Url(Url),
}

impl Default for Base {
    fn default() -> Self {
        Self::default_at(Path::new(DEFAULT_SOCKET))
    }
}

impl FromStr for Base {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("base URL {text}: {why}, as in {DEFAULT_URL}");
        if let Some(path) = text.strip_prefix(SOCKET_SCHEME) {
            let is_absolute = path.starts_with('/');
            let example =
                || format!("base URL {text}: the path must be absolute, as in unix://{DEFAULT_SOCKET}");
            return if is_absolute { Ok(Self::Socket(path.into())) } else { Err(example()) };
        }
        let url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong("must begin with unix://, http:// or https://"));
        }
        Ok(Self::Url(url))
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{SOCKET_SCHEME}{}", path.display()),
            Self::Url(url) => url.fmt(f),
        }
    }
}

impl Base {
    /// Returns this socket if it exists, or else the default URL.
    fn default_at(socket: &Path) -> Self {
        if fs::metadata(socket).is_ok_and(|seen| seen.file_type().is_socket()) {
            return Self::Socket(socket.into());
        }
        Self::Url(Url::parse(DEFAULT_URL).expect("a valid constant"))
    }

    /// Refuses an address at which no request could be answered, or at which another user would get the token.
    pub(super) fn check(&self, has_token: bool) -> Result<(), Failure> {
        match self {
            Self::Url(_) if !has_token => {
                let message = "no token: set STEAD_API_KEY to what `stead token create` prints";
                Err(Failure::Usage(message.to_owned()))
            }
            Self::Url(url) if url.as_str().trim_end_matches('/') == DEFAULT_URL => {
                let port = url.port_or_known_default().unwrap_or_default();
                match foreign_listener(port) {
                    Some(owner) => Err(Failure::Usage(format!(
                        "a program of user {owner} listens at port {port} of this host, and would get the token: set \
                         STEAD_BASE_URL if that is meant"
                    ))),
                    None => Ok(()),
                }
            }
            Self::Socket(path) if has_token => {
                let own = rustix::process::geteuid().as_raw();
                match fs::metadata(path).map(|seen| seen.uid()) {
                    Ok(owner) if owner != 0 && owner != own => Err(Failure::Usage(format!(
                        "{self} belongs to user {owner}, who would get the token"
                    ))),
                    // A socket that is not there is reported when it is used.
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Returns a warning if the token crosses a network without TLS.
    pub(super) fn warning(&self, has_token: bool) -> Option<String> {
        let Self::Url(url) = self else { return None };
        // An address of version 6 is in brackets.
        let host = url.host_str()?.trim_start_matches('[').trim_end_matches(']');
        let is_local =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        let is_open = has_token && url.scheme() == "http" && !is_local;
        is_open.then(|| format!("{url} is without TLS: whoever is on the way can read the token"))
    }

    /// Returns the URL of a path given by its segments, each of which may contain any characters.
    pub(super) fn url(&self, segments: &[&str]) -> Url {
        let mut url = match self {
            Self::Socket(_) => Url::parse(URL_OVER_SOCKET).expect("a valid constant"),
            Self::Url(url) => url.clone(),
        };
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    /// Connects to the server; TLS, where it is spoken, comes on top of the stream.
    pub(super) async fn connect(&self) -> io::Result<Box<dyn Duplex>> {
        let url = match self {
            Self::Socket(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
            Self::Url(url) => url,
        };
        let absent = || io::Error::new(io::ErrorKind::InvalidInput, "the URL has no host");
        let host = url.host_str().ok_or_else(absent)?;
        // An address of version 6 is in brackets.
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = url.port_or_known_default().ok_or_else(absent)?;
        Ok(Box::new(TcpStream::connect((host, port)).await?))
    }
}

/// Returns the user of a socket that listens at this TCP port of this host, unless it is root or this user. Everybody can
/// listen at the default port while no daemon does.
fn foreign_listener(port: u16) -> Option<u32> {
    let own = rustix::process::geteuid().as_raw();
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"].map(fs::read_to_string);
    let listeners = tables.iter().flatten().flat_map(|table| table.lines().filter_map(listener));
    listeners.filter(|(at, _)| *at == port).map(|(_, user)| user).find(|user| *user != 0 && *user != own)
}

/// Parses a line as in proc(5): number, local address, remote address, state, queues, timer, retransmissions, user.
/// Returns port and user of a socket that listens.
fn listener(line: &str) -> Option<(u16, u32)> {
    const LISTENS: &str = "0A";
    let mut words = line.split_ascii_whitespace().skip(1);
    let (_, port) = words.next()?.rsplit_once(':')?;
    let is_one = words.nth(1)? == LISTENS;
    let user = words.nth(3)?.parse().ok()?;
    is_one.then_some((u16::from_str_radix(port, 16).ok()?, user))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_of_a_listener_is_found() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 65534        0 1 1 0 100";
        assert_eq!(listener(line), Some((8080, 65534)));
        assert_eq!(listener(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(
            listener("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid"),
            None
        );
    }

    #[test]
    fn an_address_is_a_socket_or_a_url() {
        let read = |text: &str| text.parse::<Base>();
        assert_eq!(read("unix:///run/x.sock"), Ok(Base::Socket("/run/x.sock".into())));
        for wrong in ["unix://x.sock", "unix:x.sock", "localhost:8080", "ftp://x", ""] {
            assert!(read(wrong).expect_err(wrong).contains("base URL"), "{wrong}");
        }
        let shown = read("https://a.test:1/below").expect("valid").url(&["a b", "c"]).to_string();
        assert_eq!(shown, "https://a.test:1/below/a%20b/c");
        assert_eq!(read("unix:///s").expect("valid").url(&["a"]).to_string(), "http://localhost/a");
    }

    #[test]
    fn a_token_that_crosses_a_network_without_tls_is_warned_of() {
        let warned =
            |text: &str, has_token| text.parse::<Base>().expect("valid").warning(has_token).is_some();
        for open in ["http://192.0.2.1:8080", "http://a.test", "http://[2001:db8::1]:1"] {
            assert!(warned(open, true) && !warned(open, false), "{open}");
        }
        for closed in
            ["https://a.test", "http://127.0.0.2:1", "http://[::1]:1", "http://localhost", "unix:///s"]
        {
            assert!(!warned(closed, true), "{closed}");
        }
    }

    #[test]
    fn a_socket_that_exists_is_the_default_and_gets_no_token_of_others() {
        let scratch = tempfile::tempdir().expect("scratch");
        let path = scratch.path().join("s");
        assert_eq!(Base::default_at(&path).to_string(), "http://127.0.0.1:8080/");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert_eq!(Base::default_at(&path), Base::Socket(path.clone()));
        // A daemon that has ended leaves no other choice either.
        drop(listener);
        let base = Base::default_at(&path);
        assert_eq!(base, Base::Socket(path.clone()));
        base.check(true).expect("it is root's");
        std::os::unix::fs::chown(&path, Some(65_534), None).expect("tests run as root");
        let refused = base.check(true).expect_err("somebody else's");
        assert!(refused.text().contains("belongs to user 65534"), "{refused:?}");
        base.check(false).expect("nothing is sent that is secret");
    }
}
