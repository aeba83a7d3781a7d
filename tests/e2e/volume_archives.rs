//! Volumes that begin as archives, in real VMs.

use std::path::Path;

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_ARCHIVE};
use crate::fixtures::until;
use crate::harness::{Answer, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Files with foreign owners and modes, links, and random content.
const FILES: &str = "mkdir sub; echo words >sub/file; ln -s file sub/link; ln sub/file sub/same; chown -R 1234:5678 sub; \
                     chmod 4750 sub/file; dd if=/dev/urandom of=large bs=1M count=20 2>/dev/null";
/// A file of zeros, which takes no room in an archive and more than a volume has.
const ZEROS: &str = "truncate -s 1100M zeros";

/// Makes a compressed archive of the files that a shell line makes.
fn archive(site: &Harness, files: &str) -> Vec<u8> {
    let archive = site.scratch("archives").join("made.tar.gz");
    site.shell(&format!(
        "tree=$(mktemp -d) && cd $tree && {files} && tar -C $tree -czf {} . && rm -r $tree",
        archive.display()
    ));
    std::fs::read(archive).expect("made")
}

async fn upload(site: &Harness, parameters: &str, archive: Vec<u8>) -> Answer {
    let path = format!("/volumes/from-archive?{parameters}");
    site.attempt_raw(reqwest::Method::POST, &path, archive).await.expect("answered")
}

/// Returns the names of what is left of archives in the data directory.
fn left(data: &Path) -> Vec<std::ffi::OsString> {
    let entries = ["archives", "prepared"].map(|name| std::fs::read_dir(data.join(name)).expect("there"));
    entries.into_iter().flatten().map(|entry| entry.expect("read").file_name()).collect()
}

#[test]
fn a_volume_has_the_files_of_its_archive_and_a_refused_one_leaves_nothing() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let archive_of = |files| archive(&site, files);
        let archive = archive_of(FILES);
        let made = upload(&site, "name=seed&size_gb=1&tags%5Bteam%5D=a", archive.clone()).await;
        assert_eq!(made.status, StatusCode::CREATED, "{made:?}\n{}", site.daemon_log());
        assert_eq!(
            (&made.body["name"], &made.body["tags"]),
            (&json!("seed"), &json!({"team": "a"})),
            "{made:?}"
        );
        // It is refused before its body is read: a client that still sends might not see the answer.
        let taken = upload(&site, "name=seed&size_gb=1", Vec::new()).await;
        assert_eq!((taken.status, &taken.body["code"]), (StatusCode::CONFLICT, &json!("already_exists")));
        let large = upload(&site, "name=large&size_gb=1", archive_of(ZEROS)).await;
        assert_eq!(
            (large.status, &large.body["code"]),
            (StatusCode::BAD_REQUEST, &json!("archive_too_large"))
        );
        let broken = upload(&site, "name=broken&size_gb=1", archive[..archive.len() / 2].to_vec()).await;
        assert_eq!(broken.status, StatusCode::BAD_REQUEST, "{broken:?}");
        let mounts: Value = json!([{ "volume_id": "seed", "mount_path": "/data" }]);
        let body = json!({
            "size": "128MB", "volumes": mounts, "cmd": ["sh", "-c", "while true; do sleep 1; done"],
        });
        site.create("box", &image("busybox"), body).await;
        site.until_state("box", "Running").await;
        let seen = shell(
            &site,
            "box",
            "cd /data/sub && cat file same && stat -c '%u %g %a' file && readlink link && wc -c </data/large && echo new >/data/new",
        )
        .await;
        assert_eq!(seen, format!("words\nwords\n1234 5678 4750\nfile\n{}", 20 << 20));
        // Nothing is left of what was refused, or of what was unpacked on the way.
        until("nothing of archives", MOMENT, async || left(&site.data()).is_empty().then_some(())).await;
        let volumes = site.request(reqwest::Method::GET, "/volumes", None).await;
        assert_eq!(volumes.body.as_array().map(Vec::len), Some(1), "{volumes:?}");
        // The content is the volume's own: it survives the daemon and its instance.
        site.kill().await;
        site.start().await;
        site.delete("box").await;
        let deleted = site.request(reqwest::Method::DELETE, "/volumes/seed", None).await;
        assert!(deleted.status.is_success(), "{deleted:?}");
        settles(&mut site, "volumes from archives").await;
    });
}

#[test]
fn a_crash_while_a_volume_takes_the_files_of_its_archive_loses_none_of_them() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let archive = archive(&site, FILES);
        let (kind, action) = OF_ARCHIVE;
        site.stop().await;
        for edge in EDGES {
            let failpoint = format!("{kind}/{action}/{edge}");
            site.spawn(Some(&failpoint));
            site.answers().await;
            // The daemon dies before or after it answers.
            let path = "/volumes/from-archive?name=seed&size_gb=1";
            site.attempt_raw(reqwest::Method::POST, path, archive.clone()).await;
            site.crashed(&failpoint).await;
            site.start().await;
            let is_there =
                async || (site.shell("ls $DATA/disks | grep -c ext4 || true").trim() == "1").then_some(());
            until("the volume's disk", MOMENT, is_there).await;
            assert_eq!(
                site.shell("debugfs -R 'cat /sub/file' $DATA/disks/*.ext4 2>/dev/null"),
                "words\n",
                "{failpoint}"
            );
            assert_eq!(left(&site.data()), [""; 0], "{failpoint}");
            let deleted = site.request(reqwest::Method::DELETE, "/volumes/seed", None).await;
            assert!(deleted.status.is_success(), "{failpoint}: {deleted:?}");
            settles(&mut site, &failpoint).await;
        }
    });
}
