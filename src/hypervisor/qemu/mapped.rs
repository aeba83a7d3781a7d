//! The RAM that a VM maps, and what its next save makes of it.
//!
//! Guarantees: a file that is mapped is written to only where its VM has pages of its own, and only when
//! nobody else has it; its sum is known as long as nothing was written to it.
//! Cancel/crash: what a save wrote to it that came to nothing is found by reading it as a whole, once.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use stead_controllers::host::HostError;

use super::manifest::{Manifest, RamKept};
use super::memory::{MANIFEST, MemoryDir, RAM, RUNNING, STATE};
use super::own_pages::OwnPages;
use super::ram::sum_ram;
use crate::host::sparse;

impl MemoryDir {
    /// Begins with the RAM that a VM maps: the very file where nobody else has it, else a copy. Its VM
    /// may run meanwhile.
    pub(super) fn begin_with_mapped(&self, running: &Self) -> Result<RamKept, HostError> {
        let (mapped, to) = (running.running(RAM), self.saving(RAM));
        let begun = || {
            // From here on it is not what its manifest says, should it be written to.
            let known = running.take_running_sum(self.is_own(running)?)?;
            match self.is_own(running)? {
                true => fs::hard_link(&mapped, &to)?,
                false => sparse::copy(&File::open(&mapped)?, &File::create_new(&to)?)?,
            }
            let begun = File::open(&to)?;
            let (bytes, sum) = match known {
                Some(sum) => (begun.metadata()?.len(), sum),
                None => sum_ram(&begun)?,
            };
            Ok(RamKept { bytes, sum })
        };
        begun().map_err(self.failed("save the memory in"))
    }

    /// Puts the pages that a VM which is held has of its own over what was begun with.
    pub(super) fn keep_own(&self, pages: &OwnPages, begun: RamKept) -> Result<RamKept, HostError> {
        let ram = File::options().read(true).write(true).open(self.saving(RAM));
        let change = ram.and_then(|ram| pages.write_to(&ram)).map_err(self.failed("save the memory in"))?;
        Ok(RamKept { sum: begun.sum.wrapping_add(change), ..begun })
    }

    /// How much a save writes that begins with what this VM maps, besides the VM's own pages.
    pub(super) fn bytes_to_copy(&self, running: &Self) -> u64 {
        let mapped = fs::metadata(running.running(RAM)).map_or(0, |mapped| mapped.blocks() * 512);
        if self.is_own(running).unwrap_or(false) { 0 } else { mapped }
    }

    /// Nobody else has the file, which a snapshot of the last standby may, and its VM's next save it is.
    fn is_own(&self, running: &Self) -> io::Result<bool> {
        Ok(self.directory == running.directory && fs::metadata(running.running(RAM))?.nlink() == 1)
    }

    fn take_running_sum(&self, is_taken: bool) -> io::Result<Option<u64>> {
        let path = self.running(MANIFEST);
        let manifest = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
        if is_taken {
            super::remove_file(&path)?;
        }
        Ok(manifest.map(|manifest| manifest.proof.ram_sum))
    }

    /// What is saved is nothing from here on, whatever crashes: a VM runs on. The RAM that it maps, if
    /// it is what is saved, stays as what its next save begins with. One that it mapped before stays
    /// instead: who else has that file must see that it is not his alone.
    pub(super) fn consume(&self, mapped_inode: Option<u64>) -> Result<(), HostError> {
        let saved = fs::metadata(self.saved(RAM)).ok().map(|saved| saved.ino());
        if saved.is_some() && saved == mapped_inode {
            super::remove_dir(&self.running("")).map_err(self.failed("discard the memory in"))?;
            self.move_saved_to(RUNNING)?;
            super::remove_file(&self.running(STATE)).map_err(self.failed("discard the memory in"))?;
        }
        self.unsave()
    }

    /// For a VM that is gone.
    pub(super) fn forget_running(&self) -> Result<(), HostError> {
        super::remove_dir(&self.running("")).map_err(self.failed("discard the memory in"))?;
        self.remove_empty()
    }

