//! `stead backup`: the control plane of a running daemon in one file.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use futures::StreamExt;
use reqwest::Method;

use super::client::Client;
use super::{Failure, show};

/// The destination of a backup.
#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The file; it appears when the backup is complete. Restoring it needs only the data directory's
    /// `keys/seal.key`, so keep a copy of that key elsewhere.
    file: PathBuf,
}

pub(super) async fn backup(client: &Client, backup: Backup) -> Result<(), Failure> {
    let Backup { file } = backup;
    let failed = |error: std::io::Error| Failure::Other(format!("{}: {error}", file.display()));
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The file is not accessible to others, as temporary files are.
    let mut partial = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    let answer = client.stream(client.request(Method::GET, &["backup"])).await?;
    let (mut chunks, mut bytes) = (answer.bytes_stream(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|error| Failure::Lost(format!("the backup was cut: {}", error.without_url())))?;
        bytes += chunk.len();
        partial.write_all(&chunk).map_err(failed)?;
    }
    partial.as_file().sync_all().map_err(failed)?;
    partial.persist(&file).map_err(|error| failed(error.error))?;
    show::line(&format!("{}: {bytes} bytes", file.display()));
    Ok(())
}
