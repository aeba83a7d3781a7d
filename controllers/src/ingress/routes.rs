//! The rules that are served at one port, and which of them a host name means.
//!
//! Guarantees: a literal name goes before every pattern, and of two patterns the one that says more,
//! read from the left; which was there first does not matter.

use std::collections::BTreeMap;
use std::sync::Arc;

use stead_schemas::ingress::{Hostname, IngressRule, TargetName};
use stead_schemas::names::Uid;

/// The rules of one port, by owner and by name.
#[derive(Debug, Default)]
pub struct Routes {
    owners: BTreeMap<Uid, Vec<Arc<IngressRule>>>,
    literals: BTreeMap<String, Route>,
    /// In the order in which they count.
    patterns: BTreeMap<Hostname, Route>,
}

#[derive(Debug, Clone)]
struct Route {
    owner: Uid,
    rule: Arc<IngressRule>,
}

/// Where a host name leads.
#[derive(Debug, Clone)]
pub struct Found {
    pub owner: Uid,
    pub rule: Arc<IngressRule>,
    /// The instance by id or name; from the request, where the rule has a capture for it.
    pub instance: String,
}

impl Routes {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    pub fn owners(&self) -> impl Iterator<Item = &Uid> {
        self.owners.keys()
    }

    /// The rules of an owner; `None` when it has none here.
    #[must_use]
    pub fn of(&self, owner: &Uid) -> Option<Vec<IngressRule>> {
        let rules = self.owners.get(owner)?;
        Some(rules.iter().map(|rule| IngressRule::clone(rule)).collect())
    }

    /// Puts these rules of an owner in place of those it had.
    pub fn set(&mut self, owner: &Uid, rules: &[IngressRule]) {
        self.remove(owner);
        let rules: Vec<Arc<IngressRule>> = rules.iter().cloned().map(Arc::new).collect();
        for rule in &rules {
            let route = Route { owner: owner.clone(), rule: rule.clone() };
            if rule.hostname.is_literal() {
                self.literals.insert(rule.hostname.to_string(), route);
            } else {
                self.patterns.insert(rule.hostname.clone(), route);
            }
        }
        self.owners.insert(owner.clone(), rules);
    }

    pub fn remove(&mut self, owner: &Uid) {
        for rule in self.owners.remove(owner).unwrap_or_default() {
            if self.literals.get(&rule.hostname.to_string()).is_some_and(|route| route.owner == *owner) {
                self.literals.remove(&rule.hostname.to_string());
            }
            if self.patterns.get(&rule.hostname).is_some_and(|route| route.owner == *owner) {
                self.patterns.remove(&rule.hostname);
            }
        }
    }

    /// Where a host (of `stead_schemas::ingress::host`) leads.
    #[must_use]
    pub fn find(&self, host: &str) -> Option<Found> {
        if let Some(Route { owner, rule }) = self.literals.get(host) {
            return Self::found(owner, rule, &[]);
        }
        self.patterns.iter().find_map(|(hostname, Route { owner, rule })| {
            let captured = hostname.matched(host)?;
            Self::found(owner, rule, &captured)
        })
    }

    fn found(owner: &Uid, rule: &Arc<IngressRule>, captured: &[(&str, &str)]) -> Option<Found> {
        let instance = match &rule.target.instance {
            TargetName::Instance(name) => name.to_string(),
            // That there is one was checked with the request.
            TargetName::Capture(name) => captured.iter().find(|(one, _)| one == name)?.1.to_owned(),
        };
        Some(Found { owner: owner.clone(), rule: rule.clone(), instance })
    }
}
