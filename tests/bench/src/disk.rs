//! fio in a guest, on the instance's disk, against the same VM started manually with the options of QEMU that are
//! fastest for each job.
//!
//! The program of both VMs runs all jobs and prints its figures on the console. Rounds are interleaved.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::daemon::Daemon;
use crate::hand::{self, Hand};
use crate::{Figure, median};

const ROUNDS: usize = 3;
const IMAGE: &str = "bench.test/fio:v1";
/// Size of the guest's disk, in bytes, of which the file of the jobs takes half.
const DISK_BYTES: u64 = 1 << 30;
const FILE: &str = "512m";
/// Time limit for all jobs of one VM, which take half a minute.
const JOBS_DEADLINE: Duration = Duration::from_secs(300);
/// Word before each figure on the console, and the last line.
const FIGURE: &str = "fio-figure";
const END: &str = "fio-end";

/// The jobs: name, description, unit, and fio's options.
const JOBS: [(&str, &str, &str, &str); 5] = [
    ("seqread", "sequential read, 128 KiB", "MB/s", "--rw=read --bs=128k --iodepth=4"),
    ("seqwrite", "sequential write, 128 KiB", "MB/s", "--rw=write --bs=128k --iodepth=4"),
    ("randread", "random read, 4 KiB, 16 at once", "/s", "--rw=randread --bs=4k --iodepth=16"),
    ("randwrite", "random write, 4 KiB, 16 at once", "/s", "--rw=randwrite --bs=4k --iodepth=16"),
    ("fsync", "write of 4 KiB with fdatasync", "/s", "--rw=randwrite --bs=4k --fdatasync=1"),
];

/// Options of the disk of a manually started VM, by which its jobs are fastest on one host or another.
const PEERS: [(&str, &str); 3] =
    [("threads", ""), ("native", ",aio=native,cache.direct=on"), ("io_uring", ",aio=io_uring")];

/// Figures of the jobs, by their names.
type Measured = BTreeMap<String, Vec<f64>>;

pub(crate) async fn disk() -> Vec<Figure> {
    let daemon = Daemon::start("stbench8", "10.239.246.1/24").await;
    import(&daemon).await;
    let (mut ours, mut peers) = (Measured::new(), BTreeMap::<&str, Measured>::new());
    let program = ["/bin/busybox", "sh", "/jobs"];
    let (overlay, directory) = (daemon.dir.path().join("hand.ext4"), daemon.dir.path().join("hand"));
    for round in 0..ROUNDS {
        let name = format!("d{round}");
        let size = format!("{}MB", DISK_BYTES >> 20);
        daemon.post_with(&name, json!({ "image": IMAGE, "overlay_size": size, "cmd": program })).await;
        let instance = daemon.get(&format!("/instances/{name}")).await;
        let id = instance["id"].as_str().expect("an id");
        read_figures(&daemon.dir.path().join("data/logs").join(id).join("app.log"), &mut ours).await;
        let pid = instance["vmm_pid"].as_u64().expect("a process");
        let arguments = hand::arguments(pid, &overlay, &directory, None);
        daemon.delete(&name).await;
        for (peer, options) in PEERS {
            hand::make_disk(&overlay, DISK_BYTES);
            let _vm = Hand::boot(&with_options(&arguments, options), &directory, &program);
            read_figures(&directory.join("app.log"), peers.entry(peer).or_default()).await;
        }
    }
    JOBS.iter()
        .map(|(job, what, unit, _)| {
            let of = |measured: &Measured| median(measured[*job].clone());
            let best = peers.iter().map(|(peer, measured)| (of(measured), peer));
            let (best, peer) = best.max_by(|one, other| one.0.total_cmp(&other.0)).expect("there are peers");
            Figure {
                what: format!("disk: {what} (peer: by hand with {peer})"),
                ours: of(&ours),
                peer: Some(best),
                unit,
                goal: ">= 0.95",
            }
        })
        .collect()
}

/// Adds options to the disk that the guest writes to.
fn with_options(arguments: &[String], options: &str) -> Vec<String> {
    let direct = options.contains("cache.direct=on");
    let changed = arguments.iter().map(|word| match word {
        word if word.contains("node-name=overlay-file,") => {
            let plain = word.replace(",aio=native", "").replace(",cache.direct=on", "");
            format!("{plain}{options}")
        }
        word if word.contains("node-name=overlay,") => {
            let plain = word.replace(",cache.direct=on", "");
            if direct { format!("{plain},cache.direct=on") } else { plain }
        }
        word => word.clone(),
    });
    changed.collect()
}

/// Reads the figures that the jobs print, and waits for their end.
async fn read_figures(log: &Path, measured: &mut Measured) {
    let start = Instant::now();
    loop {
        let text =
            fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        if text.lines().any(|line| line.trim() == END) {
            for line in text.lines().filter(|line| line.starts_with(FIGURE)) {
                let mut words = line.split_whitespace().skip(1);
                let (job, value) = (words.next().expect("a job"), words.next().expect("a figure"));
                measured.entry(job.to_owned()).or_default().push(value.parse().expect("a number"));
            }
            return;
        }
        assert!(start.elapsed() < JOBS_DEADLINE, "the jobs have not ended: {text}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Imports an image with busybox, fio with its libraries, and the program.
async fn import(daemon: &Daemon) {
    let root = daemon.dir.path().join("fio");
    for dir in ["bin", "tmp"] {
        fs::create_dir_all(root.join(dir)).expect("made");
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    let fio = PathBuf::from("/usr/bin/fio");
    let libraries = Command::new("ldd").arg(&fio).output().expect("fio is installed");
    let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    for file in libraries.chain([fio]) {
        let to = root.join(file.strip_prefix("/").expect("absolute"));
        fs::create_dir_all(to.parent().expect("a directory")).expect("made");
        fs::copy(&file, to).expect("copied");
    }
    fs::write(root.join("jobs"), script()).expect("written");
    daemon.import_root(&root, IMAGE);
}

/// Builds the program of a VM. Each job has a fixed time, on the same file, which is written once before.
fn script() -> String {
    let mut script = format!(
        "export PATH=/usr/bin:/bin\ncd /\n/bin/busybox dd if=/dev/zero of=/file bs=1M count={} conv=fsync 2>/dev/null\n",
        FILE.trim_end_matches('m')
    );
    for (job, _, unit, options) in JOBS {
        // Fields of the third version of this format, of reads and of writes: KiB per second, and operations.
        let value = if unit == "MB/s" { "($7+$48)/1024" } else { "$8+$49" };
        script.push_str(&format!(
            "fio --name={job} --filename=/file --size={FILE} --direct=1 --ioengine=libaio --time_based --runtime=4 \
             --ramp_time=1 --output-format=terse --terse-version=3 {options} | \
             /bin/busybox awk -F';' '$3==\"{job}\" {{print \"{FIGURE} {job} \" {value}}}'\n"
        ));
    }
    script.push_str(&format!("echo {END}\nexec /bin/busybox sleep 100000\n"));
    script
}
