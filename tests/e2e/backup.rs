//! A backup of a running daemon with its own command line, and the contents of its restore.

use serde_json::json;
use stead_schemas::instance::Instance;

use crate::harness::{Harness, LISTEN, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

#[test]
fn a_backup_of_a_running_daemon_is_restored_into_an_empty_directory() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let loops =
            json!({ "cmd": ["sh", "-c", "while true; do sleep 1; done"], "env": { "KEY": "s3cret" } });
        let id = site.create("web", &image("busybox"), loops).await;
        site.until_state("web", "Running").await;
        let scratch = site.scratch("copies");
        let (file, new) = (scratch.join("backup"), scratch.join("new"));
        let reported = site.cli(&format!("backup {}", file.display()));
        assert!(reported.contains("bytes"), "{reported}");
        let content = std::fs::read(&file).expect("written");
        let holds = |text: &str| content.windows(text.len()).any(|part| part == text.as_bytes());
        assert!(!holds("s3cret") && !holds("web") && !holds(&id), "it is sealed");
        let key = site.data().join("keys/seal.key");
        let restore = format!(
            "restore-backup {} --data-dir {} --seal-key {}",
            file.display(),
            new.display(),
            key.display()
        );
        let reported = site.cli(&restore);
        assert!(reported.contains("restored"), "{reported}");
        {
            let restored = stead::store::open(&new, stead_controllers::kinds()).expect("a data directory");
            let uid = id.parse().expect("an id");
            let instance = restored.store.get::<Instance>(&uid).expect("there");
            assert_eq!(instance.meta.name.as_str(), "web");
            assert!(restored.store.unreadable().is_empty());
        }
        // The backed-up daemon kept running, and its doctor reports no problem.
        let (data, run, kernel) = (site.data(), site.run_dir(), crate::fixtures::kernel_dir());
        let reported = site.cli(&format!(
            "doctor --data-dir {} --run-dir {} --kernel-dir {} --listen {LISTEN}",
            data.display(),
            run.display(),
            kernel.display()
        ));
        assert!(reported.contains("answers"), "{reported}");
        site.delete("web").await;
        settles(&mut site, "a backup").await;
    });
}
