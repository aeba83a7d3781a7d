//! Verbs on volumes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{Instance, Volume};

use super::arguments::{for_each, pair};
use super::client::Client;
use super::images::archive;
use super::show::{age, line, print};
use super::{Failure, Output, instance_table};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeVerb {
    /// Make an empty volume.
    Create {
        name: String,
        /// Size in whole gigabytes; blocks are allocated as they are written.
        #[arg(long, value_name = "GB")]
        size: u32,
        /// A tag, as KEY=VALUE.
        #[arg(short = 'l', long = "tag", value_parser = pair)]
        tags: Vec<(String, String)>,
    },
    /// Make a volume with the files of an archive (tar, perhaps compressed with gzip or zstd) or of a directory.
    FromArchive {
        name: String,
        /// The archive or the directory.
        path: PathBuf,
        /// Size in whole gigabytes, into which the files have to fit.
        #[arg(long, value_name = "GB")]
        size: u32,
        /// A tag, as KEY=VALUE.
        #[arg(short = 'l', long = "tag", value_parser = pair)]
        tags: Vec<(String, String)>,
    },
    /// List volumes.
    #[command(visible_alias = "list")]
    Ls,
    /// Print a volume.
    Get { name: String },
    /// Raise the size of a volume, also while an instance uses it.
    Grow {
        name: String,
        /// New size in whole gigabytes.
        #[arg(long, value_name = "GB")]
        size: u32,
    },
    /// Mount a volume in an instance that runs or is stopped.
    Attach {
        instance: String,
        /// The mount: VOLUME:PATH, VOLUME:PATH:ro or VOLUME:PATH:overlay=SIZE.
        mount: Mount,
    },
    /// Unmount a volume and remove it from an instance that runs or is stopped.
    Detach { instance: String, volume: String },
    /// Delete volumes with their contents.
    #[command(visible_alias = "delete")]
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// A mount, as written in one word.
#[derive(Debug, Clone)]
pub(crate) struct Mount {
    volume: String,
    body: Value,
}

impl std::str::FromStr for Mount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.splitn(3, ':');
        let (Some(volume), Some(path)) = (words.next(), words.next()) else {
            return Err("must be VOLUME:PATH, and perhaps :ro or :overlay=SIZE".to_owned());
        };
        let mut body = json!({ "mount_path": path });
        match words.next() {
            None | Some("rw") => {}
            Some("ro") => body["readonly"] = json!(true),
            Some(word) => {
                let size =
                    word.strip_prefix("overlay=").ok_or("the third word must be ro or overlay=SIZE")?;
                (body["readonly"], body["overlay"]) = (json!(true), json!(true));
                body["overlay_size"] = json!(size);
            }
        }
        Ok(Self { volume: volume.to_owned(), body })
    }
}

impl Mount {
    /// Returns the mount as an entry of a create request.
    pub(super) fn entry(&self) -> Value {
        let mut entry = self.body.clone();
        entry["volume_id"] = json!(self.volume);
        entry
    }
}

pub(super) async fn volume(client: &Client, verb: VolumeVerb, output: Output) -> Result<(), Failure> {
    match verb {
        VolumeVerb::Create { name, size, tags } => {
            let tags: BTreeMap<_, _> = tags.into_iter().collect();
            let body = json!({ "name": name, "size_gb": size, "tags": tags });
            show_all(&[client.post(&["volumes"], &body).await?], output)
        }
        VolumeVerb::FromArchive { name, path, size, tags } => {
            let size = size.to_string();
            let request = client.request(Method::POST, &["volumes", "from-archive"]);
            let request = request.query(&[("name", &name), ("size_gb", &size)]);
            let tags: Vec<_> = tags.into_iter().map(|(key, value)| (format!("tags[{key}]"), value)).collect();
            let request = request.query(&tags).body(archive(&path).await?);
            show_all(&[client.json(request).await?], output)
        }
        VolumeVerb::Grow { name, size } => {
            let request = client.request(Method::PATCH, &["volumes", &name]);
            show_all(&[client.json(request.json(&json!({ "size_gb": size }))).await?], output)
        }
        VolumeVerb::Ls => show_all(&client.get::<Vec<Volume>>(&["volumes"]).await?, output),
        VolumeVerb::Get { name } => show_all(&[client.get(&["volumes", &name]).await?], output),
        VolumeVerb::Attach { instance, mount } => {
            let path = ["instances", &instance, "volumes", &mount.volume];
            let changed: Instance = client.post(&path, &mount.body).await?;
            instance_table::show_all(&[changed], output)
        }
        VolumeVerb::Detach { instance, volume } => {
            let path = ["instances", instance.as_str(), "volumes", &volume];
            let changed: Instance = client.json(client.request(Method::DELETE, &path)).await?;
            instance_table::show_all(&[changed], output)
        }
        VolumeVerb::Rm { names } => {
            for_each(&names, async |name| {
                client.send(client.request(Method::DELETE, &["volumes", name])).await?;
                line(name);
                Ok(())
            })
            .await
        }
    }
}

fn show_all(volumes: &[Volume], output: Output) -> Result<(), Failure> {
    print(&volumes, output, &["NAME", "SIZE", "MOUNTED IN", "ID", "AGE"], || {
        volumes.iter().map(row).collect()
    })
}

fn row(volume: &Volume) -> Vec<String> {
    let mounts = volume.attachments.iter().map(|attachment| {
        let read_only = if attachment.readonly { ":ro" } else { "" };
        format!("{}:{}{read_only}", attachment.instance_id, attachment.mount_path)
    });
    let mounts = mounts.collect::<Vec<_>>().join(", ");
    vec![
        volume.name.clone(),
        format!("{} GB", volume.size_gb),
        if mounts.is_empty() { "-".to_owned() } else { mounts },
        volume.id.clone(),
        age(volume.created_at),
    ]
}
