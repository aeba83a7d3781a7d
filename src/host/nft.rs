//! The firewall by `nft` and its JSON.
//!
//! Guarantees: both tables change in one transaction; rules of ports survive a replacement; other
//! tables are never listed or touched.
//! What intact tables look like is not guessed: the same `nft` loads them once into an empty
//! network namespace of its own and lists them; what it lists here must be equal, but for handles
//! and ports. So neither a flush, a foreign rule nor another version of `nft` can mislead.
//! Assumes: the network namespace of the calling thread; programs `nft`, `unshare`, `conntrack`.
//! Cancel/crash: a transaction happens as a whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use nftables::batch::Batch;
use nftables::schema::Nftables;
use serde_json::Value;
use stead_controllers::host::{Firewall, FirewallRules, FirewallSeen, HostError, HostErrorKind, PortRule};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::nft_generation::generation;
use super::nft_rules;

/// nft's own bound of an identifier that every version takes.
const TABLE_BYTES_MAX: usize = 31;

/// The adapter; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Nft(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Held by writers, so that `replace` does not drop a port that is added meanwhile.
    writing: Mutex<()>,
    /// What intact tables look like: a pure function of the rules and the installed `nft`, which
    /// is why it may be kept. By table name, since that is configured once.
    expected: StdMutex<BTreeMap<String, (FirewallRules, Tables)>>,
    seen: StdMutex<Seen>,
}

/// What was found of one generation of all tables, which no change passes by.
#[derive(Debug, Default)]
struct Seen {
    generation: u32,
    listed: BTreeMap<String, Arc<Listed>>,
    ports: BTreeSet<(String, PortRule)>,
}

/// The objects of both tables by family, kind and chain or name; rules in order. No ports.
type Tables = BTreeMap<(String, String, String), Vec<Value>>;

impl Nft {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    async fn expected(&self, rules: &FirewallRules) -> Result<Tables, HostError> {
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

    /// What was found of this generation; nothing without one, or of another.
    fn seen(&self, generation: u32) -> MutexGuard<'_, Seen> {
        let mut seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.generation != generation {
            *seen = Seen { generation, ..Seen::default() };
        }
        seen
    }

    /// As `listed`, or as it was when nothing has changed since.
    async fn listed_or_seen(&self, table: &str) -> Result<Arc<Listed>, HostError> {
        // Before the listing: what changes meanwhile is another generation's.
        let Ok(generation) = generation() else { return Ok(Arc::new(self.listed(table).await?)) };
        let seen = self.seen(generation).listed.get(table).cloned();
        if let Some(listed) = seen {
            return Ok(listed);
        }
        let listed = Arc::new(self.listed(table).await?);
        self.seen(generation).listed.insert(table.to_owned(), listed.clone());
        Ok(listed)
    }

    /// What is loaded of both tables, and how many of them there are.
    async fn listed(&self, table: &str) -> Result<Listed, HostError> {
        let (inet, bridge) = tokio::join!(list("inet", table), list("bridge", table));
        let (inet, bridge) = (inet?, bridge?);
        let is_there = inet.is_some() || bridge.is_some();
        let (mut tables, _) = parse(&inet.unwrap_or_default(), table)?;
        let (of_bridge, ports) = parse(&bridge.unwrap_or_default(), table)?;
        tables.extend(of_bridge);
        Ok(Listed { is_there, tables, ports })
    }
}

#[derive(Debug)]
struct Listed {
    is_there: bool,
    tables: Tables,
    ports: Vec<PortRule>,
}

impl Firewall for Nft {
    async fn inspect(&self, rules: &FirewallRules) -> Result<Option<FirewallSeen>, HostError> {
        check(&rules.table)?;
        let listed = self.listed_or_seen(&rules.table).await?;
        if !listed.is_there {
            return Ok(None);
        }
        let is_intact = listed.tables == self.expected(rules).await?;
        Ok(Some(FirewallSeen { is_intact, ports: listed.ports.clone() }))
    }

    async fn has_port(&self, table: &str, port: &PortRule) -> Result<bool, HostError> {
        check(table)?;
        let generation = generation().ok();
        let key = (table.to_owned(), port.clone());
        if generation.is_some_and(|generation| self.seen(generation).ports.contains(&key)) {
            return Ok(true);
        }
        let PortRule { tap, mac, address } = port;
        let element = format!("{{ \"{tap}\" . {mac} . {address} }}");
        match run("nft", &["-j", "get", "element", "bridge", table, nft_rules::PORTS, &element], None).await {
            Ok(_) => {
                if let Some(generation) = generation {
                    self.seen(generation).ports.insert(key);
                }
                Ok(true)
            }
            Err(failure) if failure.is_missing() => Ok(false),
            Err(failure) => Err(failure.into_error("inspect a port of table", table)),
        }
    }

    async fn replace(&self, rules: &FirewallRules) -> Result<(), HostError> {
        check(&rules.table)?;
        let _writing = self.0.writing.lock().await;
        let ports = self.listed(&rules.table).await?.ports;
        self.apply("load table", &rules.table, &nft_rules::replace(rules, &ports)).await
    }

