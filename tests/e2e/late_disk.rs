//! A daemon that starts before the disk with its data is mounted.

use std::fs;

use serde_json::json;

use crate::agent::waiting;
use crate::harness::Harness;
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

#[test]
fn a_daemon_whose_data_is_not_there_refuses_to_start_and_its_vms_run_on() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({})).await;
        let vmms = site.vmms();
        let boot = shell(&site, "box", "cat /proc/sys/kernel/random/boot_id").await;
        site.kill().await;
        let (data, away) = (site.data(), site.data().with_extension("away"));
        fs::rename(&data, &away).expect("renamed");
        fs::create_dir(&data).expect("made, as a mount point is");
        site.spawn(None);
        let status = site.ended().await;
        assert!(!status.success(), "{status}");
        let log = site.daemon_log();
        assert!(log.contains("1 VMs of another data directory"), "{log}");
        assert!(log.contains("Mount the right data directory"), "{log}");
        assert_eq!(site.vmms(), vmms, "the VM runs on");
        let left: Vec<_> = fs::read_dir(&data).expect("listed").flatten().map(|entry| entry.path()).collect();
        assert!(left.iter().all(|path| !path.join("db").exists()), "no database was made: {left:?}");
        fs::remove_dir_all(&data).expect("removed");
        fs::rename(&away, &data).expect("renamed");
        site.start().await;
        site.until_state("box", "Running").await;
        assert_eq!(site.vmms(), vmms);
        assert_eq!(shell(&site, "box", "cat /proc/sys/kernel/random/boot_id").await, boot, "the same run");
        site.delete("box").await;
        settles(&mut site, "a late disk").await;
    });
}
