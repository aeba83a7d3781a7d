//! TLS of the TCP listener: clients that trust its certificate, hostile handshakes, and a certificate that is replaced.

use std::fs;
use std::path::Path;
use std::time::Duration;

use stead::api::LocalUsers;
use stead::api::tls::{Tls, TlsFiles, own_certificate};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::cli::{MOMENT, ended, stead};
use crate::server::{CONNECTIONS_MAX, CONNECTIONS_PER_CLIENT_MAX, IMAGE, Server};

/// A server with a certificate of its own.
struct Secure {
    server: Server,
    files: TlsFiles,
    tls: Tls,
    _keys: tempfile::TempDir,
}

fn made(directory: &Path) -> TlsFiles {
    own_certificate(directory, vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("made")
}

/// Returns the fingerprint as OpenSSL prints it.
async fn fingerprint(files: &TlsFiles) -> String {
    let mut command = Command::new("openssl");
    command.args(["x509", "-noout", "-fingerprint", "-sha256", "-in"]).arg(&files.certificate);
    let output = command.output().await.expect("openssl runs");
    let text = String::from_utf8(output.stdout).expect("text");
    text.trim().rsplit_once('=').expect("a fingerprint").1.to_owned()
}

impl Secure {
    async fn start(header_timeout: Duration) -> Self {
        let keys = tempfile::tempdir().expect("scratch");
        let files = made(keys.path());
        let tls = Tls::open(files.clone()).expect("opened");
        let server = Server::start_at(Some(tls.clone()), LocalUsers::default(), |_, limits| {
            limits.header_timeout = header_timeout;
        });
        Self { server: server.await, files, tls, _keys: keys }
    }

    /// Runs the client with these rules for certificates. Returns exit code, output and errors.
    async fn runs(&self, rules: &[&str], words: &[&str]) -> (i32, String, String) {
        let words = [rules, words].concat();
        let mut command = stead(&self.server.base, &self.server.token, &words);
        command.env_remove("STEAD_CACERT").env_remove("STEAD_TLS_FINGERPRINT");
        ended(command.spawn().expect("started")).await
    }

    fn authorities(&self) -> [&str; 2] {
        ["--cacert", self.files.certificate.to_str().expect("text")]
    }

    /// Checks that a client that knows the certificate is served.
    async fn serves(&self) {
        let (code, out, err) = self.runs(&self.authorities(), &["ps"]).await;
        assert_eq!(code, 0, "{out}{err}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_reach_a_server_whose_certificate_they_know_and_no_other() {
    let secure = Secure::start(Duration::from_secs(3)).await;
    let run = ["run", IMAGE, "--name", "web", "-m", "256MB", "--no-network"];
    let (code, out, err) = secure.runs(&secure.authorities(), &run).await;
    assert_eq!(code, 0, "{out}{err}");
    let print = fingerprint(&secure.files).await;
    for rules in [secure.authorities(), ["--tls-fingerprint", &print]] {
        let (code, out, err) = secure.runs(&rules, &["ps"]).await;
        assert!(code == 0 && out.contains("web"), "{out}{err}");
        let (code, _, err) = secure.runs(&rules, &["wait", "web", "--for", "Running"]).await;
        assert_eq!(code, 0, "{err}");
        // The agent of a simulated guest refuses; its refusal arrives over a WebSocket.
        let (code, _, err) = secure.runs(&rules, &["exec", "web", "true"]).await;
        assert!(code != 0 && !err.contains("cannot reach"), "{err}");
    }
    let other = tempfile::tempdir().expect("scratch");
    let other = made(other.path()).certificate.to_str().expect("text").to_owned();
    let wrong = format!("{}00", &print[..print.len() - 2]);
    let wrong = if wrong == print { format!("{}01", &print[..print.len() - 2]) } else { wrong };
    let no_rules: &[&str] = &[];
    for rules in [no_rules, &["--tls-fingerprint", &wrong], &["--cacert", &other]] {
        for words in [&["ps"][..], &["exec", "web", "true"]] {
            let (code, _, err) = secure.runs(rules, words).await;
            assert!(code != 0 && err.contains("certificate"), "{rules:?} {words:?}: {err}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_do_not_come_end_and_garbage_harms_nobody() {
    let secure = Secure::start(Duration::from_secs(1)).await;
    let garbage: [&[u8]; 4] = [
        b"",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0xff; 100_000],
        // The head of a record whose rest never comes.
        &[22, 3, 1, 64, 0],
    ];
    for bytes in garbage {
        let mut stream = TcpStream::connect(secure.server.address).await.expect("connected");
        // The server may have closed it meanwhile.
        let _ = stream.write_all(bytes).await;
        let closes = async { while stream.read(&mut [0; 4096]).await.is_ok_and(|count| count > 0) {} };
        tokio::time::timeout(MOMENT, closes).await.expect("it is closed");
    }
    secure.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_handshake_have_a_share_and_make_room() {
    let secure = Secure::start(Duration::from_secs(3600)).await;
    let mut held = Vec::new();
    for number in 0..CONNECTIONS_MAX {
        let socket = tokio::net::TcpSocket::new_v4().expect("made");
        let from = [127, 0, 0, 2 + u8::from(number % 2 == 0)];
        socket.bind((from, 0).into()).expect("an address of loopback");
        held.push(socket.connect(secure.server.address).await.expect("taken by the kernel"));
    }
    secure.serves().await;
    // One address gets no more than its share: its further connections are closed without an answer.
    let secure = Secure::start(Duration::from_secs(3600)).await;
    let mut own = Vec::new();
    let refused = async {
        for _ in 0..=CONNECTIONS_PER_CLIENT_MAX {
            own.push(TcpStream::connect(secure.server.address).await.expect("taken by the kernel"));
        }
        let mut last = own.pop().expect("there");
        last.read(&mut [0; 16]).await
    };
    let refused = tokio::time::timeout(MOMENT, refused).await.expect("closed");
    assert!(!refused.is_ok_and(|count| count > 0), "nothing is sent in clear");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_renamed_into_its_path_is_served() {
    let secure = Secure::start(Duration::from_secs(3)).await;
    let following = tokio::spawn(secure.tls.clone().follow());
    let before = fingerprint(&secure.files).await;
    let next = tempfile::tempdir_in(secure.files.key.parent().expect("a directory")).expect("scratch");
    let files = made(next.path());
    let after = fingerprint(&files).await;
    let (code, _, err) = secure.runs(&["--tls-fingerprint", &before], &["ps"]).await;
    assert_eq!(code, 0, "{err}");
    fs::rename(&files.certificate, &secure.files.certificate).expect("renamed");
    fs::rename(&files.key, &secure.files.key).expect("renamed");
    let replaced = async {
        while secure.runs(&["--tls-fingerprint", &after], &["ps"]).await.0 != 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(MOMENT, replaced).await.expect("the new certificate is served");
    following.abort();
}

/// Runs a script of `tests/sdk` over TLS; `variable` is the environment variable that names the authorities.
async fn sdk(script: &str, variable: &str, command: impl FnOnce() -> std::process::Command + Send + 'static) {
    let secure = Secure::start(Duration::from_secs(3)).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk").join(script);
    let variables = [
        ("STEAD_BASE_URL", secure.server.base.clone()),
        ("STEAD_API_KEY", secure.server.token.clone()),
        ("STEAD_TEST_IMAGE", IMAGE.to_owned()),
        (variable, secure.authorities()[1].to_owned()),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value));
    let run = move || crate::python::run(command().arg(script).envs(variables));
    let output = tokio::task::spawn_blocking(run).await.expect("it ran");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("sdk: everything passed"), "{out}\n{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_python_sdk_works_over_tls_with_the_certificate_as_its_authority() {
    sdk("test_sdk.py", "SSL_CERT_FILE", || std::process::Command::new(crate::python::python())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_typescript_sdk_works_over_tls_with_the_certificate_as_its_authority() {
    sdk("test_sdk.mjs", "NODE_EXTRA_CA_CERTS", crate::sdk::node_command).await;
}
