//! The store on real files: order of system calls, a full disk, a killed process, the lock.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use stead::store::{DataDirectory, LockError, OpenError, SealKeyError, open};
use stead_controllers::store::{Kinds, New, Store, StoreError, TransactError, TxError};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::meta::Tags;
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::Bytes;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Environment variable that is set for the copy of this program that the tests run as a separate process.
const CHILD_DIRECTORY: &str = "STEAD_TEST_STORE_CHILD";

/// An open store that can be closed in order.
pub(crate) struct Open {
    pub(crate) store: Store,
    stop: oneshot::Sender<()>,
    writer: JoinHandle<()>,
    lock: stead::store::DirectoryLock,
}

pub(crate) fn start(directory: &Path) -> Result<Open, OpenError> {
    let DataDirectory { store, writer, lock } = open(directory, Kinds::new().with::<Disk>())?;
    let (stop, stopped) = oneshot::channel::<()>();
    let writer = tokio::spawn(writer.run(async {
        let _ = stopped.await;
    }));
    Ok(Open { store, stop, writer, lock })
}

impl Open {
    pub(crate) async fn close(self) {
        self.stop.send(()).expect("the writer runs");
        self.writer.await.expect("the writer ends in peace");
        drop(self.lock);
    }
}

pub(crate) async fn create(store: &Store, name: &str) -> Result<Uid, TransactError<TxError>> {
    create_tagged(store, name, Tags::new()).await
}

async fn create_tagged(store: &Store, name: &str, tags: Tags) -> Result<Uid, TransactError<TxError>> {
    let name = Name::resource(name).expect("a valid name");
    let spec = DiskSpec::empty(Bytes(1 << 20), DiskPurpose::RootOverlay);
    let new = New::<Disk> { uid: None, name, tags, owner: None, spec };
    store.transact(move |tx| tx.create(new).map(|disk| disk.meta.uid.clone())).await
}

pub(crate) fn uids(store: &Store) -> BTreeSet<Uid> {
    store.uids::<Disk>().into_iter().collect()
}

/// Returns the command that runs this test again in a separate process, with `CHILD_DIRECTORY` set.
pub(crate) fn child(wrapper: &[&str], test: &str, directory: &Path) -> Command {
    let this = std::env::current_exe().expect("this program has a path");
    let mut words = wrapper.iter().map(|word| (*word).to_owned());
    let mut command = match words.next() {
        Some(program) => {
            let mut command = Command::new(program);
            command.args(words).arg(this);
            command
        }
        None => Command::new(this),
    };
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD_DIRECTORY, directory);
    command
}

/// Returns the directory to work in, if this process is the child.
pub(crate) fn child_directory() -> Option<PathBuf> {
    std::env::var_os(CHILD_DIRECTORY).map(PathBuf::from)
}

pub(crate) fn acknowledge(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).expect("the parent reads");
}

/// A call on the database file, from a line of strace's output.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Written,
    SyncBegun,
    SyncEnded,
    Acknowledged,
}

/// Parses lines of `strace -f -y`. Calls of one thread may be split by those of others.
fn parse_trace(trace: &str) -> Vec<Call> {
    let mut syncing = BTreeSet::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let Some((pid, call)) = line.split_once(' ') else { continue };
        let call = call.trim_start();
        let is_database = call.contains("/db/db>");
        if call.starts_with("pwrite64(") && is_database {
            calls.push(Call::Written);
        } else if call.starts_with("fdatasync(") && is_database {
            calls.push(Call::SyncBegun);
            if call.ends_with("= 0") {
                calls.push(Call::SyncEnded);
            } else if call.ends_with("<unfinished ...>") {
                syncing.insert(pid);
            }
        } else if call.starts_with("<... fdatasync resumed>") && call.ends_with("= 0") {
            if syncing.remove(pid) {
                calls.push(Call::SyncEnded);
            }
        } else if call.starts_with("write(1") && call.contains("ACK") {
            calls.push(Call::Acknowledged);
        }
    }
    calls
}

