//! `stead cp` and `stead stat`: files between this host and a guest.
//!
//! Paths are bytes on both sides, in any encoding. The guest is not trusted here either: names that lead out
//! of the destination end the copy, links that do are left out with a warning (`links`), and nothing is
//! written or read through a link.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use futures::{SinkExt, StreamExt};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{CopyFrame, CopyHeader, PathView, path_fields};
use stead_schemas::guest::BytePath;
use tokio_tungstenite::tungstenite::Message;

use super::client::{Client, Socket};
use super::show::{print, shown};
use super::{Failure, Output, links};

#[derive(Debug, Args)]
pub(crate) struct Cp {
    source: OsString,
    target: OsString,
    /// Keep owners; needs root on the receiving side.
    #[arg(short, long)]
    archive: bool,
    /// Copy the targets of links. Without it, links out of a guest are copied as links, and links into a
    /// guest are left out.
    #[arg(short = 'L', long)]
    follow_links: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StatPath {
    /// NAME:PATH
    location: OsString,
    #[arg(short = 'L', long)]
    follow_links: bool,
}

const CHUNK_BYTES: usize = 256 << 10;

/// Parses `NAME:PATH`, unless the colon belongs to a path of this host.
fn remote(text: &OsStr) -> Option<(&str, BytePath)> {
    let bytes = text.as_bytes();
    let colon = bytes.iter().position(|&byte| byte == b':')?;
    let name = std::str::from_utf8(&bytes[..colon]).ok()?;
    let is_name = !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    is_name.then(|| (name, BytePath(bytes[colon + 1..].to_vec())))
}

pub(super) async fn cp(client: &Client, cp: Cp) -> Result<(), Failure> {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bytes} {bytes_per_sec} {wide_msg}") {
        bar.set_style(style);
    }
    let result = match (remote(&cp.source), remote(&cp.target)) {
        (None, Some((name, path))) => upload(client, &cp, name, &path, &bar).await,
        (Some((name, path)), None) => download(client, &cp, name, &path, &bar).await,
        _ => Err(Failure::Usage("one of the two must be NAME:PATH, and only one".to_owned())),
    };
    bar.finish_and_clear();
    result
}

pub(super) async fn stat(client: &Client, stat: StatPath, output: Output) -> Result<(), Failure> {
    let (name, path) =
        remote(&stat.location).ok_or_else(|| Failure::Usage("the place must be NAME:PATH".to_owned()))?;
    let info = fetch_info(client, name, &path, stat.follow_links).await?;
    if !info.exists {
        return Err(Failure::NotFound(format!(
            "{}: {}",
            path.shown(),
            info.error.as_deref().unwrap_or("not there")
        )));
    }
    let kind = match (info.is_dir, info.is_file, info.is_symlink) {
        (true, ..) => "directory",
        (_, true, _) => "file",
        (.., true) => "link",
        _ => "other",
    };
    print(&info, output, &["PATH", "KIND", "MODE", "SIZE", "TARGET"], || {
        let target = info.link_target.clone().unwrap_or_default();
        vec![vec![path.shown(), kind.to_owned(), format!("{:04o}", info.mode), info.size.to_string(), target]]
    })
}

async fn fetch_info(
    client: &Client,
    name: &str,
    path: &BytePath,
    follow_links: bool,
) -> Result<PathView, Failure> {
    let (text, base64) = path_fields(path);
    // The server reads only one of the two parameters: the plain one would be the displayed form of the
    // path.
    let location = base64.map_or(("path", text), |base64| ("path_base64", base64));
    let query = [(location.0, &*location.1), ("follow_links", if follow_links { "true" } else { "false" })];
    client.json(client.request(Method::GET, &["instances", name, "stat"]).query(&query)).await
}

fn local(path: &Path) -> impl Fn(std::io::Error) -> Failure + '_ {
    move |error| Failure::Other(format!("{}: {error}", path.display()))
}

fn broken() -> Failure {
    Failure::Other("the connection was lost before the copy ended".to_owned())
}

// Upload: to the guest.

