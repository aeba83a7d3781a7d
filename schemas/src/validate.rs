//! Validation: collects all problems of an input at once, each with the path of its field.

use std::fmt;

use crate::limits;
use crate::meta::Tags;

/// A problem: the field's path in the request (`network.egress.enabled`, `volumes[2].mount_path`), the
/// wire's error code for it, and a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    pub path: String,
    pub code: &'static str,
    pub message: String,
}

/// The problems of one input; never empty when returned as an error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldErrors(Vec<FieldError>);

impl FieldErrors {
    pub fn push(&mut self, path: impl Into<String>, code: &'static str, message: impl fmt::Display) {
        self.0.push(FieldError { path: path.into(), code, message: message.to_string() });
    }

    /// Returns the value of a parse, or notes its error under `path`.
    pub fn take<T, E: fmt::Display>(
        &mut self,
        path: &str,
        code: &'static str,
        parsed: Result<T, E>,
    ) -> Option<T> {
        parsed.map_err(|error| self.push(path, code, error)).ok()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &FieldError> {
        self.0.iter()
    }

    /// Returns `Ok` when nothing was noted.
    ///
    /// # Errors
    /// Returns itself when at least one problem was noted.
    pub fn into_result(self) -> Result<(), Self> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for FieldErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{} {}", error.path, error.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for FieldErrors {}

/// Checks tags against the wire's bounds.
pub fn tags(errors: &mut FieldErrors, path: &str, tags: &Tags) {
    tags_of(errors, path, "invalid_request", tags);
}

/// Checks tags against the wire's bounds; the problems carry `code`.
pub fn tags_of(errors: &mut FieldErrors, path: &str, code: &'static str, tags: &Tags) {
    let allowed = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b" _.:/=+@-".contains(&b));
    if tags.len() > limits::TAGS_MAX {
        errors.push(
            path,
            code,
            format!("has {} entries; at most {} are allowed", tags.len(), limits::TAGS_MAX),
        );
    }
    for (key, value) in tags.iter().take(limits::TAGS_MAX + 1) {
        let at = format!("{path}[{}]", printable(key, 64));
        if key.is_empty() || key.len() > limits::TAG_KEY_BYTES_MAX || !allowed(key) {
            errors.push(&at, code, "has a key that is not 1 to 128 of letters, digits, space and _.:/=+@-");
        }
        if value.len() > limits::TAG_VALUE_BYTES_MAX || !allowed(value) {
            errors.push(
                &at,
                code,
                "has a value that is not at most 256 of letters, digits, space and _.:/=+@-",
            );
        }
    }
}

/// Makes text from an untrusted source suitable for a message: control characters are replaced, and the
/// length is cut.
#[must_use]
pub fn printable(text: &str, chars_max: usize) -> String {
    let mut out: String =
        text.chars().take(chars_max).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(chars_max).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_checked_at_the_limit_and_one_beyond() {
        let many = |count: usize| (0..count).map(|n| (format!("k{n}"), String::new())).collect::<Tags>();
        let problems = |given: &Tags| {
            let mut errors = FieldErrors::default();
            tags(&mut errors, "tags", given);
            errors.iter().count()
        };
        assert_eq!(problems(&many(limits::TAGS_MAX)), 0);
        assert_eq!(problems(&many(limits::TAGS_MAX + 1)), 1);
        assert_eq!(problems(&Tags::from([("k".repeat(128), "v".repeat(256))])), 0);
        assert_eq!(problems(&Tags::from([("k".repeat(129), "v".repeat(257))])), 2);
        assert_eq!(problems(&Tags::from([("a\nb".to_owned(), "\u{0}".to_owned())])), 2);
    }

    #[test]
    fn printable_bounds_and_cleans() {
        assert_eq!(printable("a\x1b[31mb", 10), "a\u{fffd}[31mb");
        assert_eq!(printable("abcdef", 3), "abc…");
    }
}
