//! The merged tree of an image's layers: which path is made of which entry of which layer.
//!
//! Layers are applied bottom up, as a container runtime would: later entries replace earlier ones,
//! whiteouts take away what lower layers brought, hard links share one node whatever happens to the
//! path they were made of. Nothing is unpacked: the tree only says what to emit.

use std::collections::{BTreeMap, BTreeSet};

use super::Refused;
use super::archive::{Item, Kind, Meta, components, show};

/// Entries of all layers together. A large distribution image has 200,000; each costs memory here.
pub(super) const ENTRIES_MAX: usize = 1_000_000;
/// Symbolic links followed for one parent path, as Linux has it.
const LINKS_FOLLOWED_MAX: usize = 40;
/// Bytes of names, link targets and attributes. A large distribution image has 20 MiB; what is kept in
/// memory is some three times as much.
const BYTES_MAX: usize = 128 << 20;
/// Components looked up, made and taken away. An ordinary entry needs ten; a second of processor time is
/// some millions.
const STEPS_MAX: usize = 20_000_000;

/// Where a node's entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) layer: usize,
    pub(super) ordinal: usize,
}

/// One inode to be.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) kind: Kind,
    pub(super) meta: Meta,
}

/// A name in the tree.
#[derive(Debug, Clone, Copy)]
struct Name {
    node: usize,
    /// The layer that put it there: whiteouts of the same layer do not touch it.
    layer: usize,
}

/// The tree under construction; keys are paths joined with `/`, the root is the empty one.
#[derive(Debug, Default)]
pub(super) struct Tree {
    names: BTreeMap<Vec<u8>, Name>,
    nodes: Vec<Node>,
    /// Below which paths the present layer hid everything already: once is enough, and a layer of
    /// nothing but whiteouts costs no more than its length.
    hidden: BTreeSet<Vec<u8>>,
    layer: usize,
    /// What was spent of the budgets.
    bytes: usize,
    steps: usize,
}

impl Tree {
    /// With few steps left, so that a test need not take them all.
    #[cfg(test)]
    pub(super) fn nearly_spent() -> Self {
        Self { steps: STEPS_MAX - 100_000, ..Self::default() }
    }

    /// Applies one entry.
    pub(super) fn apply(&mut self, place: Place, item: Item) -> Result<(), Refused> {
        if place.ordinal >= ENTRIES_MAX {
            return Err(too_many());
        }
        self.step(1)?;
        let Some((last, parents)) = item.path.split_last() else {
            // The root itself: only its attributes matter.
            return self.put(Vec::new(), place, Kind::Directory, item.meta);
        };
        let parent = self.resolve_parent(parents, place)?;
        if last == b".wh..wh..opq" {
            return self.hide_below(&parent, place);
        }
        if last.starts_with(b".wh..wh.") {
            return Ok(());
        }
        if let Some(hidden) = last.strip_prefix(b".wh.") {
            let path = joined(&parent, hidden);
            return self.hide(&path, place);
        }
        let path = joined(&parent, last);
        match item.kind {
            Kind::Dropped => self.remove_all(&path),
            Kind::Hardlink(target) => self.link(path, &target, place, &item.path),
            kind => self.put(path, place, kind, item.meta),
        }
    }

    fn put(&mut self, path: Vec<u8>, place: Place, kind: Kind, meta: Meta) -> Result<(), Refused> {
        let is_directory = kind == Kind::Directory;
        let old = self.names.get(&path).map(|name| &self.nodes[name.node].kind);
        if !(is_directory && old == Some(&Kind::Directory)) {
            self.remove_all(&path)?;
        }
        self.insert(path, place, kind, meta)
    }

    /// Puts a new node at a path, within the budgets.
    fn insert(&mut self, path: Vec<u8>, place: Place, kind: Kind, meta: Meta) -> Result<(), Refused> {
        if self.nodes.len() >= ENTRIES_MAX {
            return Err(too_many());
        }
        let target = match &kind {
            Kind::Symlink(target) | Kind::Hardlink(target) => target.len(),
            _ => 0,
        };
        let attributes = meta.attributes.iter().map(|(name, value)| name.len() + value.len());
        self.spend(path.len() + target + attributes.sum::<usize>())?;
        self.nodes.push(Node { place, kind, meta });
        self.names.insert(path, Name { node: self.nodes.len() - 1, layer: place.layer });
        Ok(())
    }

