//! The token of one VM's control channel, and its change when the guest takes another identity.
//!
//! Guarantees: a new token is recorded before it is sent to the guest. Until the guest has used it, both
//! tokens are accepted, by a later daemon too; from then on the old one is refused.
//! Cancel/crash: a daemon that finds a new token in the record sends that same one again, because the
//! guest may be about to take it.

use std::fs;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::guest::Token;
use tracing::warn;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 16;

/// The token that a guest was given, or is about to be given, with the incarnation that it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NewToken {
    token: Token,
    incarnation: String,
}

/// The tokens of a guest as they are recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    /// The token that the guest used last.
    pub(crate) token: Token,
    /// The token that was sent to the guest and not used by it yet.
    pub(crate) new: Option<NewToken>,
}

/// Writes tokens to the record of the VM; an error when there is no record.
pub(crate) type SaveTokens = Box<dyn Fn(&Known) -> Result<(), HostError> + Send + Sync>;

/// The tokens that messages of one guest are checked against.
pub(crate) struct Tokens {
    /// The instance, for error messages.
    name: String,
    known: Mutex<Known>,
    save: SaveTokens,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Tokens {
    pub(crate) fn new(name: String, known: Known, save: SaveTokens) -> Self {
        Self { name, known: Mutex::new(known), save }
    }

    /// Returns the token that the guest used last.
    pub(crate) fn current(&self) -> Token {
        self.lock().token.clone()
    }

    /// Returns the token that the guest should take with this incarnation. It is recorded by then.
    pub(crate) fn begin(&self, incarnation: &str) -> Result<Token, HostError> {
        let mut known = self.lock();
        let token = match &known.new {
            // It may have been sent already, and the guest may be about to use it.
            Some(sent) => sent.token.clone(),
            None => new_token().map_err(|error| self.failed().because(error))?,
        };
        let new = NewToken { token: token.clone(), incarnation: incarnation.to_owned() };
        let next = Known { new: Some(new), ..known.clone() };
        (self.save)(&next)?;
        *known = next;
        Ok(token)
    }

    /// Returns whether a message with this token is accepted. A guest that uses its new token has taken it.
    pub(crate) fn accept(&self, token: &Token, incarnation: Option<&str>) -> bool {
        let mut known = self.lock();
        let Some(new) = &known.new else { return *token == known.token };
        let has_new_identity = incarnation == Some(new.incarnation.as_str());
        if *token != new.token && (*token != known.token || !has_new_identity) {
            return *token == known.token;
        }
        // A guest that took the identity and kept its token was saved before there were new tokens.
        let settled = Known { token: token.clone(), new: None };
        if let Err(error) = (self.save)(&settled) {
            // Both tokens are still accepted; the next message of the guest tries again.
            warn!(%error, "the new token of a guest was not recorded");
            return true;
        }
        *known = settled;
        true
    }

    fn failed(&self) -> HostError {
        HostError::new(HostErrorKind::Transient, "make a token for", self.name.as_str())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a token that nothing else can guess.
pub(crate) fn new_token() -> io::Result<Token> {
    Ok(Token(hex::encode(random::<TOKEN_BYTES>()?)))
}

/// Reads random bytes from the kernel.
pub(crate) fn random<const LENGTH: usize>() -> io::Result<[u8; LENGTH]> {
    let mut bytes = [0u8; LENGTH];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;

    const OLD: &str = "old";
    const LIFE: &str = "life";

    /// The record of a VM, which outlives a daemon; `None` when it is gone.
    #[derive(Clone)]
    pub(in super::super) struct Recorded(Arc<Mutex<Option<Known>>>);

    impl Recorded {
        pub(in super::super) fn new(token: Token) -> Self {
            Self(Arc::new(Mutex::new(Some(Known { token, new: None }))))
        }

        /// Makes the tokens as a daemon has them that starts now.
        pub(in super::super) fn tokens(&self) -> Tokens {
            let (record, known) = (self.0.clone(), self.0.lock().expect("whole").clone().expect("there"));
            let save = move |known: &Known| {
                let mut record = record.lock().expect("whole");
                let missing = || HostError::new(HostErrorKind::Missing, "record a token in", "the record");
                *record.as_mut().ok_or_else(missing)? = known.clone();
                Ok(())
            };
            Tokens::new("an instance".to_owned(), known, Box::new(save))
        }
    }

    fn old() -> Token {
        Token(OLD.to_owned())
    }

    #[test]
    fn both_tokens_are_accepted_until_the_guest_uses_the_new_one_and_only_that_afterwards() {
        let record = Recorded::new(old());
        let first = record.tokens();
        let new = first.begin(LIFE).expect("recorded");
        assert_ne!(new, old());
        assert!(first.accept(&old(), None) && first.accept(&old(), Some("another life")));
        assert_eq!(first.current(), old(), "the guest does not know the new one yet");
        // A daemon that died before or after it sent the token: the next one sends the same.
        let second = record.tokens();
        assert!(second.accept(&old(), None));
        assert_eq!(second.begin(LIFE).expect("recorded"), new);
        assert!(!second.accept(&Token("unknown".to_owned()), Some(LIFE)));
        assert!(second.accept(&new, Some(LIFE)));
        for daemon in [second, record.tokens()] {
            assert_eq!(daemon.current(), new);
            assert!(daemon.accept(&new, Some(LIFE)) && daemon.accept(&new, None));
            assert!(!daemon.accept(&old(), Some(LIFE)) && !daemon.accept(&old(), None));
        }
    }

    #[test]
    fn a_guest_older_than_new_tokens_keeps_its_own() {
        let record = Recorded::new(old());
        let tokens = record.tokens();
        let new = tokens.begin(LIFE).expect("recorded");
        assert!(tokens.accept(&old(), Some(LIFE)));
        assert!(!tokens.accept(&new, Some(LIFE)));
        assert_eq!(record.tokens().current(), old());
    }

    #[test]
    fn without_a_record_no_token_is_made() {
        let record = Recorded::new(old());
        let tokens = record.tokens();
        *record.0.lock().expect("whole") = None;
        assert!(tokens.begin(LIFE).is_err());
        assert!(tokens.accept(&old(), None));
    }
}
