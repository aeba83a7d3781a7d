//! A single fault in one step: its effect on clients, its report, and the check that it left nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::io::Errno;
use serde_json::Value;

use super::steps::Act;
use super::supervisor::{Fault, Supervisor};
use crate::fixtures::{deadline, run};
use crate::harness::{Answer, Harness};

/// Time between two polls of the condition that a step waits for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Time within which a fault must be reported, the work must be completed once nothing fails any more, and leftovers
/// must be removed. Retries come within seconds.
const IN_TIME: Duration = Duration::from_secs(120);

/// Interval of the daemon's resync, as the scene configures it.
pub(crate) const RESYNC: Duration = Duration::from_secs(1);
/// Time in which the daemon has completed a resync, on a busy machine too.
pub(crate) const FULL_SCAN: Duration = Duration::from_secs(4);
/// Time for which a fault lasts beside a VM without requests, so that the daemon meets it and reacts to it.
const HOLD: Duration = Duration::from_millis(1500);

/// The outcome of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// A client got an error, in an answer or in a condition.
    Reported,
    /// The daemon's log contains the error.
    Logged,
    /// The step succeeded in spite of the fault, without a report.
    Borne,
    /// The daemon ended with a message.
    Ended,
    /// The call was not made this time.
    Unreached,
}

/// A step in progress.
pub(crate) struct Walk {
    acts: Vec<Act>,
    at: usize,
    /// True if an object was created with an acknowledgement and not deleted.
    is_made: bool,
    /// Texts of all answers since the fault began.
    got: String,
    token: Option<(String, String)>,
    archive: Vec<u8>,
}

impl Walk {
    pub(crate) fn new(acts: Vec<Act>, archive: &[u8]) -> Self {
        Self { acts, at: 0, is_made: false, got: String::new(), token: None, archive: archive.to_vec() }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.at == self.acts.len()
    }

    /// Returns `true` if the step sends no request.
    fn is_idle(&self) -> bool {
        self.acts.iter().all(|act| matches!(act, Act::See(..)))
    }

    fn record(&mut self, answer: &Answer) {
        self.got.push_str(&answer.body.to_string());
        self.got.push('\n');
    }

    /// Checks that an error answer states the problem, in the API's format.
    fn check(&mut self, what: &Act, answer: &Answer) -> Result<(), String> {
        self.record(answer);
        let text = |field: &str| answer.body[field].as_str().unwrap_or_default();
        let is_clear =
            !text("code").is_empty() && text("message").contains(' ') && text("code") != "internal_error";
        if is_clear {
            Ok(())
        } else {
            Err(format!("{what:?} was answered without a clear error: {answer:?}"))
        }
    }

    /// Deletes all objects of a list. Returns true if there are none.
    async fn clear(&mut self, site: &Harness, act: &Act, list: &str, kind: &str) -> Result<bool, String> {
        match site.attempt(Method::GET, list, None).await {
            Some(seen) if seen.status == 200 => {
                let all = seen.body.as_array().cloned().unwrap_or_default();
                for id in all.iter().filter_map(|object| object["id"].as_str()) {
                    let gone = site.attempt(Method::DELETE, &format!("{kind}/{id}"), None).await;
                    if let Some(answer) = gone.filter(|answer| !answer.status.is_success()) {
                        self.check(act, &answer)?;
                    }
                }
                Ok(all.is_empty())
            }
            Some(answer) => self.check(act, &answer).map(|()| false),
            None => Ok(false),
        }
    }

    /// Continues as far as possible without waiting.
    pub(crate) async fn go(&mut self, site: &Harness) -> Result<(), String> {
        while let Some(act) = self.acts.get(self.at).cloned() {
            let is_over = match &act {
                Act::Ask(method, path, body, good) => {
                    let body = Some(body.clone()).filter(|body| !body.is_null());
                    let answer = site.attempt(method.clone(), path, body).await;
                    self.asked(&act, answer, good)?
                }
                Act::Import(path) => {
                    let answer = site.attempt_raw(Method::POST, path, self.archive.clone()).await;
                    self.asked(&act, answer, &[200, 201, 202])?
                }
                Act::Bring(verb, path, is_so) => {
                    let seen = site.attempt(Method::GET, path, None).await;
                    let is_so = seen.is_some_and(|seen| seen.status == 200 && is_so(&seen.body));
                    if !is_so && let Some(answer) = site.attempt(Method::POST, verb, None).await {
                        self.record(&answer);
                        if !answer.status.is_success() {
                            self.check(&act, &answer)?;
                        }
                    }
                    is_so
                }
                Act::See(path, is_so) => match site.attempt(Method::GET, path, None).await {
                    Some(answer) if answer.status == 200 => {
                        self.record(&answer);
                        is_so(&answer.body)
                    }
                    Some(answer) if answer.status == 404 && self.is_made => {
                        return Err(format!("{path} was acknowledged, and is not there"));
                    }
                    Some(answer) => self.check(&act, &answer).map(|()| false)?,
                    None => false,
                },
                Act::Clear(list, kind) => self.clear(site, &act, list, kind).await?,
                Act::Gone(path) => match site.attempt(Method::GET, path, None).await {
                    Some(answer) if answer.status == 404 => true,
                    Some(answer) => {
                        self.record(&answer);
                        false
                    }
                    None => false,
                },
                Act::Take(path) => match site.attempt_raw(Method::GET, path, Vec::new()).await {
                    Some(answer) if answer.status == 200 => true,
                    Some(answer) => self.check(&act, &answer).map(|()| false)?,
                    // The connection was closed after the request had begun.
                    None => false,
                },
                Act::Token => self.token(site).await,
            };
            if !is_over {
                return Ok(());
            }
            self.at += 1;
        }
        Ok(())
    }

