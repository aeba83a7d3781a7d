//! The merged tree of an image's layers: maps each path to the entry and the layer that make it.
//!
//! Layers are applied bottom up, as in a container runtime: later entries replace earlier ones, whiteouts remove
//! entries of lower layers, hard links share one node even if the path that they were made from changes. Nothing is
//! unpacked: the tree only describes what to emit.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::Refused;
use super::archive::{Item, Kind, Meta, components, show};

/// Limit on the entries of one layer, and on the nodes of all layers together. A large distribution image has
/// 200,000.
pub(super) const ENTRIES_MAX: usize = 1_000_000;
/// Limit on symbolic links followed for one parent path, as in Linux.
const LINKS_FOLLOWED_MAX: usize = 40;
/// Limit on the memory of one tree, in bytes. By default two are made at a time, beside the daemon's other work. A
/// large distribution image takes 55 MiB.
pub(super) const MEMORY_MAX: usize = 96 << 20;
/// Memory of an entry in addition to its name, link target and attributes, in bytes: its node, its positions in the
/// tree and in the output, and the allocator's overhead.
const ENTRY_BYTES: usize = 210;
/// Number of names examined at a time during a bulk removal. Copies of them are kept for as long.
const BATCH_NAMES: usize = 1024;
/// Limit on the components that are looked up, created and removed. An ordinary entry needs ten; some millions take a
/// second of processor time.
const STEPS_MAX: usize = 20_000_000;

/// The position of a node's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) layer: u32,
    pub(super) ordinal: u32,
}

/// A future inode.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) position: Position,
    pub(super) kind: Kind,
    pub(super) meta: Meta,
}

/// A name in the tree.
#[derive(Debug, Clone, Copy)]
struct Name {
    /// Index of the node.
    node: u32,
    /// Layer that created the name. Whiteouts of the same layer do not affect it.
    layer: u32,
}

/// The tree under construction. Its keys are paths joined with `/`; the root is the empty path.
#[derive(Debug, Default)]
pub(super) struct Tree {
    names: BTreeMap<Vec<u8>, Name>,
    nodes: Vec<Node>,
    /// Paths below which the current layer has already hidden everything. Hiding once is enough, so a layer of
    /// nothing but whiteouts costs no more than its length.
    hidden: BTreeSet<Vec<u8>>,
    layer: u32,
    /// Amounts spent of the budgets.
    memory: usize,
    steps: usize,
}

impl Tree {
    /// Creates a tree with few steps left, so that a test need not spend them all.
    #[cfg(test)]
    pub(super) fn nearly_spent() -> Self {
        Self { steps: STEPS_MAX - 100_000, ..Self::default() }
    }

    /// Applies one entry.
    pub(super) fn apply(&mut self, position: Position, item: Item) -> Result<(), Refused> {
        if position.ordinal as usize >= ENTRIES_MAX {
            return Err(too_many());
        }
        self.step(1)?;
        let Some((last, parents)) = item.path.split_last() else {
            // Only the attributes of the root itself matter.
            return self.put(Vec::new(), position, Kind::Directory, item.meta);
        };
        let parent = self.resolve_parent(parents, position)?;
        if last == b".wh..wh..opq" {
            return self.hide_below(&parent, position);
        }
        if last.starts_with(b".wh..wh.") {
            return Ok(());
        }
        if let Some(hidden) = last.strip_prefix(b".wh.") {
            let path = joined(&parent, hidden);
            return self.hide(&path, position);
        }
        let path = joined(&parent, last);
        match item.kind {
            Kind::Dropped => self.remove_all(&path),
            Kind::Hardlink(target) => self.link(path, &target, position, &item.path),
            kind => self.put(path, position, kind, item.meta),
        }
    }

    fn node(&self, name: Name) -> &Node {
        &self.nodes[name.node as usize]
    }

    fn put(&mut self, path: Vec<u8>, position: Position, kind: Kind, meta: Meta) -> Result<(), Refused> {
        let is_directory = kind == Kind::Directory;
        let old = self.names.get(&path).map(|name| &self.node(*name).kind);
        if !(is_directory && old == Some(&Kind::Directory)) {
            self.remove_all(&path)?;
        }
        self.insert(path, position, kind, meta)
    }

