//! The RAM file that a VM maps privately, and how its next save reuses that file.
//!
//! Guarantees: a mapped file is written to only where its VM has dirty pages, and only when the file has
//! no other name. Its checksum is known as long as nothing was written to it.
//! Cancel/crash: after a save that failed half way the checksum is not known, and the file is read once
//! as a whole.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use stead_controllers::host::HostError;

use super::directory::{MANIFEST, MemoryDir, RAM, RUNNING, STATE};
use super::dirty_pages::DirtyPages;
use super::manifest::{Manifest, RamKept};
use super::ram::sum_ram;
use crate::host::directories::{remove_dir, remove_file};
use crate::host::sparse;

impl MemoryDir {
    /// Begins a save with the RAM file that a VM maps: with the file itself when it has no other name, else
    /// with a copy. The VM may run meanwhile.
    pub(crate) fn begin_with_mapped(&self, running: &Self) -> Result<RamKept, HostError> {
        let (mapped, to) = (running.running(RAM), self.saving(RAM));
        let begun = || {
            // From here on the file may be written to, so the sum in its manifest is no longer valid.
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

    /// Writes the dirty pages of a paused VM over the RAM that the save began with.
    pub(crate) fn keep_dirty(&self, pages: &DirtyPages, begun: RamKept) -> Result<RamKept, HostError> {
        let ram = File::options().read(true).write(true).open(self.saving(RAM));
        let change = ram.and_then(|ram| pages.write_to(&ram)).map_err(self.failed("save the memory in"))?;
        Ok(RamKept { sum: begun.sum.wrapping_add(change), ..begun })
    }

    /// Returns how many bytes a save copies before the dirty pages of the VM.
    pub(crate) fn bytes_to_copy(&self, running: &Self) -> u64 {
        let mapped = fs::metadata(running.running(RAM)).map_or(0, |mapped| mapped.blocks() * 512);
        if self.is_own(running).unwrap_or(false) { 0 } else { mapped }
    }

    /// Returns whether the save may write to the mapped file: it is the save of this VM, and no snapshot
    /// shares the file.
    fn is_own(&self, running: &Self) -> io::Result<bool> {
        Ok(self.directory == running.directory && fs::metadata(running.running(RAM))?.nlink() == 1)
    }

    fn take_running_sum(&self, is_taken: bool) -> io::Result<Option<u64>> {
        let path = self.running(MANIFEST);
        let manifest = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
        if is_taken {
            remove_file(&path)?;
        }
        Ok(manifest.map(|manifest| manifest.proof.ram_sum))
    }

    /// Invalidates the saved memory durably, because its VM runs on. If the VM maps the saved RAM, that file stays in
    /// `running` for the next save to begin with. If the VM maps an older file, that one stays there instead: its
    /// second name shows to its other users that the file is shared.
    pub(crate) fn consume(&self, mapped_inode: Option<u64>) -> Result<(), HostError> {
        let saved = fs::metadata(self.saved(RAM)).ok().map(|saved| saved.ino());
        if saved.is_some() && saved == mapped_inode {
            remove_dir(&self.running("")).map_err(self.failed("discard the memory in"))?;
            self.move_saved_to(RUNNING)?;
        }
        // An earlier attempt may have ended before this.
        remove_file(&self.running(STATE)).map_err(self.failed("discard the memory in"))?;
        self.unsave()
    }

    /// Removes the RAM file of a VM that has ended.
    pub(crate) fn forget_running(&self) -> Result<(), HostError> {
        remove_dir(&self.running("")).map_err(self.failed("discard the memory in"))?;
        self.remove_empty()
    }

    fn running(&self, name: &str) -> PathBuf {
        self.directory.join(RUNNING).join(name)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::dirty_pages::tests::Ram;
    use super::super::manifest::Origin;
    use super::*;

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).expect("there").ino()
    }

    fn origin() -> Origin {
        serde_json::from_value(serde_json::json!({
            "generation": 1, "run": 1, "launched_at": "1970-01-01T00:00:00Z", "saved_at": "1970-01-01T00:00:00Z",
            "token": "t", "backend": "driver", "version": "1", "machine": "m", "kernel": "k", "initrd": "i",
            "overlay": { "inode": 1, "bytes": 1, "changed": [0, 0] },
        }))
        .expect("as it is written")
    }

    /// Saves this RAM as far as that is possible without a VMM.
    fn save(memory: &MemoryDir, into: &MemoryDir, ram: &Ram) -> Result<(), HostError> {
        into.begin()?;
        let begun = into.begin_with_mapped(memory)?;
        fs::write(into.saving_state(), "state").expect("written");
        let kept = into.keep_dirty(&ram.dirty_pages(), begun)?;
        into.prove(origin(), kept)?;
        into.publish()
    }

    fn is_right(memory: &MemoryDir, ram: &Ram) {
        let manifest = memory.manifest().expect("read").expect("saved");
        memory.check_ram(&manifest).expect("its sum is right");
        assert!(fs::read(memory.saved(RAM)).expect("there") == ram.bytes(), "another RAM is saved");
    }

    #[test]
    fn a_memory_that_cannot_be_read_is_not_absent() {
        let dir = tempfile::tempdir().expect("scratch");
        let memory = MemoryDir::new(dir.path(), &format!("t{:023}", 0).parse().expect("valid"));
        assert!(!memory.exists().expect("observed") && !memory.has_remainder().expect("observed"));
        // A file stands where the directory should be, and cannot be listed.
        fs::create_dir(dir.path().join("memory")).expect("made");
        fs::write(&memory.directory, "").expect("written");
        memory.exists().expect_err("it may be there");
        memory.observe().expect_err("it may be there");
    }

    #[test]
    fn a_save_reuses_the_mapped_file_and_never_changes_a_shared_one() {
        let dir = tempfile::tempdir().expect("scratch");
        let memory = MemoryDir::new(dir.path(), &format!("t{:023}", 0).parse().expect("valid"));
        let snapshot = MemoryDir::for_snapshot(dir.path(), &format!("s{:023}", 0).parse().expect("valid"));
        // Restored: the saved file is mapped, and is no saved memory from then on.
        memory.begin().expect("empty");
        fs::write(memory.saving(RAM), [1; 8 * 4096]).expect("written");
        fs::write(memory.saving_state(), "state").expect("written");
        let (bytes, sum) = sum_ram(&File::open(memory.saving(RAM)).expect("there")).expect("read");
        memory.prove(origin(), RamKept { bytes, sum }).expect("proved");
        memory.publish().expect("published");
        let mut ram = Ram::map(&memory.saved(RAM));
        memory.consume(Some(ram.inode())).expect("consumed");
        assert!(!memory.exists().expect("observed") && inode(&memory.running(RAM)) == ram.inode());
        // An attempt whose last step failed is repeated.
        fs::write(memory.running(STATE), "state").expect("written");
        assert!(memory.exists().expect("observed"));
        memory.consume(Some(ram.inode())).expect("consumed");
        assert!(!memory.exists().expect("observed") && !memory.running(STATE).exists());
        // A snapshot has a file of its own, and the VM runs on.
        ram.write(4096, &[2; 100]);
        save(&memory, &snapshot, &ram).expect("taken");
        is_right(&snapshot, &ram);
        assert!(inode(&snapshot.saved(RAM)) != ram.inode());
        // A save that fails: the next save must not rely on what it wrote.
        memory.begin().expect("empty");
        let begun = memory.begin_with_mapped(&memory).expect("begun");
        memory.keep_dirty(&ram.dirty_pages(), begun).expect("kept");
        memory.unsave().expect("undone");
        assert!(memory.running(RAM).exists() && !memory.exists().expect("observed"));
        ram.write(3 * 4096, &[3; 5000]);
        save(&memory, &memory, &ram).expect("saved");
        is_right(&memory, &ram);
        assert_eq!(inode(&memory.saved(RAM)), ram.inode(), "the very file");
        // The file has a second name by now, and the standby is undone: the file must not change.
        let shared_name = dir.path().join("shared");
        fs::hard_link(memory.saved(RAM), &shared_name).expect("linked");
        memory.consume(Some(ram.inode())).expect("consumed");
        let shared = fs::read(&shared_name).expect("there");
        for byte in [4, 5] {
            ram.write(6 * 4096, &[byte; 9]);
            save(&memory, &memory, &ram).expect("saved");
            is_right(&memory, &ram);
            assert!(inode(&memory.saved(RAM)) != ram.inode());
            memory.consume(Some(ram.inode())).expect("consumed");
            assert_eq!(inode(&memory.running(RAM)), ram.inode(), "whoever shares it must see that");
            assert!(!memory.exists().expect("observed") && fs::read(&shared_name).expect("there") == shared);
        }
        memory.forget_running().expect("removed");
        assert!(!memory.has_remainder().expect("observed"));
    }

    #[test]
    fn a_save_of_other_ram_than_the_mapped_one_is_discarded_as_a_whole() {
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
        assert!(!memory.exists().expect("observed") && !memory.running(RAM).exists());
        memory.discard().expect("removed");
        assert!(!memory.has_remainder().expect("observed"));
    }
}
