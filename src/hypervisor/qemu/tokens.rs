//! The token of one VM's control channel, and its change when the guest becomes another.
//!
//! Guarantees: a new token is on record before the guest is told of it; until the guest has said it,
//! both are believed, by a later daemon too; from then on the old one is refused.
//! Cancel/crash: a daemon that finds a new token on record asks with that one again, since the guest
//! may be about to take it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::guest::Token;
use tracing::warn;

use super::new_token;
use super::places::{Places, Record};

/// The token that a guest was given, or is about to be, with the life that it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NewToken {
    token: Token,
    incarnation: String,
}

/// What a guest's word is believed by.
#[derive(Debug)]
pub(super) struct Tokens {
    places: Places,
    known: Mutex<Known>,
}

#[derive(Debug, Clone)]
struct Known {
    token: Token,
    new: Option<NewToken>,
}

impl Tokens {
    pub(super) fn new(places: Places, record: &Record) -> Self {
        let known = Known { token: record.token.clone(), new: record.new_token.clone() };
        Self { places, known: Mutex::new(known) }
    }

    /// The one that the guest said last.
    pub(super) fn current(&self) -> Token {
        self.lock().token.clone()
    }

    /// The one for the guest to take when it becomes this life: on record when this answers.
    pub(super) fn begin(&self, incarnation: &str) -> Result<Token, HostError> {
        let mut known = self.lock();
        let token = match &known.new {
            // It may have been told already, and be about to say it.
            Some(told) => told.token.clone(),
            None => new_token().map_err(|error| self.failed().because(error))?,
        };
        let new = NewToken { token: token.clone(), incarnation: incarnation.to_owned() };
        let next = Known { new: Some(new), ..known.clone() };
        self.record(&next)?;
        *known = next;
        Ok(token)
    }

    /// Whether what carries this token is believed. A guest that says its new one has taken it.
    pub(super) fn hear(&self, token: &Token, incarnation: Option<&str>) -> bool {
        let mut known = self.lock();
        let Some(new) = &known.new else { return *token == known.token };
        let is_of_new_life = incarnation == Some(new.incarnation.as_str());
        if *token != new.token && (*token != known.token || !is_of_new_life) {
            return *token == known.token;
        }
        // One that became another and kept its token was saved before there were new ones.
        let settled = Known { token: token.clone(), new: None };
        if let Err(error) = self.record(&settled) {
            // Both stay believed; its next word settles it.
            warn!(%error, "the new token of a guest was not recorded");
            return true;
        }
        *known = settled;
        true
    }

    fn record(&self, known: &Known) -> Result<(), HostError> {
        let missing = || HostError::new(HostErrorKind::Missing, "record a token in", self.name());
        let mut record = Record::read(&self.places)?.ok_or_else(missing)?;
        (record.token, record.new_token) = (known.token.clone(), known.new.clone());
        record.write(&self.places)
    }

    fn failed(&self) -> HostError {
        HostError::new(HostErrorKind::Transient, "make a token for", self.name())
    }

    fn name(&self) -> String {
        self.places.record().display().to_string()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "old";
    const LIFE: &str = "life";

    struct Host {
        places: Places,
        _dir: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("scratch");
            let uid = format!("t{:023}", 0).parse().expect("valid");
            let places = Places::new(dir.path(), dir.path(), &uid);
            Record { token: Token(OLD.to_owned()), ..Record::never_was() }.write(&places).expect("written");
            Self { places, _dir: dir }
        }

        /// As a daemon has it that starts now.
        fn tokens(&self) -> Tokens {
            Tokens::new(self.places.clone(), &Record::read(&self.places).expect("read").expect("there"))
        }
    }

    fn old() -> Token {
        Token(OLD.to_owned())
    }

    #[test]
    fn both_are_believed_until_the_guest_says_the_new_one_and_only_that_afterwards() {
        let host = Host::new();
        let first = host.tokens();
        let new = first.begin(LIFE).expect("recorded");
        assert_ne!(new, old());
        assert!(first.hear(&old(), None) && first.hear(&old(), Some("another life")));
        assert_eq!(first.current(), old(), "the guest does not know the new one yet");
        // A daemon that died before or after it asked: the next one asks with the same.
        let second = host.tokens();
        assert!(second.hear(&old(), None));
        assert_eq!(second.begin(LIFE).expect("recorded"), new);
        assert!(!second.hear(&Token("of nobody".to_owned()), Some(LIFE)));
        assert!(second.hear(&new, Some(LIFE)));
        for daemon in [second, host.tokens()] {
            assert_eq!(daemon.current(), new);
            assert!(daemon.hear(&new, Some(LIFE)) && daemon.hear(&new, None));
            assert!(!daemon.hear(&old(), Some(LIFE)) && !daemon.hear(&old(), None));
        }
    }

    #[test]
    fn a_guest_of_before_there_were_new_tokens_keeps_its_own() {
        let host = Host::new();
        let tokens = host.tokens();
        let new = tokens.begin(LIFE).expect("recorded");
        assert!(tokens.hear(&old(), Some(LIFE)));
        assert!(!tokens.hear(&new, Some(LIFE)));
        assert_eq!(host.tokens().current(), old());
    }

    #[test]
    fn without_a_record_no_token_is_made_and_no_directory() {
        let host = Host::new();
        let tokens = host.tokens();
        std::fs::remove_dir_all(host.places.runtime()).expect("removed");
        assert!(tokens.begin(LIFE).is_err());
        assert!(!host.places.runtime().exists());
        assert!(tokens.hear(&old(), None));
    }
}
