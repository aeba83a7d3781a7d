//! Pulls from a real registry: authorization, resumption, content that does not match its digest.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use stead::host::oci::{Oci, OciConfig, Target};
use stead_controllers::host::{HostError, HostErrorKind, ImageJobs, Images, Resolved};
use stead_schemas::api::PushCredentials;
use stead_schemas::instance::Secret;
use stead_schemas::names::{ImageRef, Platform, Uid};
use stead_schemas::quantity::Bytes;

use crate::fake_registry::digest;
use crate::namespace::{PATIENCE, uid};
use crate::registry_harness::{Image, Proxy, Registry, TokenService};

const AMD64: Platform = Platform::LinuxAmd64;

pub(crate) fn oci(directory: &Path) -> Oci {
    let config = OciConfig {
        directory: directory.to_owned(),
        plain_http_hosts: Vec::new(),
        jobs_max: 2,
        registry_allow: vec!["127.0.0.0/8".parse().expect("a network")],
        target: Target::plain(AMD64),
        disk_reserve: Bytes(0),
        quota: None,
    };
    Oci::open(config, |_| {}).expect("opened")
}

fn credentials(password: &str) -> PushCredentials {
    PushCredentials {
        username: Some("user".to_owned()),
        password: Some(Secret(password.to_owned())),
        registry_token: None,
    }
}

pub(crate) fn reference(text: &str) -> ImageRef {
    text.parse().expect("a reference")
}

