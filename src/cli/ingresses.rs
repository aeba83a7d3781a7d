//! Verbs on ingresses.

use std::collections::BTreeMap;

use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{Ingress, IngressRule};
use stead_schemas::condition;

use super::arguments::{for_each, pair};
use super::client::Client;
use super::show::{age, line, print};
use super::{Failure, Output};

#[derive(Debug, Subcommand)]
pub(crate) enum IngressVerb {
    /// Lead host names at ports of the server to ports of instances.
    Create {
        name: String,
        /// HOSTNAME[:PORT]=INSTANCE:PORT; a label of the host name may be a capture, such as {app}, which
        /// may also be the instance. The first port is 80 by default.
        #[arg(long = "rule", required = true, value_parser = rule)]
        rules: Vec<Value>,
        /// Header that every request must have; its value is in STEAD_INGRESS_SECRET.
        #[arg(long, requires = "auth_value")]
        auth_header: Option<String>,
        /// The value of the header; it is not given on the command line, which others can read.
        #[arg(long, hide = true, env = "STEAD_INGRESS_SECRET", hide_env_values = true)]
        auth_value: Option<String>,
        /// A tag, as KEY=VALUE.
        #[arg(short = 'l', long = "tag", value_parser = pair)]
        tags: Vec<(String, String)>,
    },
    /// List ingresses.
    #[command(visible_alias = "ls")]
    List,
    /// Print an ingress.
    Get { name: String },
    /// Delete ingresses.
    #[command(visible_alias = "rm")]
    Delete {
        #[arg(required = true)]
        names: Vec<String>,
    },
}

fn rule(text: &str) -> Result<Value, String> {
    const FORM: &str = "must be HOSTNAME[:PORT]=INSTANCE:PORT";
    let (from, to) = text.split_once('=').ok_or(FORM)?;
    let port = |text: &str| text.parse::<u16>().map_err(|_| FORM);
    let matched = match from.split_once(':') {
        Some((hostname, at)) => json!({ "hostname": hostname, "port": port(at)? }),
        None => json!({ "hostname": from }),
    };
    let (instance, at) = to.rsplit_once(':').ok_or(FORM)?;
    Ok(json!({ "match": matched, "target": { "instance": instance, "port": port(at)? } }))
}

pub(super) async fn ingress(client: &Client, verb: IngressVerb, output: Output) -> Result<(), Failure> {
    match verb {
        IngressVerb::Create { name, mut rules, auth_header, auth_value, tags } => {
            if let (Some(header), Some(value)) = (auth_header, auth_value) {
                for rule in &mut rules {
                    rule["request_header_auth"] = json!({ "header": header, "value": value });
                }
            }
            let tags: BTreeMap<_, _> = tags.into_iter().collect();
            let body = json!({ "name": name, "rules": rules, "tags": tags });
            let ingress: Ingress = client.post(&["ingresses"], &body).await?;
            show_all(&[ingress], output)
        }
        IngressVerb::List => {
            let ingresses: Vec<Ingress> = client.get(&["ingresses"]).await?;
            show_all(&ingresses, output)
        }
        IngressVerb::Get { name } => {
            let ingress: Ingress = client.get(&["ingresses", &name]).await?;
            show_all(&[ingress], output)
        }
        IngressVerb::Delete { names } => {
            for_each(&names, async |name| {
                client.send(client.request(Method::DELETE, &["ingresses", name])).await?;
                line(name);
                Ok(())
            })
            .await
        }
    }
}

fn show_all(ingresses: &[Ingress], output: Output) -> Result<(), Failure> {
    print(&ingresses, output, &["ID", "NAME", "RULES", "READY", "AGE"], || {
        let rows = |ingress: &Ingress| {
            // Each rule is a row: cells have no line breaks.
            let rules = ingress.rules.iter().map(summary);
            let mut rows: Vec<[String; 5]> = rules
                .map(|rule| [String::new(), String::new(), rule, String::new(), String::new()])
                .collect();
            if let Some([id, name, _, is_ready, since]) = rows.first_mut() {
                (*id, *name) = (ingress.id.clone(), ingress.name.clone());
                (*is_ready, *since) = (ready(ingress), age(ingress.created_at));
            }
            rows.into_iter().map(Vec::from)
        };
        ingresses.iter().flat_map(rows).collect()
    })
}

fn summary(rule: &IngressRule) -> String {
    let (matched, target) = (&rule.matched, &rule.target);
    let lock = if rule.request_header_auth.is_some() { " (with a header)" } else { "" };
    format!("{}:{} -> {}:{}{lock}", matched.hostname, matched.port, target.instance, target.port)
}

fn ready(ingress: &Ingress) -> String {
    if condition::is_ready(&ingress.conditions) {
        return "yes".to_owned();
    }
    let ready = condition::find(&ingress.conditions, condition::ConditionType::Ready);
    let why = ready.map(|ready| {
        if ready.message.is_empty() { format!("{:?}", ready.reason) } else { ready.message.clone() }
    });
    why.map_or_else(|| "not yet".to_owned(), |why| format!("no: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_read_with_and_without_the_ports_default() {
        let read = |text: &str| rule(text).ok();
        let target = json!({ "instance": "{app}", "port": 8080 });
        let plain = json!({ "match": { "hostname": "{app}.test" }, "target": target });
        assert_eq!(read("{app}.test={app}:8080"), Some(plain));
        let at = json!({ "match": { "hostname": "{app}.test", "port": 81 }, "target": target });
        assert_eq!(read("{app}.test:81={app}:8080"), Some(at));
        for text in ["", "a.test", "a.test=web", "a.test:x=web:80", "a.test=web:70000"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
