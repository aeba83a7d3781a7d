//! Placeholders: the worthless words that a guest has instead of its credentials.

/// The beginning of every placeholder.
const PREFIX: &str = "mock-";

/// Returns the placeholder of a credential.
#[must_use]
pub fn placeholder(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// Returns those of the credentials whose placeholders a text contains, as whole words.
pub fn placeholders_in<'a>(
    text: &'a [u8],
    names: impl Iterator<Item = &'a str> + 'a,
) -> impl Iterator<Item = &'a str> + 'a {
    let has_any = contains(text, PREFIX.as_bytes(), |_| true);
    // Most texts contain no placeholder at all and are searched once.
    names
        .filter(move |name| has_any && contains(text, placeholder(name).as_bytes(), |next| !is_of_name(next)))
}

/// Returns `true` for a byte that continues the name of a credential.
fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Returns `true` if the text contains the word and `is_end` accepts the byte after it, if any.
fn contains(text: &[u8], word: &[u8], is_end: impl Fn(u8) -> bool) -> bool {
    text.windows(word.len())
        .enumerate()
        .any(|(at, window)| window == word && text.get(at + word.len()).is_none_or(|next| is_end(*next)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placeholder_is_found_as_a_whole_word() {
        let found = |text: &str| {
            let names = ["KEY", "KEY_2", "OTHER"];
            placeholders_in(text.as_bytes(), names.into_iter()).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(found("Bearer mock-KEY"), ["KEY"]);
        assert_eq!(found("/v1?key=mock-KEY&b=mock-OTHER"), ["KEY", "OTHER"]);
        assert_eq!(found("mock-KEY_2"), ["KEY_2"]);
        assert_eq!(found("mock-KEY_2 mock-KEY"), ["KEY", "KEY_2"]);
        assert!(found("mock-KEYS mock- MOCK-KEY").is_empty());
        assert!(found("").is_empty());
    }
}
