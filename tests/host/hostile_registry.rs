//! Registries that are slow, endless, lying, or that redirect the daemon to others; and images that share content.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use stead::host::oci::{Allowed, Oci, OciConfig, Target};
use stead_controllers::host::{HostErrorKind, ImageJobs, Images, Job};
use stead_schemas::names::{ImageRef, Platform, Uid};
use stead_schemas::quantity::Bytes;
use tokio::sync::watch;

use crate::fake_registry::{Fake, challenge, digest, endless, gated, image, layer, redirect};
use crate::namespace::{PATIENCE, uid};
use crate::registry::{blobs, oci, pull, reference, resolve};

fn allowing(directory: &Path, allowed: &[String]) -> Oci {
    let allowed = allowed.iter().map(|entry| entry.parse::<Allowed>().expect("an entry"));
    let config = OciConfig {
        directory: directory.to_owned(),
        plain_http_hosts: Vec::new(),
        registry_allow: allowed.collect(),
        jobs_max: 1,
        target: Target::plain(Platform::LinuxAmd64),
        disk_reserve: Bytes(0),
        quota: None,
    };
    Oci::open(config, |_| {}).expect("opened")
}

fn at(fake: &Fake, name: &str) -> ImageRef {
    reference(&format!("{}/{name}:v1", fake.address))
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Builds the root file system of a pulled image, and reads a file of it.
async fn content(oci: &Oci, owner: &Uid, of: &stead_schemas::names::Digest, path: &str) -> String {
    until("converted", async || {
        if oci.inspect(of).await.expect("observed").is_none() {
            oci.convert(owner, of).await.expect("converted");
        }
        oci.inspect(of).await.expect("observed").is_some()
    })
    .await;
    let output = Command::new("unsquashfs").arg("-cat").arg(oci.rootfs(of)).arg(path).output();
    String::from_utf8_lossy(&output.expect("unsquashfs runs").stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_registry_never_writes_into_what_another_brought() {
    let (honest, hostile) = (Fake::start().await, Fake::start().await);
    let shared = layer("target", &vec![b'g'; 4 << 20]);
    let (victim, attacker) =
        (image(&[shared.clone(), layer("v", b"v")]), image(std::slice::from_ref(&shared)));
    honest.serve("victim/x", &victim);
    hostile.serve("attacker/x", &attacker);
    let (open, gate) = watch::channel(false);
    let (first, rest) = (shared[..3 << 20].to_vec(), vec![b'e'; shared.len() - (3 << 20)]);
    hostile.on(&format!("/v2/attacker/x/blobs/{}", digest(&shared)), move |_| {
        gated(first.clone(), rest.clone(), gate.clone())
    });
    let dir = tempfile::tempdir().expect("scratch");
    let oci = oci(dir.path());
    let (one, other) = (uid('a'), uid('b'));
    let resolved = resolve(&oci, &one, &at(&hostile, "attacker/x")).await.expect("resolved");
    oci.fetch(&one, &at(&hostile, "attacker/x"), &resolved.digest).await.expect("begun");
    until("the hostile transfer stands", async || {
        let seen = oci.manifest(&resolved.digest).await.expect("read").expect("resolved");
        seen.layers[0].present.0 >= 2 << 20
    })
    .await;
    let pulled = pull(&oci, &other, &at(&honest, "victim/x")).await.expect("its own registry brings it");
    open.send_replace(true);
    until("the hostile transfer is over", async || oci.job(&one, &resolved.digest).await.is_none()).await;
    let path = dir.path().join("blobs").join(&digest(&shared)["sha256:".len()..]);
    assert!(std::fs::read(path).expect("there") == shared, "the blob is what it is named by");
    let seen = content(&oci, &other, &pulled.digest, "target").await;
    assert!(seen.len() == 4 << 20 && seen.bytes().all(|byte| byte == b'g'), "foreign bytes were built in");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_listed_several_times_or_by_several_images_is_brought_once() {
    let fake = Fake::start().await;
    let (common, own) = (layer("a", &vec![1; 3 << 20]), layer("b", b"b"));
    let first = image(&[common.clone(), common.clone(), common.clone()]);
    fake.serve("first", &first);
    fake.serve("first/second", &image(&[own, common.clone()]));
    fake.serve("first/third", &image(&[common.clone(), layer("c", b"c")]));
    let dir = tempfile::tempdir().expect("scratch");
    let oci = oci(dir.path());
    pull(&oci, &uid('a'), &at(&fake, "first")).await.expect("pulled");
    assert_eq!(fake.seen(&digest(&common)), 1);
    for name in ["first/second", "first/third"] {
        pull(&oci, &uid('b'), &at(&fake, name)).await.expect("pulled");
    }
    assert_eq!(fake.seen(&digest(&common)), 1, "what is here is not asked for again");
    // The pulls run at the same time, from two repositories, by a registry that does not resume.
    let dir = tempfile::tempdir().expect("scratch");
    let oci = crate::registry::oci(dir.path());
    let (owners, names) = ([uid('a'), uid('b'), uid('c')], ["first", "first/second", "first/third"]);
    let pulls = owners.iter().zip(names).map(|(owner, name)| {
        let (oci, from) = (oci.clone(), at(&fake, name));
        async move { pull(&oci, owner, &from).await.expect("never fails in between") }
    });
    futures::future::join_all(pulls).await;
    let path = dir.path().join("blobs").join(&digest(&common)["sha256:".len()..]);
    assert!(std::fs::read(path).expect("there") == common);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_leads_the_daemon_to_addresses_that_are_not_listed() {
    let (registry, inside) = (Fake::start().await, Fake::start().await);
    inside.on_bytes("/admin", br#"{"token":"INSIDE-TOKEN","secret":"hunter2"}"#.to_vec());
    let realm = format!("http://{}/admin", inside.address);
    registry.on("/v2/realm/manifests/v1", move |_| challenge(&realm));
    let target = format!("http://{}/admin", inside.address);
    registry.on("/v2/redirect/manifests/v1", move |_| redirect(target.clone()));
    let localhost = format!("http://localhost:{}/admin", inside.address.port());
    registry.on("/v2/name/manifests/v1", move |_| redirect(localhost.clone()));
    let mapped = format!("http://[::ffff:127.0.0.1]:{}/admin", inside.address.port());
    registry.on("/v2/mapped/manifests/v1", move |_| redirect(mapped.clone()));
    let dir = tempfile::tempdir().expect("scratch");
    let oci = allowing(dir.path(), &[registry.address.to_string()]);
    for name in ["realm", "redirect", "name", "mapped"] {
        let refused = resolve(&oci, &uid('a'), &at(&registry, name)).await.expect_err(name);
        assert_eq!(refused.kind, HostErrorKind::Denied, "{name}: {}", refused.chain());
        assert!(refused.chain().contains("registry_allow"), "{name}: {}", refused.chain());
    }
    let refused = resolve(&oci, &uid('a'), &at(&inside, "x")).await.expect_err("a reference to it");
    assert_eq!(refused.kind, HostErrorKind::Denied, "{}", refused.chain());
    assert_eq!(inside.seen(""), 0, "it was connected to");
    assert_eq!(registry.seen("INSIDE-TOKEN"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_repeat_nothing_that_others_answered() {
    let fake = Fake::start().await;
    let secret = r#"{"schemaVersion":"SECRET-VALUE","config":{},"layers":[]}"#;
    fake.on_bytes("/v2/json/manifests/v1", secret.as_bytes().to_vec());
    fake.on("/v2/body/manifests/v1", |_| (StatusCode::FORBIDDEN, "SECRET-VALUE").into_response());
    let realm = format!("http://{}/token?key=SECRET-VALUE", fake.address);
    fake.on("/v2/realm/manifests/v1", move |_| challenge(&realm));
    fake.on("/token", |_| (StatusCode::BAD_REQUEST, "SECRET-VALUE").into_response());
    let signed = format!("http://{}/blob?signature=SECRET-VALUE", fake.address);
    fake.on("/v2/signed/manifests/v1", move |_| redirect(signed.clone()));
    let dir = tempfile::tempdir().expect("scratch");
    let oci = oci(dir.path());
    for name in ["json", "body", "realm", "signed"] {
        let refused = resolve(&oci, &uid('a'), &at(&fake, name)).await.expect_err(name);
        assert!(!refused.chain().contains("SECRET"), "{name}: {}", refused.chain());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_answers_and_odd_tokens_end_in_an_error() {
    let fake = Fake::start().await;
    let realm = |path: &str| format!("http://{}{path}", fake.address);
    let (endless_realm, odd_realm) = (realm("/endless"), realm("/odd"));
    fake.on("/v2/token/manifests/v1", move |_| challenge(&endless_realm));
    fake.on("/v2/odd/manifests/v1", move |_| challenge(&odd_realm));
    fake.on("/endless", |_| endless().into_response());
    fake.on_bytes("/odd", br#"{"token":"a\nb"}"#.to_vec());
    fake.on("/v2/error/manifests/v1", |_| (StatusCode::BAD_GATEWAY, endless()).into_response());
    let again = format!("http://{}/v2/loop/manifests/v1", fake.address);
    fake.on("/v2/loop/manifests/v1", move |_| redirect(again.clone()));
    fake.on("/v2/huge/manifests/v1", |_| {
        ([(header::CONTENT_LENGTH, u64::MAX.to_string())], endless()).into_response()
    });
    let dir = tempfile::tempdir().expect("scratch");
    let oci = oci(dir.path());
    for (name, words) in [
        ("token", "larger than 64 KiB"),
        ("odd", "no token"),
        ("error", "502"),
        ("loop", "redirects too often"),
    ] {
        let refused = resolve(&oci, &uid('a'), &at(&fake, name)).await.expect_err(name);
        assert!(refused.chain().contains(words), "{name}: {}", refused.chain());
    }
    resolve(&oci, &uid('a'), &at(&fake, "huge")).await.expect_err("longer than anything");
    // The failed pull does not occupy the digest: an honest registry can provide it.
    let made = image(&[layer("a", b"a")]);
    fake.serve("good", &made);
    pull(&oci, &uid('b'), &at(&fake, "good")).await.expect("pulled");
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_that_stand_still_hold_up_nobody_else_and_end_with_their_images() {
    let (slow, honest) = (Fake::start().await, Fake::start().await);
    let (_closed, gate) = watch::channel(false);
    let made = image(&[layer("a", &vec![7; 100_000])]);
    let owners: Vec<Uid> = ('c'..='z').map(uid).collect();
    for number in 0..owners.len() {
        let name = format!("slow{number}");
        slow.serve(&name, &made);
        let (bytes, gate) = (made.layers[0].clone(), gate.clone());
        slow.on(&format!("/v2/{name}/blobs/{}", digest(&made.layers[0])), move |_| {
            gated(bytes[..10].to_vec(), bytes[10..].to_vec(), gate.clone())
        });
    }
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let from_silent = reference(&format!("{}/x:v1", silent.local_addr().expect("bound")));
    let dir = tempfile::tempdir().expect("scratch");
    let oci = allowing(dir.path(), &["127.0.0.0/8".to_owned()]);
    let mut content = None;
    for (number, owner) in owners.iter().enumerate() {
        let from = at(&slow, &format!("slow{number}"));
        let digest = resolve(&oci, owner, &from).await.expect("resolved").digest;
        oci.fetch(owner, &from, &digest).await.expect("begun");
        content = Some(digest);
        // The registry accepts connections and never answers, and callers do not wait for it.
        let asked = oci.resolve(owner, &from_silent, Platform::LinuxAmd64, 1).await.expect("asked");
        assert_eq!(asked, None);
    }
    let content = content.expect("there are owners");
    until("one is fetched", async || {
        let mut fetching = 0;
        for owner in &owners {
            fetching += usize::from(oci.job(owner, &content).await == Some(Job::Fetching));
        }
        fetching == 1
    })
    .await;
    let last = oci.job(&owners[owners.len() - 1], &content).await;
    assert!(matches!(last, Some(Job::Queued { position }) if position > 1), "{last:?}");
    // The same content comes from another registry, and also other content.
    honest.serve("good", &made);
    pull(&oci, &uid('a'), &at(&honest, "good")).await.expect("not held up");
    for owner in &owners {
        oci.forget(owner).await.expect("forgotten");
        assert!(!oci.is_busy(owner).await && oci.job(owner, &content).await.is_none());
    }
    // Nothing of them is left when nothing refers to the content.
    oci.forget(&uid('a')).await.expect("forgotten");
    until("nothing holds it", async || oci.known().await.expect("listed") == [content.clone()]).await;
    oci.remove(&content, Box::new(|| false)).await.expect("removed");
    until("its parts are collected", async || {
        oci.owners().await.expect("collected");
        let partials = std::fs::read_dir(dir.path().join("partials")).expect("there").count();
        partials == 0 && blobs(dir.path()).is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_does_not_fit_is_refused_before_it_is_fetched() {
    let fake = Fake::start().await;
    let mut made = image(&[layer("a", b"a")]);
    let mut manifest: serde_json::Value = serde_json::from_slice(&made.manifest).expect("JSON");
    manifest["layers"][0]["size"] = (65u64 << 30).into();
    made.manifest = manifest.to_string().into_bytes();
    fake.serve("huge", &made);
    manifest["layers"][0]["size"] = (60u64 << 30).into();
    made.manifest = manifest.to_string().into_bytes();
    fake.serve("large", &made);
    let dir = tempfile::tempdir().expect("scratch");
    let config = OciConfig {
        directory: dir.path().to_owned(),
        plain_http_hosts: vec![fake.address.to_string()],
        registry_allow: Vec::new(),
        jobs_max: 1,
        target: Target::plain(Platform::LinuxAmd64),
        disk_reserve: Bytes(1 << 60),
        quota: None,
    };
    let oci = Oci::open(config, |_| {}).expect("opened");
    let refused = resolve(&oci, &uid('a'), &at(&fake, "huge")).await.expect_err("beyond any image");
    assert_eq!(refused.kind, HostErrorKind::Permanent, "{}", refused.chain());
    let refused = resolve(&oci, &uid('a'), &at(&fake, "large")).await.expect_err("no room");
    assert_eq!(refused.kind, HostErrorKind::Exhausted, "{}", refused.chain());
    let archive = futures::stream::iter([Ok(bytes::Bytes::from(layer("a", b"a")))]);
    let refused = oci.import(&"a".into(), archive).await.expect_err("no room");
    assert_eq!(refused.kind, HostErrorKind::Exhausted, "{}", refused.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_take_no_more_than_their_quota_and_what_nobody_refers_to_makes_room() {
    let fake = Fake::start().await;
    let junk = |seed: u8| vec![seed; 3 << 20];
    for (name, seed) in [("one", 3), ("two", 5)] {
        fake.serve(name, &image(&[layer(name, &junk(seed))]));
    }
    let dir = tempfile::tempdir().expect("scratch");
    let config = OciConfig {
        directory: dir.path().to_owned(),
        plain_http_hosts: vec![fake.address.to_string()],
        registry_allow: Vec::new(),
        jobs_max: 1,
        target: Target::plain(Platform::LinuxAmd64),
        disk_reserve: Bytes(0),
        // The quota is enough for the layers of one of the two.
        quota: Some(Bytes(5 << 20)),
    };
    let oci = Oci::open(config, |_| {}).expect("opened");
    let one = pull(&oci, &uid('a'), &at(&fake, "one")).await.expect("within the quota");
    let refused = resolve(&oci, &uid('b'), &at(&fake, "two")).await;
    let refused = match refused {
        Ok(_) => pull(&oci, &uid('b'), &at(&fake, "two")).await.expect_err("beyond the quota"),
        Err(refused) => refused,
    };
    assert_eq!(refused.kind, HostErrorKind::Exhausted, "{}", refused.chain());
    assert!(refused.chain().contains("image_quota"), "{}", refused.chain());
    let archive = futures::stream::iter([
        Ok(bytes::Bytes::from(layer("a", &junk(7)))),
        Ok(bytes::Bytes::from(vec![0; 17 << 20])),
    ]);
    let refused = oci.import(&"a".into(), archive).await.expect_err("beyond the quota");
    assert_eq!(refused.kind, HostErrorKind::Exhausted, "{}", refused.chain());
    oci.forget(&uid('a')).await.expect("forgotten");
    oci.remove(&one.digest, Box::new(|| false)).await.expect("removed");
    until("the second one", async || pull(&oci, &uid('b'), &at(&fake, "two")).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_beyond_a_clients_share_are_asked_to_retry_and_leave_room_to_others() {
    let dir = tempfile::tempdir().expect("scratch");
    let oci = oci(dir.path());
    let (greedy, other): (Arc<str>, Arc<str>) = ("greedy".into(), "other".into());
    let never = || futures::stream::pending::<std::io::Result<bytes::Bytes>>();
    let mut held = Vec::new();
    let refused = loop {
        let mut upload = Box::pin(oci.import(&greedy, never()));
        if let Some(end) = futures::FutureExt::now_or_never(&mut upload) {
            break end.expect_err("it brings nothing");
        }
        held.push(upload);
    };
    assert_eq!((refused.kind, held.len()), (HostErrorKind::Transient, 8), "{}", refused.chain());
    let archive = futures::stream::iter([Ok(bytes::Bytes::from(layer("a", b"other's")))]);
    oci.import(&other, archive).await.expect("there is room for others");
    drop(held);
    let archive = futures::stream::iter([Ok(bytes::Bytes::from(layer("a", b"own")))]);
    oci.import(&greedy, archive).await.expect("its share came back");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_imported_is_not_collected_before_something_refers_to_it() {
    let dir = tempfile::tempdir().expect("scratch");
    let oci = oci(dir.path());
    let archive = || futures::stream::iter([Ok(bytes::Bytes::from(layer("a", b"imported")))]);
    let hold = oci.import(&"a".into(), archive()).await.expect("imported");
    let digest = hold.digest().clone();
    assert_eq!(oci.known().await.expect("listed"), [], "it is no garbage yet");
    oci.remove(&digest, Box::new(|| false)).await.expect("answered");
    oci.owners().await.expect("collected");
    assert_eq!(content(&oci, &uid('a'), &digest, "a").await, "imported");
    drop(hold);
    oci.remove(&digest, Box::new(|| true)).await.expect("answered");
    assert!(oci.inspect(&digest).await.expect("observed").is_some(), "something refers to it");
    assert_eq!(oci.known().await.expect("listed"), std::slice::from_ref(&digest));
    oci.remove(&digest, Box::new(|| false)).await.expect("removed");
    assert!(oci.inspect(&digest).await.expect("observed").is_none());
    assert_eq!(blobs(dir.path()), [""; 0]);
}
