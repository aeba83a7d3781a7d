//! Real VMs and real daemons: each test boots one or two VMs, observes them from outside, and leaves nothing.

#![cfg(test)]

mod accelerator;
mod agent;
mod auto_standby;
mod backup;
mod card;
mod changes;
mod confinement;
mod crash;
mod crowd;
mod deaths;
mod debian;
mod demo;
mod disk_limits;
mod drift;
mod drivers;
mod egress;
mod escape_attempts;
mod escapes;
mod faults;
mod fixtures;
mod forks;
mod full;
mod growth;
mod half_written;
mod harness;
mod headers;
mod health;
mod host_keys;
#[path = "../bench/src/crowd.rs"]
mod hostile_crowd;
mod hostile_guest;
mod hotplug;
mod ingress;
mod invariants;
mod kvmbox;
mod late_disk;
mod life;
mod live_volumes;
#[path = "../it/loop_disk.rs"]
#[expect(dead_code, reason = "other tests need the rest")]
mod loop_disk;
mod machine_types;
mod machines;
mod namespace;
mod neighbours;
mod odd_images;
mod page;
mod policies;
mod power;
mod programs;
#[path = "../sdk/python.rs"]
mod python;
mod reboot;
mod renewal;
mod schedules;
mod socket;
mod standby;
mod storm;
mod system;
mod tls;
mod transitions;
mod unit;
mod unread;
mod volume_archives;
mod volumes;
