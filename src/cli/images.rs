//! Verbs on images.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use serde_json::json;
use stead_schemas::api::Image;
use stead_schemas::image::ImagePhase;
use stead_schemas::quantity::Bytes;

use super::arguments::for_each;
use super::client::Client;
use super::show::{age, line, print};
use super::{Failure, Output};

#[derive(Debug, Subcommand)]
pub(crate) enum ImageVerb {
    /// Import an OCI layout (directory or tar), a `docker save` archive, or a root file system's tar.
    Import {
        path: PathBuf,
        /// The reference of the image on the server.
        #[arg(long)]
        name: String,
    },
    /// Delete image names.
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Time between two polls of an image in progress, short enough for a person who watches.
const POLL_INTERVAL: Duration = Duration::from_millis(300);

pub(super) async fn pull(client: &Client, image: &str, output: Output) -> Result<(), Failure> {
    let image: Image = client.post(&["images"], &json!({"name": image})).await?;
    show_progress(client, &image.name).await?;
    let image: Image = client.get(&["images", &image.name]).await?;
    show_all(&[image], output)
}

/// Follows an image until it is ready; shows a bar on a terminal, and nothing elsewhere.
pub(super) async fn show_progress(client: &Client, name: &str) -> Result<(), Failure> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {wide_bar} {bytes}/{total_bytes}") {
        bar.set_style(style);
    }
    loop {
        let image: Image = client.get(&["images", name]).await?;
        if let Some(progress) = image.progress {
            bar.set_length(progress.total.0);
            bar.set_position(progress.done.0);
        }
        match image.status {
            ImagePhase::Ready => {
                bar.finish_and_clear();
                return Ok(());
            }
            ImagePhase::Failed => {
                bar.finish_and_clear();
                return Err(Failure::Other(format!("{name}: {}", image.error.unwrap_or_default())));
            }
            ImagePhase::Pending => bar.set_message(match image.queue_position {
                Some(position) => format!("waiting, place {position}"),
                None => "resolving".to_owned(),
            }),
            ImagePhase::Pulling => bar.set_message("pulling"),
            ImagePhase::Converting => bar.set_message("converting"),
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn show_all(images: &[Image], output: Output) -> Result<(), Failure> {
    print(&images, output, &["NAME", "STATUS", "SIZE", "DIGEST", "AGE", "NOTE"], || {
        images.iter().map(row).collect()
    })
}

fn row(image: &Image) -> Vec<String> {
    vec![
        image.name.clone(),
        format!("{:?}", image.status).to_lowercase(),
        image.size_bytes.map_or_else(|| "-".to_owned(), |size| Bytes(size).to_string()),
        image.digest.chars().take(19).collect(),
        age(image.created_at),
        image.error.clone().unwrap_or_default(),
    ]
}

pub(super) async fn list(client: &Client, output: Output) -> Result<(), Failure> {
    let images: Vec<Image> = client.get(&["images"]).await?;
    show_all(&images, output)
}

pub(super) async fn image(client: &Client, verb: ImageVerb, output: Output) -> Result<(), Failure> {
    match verb {
        ImageVerb::Import { path, name } => {
            let body = archive(&path).await?;
            let request =
                client.request(Method::POST, &["images", "import"]).query(&[("name", name)]).body(body);
            let image: Image = client.json(request).await?;
            show_progress(client, &image.name).await?;
            show_all(&[client.get(&["images", &image.name]).await?], output)
        }
        ImageVerb::Rm { names } => {
            for_each(&names, async |name| {
                client.send(client.request(Method::DELETE, &["images", name])).await?;
                line(name);
                Ok(())
            })
            .await
        }
    }
}

/// Returns the contents of the file, or of the archive that is made of a directory.
pub(super) async fn archive(path: &Path) -> Result<reqwest::Body, Failure> {
    let failed = |error: std::io::Error| Failure::Usage(format!("{}: {error}", path.display()));
    let source = if std::fs::metadata(path).map_err(failed)?.is_dir() {
        let file = tempfile::tempfile().map_err(failed)?;
        let mut archive = tar::Builder::new(file);
        archive.follow_symlinks(false);
        archive.append_dir_all("", path).map_err(failed)?;
        let mut file = archive.into_inner().map_err(failed)?;
        std::io::Seek::rewind(&mut file).map_err(failed)?;
        file
    } else {
        std::fs::File::open(path).map_err(failed)?
    };
    let file = tokio::fs::File::from_std(source);
    let chunks = futures::stream::unfold(file, |mut file| async move {
        use tokio::io::AsyncReadExt;
        let mut chunk = vec![0u8; 256 << 10];
        match file.read(&mut chunk).await {
            Ok(0) => None,
            Ok(count) => {
                chunk.truncate(count);
                Some((Ok(chunk), file))
            }
            Err(error) => Some((Err(error), file)),
        }
    });
    Ok(reqwest::Body::wrap_stream(chunks))
}
