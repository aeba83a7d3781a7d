//! The boards that a VM can have, and what differs between them.
//!
//! ```text
//! qemu           q35       a PC with PCI Express
//! qemu-microvm   microvm   no PCI: virtio devices at addresses that ACPI tells
//! ```

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stead_schemas::instance::Hypervisor;
use tokio::process::Command;

use crate::host::tsc;

/// QEMU lists its boards in 30 ms.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A kind of board; what is saved of one fits no other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Board {
    /// Also of records that are older than the choice.
    #[default]
    Q35,
    Microvm,
}

impl Board {
    pub(super) const ALL: [Self; 2] = [Self::Q35, Self::Microvm];

    /// `None` for what is not driven here.
    pub(super) fn of(hypervisor: Hypervisor) -> Option<Self> {
        Self::ALL.into_iter().find(|board| board.hypervisor() == hypervisor)
    }

    pub(super) fn hypervisor(self) -> Hypervisor {
        match self {
            Self::Q35 => Hypervisor::Qemu,
            Self::Microvm => Hypervisor::QemuMicrovm,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    /// What it has and has not.
    pub(super) fn options(self) -> &'static str {
        match self {
            Self::Q35 => "smm=off,vmport=off,usb=off",
            // ACPI tells the guest of its devices (its kernel takes none from its command line) and powers
            // it off. Without the clock of the day it waits two seconds for one. A second controller of
            // interrupts makes room for 24 virtio devices, where one has eight, and costs nothing.
            Self::Microvm => "acpi=on,rtc=on,pit=on,pic=on,isa-serial=on,ioapic2=on",
        }
    }

    /// There is a clock besides the processor's, and so a way to find out how fast that is. The timer of
    /// the other board serves an emulated guest too late on a host under load.
    pub(super) fn has_reference_clock(self) -> bool {
        match self {
            Self::Q35 => true,
            Self::Microvm => false,
        }
    }

    /// The name of its virtio device of a kind.
    pub(super) fn device(self, kind: &str) -> String {
        match self {
            Self::Q35 => format!("virtio-{kind}-pci"),
            Self::Microvm => format!("virtio-{kind}-device"),
        }
    }
}

/// Those that this program has boards for; none when it does not say so in time.
pub async fn hypervisors(binary: &Path) -> Vec<Hypervisor> {
    let mut command = Command::new(binary);
    command.args(["-machine", "help"]).stdin(Stdio::null()).kill_on_drop(true);
    // The rate is needed by launches, which shall not wait for it: it is measured while the program answers.
    let measured = tokio::task::spawn_blocking(tsc::khz);
    let (told, _) = tokio::join!(tokio::time::timeout(ANSWER_DEADLINE, command.output()), measured);
    match told {
        Ok(Ok(output)) => hypervisors_in(&String::from_utf8_lossy(&output.stdout)),
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

/// One board a line, its name first.
fn hypervisors_in(help: &str) -> Vec<Hypervisor> {
    let has = |board: &Board| help.lines().any(|line| line.split_whitespace().next() == Some(board.as_str()));
    Board::ALL.into_iter().filter(has).map(Board::hypervisor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_board_is_a_hypervisor_s_and_others_have_none() {
        for board in Board::ALL {
            assert_eq!(Board::of(board.hypervisor()), Some(board));
            let written = serde_json::to_value(board).expect("written");
            assert_eq!(written, board.as_str(), "in records as on command lines");
        }
        assert_eq!(Board::of(Hypervisor::Firecracker), None);
    }

    #[tokio::test]
    async fn what_a_program_lacks_is_not_offered() {
        let q35 = "q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)";
        let both =
            format!("Supported machines are:\nmicrovm              microvm (i386)\n{q35}\nnone  empty\n");
        assert_eq!(hypervisors_in(&both), [Hypervisor::Qemu, Hypervisor::QemuMicrovm]);
        assert_eq!(hypervisors_in(q35), [Hypervisor::Qemu]);
        assert_eq!(hypervisors(Path::new("/no/such/program")).await, []);
    }
}