/// Resolves a reference again, and waits for the answer.
pub(crate) async fn resolve(oci: &Oci, owner: &Uid, from: &ImageRef) -> Result<Resolved, HostError> {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let (number, deadline) = (ASKED.fetch_add(1, Ordering::SeqCst), Instant::now() + PATIENCE);
    loop {
        if let Some(resolved) = oci.resolve(owner, from, AMD64, number).await? {
            return Ok(resolved);
        }
        assert!(Instant::now() < deadline, "{from}: no answer");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Pulls everything of an image to the disk. Returns the first failure.
pub(crate) async fn pull(oci: &Oci, owner: &Uid, from: &ImageRef) -> Result<Resolved, HostError> {
    let resolved = resolve(oci, owner, from).await?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = oci.manifest(&resolved.digest).await?.expect("resolved just now");
        let is_whole = seen.layers.iter().all(|layer| layer.present == layer.size);
        let job = oci.job(owner, &resolved.digest).await;
        if is_whole && job.is_none() {
            return Ok(seen);
        }
        assert!(Instant::now() < deadline, "{from}: {job:?}, {seen:?}");
        if job.is_none() {
            // This begins the fetch, or returns the failure of the last attempt.
            oci.fetch(owner, from, &resolved.digest).await?;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn blobs(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory.join("blobs")).expect("there").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

async fn rights_are_checked(oci: &Oci, from: &ImageRef) {
    let (one, other) = (uid('a'), uid('b'));
    let denied = pull(oci, &one, from).await.expect_err("without credentials");
    assert_eq!(denied.kind, HostErrorKind::Denied, "{}", denied.chain());
    oci.keep_credentials(&one, credentials("wr0ng-secret"));
    let denied = pull(oci, &one, from).await.expect_err("with a wrong password");
    assert_eq!(denied.kind, HostErrorKind::Denied, "{}", denied.chain());
    assert!(!denied.chain().contains("wr0ng-secret") && !format!("{denied:?}").contains("wr0ng-secret"));
    oci.keep_credentials(&one, credentials("right"));
    pull(oci, &one, from).await.expect("with the right one");
    // Credentials serve the object they came with and no other.
    let denied = resolve(oci, &other, from).await.expect_err("of another object");
    assert_eq!(denied.kind, HostErrorKind::Denied, "{}", denied.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_passwords_is_pulled_from_with_the_right_one_only() {
    let auth = "auth: {htpasswd: {realm: tests, path: DIR/htpasswd}}";
    let registry = Registry::start(auth).await;
    let to = format!("{}/team/app:v1", registry.address);
    Image::make(registry.dir.path(), 1, &[4000, 70_000], "amd64").push(&to, Some("user:right"));
    rights_are_checked(&oci(&registry.dir.path().join("images")), &reference(&to)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_a_token_service_is_pulled_from_with_its_tokens() {
    let service = TokenService::start().await;
    let auth = format!(
        "auth: {{token: {{realm: 'http://{}/token', service: registry, issuer: tests, rootcertbundle: DIR/cert.pem}}}}",
        service.address
    );
    let registry = Registry::start(&auth).await;
    service.sign_for(&registry);
    let to = format!("{}/team/app:v1", registry.address);
    Image::make(registry.dir.path(), 1, &[4000, 70_000], "amd64").push(&to, Some("user:right"));
    let before = service.issued.load(Ordering::SeqCst);
    rights_are_checked(&oci(&registry.dir.path().join("images")), &reference(&to)).await;
    assert!(service.issued.load(Ordering::SeqCst) > before, "no token was asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_was_cut_goes_on_where_it_stopped_in_the_next_daemon() {
    let registry = Registry::start("").await;
    let proxy = Proxy::start(registry.address).await;
    let image = Image::make(registry.dir.path(), 2, &[3000, 4 << 20], "amd64");
    image.push(&format!("{}/app:v1", registry.address), None);
    let from = reference(&format!("{}/app:v1", proxy.address));
    let images = registry.dir.path().join("images");

    let first = oci(&images);
    proxy.cut_after(1 << 20);
    let failed = pull(&first, &uid('a'), &from).await.expect_err("it is cut");
    assert_eq!(failed.kind, HostErrorKind::Transient, "{}", failed.chain());
    let (small, large) = (&image.layers[0], &image.layers[1]);
    let partials = std::fs::read_dir(images.join("partials")).expect("there").flatten();
    let large_partials = partials
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&large["sha256:".len()..]))
        .map(|entry| entry.metadata().expect("there").len());
    let had = large_partials.max().expect("what came is kept");
    assert!(had > 0 && had <= 1 << 20, "{had} bytes are kept");
    assert_eq!(proxy.take_seen(large).len(), 1);
    // The layers come side by side: the small one may have been requested, and may even be complete.
    let _ = proxy.take_seen(small);
    let is_whole = images.join("blobs").join(&small["sha256:".len()..]).exists();
    drop(first);

    proxy.cut_after(u64::MAX);
    let second = oci(&images);
    let pulled = pull(&second, &uid('a'), &from).await.expect("the rest comes");
    assert_eq!(pulled.layers.len(), 2);
    // It may have become complete after it was looked for, before the first daemon's work ended.
    let requests = proxy.take_seen(small).len();
    assert!(requests <= usize::from(!is_whole), "what is here is not fetched again: {requests}");
    let ranges = proxy.take_seen(large);
    assert!(
        ranges.len() == 1
            && ranges[0].as_ref().is_some_and(|range| range.starts_with(&format!("bytes={had}-"))),
        "{had} bytes were here, {ranges:?} asked for"
    );
    let deadline = Instant::now() + PATIENCE;
    while second.inspect(&pulled.digest).await.expect("observed").is_none() {
        // This begins the conversion, or returns the failure of the last attempt.
        second.convert(&uid('a'), &pulled.digest).await.expect("converted");
        assert!(Instant::now() < deadline, "{:?}", second.job(&uid('a'), &pulled.digest).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Another image with the same layer fetches only its own layers.
    let sibling = Image::make(registry.dir.path(), 2, &[3000, 4 << 20, 500], "amd64");
    sibling.push(&format!("{}/app:v2", registry.address), None);
    let _ = proxy.take_seen("sha256:");
    pull(&second, &uid('b'), &reference(&format!("{}/app:v2", proxy.address))).await.expect("pulled");
    assert_eq!((proxy.take_seen(large), proxy.take_seen(&sibling.layers[2]).len()), (Vec::new(), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_is_not_what_it_is_named_is_refused_and_not_kept() {
    let registry = Registry::start("").await;
    let images = registry.dir.path().join("images");
    let oci = oci(&images);
    let made = |seed, name: &str| {
        let image = Image::make(registry.dir.path(), seed, &[50_000], "amd64");
        let to = format!("{}/{name}:v1", registry.address);
        image.push(&to, None);
        (image, reference(&to))
    };
    let (corrupt, from_corrupt) = made(3, "corrupt");
    let (short, from_short) = made(4, "short");
    let (_, from_good) = made(5, "good");
    let path = registry.blob(&corrupt.layers[0]);
    let mut bytes = std::fs::read(&path).expect("stored");
    bytes[30_000] ^= 1;
    std::fs::write(&path, &bytes).expect("flipped");
    let path = registry.blob(&short.layers[0]);
    std::fs::File::options().write(true).open(path).expect("stored").set_len(20_000).expect("cut");

    let refused = pull(&oci, &uid('a'), &from_corrupt).await.expect_err("a bit is wrong");
    assert!(refused.chain().contains("digest"), "{}", refused.chain());
    assert_eq!(blobs(&images), [""; 0], "nothing of it is kept");
    let refused = pull(&oci, &uid('a'), &from_short).await.expect_err("an end is missing");
    assert!(refused.chain().contains("ended early"), "{}", refused.chain());
    assert!(
        !blobs(&images).contains(&short.layers[0]["sha256:".len()..].to_owned()),
        "a part passed as whole"
    );

    // The manifest understates the size of a layer: bytes beyond it are not taken.
    let (honest, _) = made(6, "lying");
    let mut lie: serde_json::Value = serde_json::from_slice(&honest.manifest_bytes).expect("JSON");
    lie["layers"][0]["size"] = json!(1000);
    let body = lie.to_string();
    let put = reqwest::Client::new()
        .put(format!("http://{}/v2/lying/manifests/lie", registry.address))
        .header("content-type", "application/vnd.oci.image.manifest.v1+json")
        .body(body)
        .send()
        .await
        .expect("an answer");
    assert!(put.status().is_success(), "{}", put.text().await.unwrap_or_default());
    let from = reference(&format!("{}/lying:lie", registry.address));
    let refused = pull(&oci, &uid('a'), &from).await.expect_err("larger than told");
    assert!(refused.chain().contains("larger than its manifest says"), "{}", refused.chain());
    pull(&oci, &uid('a'), &from_good).await.expect("others are pulled as ever");
}

#[tokio::test(flavor = "multi_thread")]
async fn references_follow_the_registry_and_digests_never_change() {
    let registry = Registry::start("").await;
    let oci = oci(&registry.dir.path().join("images"));
    let at = |name: &str| format!("{}/app{name}", registry.address);
    let owner = uid('a');
    let first = Image::make(registry.dir.path(), 7, &[1000], "amd64");
    let second = Image::make(registry.dir.path(), 8, &[1000], "amd64");
    let foreign = Image::make(registry.dir.path(), 9, &[1000], "arm64");
    first.push(&at(":tag"), None);
    let seen = resolve(&oci, &owner, &reference(&at(":tag"))).await.expect("resolved");
    assert_eq!(seen.digest.as_str(), first.manifest);
    second.push(&at(":tag"), None);
    foreign.push(&at(":foreign"), None);
    let seen = resolve(&oci, &owner, &reference(&at(":tag"))).await.expect("resolved");
    assert_eq!(seen.digest.as_str(), second.manifest, "a tag that was moved is looked up again");
    let by_digest = reference(&at(&format!("@{}", first.manifest)));
    let seen = resolve(&oci, &owner, &by_digest).await.expect("resolved");
    assert_eq!(seen.digest.as_str(), first.manifest);

    let entry = |image: &Image, architecture: &str| {
        json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.manifest,
                "size": image.manifest_bytes.len(), "platform": { "os": "linux", "architecture": architecture } })
    };
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX,
                        "manifests": [entry(&foreign, "arm64"), entry(&second, "amd64")] });
    put_index(&registry, "many", &index).await;
    let seen = resolve(&oci, &owner, &reference(&at(":many"))).await.expect("resolved");
    assert_eq!(seen.digest.as_str(), second.manifest);
    for (name, kind) in [(":foreign", HostErrorKind::Unsupported), (":none", HostErrorKind::Missing)] {
        let error = resolve(&oci, &owner, &reference(&at(name))).await.expect_err(name);
        assert_eq!(error.kind, kind, "{name}: {}", error.chain());
    }

    // Each index has the one before as its only entry: three are followed, four are not.
    let mut nested = index;
    for depth in 2..=4 {
        let bytes = nested.to_string();
        let one = json!({ "mediaType": INDEX, "digest": digest(bytes.as_bytes()), "size": bytes.len() });
        nested = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [one] });
        let name = format!("depth-{depth}");
        put_index(&registry, &name, &nested).await;
        let seen = resolve(&oci, &owner, &reference(&at(&format!(":{name}")))).await;
        if depth < 4 {
            assert_eq!(seen.expect(&name).digest.as_str(), second.manifest);
        } else {
            let error = seen.expect_err(&name);
            assert_eq!(error.kind, HostErrorKind::Permanent, "{}", error.chain());
            assert!(error.chain().contains("nested too deep"), "{}", error.chain());
        }
    }
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

async fn put_index(registry: &Registry, name: &str, index: &serde_json::Value) {
    let put = reqwest::Client::new()
        .put(format!("http://{}/v2/app/manifests/{name}", registry.address))
        .header("content-type", INDEX)
        .body(index.to_string());
    assert!(put.send().await.expect("an answer").status().is_success());
}

/// A registry answers with a document without an end.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_without_an_end_is_refused_when_it_is_too_long() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let endless = axum::Router::new().fallback(|| async {
        let chunks = futures::stream::repeat_with(|| {
            Ok::<_, std::io::Error>(bytes::Bytes::from(vec![b' '; 64 << 10]))
        });
        axum::body::Body::from_stream(chunks)
    });
    tokio::spawn(async move { axum::serve(listener, endless).await });
    let dir = tempfile::tempdir().expect("scratch");
    let from = reference(&format!("{address}/app:v1"));
    let refused = resolve(&oci(dir.path()), &uid('a'), &from).await.expect_err("it has no end");
    assert_eq!(refused.kind, HostErrorKind::Permanent, "{}", refused.chain());
    assert!(refused.chain().contains("larger than 4096 KiB"), "{}", refused.chain());
}
