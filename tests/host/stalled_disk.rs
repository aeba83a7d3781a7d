//! A disk that stops answering: what waits for it waits on threads of its own, and the async workers go on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use stead::host::boot_files::BootFiles;
use stead::host::cgroup::Cgroups;
use stead::host::watch_directories::DirectoryWatches;
use stead::hypervisor::{
    Accelerator, Drivers, Hypervisors, HypervisorsConfig, Jails, USERS, UserRange, WantedAccelerator,
};
use stead_controllers::host::{ImageJobs, Memories};
use stead_schemas::quantity::Bytes;
use tokio::sync::watch;

use crate::fake_registry::{Fake, digest, gated, image, layer};
use crate::loop_disk::LoopDisk;
use crate::namespace::{PATIENCE, in_namespace, shell, uid};
use crate::registry::{oci, pull, reference, resolve};

/// Returns `true` if a thread of this process waits for a disk.
fn waits_for_a_disk() -> bool {
    let threads = fs::read_dir("/proc/self/task").expect("mounted").flatten();
    threads.map(|thread| fs::read_to_string(thread.path().join("stat")).unwrap_or_default()).any(|stat| {
        let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
        after.starts_with('D')
    })
}

/// Waits until something waits for the disk, and checks that the only async worker does not.
async fn the_worker_is_free() {
    let deadline = Instant::now() + PATIENCE;
    while !waits_for_a_disk() {
        assert!(Instant::now() < deadline, "nothing waits for the disk");
        tokio::task::yield_now().await;
    }
    // A timer of the runtime would wait for the worker, too.
    let (sender, receiver) = std::sync::mpsc::channel();
    tokio::spawn(async move { sender.send(()) });
    receiver.recv_timeout(PATIENCE).expect("the worker waits for the disk");
}

/// Runs a body on a runtime with one worker. The body itself has a thread of its own.
async fn on_one_worker<Body: Future<Output = ()>>(body: impl FnOnce() -> Body + Send + 'static) {
    let on_thread = move || {
        let builder = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        builder.expect("a runtime starts").block_on(body());
    };
    tokio::task::spawn_blocking(on_thread).await.expect("it passes");
}

#[test]
fn a_pull_onto_a_disk_that_stalls_leaves_the_worker_to_others() {
    in_namespace(async || {
        on_one_worker(async || {
            shell("ip link set lo up");
            let fake = Fake::start().await;
            let big = layer("big", &vec![7; 8 << 20]);
            fake.serve("app", &image(std::slice::from_ref(&big)));
            let (open, gate) = watch::channel(false);
            let (first, rest) = (big[..4 << 20].to_vec(), big[4 << 20..].to_vec());
            fake.on(&format!("/v2/app/blobs/{}", digest(&big)), move |_| {
                gated(first.clone(), rest.clone(), gate.clone())
            });
            let disk = LoopDisk::new(64);
            let (oci, owner) = (oci(&disk.path().join("images")), uid('a'));
            let from = reference(&format!("{}/app:v1", fake.address));
            let resolved = resolve(&oci, &owner, &from).await.expect("resolved");
            oci.fetch(&owner, &from, &resolved.digest).await.expect("begun");
            disk.freeze();
            open.send_replace(true);
            the_worker_is_free().await;
            disk.thaw();
            pull(&oci, &owner, &from).await.expect("it goes on when the disk answers");
        })
        .await
    });
}

fn hypervisors(scratch: &Path, data: &Path) -> Hypervisors {
    let run = scratch.join("run");
    Hypervisors::new(HypervisorsConfig {
        drivers: Drivers::built_in(&BTreeMap::new(), Accelerator::probe()),
        run_dir: run.clone(),
        data_dir: data.to_owned(),
        boot_files: BootFiles::new(scratch.join("kernel"), scratch.join("cache")),
        console_log_max: Bytes(64 << 10),
        watches: DirectoryWatches::default(),
        noted: Arc::new(|_, _| ()),
        cgroups: Cgroups::probe("stall0"),
        accelerator: WantedAccelerator::Auto,
        jails: Jails::new(UserRange::new(USERS).expect("valid"), run),
        rootfs: Box::new(|_| PathBuf::new()),
        disk: Box::new(|_| PathBuf::new()),
        disk_reserve: Bytes(0),
        changed: Arc::new(|_| {}),
    })
}

#[test]
fn a_memory_that_is_discarded_from_a_disk_that_stalls_leaves_the_worker_to_others() {
    in_namespace(async || {
        on_one_worker(async || {
            let (disk, scratch) = (LoopDisk::new(64), tempfile::tempdir().expect("scratch"));
            let owner = uid('a');
            let saved = disk.path().join("memory").join(owner.as_str()).join("saved");
            fs::create_dir_all(&saved).expect("made");
            fs::write(saved.join("ram"), "RAM").expect("written");
            let vms = hypervisors(scratch.path(), &disk.path());
            disk.freeze();
            let discarding = tokio::spawn(async move { Memories::discard(&vms, &owner).await });
            the_worker_is_free().await;
            disk.thaw();
            discarding.await.expect("it does not panic").expect("discarded");
            assert!(!saved.exists());
        })
        .await
    });
}
