//! The firewall, controlled by `nft` and its JSON.
//!
//! Guarantees: both tables change in one transaction. Port rules survive a replacement. Other tables are never listed
//! or touched.
//! The expected listing of intact tables is not guessed: the same `nft` loads them once into a new, empty network
//! namespace and lists them. The listing here must be equal, except for handles and ports. So neither a flush, a
//! foreign rule nor another version of `nft` leads to a wrong result.
//! Assumes: the network namespace of the calling thread, and the programs `nft` and `unshare`.
//! Cancel/crash: a transaction happens as a whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use nftables::schema::Nftables;
use serde_json::Value;
use stead_controllers::host::{Firewall, FirewallRules, FirewallSeen, HostError, HostErrorKind, NicRule};
use stead_schemas::names::LinkName;
use stead_schemas::network::{Lane, Mac};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Mutex, oneshot};

use super::conntrack_forget;
use super::nft_cache::{Cache, Listed, NicChange, Tables};
use super::nft_generation::generation;
use super::nft_mediation;
use super::nft_nics::{self, NicQueue, abandoned, outcome};
use super::nft_rules;

/// Limit on an identifier that every version of nft accepts, in bytes.
const TABLE_BYTES_MAX: usize = 31;

/// The adapter. Clones are cheap.
#[derive(Debug, Clone, Default)]
pub struct Nft(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Lock of writers, so that `replace` does not drop a port that is added meanwhile, and of the task that lists,
    /// so that simultaneous callers share one listing and no caller lists because of our own transaction.
    writing: Mutex<()>,
    /// Number of listings so far.
    listings: AtomicUsize,
    /// Listing of intact tables by table name. It is a pure function of the rules and the installed `nft`, so it can
    /// be kept. The table name is configured once.
    expected: StdMutex<BTreeMap<String, (FirewallRules, Arc<Tables>)>>,
    cache: StdMutex<Cache>,
    queue: NicQueue,
}

impl Nft {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the number of times that tables were listed. The cost of a listing grows with the ports.
    #[must_use]
    pub fn listings(&self) -> usize {
        self.0.listings.load(Ordering::Relaxed)
    }

    async fn expected(&self, rules: &FirewallRules) -> Result<Arc<Tables>, HostError> {
        let known = self.0.expected.lock().unwrap_or_else(PoisonError::into_inner).get(&rules.table).cloned();
        if let Some((_, tables)) = known.filter(|(of, _)| of == rules) {
            return Ok(tables);
        }
        let script = "nft -j -f - && nft -j list table inet \"$0\" && nft -j list table bridge \"$0\"";
        let arguments = ["--net", "sh", "-c", script, &rules.table];
        let load = encode(&nft_rules::replace(rules, &[]), &rules.table)?;
        let listed = run("unshare", &arguments, Some(load)).await;
        let listed =
            listed.map_err(|failure| failure.into_error("learn the listing of table", &rules.table))?;
        let (tables, _) = parse(&listed, &rules.table)?;
        let tables = Arc::new(tables);
        let mut known = self.0.expected.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(rules.table.clone(), (rules.clone(), tables.clone()));
        Ok(tables)
    }