#[tokio::test]
async fn an_acknowledgement_follows_the_fdatasync_of_what_it_acknowledges() {
    const WRITES: usize = 20;
    if let Some(directory) = child_directory() {
        let open = start(&directory).expect("opens");
        for n in 0..WRITES {
            create(&open.store, &format!("n-{n}")).await.expect("stored");
            acknowledge(&format!("ACK {n}"));
        }
        return open.close().await;
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let trace = scratch.path().join("trace");
    let trace_text = trace.to_str().expect("a plain path");
    let wrapper =
        ["strace", "-f", "-y", "-e", "trace=fdatasync,fsync,write,pwrite64,sendto", "-o", trace_text];
    let test = "store::an_acknowledgement_follows_the_fdatasync_of_what_it_acknowledges";
    let status = child(&wrapper, test, &scratch.path().join("data"))
        .stdout(Stdio::null())
        .status()
        .expect("strace is installed (Debian package strace)");
    assert!(status.success(), "{status}");

    let (mut is_dirty, mut writes_since_sync_began, mut syncs, mut acknowledged) = (false, false, 0, 0);
    for call in parse_trace(&fs::read_to_string(&trace).expect("strace wrote its file")) {
        match call {
            Call::Written => (is_dirty, writes_since_sync_began) = (true, true),
            Call::SyncBegun => writes_since_sync_began = false,
            Call::SyncEnded => {
                is_dirty = writes_since_sync_began;
                syncs += 1;
            }
            Call::Acknowledged => {
                assert!(!is_dirty, "acknowledgement {acknowledged} came before the sync of its data");
                assert!(syncs > acknowledged, "each acknowledgement has a sync of its own");
                acknowledged += 1;
            }
        }
    }
    assert_eq!(acknowledged, WRITES);
}

#[test]
fn the_trace_parser_sees_a_missing_and_a_late_sync() {
    let write = r#"7 pwrite64(5</d/db/db>, "x"..., 9, 0) = 9"#;
    let ack = r#"8 write(1</dev/null>, "ACK 0\n", 6) = 6"#;
    let begun = "7 fdatasync(5</d/db/db> <unfinished ...>";
    let ended = "7 <... fdatasync resumed>) = 0";
    let failed = "7 <... fdatasync resumed>) = -1 EIO";
    let lines = [write, begun, ack, ended, write, begun, failed].join("\n");
    use Call::{Acknowledged, SyncBegun, SyncEnded, Written};
    assert_eq!(parse_trace(&lines), [Written, SyncBegun, Acknowledged, SyncEnded, Written, SyncBegun]);
}

#[tokio::test]
async fn what_was_acknowledged_before_a_kill_is_there_after_it() {
    if let Some(directory) = child_directory() {
        let open = start(&directory).expect("opens");
        for n in 0.. {
            let uid = create(&open.store, &format!("n-{n}")).await.expect("stored");
            acknowledge(&format!("ACK {uid}"));
        }
    }
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let directory = scratch.path().join("data");
    let test = "store::what_was_acknowledged_before_a_kill_is_there_after_it";
    let mut acknowledged = BTreeSet::new();
    for round in 1..=5 {
        let mut child = child(&[], test, &directory).stdout(Stdio::piped()).spawn().expect("starts");
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("piped")));
        let mut count = 0;
        // The harness writes its own lines, and the kill may cut the last one.
        for line in lines.by_ref().map_while(Result::ok) {
            acknowledged.extend(acknowledged_uid(&line));
            count += usize::from(line.contains("ACK "));
            if count >= 50 * round {
                break;
            }
        }
        child.kill().expect("SIGKILL");
        child.wait().expect("reaped");
        assert_eq!(count, 50 * round, "the child ended by itself");
        // These lines were written between the last line read and the kill.
        acknowledged.extend(lines.map_while(Result::ok).filter_map(|line| acknowledged_uid(&line)));
        let open = start(&directory).expect("opens after the kill");
        let found = uids(&open.store);
        let lost: Vec<_> = acknowledged.difference(&found).collect();
        assert!(lost.is_empty(), "lost after round {round}: {lost:?}");
        assert!(open.store.unreadable().is_empty());
        // The next round starts with its own names.
        for uid in found {
            let gone = open.store.transact(move |tx| tx.request_deletion::<Disk>(&uid)).await;
            gone.expect("stored");
        }
        open.close().await;
    }
}

