//! A set of many ports: they are changed in few transactions, and looked up without a process each.

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};

use futures::future::join_all;
use stead::host::nft::Nft;
use stead_controllers::host::{Firewall, NicRule};
use stead_schemas::network::{Lane, Mac};

use crate::guest::{TABLE, rules};
use crate::namespace::{PATIENCE, in_namespace, link_name, shell};

const PORTS: u8 = 200;
/// Limit on the transactions of one round of changes: the first change runs alone, the others wait for it.
const TRANSACTIONS_MAX: usize = 3;

fn rule(number: u8) -> NicRule {
    let address = Ipv4Addr::new(10, 99, 0, number);
    NicRule {
        tap: link_name(&format!("st-many{number}")),
        mac: Mac::of_address(address),
        address,
        lane: Lane::Direct,
    }
}

/// A counter of the transactions of all programs in this namespace.
struct Transactions {
    monitor: Child,
    lines: Receiver<String>,
}

impl Transactions {
    fn watch() -> Self {
        // The output is written line by line, although it is a pipe.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "nft", "monitor"]).stdout(Stdio::piped());
        let mut monitor = command.spawn().expect("nft runs");
        let output = BufReader::new(monitor.stdout.take().expect("piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let transactions = Self { monitor, lines };
        // The monitor runs as soon as it reports a change.
        let deadline = std::time::Instant::now() + PATIENCE;
        while transactions.lines.try_recv().is_err() {
            assert!(std::time::Instant::now() < deadline, "nft monitor reports nothing");
            shell("nft add table ip probe; nft delete table ip probe");
        }
        transactions.until("probe");
        transactions
    }

    /// Counts the transactions up to a change that the test makes itself.
    fn until(&self, marker: &str) -> usize {
        shell(&format!("nft add table ip {marker}-end; nft delete table ip {marker}-end"));
        let mut count = 0;
        loop {
            let line = self.lines.recv_timeout(PATIENCE).expect("the marker is reported");
            count += usize::from(line.contains("new generation"));
            if line.contains(&format!("delete table ip {marker}-end")) {
                return count;
            }
        }
    }
}

impl Drop for Transactions {
    fn drop(&mut self) {
        drop(self.monitor.kill().and_then(|()| self.monitor.wait()));
    }
}

#[test]
fn many_nics_change_in_few_transactions_and_a_refused_nic_delays_no_other() {
    in_namespace(async || {
        let firewall = Nft::new();
        firewall.replace(&rules()).await.expect("loaded");
        let transactions = Transactions::watch();
        let all: Vec<NicRule> = (1..=PORTS).map(rule).collect();
        let added = join_all(all.iter().map(|nic| firewall.add_nic(TABLE, nic))).await;
        assert!(added.iter().all(Result::is_ok), "{added:?}");
        // The marker is two transactions, of which the first was reported before its deletion.
        let count = transactions.until("added");
        assert!(count <= TRANSACTIONS_MAX + 2, "{count} transactions");
        let found = join_all(all.iter().map(|nic| firewall.has_nic(TABLE, nic))).await;
        assert!(found.iter().all(|found| matches!(found, Ok(true))), "{found:?}");

        let (gone, kept) = all.split_at(100);
        let removed = gone.iter().map(|nic| firewall.remove_nic(TABLE, nic));
        // Two further rules were never there.
        let absent = [rule(250), rule(251)];
        let removed = join_all(removed.chain(absent.iter().map(|nic| firewall.remove_nic(TABLE, nic)))).await;
        assert!(removed.iter().all(Result::is_ok), "{removed:?}");
        let count = transactions.until("removed");
        assert!(count <= TRANSACTIONS_MAX + 2, "{count} transactions");
        let mut left = firewall.inspect(&rules()).await.expect("read").expect("there").nics;
        left.sort();
        let mut expected = kept.to_vec();
        expected.sort();
        assert_eq!(left, expected);
        let fresh = Nft::new().inspect(&rules()).await.expect("read").expect("there");
        assert!(fresh.is_intact);
        assert_eq!(fresh.nics.len(), kept.len(), "another daemon lists the same");

        let other = Nft::new();
        other.add_nic(TABLE, &gone[0]).await.expect("added by another program");
        assert!(firewall.has_nic(TABLE, &gone[0]).await.expect("read"), "changes of others are seen");
        shell(&format!("nft flush set bridge {TABLE} ports"));
        assert!(!firewall.has_nic(TABLE, &kept[0]).await.expect("read"));
    });
}

#[test]
fn nics_that_come_and_go_while_others_are_inspected_cost_no_listing() {
    in_namespace(async || {
        let firewall = Nft::new();
        firewall.replace(&rules()).await.expect("loaded");
        firewall.inspect(&rules()).await.expect("read").expect("there");
        let before = firewall.listings();
        let come_and_go = |number: u8| {
            let firewall = &firewall;
            async move {
                let nic = rule(number);
                firewall.add_nic(TABLE, &nic).await.expect("added");
                assert!(firewall.has_nic(TABLE, &nic).await.expect("read"));
                firewall.remove_nic(TABLE, &nic).await.expect("removed");
                assert!(!firewall.has_nic(TABLE, &nic).await.expect("read"));
            }
        };
        let observe = async {
            // The reads fall between any two steps of the other changes, and the previous listing must serve them.
            for _ in 0..2000 {
                firewall.has_nic(TABLE, &rule(250)).await.expect("read");
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(join_all((1..=100).map(come_and_go)), observe);
        assert_eq!(firewall.listings(), before);
    });
}