    async fn apply(
        &self,
        operation: &'static str,
        table: &str,
        batch: &Nftables<'_>,
    ) -> Result<(), HostError> {
        let load = encode(batch, table)?;
        let done = run("nft", &["-j", "-f", "-"], Some(load)).await;
        done.map(drop).map_err(|failure| failure.into_error(operation, table))
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.0.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `read` with the content of the table: the kept one, unless another program changed a table since.
    async fn with_listed<T>(&self, table: &str, mut read: impl FnMut(&Listed) -> T) -> Result<T, HostError> {
        let mut kept = || self.cache().at(generation().ok()?, table, &mut read);
        if let Some(found) = kept() {
            return Ok(found);
        }
        // Our own transaction may have just increased the count, and may not be applied to the listing yet.
        let _writing = self.0.writing.lock().await;
        if let Some(found) = kept() {
            return Ok(found);
        }
        // The count is read before the listing: a change meanwhile results in another count.
        let before = generation();
        let listed = self.listed(table).await?;
        let found = read(&listed);
        if let Ok(before) = before {
            self.cache().keep(before, table, listed);
        }
        Ok(found)
    }

    /// Lists the loaded objects of both tables, and the number of existing tables.
    async fn listed(&self, table: &str) -> Result<Listed, HostError> {
        self.0.listings.fetch_add(1, Ordering::Relaxed);
        let (inet, bridge) = tokio::join!(list("inet", table), list("bridge", table));
        let (inet, bridge) = (inet?, bridge?);
        let is_there = inet.is_some() || bridge.is_some();
        let listings = [inet, bridge].map(Option::unwrap_or_default).concat();
        let (tables, nics) = parse(&listings, table)?;
        Ok(Listed { is_there, tables: Arc::new(tables), nics })
    }

    /// Changes the set of ports, together with the changes that wait at that moment.
    async fn change_nic(&self, table: &str, change: NicChange) -> Result<(), HostError> {
        check(table)?;
        let mut answer = self.0.queue.push(table, change);
        let _writing = self.0.writing.lock().await;
        // A change made by another caller's transaction has its answer already.
        while let Err(TryRecvError::Empty) = answer_of(&mut answer) {
            let (changes, replies): (Vec<_>, Vec<_>) = self.0.queue.take(table).into_iter().unzip();
            if changes.is_empty() {
                break;
            }
            let made = self.make(table, &changes).await;
            for (reply, done) in replies.into_iter().zip(made) {
                // The caller may be gone.
                let _ = reply.send(done);
            }
        }
        answer.await.unwrap_or_else(|_| Err(abandoned(table)))
    }

    /// Runs one transaction. If it is refused, runs one for each change, to find the refused one.
    async fn make(&self, table: &str, changes: &[NicChange]) -> Vec<Result<(), HostError>> {
        let done = self.transact(table, changes).await;
        if done.is_ok() {
            return changes.iter().map(|_| Ok(())).collect();
        }
        if let [change] = changes {
            return vec![outcome(change, done)];
        }
        let mut all = Vec::with_capacity(changes.len());
        for change in changes {
            all.push(outcome(change, self.transact(table, std::slice::from_ref(change)).await));
        }
        all
    }

    /// Returns the elements of other lanes than the changed ports should have. The caller is the only writer.
    async fn strays(&self, table: &str, changes: &[NicChange]) -> Result<Vec<NicRule>, HostError> {
        let find = |listed: &Listed| nft_nics::strays(&listed.nics, changes);
        let before = generation();
        if let Some(found) = before.as_ref().ok().and_then(|before| self.cache().at(*before, table, find)) {
            return Ok(found);
        }
        let listed = self.listed(table).await?;
        let found = find(&listed);
        if let Ok(before) = before {
            self.cache().keep(before, table, listed);
        }
        Ok(found)
    }

    async fn transact(&self, table: &str, changes: &[NicChange]) -> Result<(), HostError> {
        let strays = self.strays(table, changes).await?;
        let before = generation();
        self.apply("change the ports of table", table, &nft_nics::batch(table, changes, &strays)).await?;
        match (before, generation()) {
            (Ok(before), Ok(after)) => self.cache().changed(before, after, table, changes),
            _ => self.cache().clear(),
        }
        let removed = changes.iter().filter_map(|change| match change {
            NicChange::Remove(rule) => Some(rule.address),
            NicChange::Add(_) => None,
        });
        let removed: BTreeSet<Ipv4Addr> = removed.collect();
        if removed.is_empty() {
            return Ok(());
        }
        // From here on no new packet is admitted. The tracked connections are removed, so that the next guest of this
        // address does not get answers for this one.
        let forgotten = conntrack_forget::forget(&removed).await;
        forgotten.map_err(|error| HostError::io("forget connections of", format!("{removed:?}"), error))
    }
}

fn answer_of<T>(answer: &mut oneshot::Receiver<T>) -> Result<(), TryRecvError> {
    if answer.is_empty() && !answer.is_terminated() { Err(TryRecvError::Empty) } else { Ok(()) }
}

impl Firewall for Nft {
    async fn inspect(&self, rules: &FirewallRules) -> Result<Option<FirewallSeen>, HostError> {
        check(&rules.table)?;
        let (is_there, tables, nics) = self
            .with_listed(&rules.table, |listed| {
                let nics: Vec<NicRule> = listed.nics.iter().cloned().collect();
                (listed.is_there, listed.tables.clone(), nics)
            })
            .await?;
        if !is_there {
            return Ok(None);
        }
        let is_intact = tables == self.expected(rules).await?;
        Ok(Some(FirewallSeen { is_intact, nics }))
    }

