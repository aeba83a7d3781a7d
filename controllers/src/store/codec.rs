//! The stored form of a value: schema version, checksum, payload.
//!
//! ```text
//! 0        1..5                      5..
//! version  crc32(key, payload) (LE)  payload: sealed for objects, plain otherwise
//! ```
//! Guarantees: a value that was moved to another key, cut, or changed in any bit is refused with its cause.
//! Objects are sealed with their key as associated data.
//! Never: guesses the content of a value that fails a check.

/// Version of the stored form. A reader refuses a version that it does not know.
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 5;

/// Authenticated encryption at rest. `aad` is the key of the value.
pub trait Sealer: Send + Sync + 'static {
    /// # Errors
    /// Returns an error if no randomness is available.
    fn seal(&self, plain: &[u8], aad: &[u8]) -> Result<Vec<u8>, SealError>;
    /// # Errors
    /// Returns an error if the bytes were not sealed with this key and `aad`.
    fn open(&self, sealed: &[u8], aad: &[u8]) -> Result<Vec<u8>, SealError>;
}

/// A failure to seal or open. The text describes how it failed and never contains the content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SealError(pub String);

/// The reason why a stored value cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Cause {
    #[error("the value is cut short")]
    Short,
    #[error("the checksum does not match")]
    Checksum,
    #[error("schema version {0} is not known")]
    Version(u8),
    #[error("the seal does not open: {0}")]
    Seal(SealError),
    #[error("the content does not parse: {0}")]
    Content(String),
}

fn checksum(key: &str, payload: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key.as_bytes());
    hasher.update(payload);
    hasher.finalize().to_le_bytes()
}

/// Frames a payload that needs no seal.
pub(super) fn frame(key: &str, payload: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEAD_BYTES + payload.len());
    value.push(VERSION);
    value.extend_from_slice(&checksum(key, payload));
    value.extend_from_slice(payload);
    value
}

/// Returns the payload of a framed value.
pub(super) fn unframe<'v>(key: &str, value: &'v [u8]) -> Result<&'v [u8], Cause> {
    let (head, payload) = value.split_at_checked(HEAD_BYTES).ok_or(Cause::Short)?;
    if head[1..] != checksum(key, payload) {
        return Err(Cause::Checksum);
    }
    if head[0] == VERSION { Ok(payload) } else { Err(Cause::Version(head[0])) }
}

/// Seals and frames an object's content.
pub(super) fn seal(sealer: &dyn Sealer, key: &str, plain: &[u8]) -> Result<Vec<u8>, SealError> {
    Ok(frame(key, &sealer.seal(plain, key.as_bytes())?))
}

/// Returns the content of a value made by [`seal`].
pub(super) fn unseal(sealer: &dyn Sealer, key: &str, value: &[u8]) -> Result<Vec<u8>, Cause> {
    sealer.open(unframe(key, value)?, key.as_bytes()).map_err(Cause::Seal)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_unknown_version_is_named_not_guessed_at() {
        let mut value = frame("k", b"x");
        value[0] = 9;
        assert_eq!(unframe("k", &value), Err(Cause::Version(9)));
        assert_eq!(unframe("k", &[]), Err(Cause::Short));
    }

    proptest! {
        #[test]
        fn any_changed_bit_any_cut_and_any_other_key_is_refused(
            payload in proptest::collection::vec(any::<u8>(), 0..200),
            at in any::<proptest::sample::Index>(),
            bit in 0u8..8,
        ) {
            let value = frame("o/x/1", &payload);
            prop_assert_eq!(unframe("o/x/1", &value), Ok(payload.as_slice()));
            prop_assert!(unframe("o/x/2", &value).is_err());
            let at = at.index(value.len());
            prop_assert!(unframe("o/x/1", &value[..at]).is_err());
            let mut changed = value.clone();
            changed[at] ^= 1 << bit;
            prop_assert!(unframe("o/x/1", &changed).is_err());
        }
    }
}
