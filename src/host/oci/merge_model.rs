//! A test of the merged tree against a naive model: a flat map of paths, changed entry by entry.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::archive::{Item, Kind, Meta};
use super::merge::{Position, Tree};

/// The contents of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// A directory with its mode.
    Directory(u32),
    /// Content of this entry. Several paths with the same entry are hard links.
    Content(Position),
}

#[derive(Debug, Clone)]
enum Step {
    Directory(String),
    File(String),
    Symlink(String),
    Link(String, String),
    Whiteout(String),
    Opaque(String),
    Device(String),
}

/// Paths, each with `true` if the current layer created it.
#[derive(Debug, Default)]
struct Model(BTreeMap<String, (Held, bool)>);

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

fn is_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

impl Model {
    fn next_layer(&mut self) {
        self.0.values_mut().for_each(|(_, is_new)| *is_new = false);
    }

    fn remove(&mut self, path: &str) {
        self.0.retain(|other, _| other != path && !is_below(other, path));
    }

    fn make_parents(&mut self, path: &str) {
        for parent in parents(path) {
            if !matches!(self.0.get(parent), Some((Held::Directory(_), _))) {
                if self.0.contains_key(parent) {
                    self.remove(parent);
                }
                self.0.insert(parent.to_owned(), (Held::Directory(0o755), true));
            }
        }
    }

    fn put(&mut self, path: &str, held: Held) {
        let stays = matches!((self.0.get(path), held), (Some((Held::Directory(_), _)), Held::Directory(_)));
        if !stays {
            self.remove(path);
        }
        self.0.insert(path.to_owned(), (held, true));
    }

    /// Removes names of lower layers. Names of this layer keep their parent directories.
    fn hide(&mut self, is_hidden: impl Fn(&str) -> bool) {
        self.0.retain(|path, (_, is_new)| *is_new || !is_hidden(path));
        let kept: Vec<String> = self.0.keys().cloned().collect();
        kept.iter().for_each(|path| self.make_parents(path));
    }

    /// Applies a step. Returns `false` if such an image is refused.
    fn apply(&mut self, position: Position, mode: u32, step: &Step) -> bool {
        match step {
            Step::Directory(path) => {
                self.make_parents(path);
                self.put(path, Held::Directory(mode));
            }
            Step::File(path) | Step::Symlink(path) => {
                self.make_parents(path);
                self.put(path, Held::Content(position));
            }
            Step::Link(path, target) => {
                self.make_parents(path);
                self.make_parents(target);
                let Some(&(held @ Held::Content(_), _)) = self.0.get(target) else { return false };
                if self.0.get(path).map(|(held, _)| *held) != Some(held) {
                    self.put(path, held);
                }
            }
            Step::Whiteout(path) => {
                self.make_parents(path);
                self.hide(|other| other == path || is_below(other, path));
            }
            Step::Opaque(path) => {
                self.make_parents(&format!("{path}/x"));
                self.hide(|other| is_below(other, path));
            }
            Step::Device(path) => {
                self.make_parents(path);
                self.remove(path);
            }
        }
        true
    }
}

fn item(step: &Step, mode: u32) -> Item {
    let parts = |path: &str| path.split('/').map(|part| part.as_bytes().to_vec()).collect::<Vec<_>>();
    let marked = |path: &str| {
        let mut parts = parts(path);
        let last = parts.pop().expect("a path has a name");
        parts.push([b".wh.", &last[..]].concat());
        parts
    };
    let (path, kind) = match step {
        Step::Directory(path) => (parts(path), Kind::Directory),
        Step::File(path) => (parts(path), Kind::File),
        Step::Symlink(path) => (parts(path), Kind::Symlink(b"nowhere".to_vec())),
        Step::Link(path, target) => (parts(path), Kind::Hardlink(target.clone().into_bytes())),
        Step::Whiteout(path) => (marked(path), Kind::File),
        Step::Opaque(path) => (parts(&format!("{path}/.wh..wh..opq")), Kind::File),
        Step::Device(path) => (parts(path), Kind::Dropped),
    };
    Item { path, kind, meta: Meta { mode, ..Meta::default() } }
}

/// Returns the paths that the tree emits.
fn emitted(tree: Tree) -> BTreeMap<String, Held> {
    let merged = tree.finish();
    let text = |path: Vec<u8>| String::from_utf8(path).expect("made of letters");
    let mut out: BTreeMap<String, Held> = merged
        .directories
        .iter()
        .map(|(path, meta)| (text(path.clone()), Held::Directory(meta.mode)))
        .collect();
    for position in merged.positions() {
        let (_, paths) = merged.at(position).expect("it is one of them");
        out.extend(paths.iter().map(|named| (text(named.path.clone()), Held::Content(position))));
    }
    out
}

/// Draws paths from few names, so that entries collide. Links are separate leaves, so that no path leads through one.
fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => path().prop_map(Step::Directory),
        3 => path().prop_map(Step::File),
        1 => path().prop_map(|path| Step::Symlink(format!("{path}/link"))),
        2 => (path(), path()).prop_map(|(path, target)| Step::Link(path, target)),
        2 => path().prop_map(Step::Whiteout),
        1 => path().prop_map(Step::Opaque),
        1 => path().prop_map(Step::Device),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_merged_tree_is_what_applying_the_layers_one_by_one_makes(
        layers in proptest::collection::vec(proptest::collection::vec(step(), 0..8), 1..4),
    ) {
        let (mut tree, mut model) = (Tree::default(), Model::default());
        for (layer, steps) in (0u32..).zip(&layers) {
            model.next_layer();
            for (ordinal, step) in (0u32..).zip(steps) {
                let position = Position { layer, ordinal };
                let mode = 0o100 + layer * 8 + ordinal;
                let is_taken = tree.apply(position, item(step, mode)).is_ok();
                prop_assert_eq!(is_taken, model.apply(position, mode, step), "{:?}", step);
                if !is_taken {
                    return Ok(());
                }
            }
        }
        let expected: BTreeMap<String, Held> =
            model.0.into_iter().map(|(path, (held, _))| (path, held)).collect();
        prop_assert_eq!(emitted(tree), expected);
    }
}
