//! `stead doctor`: examines the host, the data directory, the daemon and the leftovers of an ended daemon,
//! and suggests a remedy for each problem. It changes nothing.

mod data;
mod host;
mod leftovers;
mod network;

use std::time::Duration;

use serde::Serialize;

use crate::config::Config;

/// Longest wait for a program or for the daemon.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// The thing works, but worse than it could.
    Warning,
    /// The thing is needed by instances and does not work.
    Problem,
}

/// The result of examining one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub level: Level,
    /// Name of the thing, in a word or two.
    pub subject: &'static str,
    pub message: String,
    /// Remedy for the problem; empty when nothing needs to be done.
    pub remedy: String,
}

impl Finding {
    fn ok(subject: &'static str, message: impl Into<String>) -> Self {
        Self { level: Level::Ok, subject, message: message.into(), remedy: String::new() }
    }
    fn warning(subject: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Warning, subject, message: message.into(), remedy: remedy.into() }
    }
    fn problem(subject: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Problem, subject, message: message.into(), remedy: remedy.into() }
    }
}

/// Examines everything, in the order in which a person would fix problems.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = host::examine(config).await;
    let daemon = data::daemon(config).await;
    findings.extend(network::examine(config).await);
    findings.extend(data::examine(config, &daemon));
    findings.extend(leftovers::examine(config, &daemon).await);
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scratch: &std::path::Path) -> Config {
        Config {
            data_dir: scratch.join("data"),
            run_dir: scratch.join("run"),
            kernel_dir: Some(scratch.join("kernel")),
            qemu: scratch.join("no-qemu"),
            disk_reserve: "100000TB".to_owned(),
            listen: ([127, 0, 0, 1], 9).into(),
            ..Config::default()
        }
    }

    #[tokio::test]
    async fn each_problem_has_a_remedy_and_nothing_is_made() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let findings = examine(&config(scratch.path())).await;
        let found = |subject: &str| {
            findings
                .iter()
                .find(|finding| finding.subject == subject)
                .unwrap_or_else(|| panic!("{subject}: {findings:?}"))
        };
        for subject in ["qemu", "guest kernel", "data directory"] {
            assert_ne!(found(subject).level, Level::Ok, "{subject}");
        }
        assert_eq!(found("daemon").level, Level::Warning, "it does not run");
        for finding in &findings {
            assert_eq!(finding.level == Level::Ok, finding.remedy.is_empty(), "{finding:?}");
        }
        let left = std::fs::read_dir(scratch.path()).expect("there").count();
        assert_eq!(left, 0, "an examination changes nothing");
    }

    #[tokio::test]
    async fn an_open_directory_a_full_disk_and_vms_of_another_store_are_found() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let config = config(scratch.path());
        std::fs::create_dir_all(config.data_dir.join("disks")).expect("made");
        std::fs::create_dir_all(config.run_dir.join("vm/a23456789012345678901234")).expect("made");
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&config.data_dir, open).expect("set");
        let findings = examine(&config).await;
        let has = |text: &str| {
            let hit = |finding: &&Finding| finding.message.contains(text) && finding.level != Level::Ok;
            findings.iter().find(hit).unwrap_or_else(|| panic!("{text}: {findings:?}"))
        };
        has("open to other users");
        has("reserve");
        has("VMs of another data directory");
    }
}