    /// Puts a new node at a path, within the budgets.
    fn insert(&mut self, path: Vec<u8>, position: Position, kind: Kind, meta: Meta) -> Result<(), Refused> {
        let node = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        if node as usize >= ENTRIES_MAX {
            return Err(too_many());
        }
        let target = match &kind {
            Kind::Symlink(target) | Kind::Hardlink(target) => target.len(),
            _ => 0,
        };
        let attributes = meta.attributes.iter().map(|(name, value)| name.len() + value.len());
        self.spend(path.len() + target + attributes.sum::<usize>())?;
        self.nodes.push(Node { position, kind, meta });
        self.names.insert(path, Name { node, layer: position.layer });
        Ok(())
    }

    /// Counts an entry with its additional bytes. Memory that is freed again is not subtracted: an image that hides
    /// that much of itself is as hostile.
    fn spend(&mut self, bytes: usize) -> Result<(), Refused> {
        self.memory = self.memory.saturating_add(bytes).saturating_add(ENTRY_BYTES);
        if self.memory <= MEMORY_MAX {
            return Ok(());
        }
        let words = "the image has too many entries, or too long names and links";
        Err(Refused::new(format!("{words}: they take more than {} MiB", MEMORY_MAX >> 20)))
    }

    fn step(&mut self, count: usize) -> Result<(), Refused> {
        self.steps = self.steps.saturating_add(count);
        if self.steps <= STEPS_MAX {
            return Ok(());
        }
        Err(Refused::new("the image's links and whiteouts take too long to follow"))
    }

    fn link(
        &mut self,
        path: Vec<u8>,
        target: &[u8],
        position: Position,
        shown: &[Vec<u8>],
    ) -> Result<(), Refused> {
        let target = components(target)?;
        let found = match target.split_last() {
            Some((last, parents)) => {
                let parent = self.resolve_parent(parents, position)?;
                self.names.get(&joined(&parent, last)).copied()
            }
            None => None,
        };
        let Some(found) = found else {
            return Err(Refused::new(format!("{} is a hard link to what is not in the image", show(shown))));
        };
        if self.node(found).kind == Kind::Directory {
            return Err(Refused::new(format!("{} is a hard link to a directory", show(shown))));
        }
        if self.names.get(&path).is_some_and(|name| name.node == found.node) {
            return Ok(());
        }
        self.remove_all(&path)?;
        self.spend(path.len())?;
        self.names.insert(path, Name { node: found.node, layer: position.layer });
        Ok(())
    }

    /// Returns the real directory of a path's parents: symbolic links are followed within the image, missing
    /// directories are created, and other files in the way are replaced by directories.
    fn resolve_parent(&mut self, parents: &[Vec<u8>], position: Position) -> Result<Vec<u8>, Refused> {
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
            // The cost of a look-up grows with the length of the path.
            self.step(1 + next.len() / 256)?;
            match self.names.get(&next).map(|name| self.node(*name).kind.clone()) {
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
                    self.put(next.clone(), position, Kind::Directory, meta)?;
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
            // Only a directory has paths below it.
            Some(name) if self.node(name).kind == Kind::Directory => self.remove_below(path, u32::MAX),
            _ => Ok(()),
        }
    }

    /// Removes a name that a lower layer created, with everything that lower layers created below it.
    fn hide(&mut self, path: &[u8], position: Position) -> Result<(), Refused> {
        let is_lower = self.names.get(path).is_some_and(|name| name.layer < position.layer);
        self.hide_below(path, position)?;
        if is_lower {
            self.names.remove(path);
            self.give_parents(path, position)?;
        }
        Ok(())
    }