    fn running(&self, name: &str) -> PathBuf {
        self.directory.join(RUNNING).join(name)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::manifest::Origin;
    use super::super::own_pages::tests::Ram;
    use super::*;

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).expect("there").ino()
    }

    fn origin() -> Origin {
        serde_json::from_value(serde_json::json!({
            "generation": 1, "run": 1, "launched_at": "1970-01-01T00:00:00Z", "saved_at": "1970-01-01T00:00:00Z",
            "token": "t", "backend": "qemu", "version": "1", "machine": "m", "kernel": "k", "initrd": "i",
            "overlay": { "inode": 1, "bytes": 1, "changed": [0, 0] },
        }))
        .expect("as it is written")
    }

    /// A save of this RAM, as far as it is made without a VMM.
    fn save(memory: &MemoryDir, into: &MemoryDir, ram: &Ram) -> Result<(), HostError> {
        into.begin()?;
        let begun = into.begin_with_mapped(memory)?;
        fs::write(into.saving_state(), "state").expect("written");
        let kept = into.keep_own(&ram.own_pages(), begun)?;
        into.prove(origin(), kept)?;
        into.publish()
    }

    fn is_right(memory: &MemoryDir, ram: &Ram) {
        let manifest = memory.manifest().expect("read").expect("saved");
        memory.check_ram(&manifest).expect("its sum is right");
        assert!(fs::read(memory.saved(RAM)).expect("there") == ram.bytes(), "another RAM is saved");
    }

    #[test]
    fn a_memory_that_cannot_be_looked_at_is_not_absent() {
        let dir = tempfile::tempdir().expect("scratch");
        let memory = MemoryDir::new(dir.path(), &format!("t{:023}", 0).parse().expect("valid"));
        assert!(!memory.exists().expect("looked at") && !memory.has_rest().expect("looked at"));
        // Where the directory should be is something that cannot be listed.
        fs::create_dir(dir.path().join("memory")).expect("made");
        fs::write(&memory.directory, "").expect("written");
        memory.exists().expect_err("it may be there");
        memory.seen().expect_err("it may be there");
    }

    #[test]
    fn a_save_goes_on_from_what_is_mapped_and_leaves_what_others_have_as_it_was() {
        let dir = tempfile::tempdir().expect("scratch");
        let memory = MemoryDir::new(dir.path(), &format!("t{:023}", 0).parse().expect("valid"));
        let snapshot = MemoryDir::of_snapshot(dir.path(), &format!("s{:023}", 0).parse().expect("valid"));
        // Restored: what was saved is mapped, and is nothing from then on.
        memory.begin().expect("empty");
        fs::write(memory.saving(RAM), [1; 8 * 4096]).expect("written");
        fs::write(memory.saving_state(), "state").expect("written");
        let (bytes, sum) = sum_ram(&File::open(memory.saving(RAM)).expect("there")).expect("read");
        memory.prove(origin(), RamKept { bytes, sum }).expect("proved");
        memory.publish().expect("published");
        let mut ram = Ram::map(&memory.saved(RAM));
        memory.consume(Some(ram.inode())).expect("consumed");
        assert!(!memory.exists().expect("looked at") && inode(&memory.running(RAM)) == ram.inode());
        // A snapshot has a file of its own, and the VM runs on.
        ram.write(4096, &[2; 100]);
        save(&memory, &snapshot, &ram).expect("taken");
        is_right(&snapshot, &ram);
        assert!(inode(&snapshot.saved(RAM)) != ram.inode());
        // A save that comes to nothing: what it wrote is no truth, and the next one does without it.
        memory.begin().expect("empty");
        let begun = memory.begin_with_mapped(&memory).expect("begun");
        memory.keep_own(&ram.own_pages(), begun).expect("kept");
        memory.unsave().expect("undone");
        assert!(memory.running(RAM).exists() && !memory.exists().expect("looked at"));
        ram.write(3 * 4096, &[3; 5000]);
        save(&memory, &memory, &ram).expect("saved");
        is_right(&memory, &ram);
        assert_eq!(inode(&memory.saved(RAM)), ram.inode(), "the very file");
        // Somebody has it too by now, and the standby is undone: it stays his.
        let of_others = dir.path().join("of others");
        fs::hard_link(memory.saved(RAM), &of_others).expect("linked");
        memory.consume(Some(ram.inode())).expect("consumed");
        let shared = fs::read(&of_others).expect("there");
        for byte in [4, 5] {
            ram.write(6 * 4096, &[byte; 9]);
            save(&memory, &memory, &ram).expect("saved");
            is_right(&memory, &ram);
            assert!(inode(&memory.saved(RAM)) != ram.inode());
            memory.consume(Some(ram.inode())).expect("consumed");
            assert_eq!(inode(&memory.running(RAM)), ram.inode(), "whoever has it too shall see that");
            assert!(!memory.exists().expect("looked at") && fs::read(&of_others).expect("there") == shared);
        }
        memory.forget_running().expect("removed");
        assert!(!memory.has_rest().expect("looked at"));
    }

    #[test]
    fn a_save_that_is_not_of_what_is_mapped_is_discarded_whole() {
        let dir = tempfile::tempdir().expect("scratch");
        let memory = MemoryDir::new(dir.path(), &format!("t{:023}", 0).parse().expect("valid"));
        memory.begin().expect("empty");
        let ram = super::super::ram::anonymous().expect("in memory");
        ram.set_len(8192).expect("in memory");
        let kept = memory.keep_ram(&ram).expect("kept");
        fs::write(memory.saving_state(), "state").expect("written");
        memory.prove(origin(), kept).expect("proved");
        memory.publish().expect("published");
        memory.consume(None).expect("consumed");
        assert!(!memory.exists().expect("looked at") && !memory.running(RAM).exists());
        memory.discard().expect("removed");
        assert!(!memory.has_rest().expect("looked at"));
    }
}