    async fn has_nic(&self, table: &str, nic: &NicRule) -> Result<bool, HostError> {
        check(table)?;
        self.with_listed(table, |listed| listed.has(nic)).await
    }

    async fn replace(&self, rules: &FirewallRules) -> Result<(), HostError> {
        check(&rules.table)?;
        let _writing = self.0.writing.lock().await;
        let nics: Vec<NicRule> = self.listed(&rules.table).await?.nics.into_iter().collect();
        self.apply("load table", &rules.table, &nft_rules::replace(rules, &nics)).await
    }

    async fn add_nic(&self, table: &str, nic: &NicRule) -> Result<(), HostError> {
        self.change_nic(table, NicChange::Add(nic.clone())).await
    }

    async fn remove_nic(&self, table: &str, nic: &NicRule) -> Result<(), HostError> {
        self.change_nic(table, NicChange::Remove(nic.clone())).await
    }

    async fn remove(&self, table: &str) -> Result<(), HostError> {
        check(table)?;
        let _writing = self.0.writing.lock().await;
        self.apply("remove table", table, &nft_rules::remove(table)).await
    }
}

/// Checks the name of the table. A keyword of the nft language would be parsed as such.
fn check(table: &str) -> Result<(), HostError> {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let starts = table.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic());
    if starts && table.len() <= TABLE_BYTES_MAX && table.bytes().all(is_fit) {
        return Ok(());
    }
    Err(HostError::new(HostErrorKind::Permanent, "use the table name", table)
        .because("a table name has up to 31 letters, digits and underscores, a letter first"))
}

fn encode(batch: &Nftables<'_>, table: &str) -> Result<String, HostError> {
    serde_json::to_string(batch).map_err(|error| {
        HostError::new(HostErrorKind::Permanent, "encode the rules of table", table).because(error)
    })
}

/// Lists a table. Returns `None` when there is no such table.
async fn list(family: &str, table: &str) -> Result<Option<String>, HostError> {
    match run("nft", &["-j", "list", "table", family, table], None).await {
        Ok(listed) => Ok(Some(listed)),
        Err(failure) if failure.is_missing() => Ok(None),
        Err(failure) => Err(failure.into_error("list table", table)),
    }
}