    fn asked(&mut self, act: &Act, answer: Option<Answer>, good: &[u16]) -> Result<bool, String> {
        // Without an answer either outcome is valid, and the request is repeated.
        let Some(answer) = answer else { return Ok(false) };
        let status = answer.status.as_u16();
        if good.contains(&status) {
            let is_deletion = matches!(act, Act::Ask(Method::DELETE, ..));
            self.is_made = !is_deletion;
            return Ok(true);
        }
        self.check(act, &answer)?;
        // An object that was created without an acknowledgement is complete.
        if ["name_conflict", "already_exists"].contains(&answer.body["code"].as_str().unwrap_or_default()) {
            self.is_made = true;
            return Ok(true);
        }
        // A state that does not fit yet, or a failure in between, is reported as a conflict.
        if status < 500 && status != 409 {
            return Err(format!("{act:?} was refused for good: {answer:?}"));
        }
        Ok(false)
    }

    /// Creates a token, uses it, revokes it and checks that it is refused.
    async fn token(&mut self, site: &Harness) -> bool {
        let data = site.data().display().to_string();
        let program = env!("CARGO_BIN_EXE_stead");
        let (token, is_revoked) = match self.token.take() {
            None => (run(program, &["token", "create", "--data-dir", &data]).trim().to_owned(), false),
            Some((token, state)) => (token, state == "revoked"),
        };
        let status = site.status_with(&token).await;
        if is_revoked {
            self.token = Some((token, "revoked".to_owned()));
            return status == Some(401);
        }
        let is_used = status == Some(200);
        if is_used {
            let listed = run(program, &["token", "list", "--data-dir", &data, "-o", "json"]);
            let listed: Value = serde_json::from_str(&listed).expect("JSON");
            let last = listed.as_array().and_then(|all| all.last()).expect("a token");
            run(program, &["token", "revoke", last["id"].as_str().expect("an id"), "--data-dir", &data]);
        }
        self.token = Some((token, if is_used { "revoked" } else { "made" }.to_owned()));
        false
    }
}

/// Returns `true` if a text reports an error.
pub(crate) fn shows(text: &str, errno: Errno) -> bool {
    let error = std::io::Error::from(errno).to_string();
    let words = error.split(" (os").next().unwrap_or_default();
    text.contains(words) || error_is_reported_otherwise(text, errno)
}

/// Returns `true` for the store's own words for an error.
fn error_is_reported_otherwise(text: &str, errno: Errno) -> bool {
    errno == Errno::NOSPC && text.contains("file system is full")
}

/// Returns the text of the daemons' log after an offset.
pub(crate) fn log_since(site: &Harness, from: u64) -> String {
    let log = fs::read(site.log_file()).unwrap_or_default();
    let from = usize::try_from(from).expect("a short log");
    String::from_utf8_lossy(log.get(from..).unwrap_or_default()).into_owned()
}

pub(crate) fn log_length(site: &Harness) -> u64 {
    fs::metadata(site.log_file()).map_or(0, |log| log.len())
}

