//! The merged tree of an image's layers: which path is made of which entry of which layer.
//!
//! Layers are applied bottom up, as a container runtime would: later entries replace earlier ones,
//! whiteouts take away what lower layers brought, hard links share one node whatever happens to the
//! path they were made of. Nothing is unpacked: the tree only says what to emit.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::Refused;
use super::archive::{Item, Kind, Meta, components, show};

/// Entries of one layer, and nodes of all layers together. A large distribution image has 200,000.
pub(super) const ENTRIES_MAX: usize = 1_000_000;
/// Symbolic links followed for one parent path, as Linux has it.
const LINKS_FOLLOWED_MAX: usize = 40;
/// Memory of one tree, in bytes: two are made at a time by default, beside whatever else the daemon does. A
/// large distribution image takes 55 MiB.
pub(super) const MEMORY_MAX: usize = 96 << 20;
/// Memory of an entry besides its name, link target and attributes, in bytes: its node, its places in the
/// tree and in what is emitted, and what the allocator adds.
const ENTRY_BYTES: usize = 210;
/// Names that are looked through at a time where many are removed: copies of them are kept for as long.
const BATCH_NAMES: usize = 1024;
/// Components looked up, made and taken away. An ordinary entry needs ten; a second of processor time is
/// some millions.
const STEPS_MAX: usize = 20_000_000;

/// Where a node's entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) layer: u32,
    pub(super) ordinal: u32,
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
    /// Index of the node.
    node: u32,
    /// The layer that put it there: whiteouts of the same layer do not touch it.
    layer: u32,
}

/// The tree under construction; keys are paths joined with `/`, the root is the empty one.
#[derive(Debug, Default)]
pub(super) struct Tree {
    names: BTreeMap<Vec<u8>, Name>,
    nodes: Vec<Node>,
    /// Below which paths the present layer hid everything already: once is enough, and a layer of
    /// nothing but whiteouts costs no more than its length.
    hidden: BTreeSet<Vec<u8>>,
    layer: u32,
    /// What was spent of the budgets.
    memory: usize,
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
        if place.ordinal as usize >= ENTRIES_MAX {
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

    fn node(&self, name: Name) -> &Node {
        &self.nodes[name.node as usize]
    }

    fn put(&mut self, path: Vec<u8>, place: Place, kind: Kind, meta: Meta) -> Result<(), Refused> {
        let is_directory = kind == Kind::Directory;
        let old = self.names.get(&path).map(|name| &self.node(*name).kind);
        if !(is_directory && old == Some(&Kind::Directory)) {
            self.remove_all(&path)?;
        }
        self.insert(path, place, kind, meta)
    }

    /// Puts a new node at a path, within the budgets.
    fn insert(&mut self, path: Vec<u8>, place: Place, kind: Kind, meta: Meta) -> Result<(), Refused> {
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
        self.nodes.push(Node { place, kind, meta });
        self.names.insert(path, Name { node, layer: place.layer });
        Ok(())
    }

    /// Counts an entry that takes so many bytes besides what each entry takes. What is given back is not
    /// counted: an image that hides that much of itself is as hostile.
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

    fn link(&mut self, path: Vec<u8>, target: &[u8], place: Place, shown: &[Vec<u8>]) -> Result<(), Refused> {
        let target = components(target)?;
        let found = match target.split_last() {
            Some((last, parents)) => {
                let parent = self.resolve_parent(parents, place)?;
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
        self.names.insert(path, Name { node: found.node, layer: place.layer });
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
            Some(name) if self.node(name).kind == Kind::Directory => self.remove_below(path, u32::MAX),
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

    /// The next names below a directory after `last`, with the layers that put them there.
    fn names_below(&self, path: &[u8], last: Option<&[u8]>) -> Vec<(Vec<u8>, u32)> {
        let (start, end) = Self::below(path);
        let from = last.map_or(Bound::Included(start.as_slice()), Bound::Excluded);
        let names = self.names.range::<[u8], _>((from, Bound::Excluded(end.as_slice())));
        names.take(BATCH_NAMES).map(|(path, name)| (path.clone(), name.layer)).collect()
    }

    /// Makes the directories, from `path` down, that what is below it lacks.
    fn give_parents(&mut self, path: &[u8], place: Place) -> Result<(), Refused> {
        let mut left = self.names_below(path, None);
        while let Some((last, _)) = left.last().cloned() {
            for (name, _) in left {
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
            left = self.names_below(path, Some(&last));
        }
        Ok(())
    }

    /// Removes what layers before `layer` brought below a directory.
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

    /// What to emit: directories with parents first, and for every other place its paths.
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
        // Stable: the paths of one node stay in their order.
        content.sort_by_key(|named| self.nodes[named.node as usize].place);
        Merged { directories, nodes: self.nodes, content }
    }
}

/// A path of what is no directory.
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
    /// In the order of the nodes' places; several of one node are hard links of one another.
    content: Vec<Named>,
}

impl Merged {
    fn place(&self, named: &Named) -> Place {
        self.nodes[named.node as usize].place
    }

    /// What the entry at a place makes, and where.
    pub(super) fn at(&self, place: Place) -> Option<(&Node, &[Named])> {
        let start = self.content.partition_point(|named| self.place(named) < place);
        let count = self.content[start..].partition_point(|named| self.place(named) == place);
        let named = &self.content[start..start + count];
        named.first().map(|first| (&self.nodes[first.node as usize], named))
    }

    /// The places of what is no directory.
    #[cfg(test)]
    pub(super) fn places(&self) -> impl Iterator<Item = Place> {
        self.content.iter().map(|named| self.place(named))
    }
}

fn too_many() -> Refused {
    Refused::new(format!("the image has more than {ENTRIES_MAX} entries"))
}

fn joined(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}