async fn upload(
    client: &Client,
    cp: &Cp,
    name: &str,
    path: &BytePath,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let source = Path::new(&cp.source);
    let is_directory = fetch_info(client, name, path, true).await?.is_dir;
    let target = match source.file_name() {
        Some(base) if is_directory => below(path, base),
        _ => path.clone(),
    };
    let mut pending = vec![(source.to_owned(), target)];
    while let Some((from, to)) = pending.pop() {
        // The wire has no form for links into a guest. The target of a link is copied when that was asked
        // for; otherwise the author of the directory would choose which files of this host are sent.
        let is_named = from == source;
        let meta =
            if cp.follow_links || is_named { fs::metadata(&from) } else { fs::symlink_metadata(&from) };
        let meta = meta.map_err(local(&from))?;
        if meta.is_symlink() {
            eprintln!(
                "stead: {}: left out, a link (-L copies what it leads to)",
                shown(&from.display().to_string())
            );
            continue;
        }
        if !meta.is_dir() && !meta.is_file() {
            eprintln!(
                "stead: {}: left out, neither a file nor a directory",
                shown(&from.display().to_string())
            );
            continue;
        }
        bar.set_message(shown(&to.shown()));
        send_entry(client, cp, name, &from, &to, &meta, bar).await?;
        if meta.is_dir() {
            for entry in fs::read_dir(&from).map_err(local(&from))? {
                let entry = entry.map_err(local(&from))?;
                pending.push((entry.path(), below(&to, &entry.file_name())));
            }
        }
    }
    Ok(())
}

/// Returns the path of an entry of a directory in the guest.
fn below(directory: &BytePath, name: &OsStr) -> BytePath {
    let end = directory.0.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    BytePath([&directory.0[..end], b"/", name.as_bytes()].concat())
}

/// Makes the first frame of a copy, with its direction and path.
fn asking(direction: &str, path: &BytePath) -> Value {
    let (text, base64) = path_fields(path);
    let mut request = json!({ "direction": direction, "guest_path": text });
    if let Some(base64) = base64 {
        request["guest_path_base64"] = base64.into();
    }
    request
}

async fn send_entry(
    client: &Client,
    cp: &Cp,
    name: &str,
    from: &Path,
    to: &BytePath,
    meta: &fs::Metadata,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut request = asking("to", to);
    request["is_dir"] = meta.is_dir().into();
    request["mode"] = (meta.mode() & 0o7777).into();
    if meta.is_file() {
        request["mtime"] = meta.mtime().into();
    }
    if cp.archive {
        request["uid"] = meta.uid().into();
        request["gid"] = meta.gid().into();
    }
    let mut socket = client.socket(&["instances", name, "cp"], &request).await?;
    let mut sent = 0;
    if meta.is_file() {
        let mut file = File::open(from).map_err(local(from))?;
        let mut buffer = vec![0u8; CHUNK_BYTES];
        loop {
            let count = file.read(&mut buffer).map_err(local(from))?;
            if count == 0 {
                break;
            }
            // A guest that gave up has sent the reason: it is read below.
            if socket.send(Message::binary(buffer[..count].to_vec())).await.is_err() {
                break;
            }
            sent += count as u64;
            bar.inc(count as u64);
        }
    }
    let _ = socket.send(Message::text(r#"{"type":"end"}"#)).await;
    match next(&mut socket).await? {
        Frame::Control(CopyFrame::Result { success: true, bytes_written, .. })
            if bytes_written.unwrap_or(0) == sent =>
        {
            Ok(())
        }
        Frame::Control(CopyFrame::Result { error: Some(error), .. }) => Err(Failure::Other(error)),
        Frame::Control(CopyFrame::Error { message, .. }) => {
            Err(Failure::Other(format!("{}: {message}", to.shown())))
        }
        _ => Err(broken()),
    }
}

// Download: from the guest.

enum Frame {
    Data(Vec<u8>),
    Control(CopyFrame),
}

async fn next(socket: &mut Socket) -> Result<Frame, Failure> {
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(bytes) => return Ok(Frame::Data(bytes.to_vec())),
            Message::Text(text) => {
                return serde_json::from_str(&text).map(Frame::Control).map_err(|_| broken());
            }
            _ => {}
        }
    }
    Err(broken())
}

