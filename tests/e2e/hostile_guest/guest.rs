//! The hostile guest: PID 1 of a real VM that ends our agent and uses its port.
//!
//! The test compiles it with `rustc` alone, statically, for an image of its own; it is not part of any crate. It
//! prints each attack on the console before it begins, and ends silently, with the port open.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

const MAGIC: [u8; 4] = [0xf7, b's', b't', b'd'];
const CONTROL: u8 = 0;
const PORT: &str = "/dev/vport0p1";
/// Path of a file that survives a start, with the token of an earlier boot.
const KEPT: &str = "/token";
/// Duration of each attack.
const TIME: Duration = Duration::from_secs(3);

fn main() {
    let agent = agent();
    let token = token_of(&agent);
    let earlier = fs::read_to_string(KEPT).ok();
    fs::write(KEPT, token.as_deref().unwrap_or("none")).expect("written");
    println!("hostile: token {}", if token.is_some() { "found" } else { "not found" });
    let killed = Command::new("/bin/busybox").args(["kill", "-9", &agent]).status();
    assert!(killed.is_ok_and(|status| status.success()), "the agent was killed");
    let mut port = open();
    if let Some(earlier) = earlier {
        println!("hostile: replays");
        // One message has the token of an earlier boot, the other has none: neither ends this boot.
        for token in [format!("\"{earlier}\""), "null".to_owned()] {
            attack(&mut port, |_| {
                state(&token, "exited", "{\"code\":0,\"message\":\"over\",\"is_boot_failure\":false}")
            });
        }
        println!("hostile: replayed");
        silence();
    }
    println!("hostile: floods");
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    attack(&mut port, |_| (0..8192).flat_map(|_| noise.next().to_le_bytes()).collect());
    println!("hostile: lies about sizes");
    attack(&mut port, |round| {
        let length = [u32::MAX, 1 << 20, (1 << 20) + 1, 0][round % 4];
        let mut bytes = [&MAGIC[..], &length.to_le_bytes(), &[CONTROL, 0, 0, 0, 0]].concat();
        bytes.extend(vec![b'['; 50_000]);
        bytes
    });
    println!("hostile: speaks on streams that nobody opened");
    attack(&mut port, |round| {
        let (kind, stream) = (u8::try_from(round % 9).expect("small"), u32::try_from(round).expect("small"));
        frame(kind, stream.wrapping_mul(0x9e37_79b9), &vec![0xff; 1 << (round % 17)])
    });
    println!("hostile: nests");
    attack(&mut port, |_| frame(CONTROL, 0, &vec![b'['; 1 << 20]));
    println!("hostile: flaps");
    let token = token.map_or("null".to_owned(), |token| format!("\"{token}\""));
    attack(&mut port, |round| state(&token, ["ready", "configured", "awaiting_config"][round % 3], "null"));
    println!("hostile: boasts");
    let boast = format!(
        "{{\"code\":7,\"message\":\"{}\",\"is_boot_failure\":false}}",
        "\\u001b[31m boo".repeat(60_000)
    );
    attack(&mut port, |_| state("null", "exited", &boast));
    attack(&mut port, |_| state(&token, "ready", "null"));
    println!("hostile: is silent");
    silence();
}

/// Neither reads nor writes, and keeps the port open.
fn silence() -> ! {
    loop {
        std::thread::park();
    }
}

fn attack(port: &mut File, mut bytes: impl FnMut(usize) -> Vec<u8>) {
    let start = Instant::now();
    for round in 0.. {
        if start.elapsed() > TIME {
            return;
        }
        // The host may hang up. Messages sent then are lost.
        if port.write_all(&bytes(round)).is_err() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small").to_le_bytes();
    [&MAGIC[..], &length, &[kind], &stream.to_le_bytes(), payload].concat()
}

fn state(token: &str, phase: &str, exit: &str) -> Vec<u8> {
    let text =
        format!("{{\"protocol\":1,\"nonce\":1,\"token\":{token},\"phase\":\"{phase}\",\"exit\":{exit}}}");
    frame(CONTROL, 0, text.as_bytes())
}

/// Returns the process id of the agent, once it exists.
fn agent() -> String {
    loop {
        for entry in fs::read_dir("/proc").expect("mounted").flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if line.starts_with(b"stead-agent") {
                // Meanwhile the agent reports its state to the host, with the token in it.
                std::thread::sleep(Duration::from_secs(1));
                return entry.file_name().into_string().expect("a number");
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the token, read from the agent's memory: root may read it.
fn token_of(agent: &str) -> Option<String> {
    const KEY: &[u8] = b"\"token\":\"";
    let maps = fs::read_to_string(format!("/proc/{agent}/maps")).ok()?;
    let memory = File::open(format!("/proc/{agent}/mem")).ok()?;
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        let mut bytes = vec![0; usize::try_from(to - from).ok()?];
        if memory.read_at(&mut bytes, from).is_err() {
            continue;
        }
        let found = bytes.windows(KEY.len() + 32).filter(|part| part.starts_with(KEY)).find_map(|part| {
            let word = std::str::from_utf8(&part[KEY.len()..]).ok()?;
            word.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| word.to_owned())
        });
        if found.is_some() {
            return found;
        }
    }
    None
}

/// Opens the port, which the agent no longer uses.
fn open() -> File {
    loop {
        if let Ok(file) = File::options().read(true).write(true).open(PORT) {
            return file;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A Splitmix64 generator: random enough for noise.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
