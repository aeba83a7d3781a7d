//! Masks for the values of credentials in what servers answer.
//!
//! A server that reflects a request's head would otherwise give the value to the guest. Heads only are
//! searched: a host that gets a credential can hand it back in a body.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use stead_schemas::egress::{Policy, placeholder};
use stead_schemas::instance::Secret;
use stead_schemas::limits::EGRESS_MASKED_BYTES_MIN;

/// The forms of the values that are searched for, each with the placeholder that replaces it.
#[derive(Debug)]
pub(crate) struct Mask(Vec<(Secret, String)>);

impl Mask {
    /// Creates the mask of all credentials of a policy.
    pub(crate) fn new(policy: &Policy) -> Self {
        let values = policy.credentials.iter();
        let values = values.filter(|(_, credential)| credential.value.0.len() >= EGRESS_MASKED_BYTES_MIN);
        let forms = values.flat_map(|(name, credential)| {
            let word = placeholder(name);
            forms(&credential.value).into_iter().map(move |form| (form, word.clone()))
        });
        let mut forms: Vec<_> = forms.collect();
        // A value that contains another is replaced first.
        forms.sort_by_key(|(form, _)| std::cmp::Reverse(form.0.len()));
        Self(forms)
    }

    /// Replaces the values in the fields of a head, and removes fields whose names contain one.
    pub(crate) fn apply(&self, fields: &mut HeaderMap) {
        let has_value = |name: &HeaderName| {
            self.0.iter().any(|(form, _)| name.as_str().contains(&form.0.to_ascii_lowercase()))
        };
        let named: Vec<HeaderName> = fields.keys().filter(|name| has_value(name)).cloned().collect();
        for name in named {
            fields.remove(name);
        }
        for value in fields.values_mut() {
            if let Some(masked) = self.masked(value.as_bytes()) {
                *value = HeaderValue::from_bytes(&masked).unwrap_or(HeaderValue::from_static(""));
            }
        }
    }

    /// Returns a text with its values replaced, or `None` when it has none.
    fn masked(&self, text: &[u8]) -> Option<Vec<u8>> {
        let mut out: Option<Vec<u8>> = None;
        for (form, word) in &self.0 {
            let current = out.as_deref().unwrap_or(text);
            if find(current, form.0.as_bytes()).is_some() {
                out = Some(replaced(current, form.0.as_bytes(), word.as_bytes()));
            }
        }
        out
    }
}

/// Returns the value itself, and the parts of its base64 form that do not depend on the text around it, for
/// each of the three alignments.
fn forms(value: &Secret) -> Vec<Secret> {
    let mut forms = vec![value.clone()];
    for before in 0..3 {
        let padded = Secret(format!("{}{}", "\0".repeat(before), value.0));
        let encoded = Secret(STANDARD_NO_PAD.encode(&padded.0));
        // Characters that also depend on the bytes before and after the value.
        let start = (before * 8).div_ceil(6);
        let end = padded.0.len() * 8 / 6;
        if let Some(part) = encoded.0.get(start..end).filter(|part| part.len() >= EGRESS_MASKED_BYTES_MIN) {
            forms.push(Secret(part.to_owned()));
        }
    }
    forms
}

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

fn replaced(mut text: &[u8], word: &[u8], with: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    while let Some(at) = find(text, word) {
        out.extend_from_slice(&text[..at]);
        out.extend_from_slice(with);
        text = &text[at + word.len()..];
    }
    out.extend_from_slice(text);
    out
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::*;

    fn mask(value: &str) -> Mask {
        let mut forms: Vec<(Secret, String)> =
            forms(&Secret(value.to_owned())).into_iter().map(|form| (form, "mock-KEY".to_owned())).collect();
        forms.sort_by_key(|(form, _)| std::cmp::Reverse(form.0.len()));
        Mask(forms)
    }

    fn masked(value: &str, text: &str) -> String {
        let out = mask(value).masked(text.as_bytes());
        String::from_utf8(out.unwrap_or_else(|| text.as_bytes().to_vec())).expect("text")
    }

    #[test]
    fn a_value_is_masked_wherever_it_stands() {
        assert_eq!(masked("s3cret-value", "a s3cret-value, s3cret-value"), "a mock-KEY, mock-KEY");
        assert_eq!(masked("s3cret-value", "nothing"), "nothing");
    }

    #[test]
    fn fields_are_masked_and_names_with_a_value_removed() {
        let mut fields = HeaderMap::new();
        fields.insert("x-echo", HeaderValue::from_static("Bearer s3cret-value"));
        fields.insert("x-s3cret-value", HeaderValue::from_static("1"));
        fields.insert("x-other", HeaderValue::from_static("2"));
        mask("S3CRET-VALUE").apply(&mut fields);
        assert_eq!(fields.len(), 2);
        mask("s3cret-value").apply(&mut fields);
        assert_eq!(fields["x-echo"], "Bearer mock-KEY");
        assert_eq!(fields["x-other"], "2");
    }

    proptest! {
        #[test]
        fn a_value_is_masked_in_base64_at_every_alignment(
            before in "[a-z:]{0,9}", value in "[A-Za-z0-9_-]{12,40}", after in "[a-z:]{0,9}",
        ) {
            let encoded = STANDARD.encode(format!("{before}{value}{after}"));
            let out = masked(&value, &encoded);
            prop_assert!(out.contains("mock-KEY"), "{}", out);
            // At most one character of the value can still be decoded at each end.
            let left = STANDARD_NO_PAD.decode(out.replace("mock-KEY", "AAAA").trim_end_matches('='));
            prop_assert!(!left.is_ok_and(|left| find(&left, value.as_bytes()).is_some()));
        }
    }
}