/// Separates listings into the parts that must be equal and the ports.
fn parse(listings: &str, table: &str) -> Result<(Tables, BTreeSet<NicRule>), HostError> {
    let unreadable = |why: String| {
        HostError::new(HostErrorKind::Unsupported, "read the listing of table", table).because(why)
    };
    let (mut tables, mut senders) = (Tables::new(), Vec::new());
    let mut lanes: BTreeMap<Lane, BTreeSet<Ipv4Addr>> = BTreeMap::new();
    for listing in serde_json::Deserializer::from_str(listings).into_iter::<Value>() {
        let mut listing = listing.map_err(|error| unreadable(error.to_string()))?;
        let objects = listing.get_mut("nftables").and_then(Value::as_array_mut).map(std::mem::take);
        for object in objects.ok_or_else(|| unreadable("it has no list of objects".to_owned()))? {
            let Value::Object(object) = object else { continue };
            let Some((kind, mut body)) = object.into_iter().next().filter(|(kind, _)| kind != "metainfo")
            else {
                continue;
            };
            let Some(fields) = body.as_object_mut() else { continue };
            fields.remove("handle");
            let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let (family, name, chain) = (text("family"), text("name"), text("chain"));
            if kind == "set" && family == "bridge" && name == nft_rules::PORTS {
                let elements = fields.remove("elem");
                senders.extend(elements.iter().filter_map(Value::as_array).flatten().filter_map(sender));
            }
            let lane = nft_mediation::LANES.into_iter().find(|lane| nft_mediation::lane_set(*lane) == name);
            if let Some(lane) = lane.filter(|_| kind == "set" && family == "inet") {
                let elements = fields.remove("elem");
                let addresses = elements.iter().filter_map(Value::as_array).flatten().filter_map(address);
                lanes.entry(lane).or_default().extend(addresses);
            }
            let key = if kind == "rule" { chain } else { name };
            tables.entry((family, kind, key)).or_default().push(body);
        }
    }
    // A port in no lane is left out, and its reconciler adds it again. Which lane it was in is not guessed.
    let nics = senders.iter().flat_map(|(tap, mac, address)| {
        let its = lanes.iter().filter(|(_, addresses)| addresses.contains(address));
        its.map(|(&lane, _)| NicRule { tap: tap.clone(), mac: *mac, address: *address, lane })
    });
    Ok((tables, nics.collect()))
}

/// Returns the value of an element of a set. One with a comment or a counter is wrapped.
fn value(element: &Value) -> &Value {
    element.get("elem").and_then(|elem| elem.get("val")).unwrap_or(element)
}

/// Parses an element of the set of allowed senders. A malformed one lets no guest send and is left out.
fn sender(element: &Value) -> Option<(LinkName, Mac, Ipv4Addr)> {
    let parts = value(element).get("concat")?.as_array()?;
    let [tap, mac, address] = parts.as_slice() else { return None };
    Some((tap.as_str()?.parse().ok()?, mac.as_str()?.parse().ok()?, address.as_str()?.parse().ok()?))
}

/// Parses an element of the set of a lane.
fn address(element: &Value) -> Option<Ipv4Addr> {
    value(element).as_str()?.parse().ok()
}

/// The failure of a program.
enum Failure {
    Reported(String),
    Io(&'static str, io::Error),
}

impl Failure {
    fn is_missing(&self) -> bool {
        matches!(self, Self::Reported(reported) if reported.contains("No such file or directory"))
    }

    fn into_error(self, operation: &'static str, subject: &str) -> HostError {
        let error = |kind| HostError::new(kind, operation, subject);
        match self {
            Self::Io(program, cause) if cause.kind() == io::ErrorKind::NotFound => {
                error(HostErrorKind::Unsupported).because(format!("the program {program} is not installed"))
            }
            Self::Io(_, cause) => error(HostError::kind_of_io(&cause)).because(cause),
            Self::Reported(reported) => {
                let kind = if reported.contains("No such file or directory") {
                    HostErrorKind::Missing
                } else if reported.contains("Operation not permitted") {
                    HostErrorKind::Denied
                } else if reported.contains("Operation not supported") {
                    HostErrorKind::Unsupported
                } else if reported.contains("No space left") || reported.contains("Cannot allocate") {
                    HostErrorKind::Exhausted
                } else {
                    HostErrorKind::Transient
                };
                error(kind).because(reported)
            }
        }
    }
}

/// Runs a program to its end. Dropping the future kills it.
async fn run(program: &'static str, arguments: &[&str], input: Option<String>) -> Result<String, Failure> {
    let failed = |error| Failure::Io(program, error);
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").kill_on_drop(true);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let write = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A program that ends early gives the reason on its standard error.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let ((), output) = tokio::join!(write, child.wait_with_output());
    let output = output.map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let reported = [&output.stderr[..], &output.stdout[..]]
        .map(|bytes| String::from_utf8_lossy(bytes).trim().to_owned());
    Err(Failure::Reported(reported.join(" ").trim().to_owned()))
}
