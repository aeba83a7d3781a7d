//! Images become programs: the configuration of the image and of the instance determines what runs.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};

use crate::debian;
use crate::fixtures::run;
use crate::harness::{Harness, image};
use crate::namespace::in_namespace;

/// Returns the instance after its program ended.
async fn ended(site: &Harness, name: &str) -> Value {
    site.until(name, "ended", |seen| seen["state"] == "Stopped" && !seen["exit_message"].is_null()).await
}

/// Adds an image to the site's layout, made from another one, with a configuration.
pub(crate) fn configured(site: &Harness, name: &str, from: &str, config: &[&str]) {
    let layout = site.layout();
    let (from, to) = (format!("{layout}:{from}"), format!("{layout}:{name}"));
    run("umoci", &["tag", "--image", &from, name]);
    run("umoci", &[&["config", "--image", &to], config].concat());
    site.push(&layout, name);
}

const SCRIPT: &str = "echo \"$1 $GREETING $OWN $(id -u):$(id -g) $(pwd) $(hostname)\"; exit 7";

#[test]
fn entrypoint_command_environment_user_and_directory_are_those_of_image_and_instance() {
    in_namespace(async || {
        let site = Harness::running().await;
        configured(
            &site,
            "configured",
            "busybox",
            &[
                "--config.entrypoint=/bin/sh",
                "--config.entrypoint=-c",
                &format!("--config.entrypoint={SCRIPT}"),
                "--config.cmd=sh",
                "--config.cmd=from-image",
                "--config.env=GREETING=hello",
                "--config.env=OWN=image",
                "--config.user=nobody",
                "--config.workingdir=/tmp",
            ],
        );
        let id = site.create("one", &image("configured"), json!({ "env": { "OWN": "instance" } })).await;
        let seen = ended(&site, "one").await;
        assert_eq!(
            (&seen["exit_code"], &seen["exit_message"]),
            (&json!(7), &json!("exited with code 7")),
            "{}",
            site.console(&id)
        );
        let reported = "from-image hello instance 65534:65534 /tmp one";
        assert!(site.console(&id).contains(reported), "{}", site.console(&id));
        // A command replaces the image's command and keeps its entrypoint, as in Docker.
        let path = format!("/instances/{id}/start");
        site.request(Method::POST, &path, Some(json!({ "cmd": ["sh", "from-instance"] }))).await;
        site.until_console(&id, "from-instance hello instance 65534:65534 /tmp one").await;
        ended(&site, "one").await;
        // An entrypoint replaces both.
        let body = json!({ "entrypoint": ["/bin/echo", "only this"], "cmd": [] });
        site.request(Method::POST, &path, Some(body)).await;
        site.until_console(&id, "only this").await;
        let seen = ended(&site, "one").await;
        assert_eq!((&seen["exit_code"], &seen["exit_message"]), (&json!(0), &json!("exited with code 0")));
        // A program that cannot start is reported where the client sees it.
        let body = json!({ "entrypoint": ["/no/such/program"] });
        site.request(Method::POST, &path, Some(body)).await;
        let seen = ended(&site, "one").await;
        assert_eq!(seen["exit_code"], 127, "{seen:#}");
        assert!(seen["exit_message"].as_str().is_some_and(|text| text.contains("/no/such/program")));
    });
}

#[test]
fn an_image_of_one_static_program_and_nothing_else_runs() {
    in_namespace(async || {
        let site = Harness::running().await;
        let root = site.scratch("scratch-root");
        let source = site.scratch("source").join("main.c");
        fs::write(&source, "#include <stdio.h>\nint main(int n, char **a) { puts(a[n - 1]); return 5; }\n")
            .expect("written");
        let program = root.join("program").display().to_string();
        run("gcc", &["-static", "-O1", "-o", &program, &source.display().to_string()]);
        let root = root.display().to_string();
        let target = format!("{}:scratch", site.layout());
        run("umoci", &["new", "--image", &target]);
        run("umoci", &["insert", "--image", &target, &root, "/"]);
        configured(&site, "scratch", "scratch", &["--config.entrypoint=/program", "--config.cmd=all alone"]);
        let id = site.create("one", &image("scratch"), json!({})).await;
        let seen = ended(&site, "one").await;
        assert_eq!((&seen["exit_code"], &seen["exit_message"]), (&json!(5), &json!("exited with code 5")));
        assert!(site.console(&id).contains("all alone"), "{}", site.console(&id));
    });
}

#[test]
fn what_a_program_wrote_before_its_end_is_there_at_the_next_start() {
    in_namespace(async || {
        let site = Harness::running().await;
        // The program runs longer than any grace after the start. The guest does not write back by itself that soon.
        let body = json!({ "cmd": ["sh", "-c", "sleep 12; echo precious > /root/kept; exit 0"] });
        let id = site.create("one", &image("busybox"), body).await;
        ended(&site, "one").await;
        let path = format!("/instances/{id}/start");
        let body = json!({ "cmd": ["sh", "-c", "cat /root/kept; echo looked"] });
        site.request(Method::POST, &path, Some(body)).await;
        let console = site.until_console(&id, "looked").await;
        assert!(console.contains("precious"), "{console}");
    });
}

#[test]
fn a_debian_root_runs_its_own_programs() {
    // This runs before the namespace, which has no way out.
    debian::layout();
    in_namespace(async || {
        let site = Harness::running().await;
        site.push(&debian::layout(), debian::PLAIN);
        let script = ". /etc/os-release; echo \"$PRETTY_NAME\"; dpkg --print-architecture; \
                      perl -e 'print 6*7, qq(\\n)'; su nobody -s /bin/bash -c 'id -un'; exit 3";
        let body = json!({ "cmd": ["/bin/bash", "-c", script] });
        let id = site.create("one", &image(debian::PLAIN), body).await;
        let seen = ended(&site, "one").await;
        let console = site.console(&id);
        assert_eq!(seen["exit_code"], 3, "{console}");
        for reported in ["Debian GNU/Linux 12 (bookworm)", "amd64", "42", "nobody"] {
            assert!(console.contains(reported), "{reported}: {console}");
        }
    });
}