/// Continues a step until it is done, or the fault was reported. A fault that was survived until the step is done is
/// not reported.
pub(crate) async fn suffer(
    site: &Harness,
    supervisor: &Supervisor,
    fault: &Fault,
    walk: &mut Walk,
    log: u64,
    kept: &BTreeSet<String>,
) -> Result<Outcome, String> {
    let deadline = deadline(IN_TIME);
    let is_logged = async || {
        while supervisor.hits() == 0 || !shows(&log_since(site, log), fault.error) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    let (mut done, mut met) = (None, None);
    loop {
        // A request may wait for the failing call. Then the log reports the error.
        let is_reported = {
            let went = walk.go(site);
            tokio::pin!(went);
            tokio::select! {
                biased;
                went = &mut went => went.map(|()| false)?,
                () = is_logged() => {
                    supervisor.end();
                    went.await?;
                    true
                }
            }
        };
        if is_reported {
            return Ok(if shows(&walk.got, fault.error) { Outcome::Reported } else { Outcome::Logged });
        }
        let (got, logged) = (shows(&walk.got, fault.error), shows(&log_since(site, log), fault.error));
        let met = (supervisor.hits() > 0).then(|| *met.get_or_insert_with(Instant::now));
        if walk.is_idle() && fault.lasts && met.is_some_and(|met| met.elapsed() < HOLD) {
            tokio::time::sleep(POLL_INTERVAL).await;
            continue;
        }
        if supervisor.hits() > 0 && (got || walk.is_done()) {
            return Ok(match (got, logged) {
                (true, _) => Outcome::Reported,
                (false, true) => Outcome::Logged,
                (false, false) => Outcome::Borne,
            });
        }
        if supervisor.hits() > 0 && logged && fault.lasts {
            return Ok(Outcome::Logged);
        }
        // Objects removed in the background disappear a moment after the last answer, or with the next resync.
        let since = *done.get_or_insert_with(Instant::now);
        if !walk.is_done() {
            done = None;
        } else if supervisor.hits() == 0 && since.elapsed() > FULL_SCAN && files(site) == *kept {
            return Ok(Outcome::Unreached);
        }
        if Instant::now() > deadline {
            return Err(format!(
                "neither done nor told: at {:?}, {} hits\nsaid: {}\nlog: {}",
                walk.acts.get(walk.at),
                supervisor.hits(),
                walk.got.lines().last().unwrap_or_default(),
                log_since(site, log)
            ));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Continues until the step is done, while nothing fails.
pub(crate) async fn recover(site: &Harness, walk: &mut Walk) -> Result<(), String> {
    let deadline = deadline(IN_TIME);
    loop {
        walk.go(site).await?;
        if walk.is_done() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let last = walk.got.lines().last().unwrap_or_default();
            return Err(format!("it does not go on at {:?}: {last}", walk.acts[walk.at]));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Lists the files of the data and run directories, apart from the database and permanent logs of the daemon.
pub(crate) fn files(site: &Harness) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for root in [site.data(), site.run_dir()] {
        walk_files(&root, &mut found);
    }
    let data = site.data().display().to_string();
    let is_own = |path: &String| {
        ["db/", "audit/", "store-mark"].iter().any(|own| path.starts_with(&format!("{data}/{own}")))
    };
    found.retain(|path| !is_own(path));
    found
}

fn walk_files(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        found.insert(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk_files(&entry.path(), found);
        }
    }
}

/// Waits until the same files exist as before.
pub(crate) async fn leaves_nothing(site: &Harness, before: &BTreeSet<String>) -> Result<(), String> {
    let deadline = deadline(IN_TIME);
    loop {
        let now = files(site);
        if now == *before {
            return Ok(());
        }
        if Instant::now() > deadline {
            let more: Vec<_> = now.difference(before).collect();
            let less: Vec<_> = before.difference(&now).collect();
            return Err(format!("files are left over: {more:?}, or are missing: {less:?}"));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Returns every object that a client sees, by path and name, without its variable parts.
pub(crate) async fn objects(site: &Harness) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for kind in ["instances", "images", "volumes", "ingresses", "snapshots"] {
        let answer = site.request(Method::GET, &format!("/{kind}"), None).await;
        for object in answer.body.as_array().unwrap_or_else(|| panic!("{kind}: {answer:?}")) {
            let name = object["name"].as_str().unwrap_or_default();
            let fields = ["id", "name", "created_at", "image", "size", "size_gb", "rules", "tags", "env"];
            let kept = fields.map(|field| object[field].clone());
            all.insert(format!("{kind}/{name}"), Value::Array(kept.to_vec()));
        }
    }
    all
}

/// Waits until a daemon answers or has ended, and returns its status in that case. A daemon that logs the reason why
/// it does neither may continue.
pub(crate) async fn begun(
    site: &mut Harness,
    supervisor: &Supervisor,
    fault: &Fault,
    log: u64,
) -> Result<Result<(), ExitStatus>, String> {
    let deadline = deadline(IN_TIME);
    loop {
        if let Some(begun) = site.begun().await {
            return Ok(begun);
        }
        let reported = log_since(site, log);
        if fault.lasts && shows(&reported, fault.error) && reported.contains("listening") {
            supervisor.end();
        }
        if Instant::now() > deadline {
            return Err("it neither begins nor ends".to_owned());
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Waits until a call has failed, for at most the time of a resync.
pub(crate) async fn is_met(supervisor: &Supervisor) {
    let deadline = Instant::now() + FULL_SCAN;
    while supervisor.hits() == 0 && Instant::now() < deadline {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
