//! The rules that are served at one port, and the choice of the rule for a host name.
//!
//! Guarantees: a literal name has priority over every pattern. Of two patterns the more specific one has
//! priority, compared from the left. The order in which rules were added does not matter.

use std::collections::BTreeMap;
use std::sync::Arc;

use stead_schemas::ingress::{Hostname, IngressRule, TargetName};
use stead_schemas::names::Uid;

/// The rules of one port, by owner and by name.
#[derive(Debug, Default)]
pub struct Routes {
    owners: BTreeMap<Uid, Vec<Arc<IngressRule>>>,
    literals: BTreeMap<String, Route>,
    /// The patterns, in the order of their priority.
    patterns: BTreeMap<Hostname, Route>,
}

#[derive(Debug, Clone)]
struct Route {
    owner: Uid,
    rule: Arc<IngressRule>,
}

/// The rule and the instance for a host name.
#[derive(Debug, Clone)]
pub struct Found {
    pub owner: Uid,
    pub rule: Arc<IngressRule>,
    /// The id or name of the instance. It comes from the request if the rule has a capture for it.
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

    /// Returns the rules of an owner, or `None` if it has none here.
    #[must_use]
    pub fn of(&self, owner: &Uid) -> Option<Vec<IngressRule>> {
        let rules = self.owners.get(owner)?;
        Some(rules.iter().map(|rule| IngressRule::clone(rule)).collect())
    }

    /// Replaces the rules of an owner with these.
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

    /// Returns the rule and instance for a host, in the form that `stead_schemas::ingress::host` returns.
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
            // Admission checked that the capture exists.
            TargetName::Capture(name) => captured.iter().find(|(one, _)| one == name)?.1.to_owned(),
        };
        Some(Found { owner: owner.clone(), rule: rule.clone(), instance })
    }
}