    fn spend(&mut self, bytes: usize) -> Result<(), Refused> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes <= BYTES_MAX {
            return Ok(());
        }
        Err(Refused::new(format!("the image's names and links have more than {} MiB", BYTES_MAX >> 20)))
    }

    fn step(&mut self, count: usize) -> Result<(), Refused> {
        self.steps = self.steps.saturating_add(count);
        if self.steps <= STEPS_MAX {
            return Ok(());
        }
        Err(Refused::new("the image's links and whiteouts take too long to follow"))
    }

    fn link(&mut self, path: Vec<u8>, target: &[u8], place: Place, shown: &[Vec<u8>]) -> Result<(), Refused> {
        let target = components(target)?;
        let found = match target.split_last() {
            Some((last, parents)) => {
                let parent = self.resolve_parent(parents, place)?;
                self.names.get(&joined(&parent, last)).copied()
            }
            None => None,
        };
        let Some(Name { node, .. }) = found else {
            return Err(Refused::new(format!("{} is a hard link to what is not in the image", show(shown))));
        };
        if self.nodes[node].kind == Kind::Directory {
            return Err(Refused::new(format!("{} is a hard link to a directory", show(shown))));
        }
        if self.names.get(&path).is_some_and(|name| name.node == node) {
            return Ok(());
        }
        self.remove_all(&path)?;
        self.spend(path.len())?;
        self.names.insert(path, Name { node, layer: place.layer });
        Ok(())
    }

    /// The real directory of a path's parents: symbolic links are followed within the image, what
    /// is missing is made, what is no directory is replaced by one.
    fn resolve_parent(&mut self, parents: &[Vec<u8>], place: Place) -> Result<Vec<u8>, Refused> {
        let mut pending: Vec<Vec<u8>> = parents.iter().rev().cloned().collect();
        let mut at: Vec<u8> = Vec::new();
        let mut followed = 0;
        while let Some(part) = pending.pop() {
            if part == b".." {
                let end = at.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                at.truncate(end);
                continue;
            }
            let next = joined(&at, &part);
            // A look-up costs about as much as the path is long.
            self.step(1 + next.len() / 256)?;
            match self.names.get(&next).map(|name| self.nodes[name.node].kind.clone()) {
                Some(Kind::Directory) => at = next,
                Some(Kind::Symlink(target)) => {
                    followed += 1;
                    if followed > LINKS_FOLLOWED_MAX {
                        return Err(Refused::new(format!("{} goes through a loop of links", show(parents))));
                    }
                    if target.starts_with(b"/") {
                        at.clear();
                    }
                    let parts =
                        target.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
                    pending.extend(parts.map(<[u8]>::to_vec).collect::<Vec<_>>().into_iter().rev());
                }
                _ => {
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    self.put(next.clone(), place, Kind::Directory, meta)?;
                    at = next;
                }
            }
        }
        Ok(at)
    }

    fn below(path: &[u8]) -> (Vec<u8>, Vec<u8>) {
        // '0' is the byte after '/'.
        if path.is_empty() { (vec![1], vec![0xff; 4097]) } else { (joined(path, b""), [path, b"0"].concat()) }
    }

    fn remove_all(&mut self, path: &[u8]) -> Result<(), Refused> {
        match self.names.remove(path) {
            // Nothing is below what is no directory.
            Some(name) if self.nodes[name.node].kind == Kind::Directory => {
                self.remove_below(path, usize::MAX)
            }
            _ => Ok(()),
        }
    }

    /// Removes a name that a lower layer brought, with what lower layers brought below it.
    fn hide(&mut self, path: &[u8], place: Place) -> Result<(), Refused> {
        let is_lower = self.names.get(path).is_some_and(|name| name.layer < place.layer);
        self.hide_below(path, place)?;
        if is_lower {
            self.names.remove(path);
            self.give_parents(path, place)?;
        }
        Ok(())
    }

    /// Removes what lower layers brought below a directory; what this layer brought stays, with
    /// directories to be in.
    fn hide_below(&mut self, path: &[u8], place: Place) -> Result<(), Refused> {
        if self.layer != place.layer {
            (self.layer, self.hidden) = (place.layer, BTreeSet::new());
        }
        if self.hidden.contains(path) {
            return Ok(());
        }
        self.spend(path.len())?;
        self.hidden.insert(path.to_vec());
        self.remove_below(path, place.layer)?;
        self.give_parents(path, place)
    }

    /// Makes the directories, from `path` down, that what is below it lacks.
    fn give_parents(&mut self, path: &[u8], place: Place) -> Result<(), Refused> {
        let (start, end) = Self::below(path);
        let left: Vec<Vec<u8>> = self.names.range(start..end).map(|(path, _)| path.clone()).collect();
        for name in left {
            self.step(1 + name.len() / 256)?;
            let ends = name.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
            for at in ends.filter(|&at| at >= path.len().max(1)) {
                self.step(1 + at / 256)?;
                if !self.names.contains_key(&name[..at]) {
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    self.insert(name[..at].to_vec(), place, Kind::Directory, meta)?;
                }
            }
        }
        Ok(())
    }

    /// Removes what layers before `layer` brought below a directory.
    fn remove_below(&mut self, path: &[u8], layer: usize) -> Result<(), Refused> {
        let (start, end) = Self::below(path);
        let mut seen = 0;
        let gone: Vec<Vec<u8>> = self
            .names
            .range(start..end)
            .inspect(|_| seen += 1)
            .filter(|(_, name)| name.layer < layer)
            .map(|(path, _)| path.clone())
            .collect();
        for path in gone {
            self.names.remove(&path);
        }
        self.step(seen)
    }

    /// What to emit: directories with parents first, and for every other place its paths.
    pub(super) fn finish(self) -> Merged {
        let mut directories = Vec::new();
        let mut content: BTreeMap<Place, (Node, Vec<Vec<u8>>)> = BTreeMap::new();
        for (path, name) in self.names {
            let node = &self.nodes[name.node];
            if node.kind == Kind::Directory {
                directories.push((path, node.meta.clone()));
            } else {
                content.entry(node.place).or_insert_with(|| (node.clone(), Vec::new())).1.push(path);
            }
        }
        Merged { directories, content }
    }
}

/// The finished tree.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) directories: Vec<(Vec<u8>, Meta)>,
    /// Several paths are hard links of one another.
    pub(super) content: BTreeMap<Place, (Node, Vec<Vec<u8>>)>,
}

fn too_many() -> Refused {
    Refused::new(format!("the image has more than {ENTRIES_MAX} entries"))
}

fn joined(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}
