//! A test of the memory of a merged tree, measured in a process that does nothing else.

use std::process::Command;

use super::archive::{Item, Kind, Meta};
use super::merge::{MEMORY_MAX, Merged, Position, Tree};

/// Environment variable that tells the test's subprocess which tree to make.
const SHAPE: &str = "STEAD_TEST_TREE";
/// Number of entries that are tried. No tree takes as many.
const ENTRIES: u32 = 2_000_000;

/// Reads a value of `/proc/self/status`, in bytes.
fn status(key: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").expect("mounted");
    let line = text.lines().find(|line| line.starts_with(key)).expect("Linux has it");
    line.split_whitespace().nth(1).and_then(|word| word.parse::<usize>().ok()).expect("a number") << 10
}

/// Returns the entry with a number, for a kind of tree.
fn entry(shape: &str, number: u32) -> Item {
    let number = format!("{number:07}");
    let (path, kind) = match shape {
        "short" => (vec![number], Kind::File),
        "long" => (vec![format!("{number}{}", "n".repeat(110))], Kind::File),
        "deep" => {
            let parts = (0..15).map(|at| format!("{at}{}", "d".repeat(200)));
            (parts.chain([number]).collect(), Kind::Symlink(vec![b't'; 4000]))
        }
        _ => {
            let attributes = vec![(b"user.a".to_vec(), vec![0; 60_000])];
            let item = Item {
                path: vec![number.into_bytes()],
                kind: Kind::File,
                meta: Meta { attributes, ..Meta::default() },
            };
            return item;
        }
    };
    Item { path: path.into_iter().map(String::into_bytes).collect(), kind, meta: Meta::default() }
}

/// Makes a tree of the largest allowed size. The next layer examines all of it and hides nothing.
fn largest(shape: &str) -> Merged {
    let mut tree = Tree::default();
    let refused = (0..ENTRIES)
        .find_map(|ordinal| tree.apply(Position { layer: 0, ordinal }, entry(shape, ordinal)).err())
        .expect("its memory is counted");
    assert!(refused.message.contains("MiB"), "{}", refused.message);
    let again = vec![b"0000000".to_vec()];
    let item = Item { path: again, kind: Kind::Directory, meta: Meta::default() };
    // The budget is spent: the names are examined even if the entry is refused.
    let _ = tree.apply(Position { layer: 1, ordinal: 0 }, item);
    tree.finish()
}

#[test]
fn the_largest_tree_takes_no_more_memory_than_is_counted() {
    if let Ok(shape) = std::env::var(SHAPE) {
        let before = status("VmRSS");
        let merged = largest(&shape);
        let grown = status("VmHWM").saturating_sub(before);
        assert!(merged.positions().next().is_some());
        // The tolerance is for pages of the program that were not read before, and for the allocator's rounding.
        let most = MEMORY_MAX + (MEMORY_MAX >> 2);
        assert!(grown < most, "{shape}: {} MiB", grown >> 20);
        return;
    }
    let name = "host::oci::merge_memory::the_largest_tree_takes_no_more_memory_than_is_counted";
    for shape in ["short", "long", "deep", "attributes"] {
        let mut own = Command::new(std::env::current_exe().expect("it has a path"));
        let output = own.args(["--exact", name, "--nocapture"]).env(SHAPE, shape).output().expect("it runs");
        let reported = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && reported.contains("1 passed"), "{shape}: {reported}");
    }
}