    async fn add_port(&self, table: &str, port: &PortRule) -> Result<(), HostError> {
        check(table)?;
        let mut batch = Batch::new();
        batch.add(nft_rules::element(table, std::slice::from_ref(port)));
        let _writing = self.0.writing.lock().await;
        self.apply("add a port to table", table, &batch.to_nftables()).await
    }

    async fn remove_port(&self, table: &str, port: &PortRule) -> Result<(), HostError> {
        check(table)?;
        let mut batch = Batch::new();
        batch.delete(nft_rules::element(table, std::slice::from_ref(port)));
        {
            let _writing = self.0.writing.lock().await;
            match self.apply("remove a port from table", table, &batch.to_nftables()).await {
                Err(error) if error.kind == HostErrorKind::Missing => {}
                done => done?,
            }
        }
        // From here on nothing new is let in; what was is forgotten, so that the next guest of
        // this address does not get the answers meant for this one.
        forget_connections(port.address).await
    }

    async fn remove(&self, table: &str) -> Result<(), HostError> {
        check(table)?;
        let _writing = self.0.writing.lock().await;
        self.apply("remove table", table, &nft_rules::remove(table)).await
    }
}

/// A name that is a word of the language would be parsed as such.
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

/// `None` when there is no such table.
async fn list(family: &str, table: &str) -> Result<Option<String>, HostError> {
    match run("nft", &["-j", "list", "table", family, table], None).await {
        Ok(listed) => Ok(Some(listed)),
        Err(failure) if failure.is_missing() => Ok(None),
        Err(failure) => Err(failure.into_error("list table", table)),
    }
}

/// Takes listings apart: what must be equal, and the ports.
fn parse(listings: &str, table: &str) -> Result<(Tables, Vec<PortRule>), HostError> {
    let unreadable = |why: String| {
        HostError::new(HostErrorKind::Unsupported, "read the listing of table", table).because(why)
    };
    let (mut tables, mut ports) = (Tables::new(), Vec::new());
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
                ports.extend(elements.iter().filter_map(Value::as_array).flatten().filter_map(port_of));
            }
            let key = if kind == "rule" { chain } else { name };
            tables.entry((family, kind, key)).or_default().push(body);
        }
    }
    ports.sort();
    Ok((tables, ports))
}

/// An element of the set; one that is not of its form lets nobody send and is left out.
fn port_of(element: &Value) -> Option<PortRule> {
    // With a comment or a counter on it an element is wrapped.
    let element = element.get("elem").and_then(|elem| elem.get("val")).unwrap_or(element);
    let parts = element.get("concat")?.as_array()?;
    let [tap, mac, address] = parts.as_slice() else { return None };
    Some(PortRule {
        tap: tap.as_str()?.parse().ok()?,
        mac: mac.as_str()?.parse().ok()?,
        address: address.as_str()?.parse().ok()?,
    })
}

async fn forget_connections(address: Ipv4Addr) -> Result<(), HostError> {
    let address = address.to_string();
    let forget = async |side| match run("conntrack", &["-D", side, &address], None).await {
        Ok(_) => Ok(()),
        // Its way to say that there were none.
        Err(Failure::Said(said)) if said.contains("0 flow entries have been deleted") => Ok(()),
        Err(failure) => Err(failure.into_error("forget connections of", &address)),
    };
    // Each waits for the kernel more than it works.
    let (from, to) = tokio::join!(forget("--orig-src"), forget("--orig-dst"));
    from.and(to)
}

/// How a program failed.
enum Failure {
    Said(String),
    Io(&'static str, io::Error),
}

impl Failure {
    fn is_missing(&self) -> bool {
        matches!(self, Self::Said(said) if said.contains("No such file or directory"))
    }

    fn into_error(self, operation: &'static str, subject: &str) -> HostError {
        let error = |kind| HostError::new(kind, operation, subject);
        match self {
            Self::Io(program, cause) if cause.kind() == io::ErrorKind::NotFound => {
                error(HostErrorKind::Unsupported).because(format!("the program {program} is not installed"))
            }
            Self::Io(_, cause) => error(HostError::kind_of_io(&cause)).because(cause),
            Self::Said(said) => {
                let kind = if said.contains("No such file or directory") {
                    HostErrorKind::Missing
                } else if said.contains("Operation not permitted") {
                    HostErrorKind::Denied
                } else if said.contains("Operation not supported") {
                    HostErrorKind::Unsupported
                } else if said.contains("No space left") || said.contains("Cannot allocate") {
                    HostErrorKind::Exhausted
                } else {
                    HostErrorKind::Transient
                };
                error(kind).because(said)
            }
        }
    }
}

/// Runs a program to its end; dropping the future kills it.
async fn run(program: &'static str, arguments: &[&str], input: Option<String>) -> Result<String, Failure> {
    let failed = |error| Failure::Io(program, error);
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").kill_on_drop(true);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let write = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A program that ends early says why on its standard error.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let ((), output) = tokio::join!(write, child.wait_with_output());
    let output = output.map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [&output.stderr[..], &output.stdout[..]]
        .map(|bytes| String::from_utf8_lossy(bytes).trim().to_owned());
    Err(Failure::Said(said.join(" ").trim().to_owned()))
}
