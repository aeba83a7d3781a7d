//! Arguments that several verbs have: pairs, and lists of names.

use super::Failure;
use super::show::shown;

/// Reads KEY=VALUE.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "must be KEY=VALUE".to_owned())
}

/// Calls `one` for each name, even after a failure; returns the last failure.
pub(super) async fn for_each(
    names: &[String],
    mut one: impl AsyncFnMut(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut last = Ok(());
    for name in names {
        let done = one(name).await;
        if done.is_err()
            && let Err(before) = std::mem::replace(&mut last, done)
        {
            // The last failure is reported by the caller.
            eprintln!("stead: {}", shown(before.text()));
        }
    }
    last
}