    /// Removes everything that lower layers created below a directory. Names of this layer stay, and keep their
    /// parent directories.
    fn hide_below(&mut self, path: &[u8], position: Position) -> Result<(), Refused> {
        if self.layer != position.layer {
            (self.layer, self.hidden) = (position.layer, BTreeSet::new());
        }
        if self.hidden.contains(path) {
            return Ok(());
        }
        self.spend(path.len())?;
        self.hidden.insert(path.to_vec());
        self.remove_below(path, position.layer)?;
        self.give_parents(path, position)
    }

    /// Returns the next names below a directory after `last`, with the layers that created them.
    fn names_below(&self, path: &[u8], last: Option<&[u8]>) -> Vec<(Vec<u8>, u32)> {
        let (start, end) = Self::below(path);
        let from = last.map_or(Bound::Included(start.as_slice()), Bound::Excluded);
        let names = self.names.range::<[u8], _>((from, Bound::Excluded(end.as_slice())));
        names.take(BATCH_NAMES).map(|(path, name)| (path.clone(), name.layer)).collect()
    }

    /// Creates the missing directories, from `path` down, for the names below it.
    fn give_parents(&mut self, path: &[u8], position: Position) -> Result<(), Refused> {
        let mut left = self.names_below(path, None);
        while let Some((last, _)) = left.last().cloned() {
            for (name, _) in left {
                self.step(1 + name.len() / 256)?;
                let ends = name.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
                for at in ends.filter(|&at| at >= path.len().max(1)) {
                    self.step(1 + at / 256)?;
                    if !self.names.contains_key(&name[..at]) {
                        let meta = Meta { mode: 0o755, ..Meta::default() };
                        self.insert(name[..at].to_vec(), position, Kind::Directory, meta)?;
                    }
                }
            }
            left = self.names_below(path, Some(&last));
        }
        Ok(())
    }

    /// Removes everything that layers before `layer` created below a directory.
    fn remove_below(&mut self, path: &[u8], layer: u32) -> Result<(), Refused> {
        let mut left = self.names_below(path, None);
        while let Some((last, _)) = left.last().cloned() {
            self.step(left.len())?;
            for (name, _) in left.iter().filter(|(_, brought)| *brought < layer) {
                self.names.remove(name);
            }
            left = self.names_below(path, Some(&last));
        }
        Ok(())
    }

    /// Returns the result to emit: directories with parents first, and the paths of each other node.
    pub(super) fn finish(self) -> Merged {
        let (mut directories, mut content) = (Vec::new(), Vec::new());
        for (path, name) in self.names {
            let node = &self.nodes[name.node as usize];
            if node.kind == Kind::Directory {
                directories.push((path, node.meta.clone()));
            } else {
                content.push(Named { node: name.node, path });
            }
        }
        // The sort is stable: the paths of one node keep their order.
        content.sort_by_key(|named| self.nodes[named.node as usize].position);
        Merged { directories, nodes: self.nodes, content }
    }
}

/// A path of a node that is no directory.
#[derive(Debug)]
pub(super) struct Named {
    /// Index of the node.
    node: u32,
    pub(super) path: Vec<u8>,
}

/// The finished tree.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) directories: Vec<(Vec<u8>, Meta)>,
    nodes: Vec<Node>,
    /// Paths in the order of their nodes' positions. Several paths of one node are hard links of each other.
    content: Vec<Named>,
}

impl Merged {
    fn position(&self, named: &Named) -> Position {
        self.nodes[named.node as usize].position
    }

    /// Returns the node that the entry at a position makes, with its paths.
    pub(super) fn at(&self, position: Position) -> Option<(&Node, &[Named])> {
        let start = self.content.partition_point(|named| self.position(named) < position);
        let count = self.content[start..].partition_point(|named| self.position(named) == position);
        let named = &self.content[start..start + count];
        named.first().map(|first| (&self.nodes[first.node as usize], named))
    }

    /// Lists the positions of the entries that are no directories.
    #[cfg(test)]
    pub(super) fn positions(&self) -> impl Iterator<Item = Position> {
        self.content.iter().map(|named| self.position(named))
    }
}

fn too_many() -> Refused {
    Refused::new(format!("the image has more than {ENTRIES_MAX} entries"))
}

fn joined(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}