pub(crate) fn acknowledged_uid(line: &str) -> Option<Uid> {
    line.split("ACK ").nth(1)?.parse().ok()
}

/// A small file system, which is removed with the value.
pub(crate) struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    pub(crate) fn mount(mebibytes: u32) -> Self {
        let directory = tempfile::tempdir().expect("a scratch directory");
        let options = std::ffi::CString::new(format!("size={mebibytes}m")).expect("no zero byte");
        mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .expect("this test mounts a tmpfs and needs root");
        Self(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills it to the last byte.
    pub(crate) fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = fs::File::create(&path).expect("made");
        for size in [1 << 20, 4096] {
            while file.write_all(&vec![7; size]).is_ok() {}
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.path(), UnmountFlags::DETACH) {
            eprintln!("cannot unmount {}: {error}", self.path().display());
        }
    }
}

/// Returns about 30 KB of tags, so that a disk fills within some hundred writes.
fn bulky() -> Tags {
    let value = "v".repeat(256);
    (0..120).map(|n| (format!("key-{n}"), value.clone())).collect()
}

#[tokio::test]
async fn a_full_disk_refuses_writes_loses_nothing_and_recovers() {
    let small = SmallDisk::mount(48);
    let directory = small.path().join("data");
    let open = start(&directory).expect("opens");
    let mut acknowledged = BTreeSet::new();
    let mut count = 0;
    for round in 0..3 {
        for _ in 0..20 {
            count += 1;
            acknowledged
                .insert(create_tagged(&open.store, &format!("n-{count}"), bulky()).await.expect("room"));
        }
        let filler = small.fill();
        let refused = loop {
            count += 1;
            match create_tagged(&open.store, &format!("n-{count}"), bulky()).await {
                Ok(uid) => acknowledged.insert(uid),
                Err(error) => break error,
            };
            assert!(count < 10_000, "the disk never filled");
        };
        assert_eq!(refused, TransactError::Store(StoreError::Full), "round {round}");
        assert_eq!(uids(&open.store), acknowledged, "reads go on");
        // Writes that free space, and writes that report the lack of it, are still accepted, hundreds of times.
        for (step, uid) in (1..).zip(acknowledged.iter().cycle().take(300)) {
            let (updated, deleted) = (uid.clone(), uid.clone());
            let size = move |spec: &mut DiskSpec| spec.size = Bytes((2 << 20) + step);
            let updated = open.store.transact(move |tx| tx.update_spec::<Disk>(&updated, None, size));
            let deleting = matches!(updated.await, Err(TransactError::Refused(TxError::Deleting { .. })));
            let deleted =
                open.store.transact(move |tx| tx.request_deletion::<Disk>(&deleted).map(drop)).await;
            deleted.unwrap_or_else(|error| panic!("round {round}, turn {step}: {error}"));
            let is_first_round_of_all = step <= 20 && round == 0;
            assert!(!(is_first_round_of_all && deleting), "turn {step} found it deleted");
        }
        assert_eq!(uids(&open.store), acknowledged);
        fs::remove_file(filler).expect("removed");
        acknowledged
            .insert(create(&open.store, &format!("again-{round}")).await.expect("there is room again"));
    }
    open.close().await;
    let open = start(&directory).expect("opens");
    assert_eq!(uids(&open.store), acknowledged);
    assert!(open.store.unreadable().is_empty());
    open.close().await;
}

/// Checks the reserve while other writers are active: guests, consoles, and saves that continue until they fail.
#[tokio::test]
async fn what_was_kept_for_a_full_disk_is_taken_by_nobody_else() {
    let small = SmallDisk::mount(48);
    let directory = small.path().join("data");
    let open = start(&directory).expect("opens");
    let uid = create_tagged(&open.store, "one", bulky()).await.expect("room");
    open.close().await;
    small.fill();
    // The daemon starts on a full disk.
    let open = start(&directory).expect("opens");
    let (is_over, path) = (Arc::new(AtomicBool::new(false)), small.path().join("greedy"));
    let ends = is_over.clone();
    let greedy = std::thread::spawn(move || {
        let mut file = fs::File::create(path).expect("made");
        while !ends.load(Ordering::Relaxed) {
            let _ = file.write_all(&[7; 4096]); // Refused most of the time: that is the point.
            // This is as fast as disks are. sled truncates its file now and then, and any writer may take the space
            // of the store beyond its end until the store takes it again, a millisecond later.
            std::thread::sleep(Duration::from_micros(100));
        }
    });
    let mut stored = Ok(());
    for step in 1..=300 {
        let uid = uid.clone();
        let size = move |spec: &mut DiskSpec| spec.size = Bytes((2 << 20) + step);
        stored = open.store.transact(move |tx| tx.update_spec::<Disk>(&uid, None, size).map(drop)).await;
        if stored.is_err() {
            break;
        }
    }
    is_over.store(true, Ordering::Relaxed);
    greedy.join().expect("it never fails");
    assert_eq!(stored, Ok(()));
    open.close().await;
}

