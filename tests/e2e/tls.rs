//! A registry over TLS: pulled from only when its certificate is one that the host trusts.

use std::fs;
use std::process::{Command, Stdio};

use reqwest::Method;
use serde_json::json;

use crate::fixtures::{run, until};
use crate::harness::{BOOT, Harness, MOMENT, Program};
use crate::namespace::in_namespace;

/// Host name of the registry. It is not a loopback name, so TLS is used, but it resolves to loopback here.
const HOST: &str = "registry.example";
const PORT: u16 = 5443;

/// Creates a certificate authority, a certificate for the host, and the name in the namespace's own hosts file.
fn prepare(site: &Harness) -> std::path::PathBuf {
    let directory = site.scratch("tls");
    let at = directory.display().to_string();
    let lines = format!(
        "cd {at}
         openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
         openssl req -newkey rsa:2048 -nodes -subj /CN={HOST} -keyout host.key -out host.csr
         printf 'subjectAltName=DNS:{HOST}\\nbasicConstraints=CA:FALSE\\nextendedKeyUsage=serverAuth\\n' >ext
         openssl x509 -req -in host.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out host.pem
         cp /etc/hosts hosts; echo '127.0.0.1 {HOST}' >>hosts; mount --bind hosts /etc/hosts"
    );
    run("sh", &["-ec", &format!("({lines}) 2>&1")]);
    directory
}

#[test]
fn an_image_comes_over_tls_from_a_registry_that_the_host_trusts() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let directory = prepare(&site);
        let at = directory.display();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {at}/store}}}}\n\
             http: {{addr: '127.0.0.1:{PORT}', tls: {{certificate: {at}/host.pem, key: {at}/host.key}}}}\n"
        );
        let path = directory.join("registry.yml");
        fs::write(&path, config).expect("written");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let _registry = Program(command.spawn().expect("docker-registry runs"));
        until("the registry", MOMENT, async || std::net::TcpStream::connect(("127.0.0.1", PORT)).ok()).await;
        let name = format!("{HOST}:{PORT}/busybox:latest");
        let (from, to) = (format!("oci:{}:busybox", site.layout()), format!("docker://{name}"));
        run("skopeo", &["copy", "-q", "--dest-tls-verify=false", &from, &to]);

        site.start().await;
        let answer = site.request(Method::POST, "/images", Some(json!({ "name": name }))).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        let image = format!("/images/{}", name.replace('/', "%2F"));
        let refused = until("the refusal", BOOT, async || {
            let seen = site.request(Method::GET, &image, None).await.body;
            seen["error"].is_string().then_some(seen)
        })
        .await;
        let why = refused["error"].as_str().expect("text").to_lowercase();
        assert!(why.contains("certificate"), "{refused:#}");
        site.stop().await;
        // The same request runs on a host that trusts the authority.
        site.trusts = Some(directory.join("ca.pem"));
        site.start().await;
        site.request(Method::POST, "/images", Some(json!({ "name": name }))).await;
        site.until_image(&name).await;
    });
}