async fn download(
    client: &Client,
    cp: &Cp,
    name: &str,
    path: &BytePath,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let info = fetch_info(client, name, path, cp.follow_links).await?;
    let target = Path::new(&cp.target);
    let base = Path::new(OsStr::from_bytes(&path.0)).file_name().filter(|_| target.is_dir());
    let target = base.map_or(target.to_owned(), |base| target.join(base));
    let mut request = asking("from", path);
    request["follow_links"] = cp.follow_links.into();
    let mut socket = client.socket(&["instances", name, "cp"], &request).await?;
    if info.is_dir {
        fs::create_dir_all(&target).map_err(local(&target))?;
    }
    let mut directories: Vec<(PathBuf, u32)> = Vec::new();
    // Links are made last, when their targets may exist; until then no path can go through a link.
    let mut links: Vec<Link> = Vec::new();
    loop {
        let header = match next(&mut socket).await? {
            Frame::Control(CopyFrame::Header(header)) => header,
            // An empty directory has no entries.
            Frame::Control(CopyFrame::End { is_final: Some(true) }) => break,
            Frame::Control(CopyFrame::Error { message, path }) => {
                let path = path.map_or_else(String::new, |path| format!("{path}: "));
                return Err(Failure::Other(format!("{path}{message}")));
            }
            _ => return Err(broken()),
        };
        bar.set_message(shown(&header.path));
        let name = header.name().map_err(Failure::Other)?;
        let location = if info.is_dir { inside(&target, &name)? } else { target.clone() };
        let is_last = receive_entry(&mut socket, cp, &header, &target, &location, &mut links, bar).await?;
        if header.is_dir {
            directories.push((location, header.mode));
        }
        if is_last {
            break;
        }
    }
    let root = if info.is_dir { target.as_path() } else { target.parent().unwrap_or(Path::new("")) };
    links::make(if root.as_os_str().is_empty() { Path::new(".") } else { root }, links)?;
    // The modes are set last: a mode without write permission would have kept the contents out.
    for (directory, mode) in directories.iter().rev() {
        fs::set_permissions(directory, fs::Permissions::from_mode(*mode)).map_err(local(directory))?;
    }
    Ok(())
}

/// The path of a link, and its target.
type Link = (PathBuf, OsString);

/// Returns the path of an entry; no name may lead out of the destination, and no part of the path may be a
/// link.
fn inside(root: &Path, name: &BytePath) -> Result<PathBuf, Failure> {
    let refuse = |why: &str| Failure::Other(format!("refused: {:?} {why}", name.shown()));
    let mut location = root.to_owned();
    for part in Path::new(OsStr::from_bytes(&name.0)).components() {
        let Component::Normal(part) = part else { return Err(refuse("leads out of the destination")) };
        if fs::symlink_metadata(&location).is_ok_and(|meta| meta.is_symlink()) && location != root {
            return Err(refuse("leads through a link"));
        }
        location.push(part);
    }
    Ok(location)
}

async fn receive_entry(
    socket: &mut Socket,
    cp: &Cp,
    header: &CopyHeader,
    root: &Path,
    location: &Path,
    links: &mut Vec<Link>,
    bar: &ProgressBar,
) -> Result<bool, Failure> {
    let parent = location.parent().unwrap_or(Path::new("."));
    let mut file = None;
    if header.is_dir {
        if fs::symlink_metadata(location).is_ok_and(|meta| meta.is_symlink()) && location != root {
            return Err(Failure::Other(format!(
                "refused: {} is a link, not a directory",
                location.display()
            )));
        }
        fs::create_dir_all(location).map_err(local(location))?;
    } else if let Some(link) = header.target().map_err(Failure::Other)? {
        links.push((location.to_owned(), OsStr::from_bytes(&link.0).to_owned()));
    } else {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        file = Some(tempfile::NamedTempFile::new_in(parent).map_err(local(parent))?);
    }
    let mut left = header.size;
    loop {
        match next(socket).await? {
            Frame::Data(bytes) => {
                left = left.checked_sub(bytes.len() as u64).ok_or_else(broken)?;
                let file = file.as_mut().ok_or_else(broken)?;
                file.write_all(&bytes).map_err(local(location))?;
                bar.inc(bytes.len() as u64);
            }
            Frame::Control(CopyFrame::End { is_final }) if left == 0 => {
                if let Some(file) = file {
                    finish_file(cp, header, location, file)?;
                }
                return Ok(is_final == Some(true));
            }
            Frame::Control(CopyFrame::Error { message, .. }) => {
                return Err(Failure::Other(format!("{}: {message}", header.path)));
            }
            Frame::Control(_) => return Err(broken()),
        }
    }
}

fn finish_file(
    cp: &Cp,
    header: &CopyHeader,
    location: &Path,
    file: tempfile::NamedTempFile,
) -> Result<(), Failure> {
    let failed = local(location);
    if cp.archive {
        std::os::unix::fs::fchown(file.as_file(), Some(header.uid), Some(header.gid)).map_err(&failed)?;
    }
    file.as_file().set_permissions(fs::Permissions::from_mode(header.mode)).map_err(&failed)?;
    let mtime = u64::try_from(header.mtime).unwrap_or(0);
    file.as_file().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(mtime)).map_err(&failed)?;
    file.persist(location).map(drop).map_err(|error| failed(error.error))
}