#[tokio::test]
async fn large_values_survive_too() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let open = start(scratch.path()).expect("opens");
    // The value is larger than one of the database's segments, so that it goes to a file of its own.
    let value = "x".repeat(3 << 20);
    let uid = create_tagged(&open.store, "large", Tags::from([("k".to_owned(), value.clone())])).await;
    let uid = uid.expect("stored");
    open.close().await;
    let open = start(scratch.path()).expect("opens");
    assert_eq!(open.store.get::<Disk>(&uid).expect("there").meta.tags["k"], value);
    open.close().await;
}

#[tokio::test]
async fn a_directory_has_one_user_and_one_key() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let open = start(scratch.path()).expect("opens");
    let uid = create(&open.store, "one").await.expect("stored");
    let second = start(scratch.path()).err();
    let own = std::process::id().to_string();
    assert!(
        matches!(&second, Some(OpenError::Lock(LockError::Held { holder, .. })) if *holder == own),
        "{second:?}"
    );
    open.close().await;

    let key = scratch.path().join("keys/seal.key");
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&key), mode(key.parent().expect("has one"))), (0o600, 0o700));
    let bytes = fs::read(&key).expect("readable by its owner");
    fs::remove_file(&key).expect("removed");
    let missing = start(scratch.path()).err();
    assert!(matches!(missing, Some(OpenError::SealKey(SealKeyError::Missing { .. }))), "{missing:?}");
    mknodat(CWD, &key, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .expect("a named pipe that nobody writes to");
    let pipe = start(scratch.path()).err();
    assert!(matches!(pipe, Some(OpenError::SealKey(SealKeyError::Kind { .. }))), "{pipe:?}");
    fs::remove_file(&key).expect("removed");
    fs::write(&key, &bytes).expect("written");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("set");
    let open_to_all = start(scratch.path()).err();
    assert!(matches!(open_to_all, Some(OpenError::SealKey(SealKeyError::Mode { .. }))), "{open_to_all:?}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("set");
    fs::write(&key, [0; 32]).expect("written");
    let wrong = start(scratch.path()).err();
    assert!(matches!(wrong, Some(OpenError::Store(StoreError::Unopenable { .. }))), "{wrong:?}");
    fs::write(&key, &bytes).expect("written");
    let open = start(scratch.path()).expect("opens with its own key");
    assert!(open.store.get::<Disk>(&uid).is_some());
    open.close().await;
}

#[tokio::test]
async fn nothing_stored_is_readable_in_the_files() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let open = start(scratch.path()).expect("opens");
    let secret = "correct-horse-battery-staple";
    let tags = Tags::from([("k".to_owned(), secret.to_owned())]);
    create_tagged(&open.store, "one", tags).await.expect("stored");
    open.close().await;
    let file = fs::read(scratch.path().join("db/db")).expect("there");
    let holds = |text: &str| file.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds("n/disk/"), "the file was searched where it matters");
    assert!(!holds(secret));
}

#[tokio::test]
async fn many_writers_at_once_are_all_stored() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let open = start(scratch.path()).expect("opens");
    let writers = (0..64).map(|writer| {
        let store = open.store.clone();
        tokio::spawn(async move {
            for n in 0..10 {
                create(&store, &format!("w-{writer}-{n}")).await.expect("stored");
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.expect("no writer panics");
    }
    assert_eq!(open.store.count::<Disk>(), 640);
    open.close().await;
}
