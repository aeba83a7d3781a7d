//! Rules for the ports of a host: few verbs, which are primitive, and a simulation of each.

use super::{Source, code, none, sources};

/// Limit on the verbs of a port. A port with more holds more than one subject.
const VERBS_MAX: usize = 8;
/// Functions of ports that are no verbs: they return a constant and request nothing from the host.
const DECLARATIONS: [&str; 1] = ["capabilities"];

/// A port and the names of its functions.
#[derive(Debug, PartialEq, Eq)]
struct Nic {
    name: String,
    functions: Vec<String>,
}

/// Lists the ports: the public traits of a file below `controllers/src/host`.
fn ports_of(text: &str) -> Vec<Nic> {
    let mut ports: Vec<Nic> = Vec::new();
    let mut is_inside = false;
    for (_, line) in code(text) {
        if let Some(rest) = line.strip_prefix("pub trait ") {
            let name = rest.split([':', ' ', '<']).next().unwrap_or_default().to_owned();
            ports.push(Nic { name, functions: Vec::new() });
            is_inside = true;
        } else if line.starts_with('}') {
            is_inside = false;
        } else if let Some(port) = ports.last_mut().filter(|_| is_inside) {
            let function = line.strip_prefix("    fn ").or_else(|| line.strip_prefix("    async fn "));
            let name = function.and_then(|rest| rest.split(['(', '<']).next());
            port.functions.extend(name.map(ToOwned::to_owned));
        }
    }
    ports
}

/// Lists all ports with the paths of their files. `Host` is no port: it has one of each.
fn ports(all: &[Source]) -> Vec<(&str, Nic)> {
    let files = all.iter().filter(|file| file.path.starts_with("controllers/src/host/"));
    let ports: Vec<_> = files
        .flat_map(|file| ports_of(&file.text).into_iter().map(|port| (file.path.as_str(), port)))
        .filter(|(_, port)| port.name != "Host")
        .collect();
    assert!(ports.len() >= 10, "{ports:?}");
    ports
}

fn verbs(port: &Nic) -> usize {
    port.functions.iter().filter(|name| !DECLARATIONS.contains(&name.as_str())).count()
}

#[test]
fn a_port_has_few_verbs() {
    let all = sources();
    let found = ports(&all);
    assert!(found.iter().all(|(_, port)| verbs(port) > 0), "a port without a verb: {found:?}");
    let is_large = |(_, port): &(&str, Nic)| verbs(port) > VERBS_MAX;
    let describe = |(path, port): (&str, Nic)| {
        format!("{path}: {} has {} verbs; {VERBS_MAX} are allowed", port.name, verbs(&port))
    };
    none(found.into_iter().filter(is_large).map(describe).collect());
}

#[test]
fn each_function_of_a_port_is_counted() {
    let text = "pub trait Doors: Send {\n    /// Has a comment with fn a().\n    fn open(&self);\n    fn close<T>(\n        \
                &self,\n    ) -> T;\n    fn capabilities(&self) -> u8;\n}\n\nfn free() {}\n";
    let found = ports_of(text);
    assert_eq!(found[0].functions, ["open", "close", "capabilities"]);
    assert_eq!((found.len(), verbs(&found[0])), (1, 2));
}

#[test]
fn every_port_has_a_simulation() {
    let all = sources();
    let is_simulated = |port: &Nic| {
        let implementation = format!("impl {} for World", port.name);
        all.iter().any(|file| file.path.contains("/sim/") && file.text.contains(&implementation))
    };
    let found = ports(&all).into_iter().filter(|(_, port)| !is_simulated(port));
    none(found.map(|(path, port)| format!("{path}: {}", port.name)).collect());
}

#[test]
fn ports_have_primitive_verbs() {
    let findings = sources()
        .into_iter()
        .filter(|file| file.path.starts_with("controllers/src/host/"))
        .flat_map(|file| {
            code(&file.text)
                .filter(|(_, line)| line.contains(concat!("fn ens", "ure_")))
                .map(|(number, _)| format!("{}:{number}", file.path))
                .collect::<Vec<_>>()
        });
    none(findings.collect());
}
