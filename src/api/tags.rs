//! Tags as parameters of a list: `?tags[key]=value`.

use std::collections::BTreeMap;

use stead_schemas::meta::Tags;
use stead_schemas::validate::{self, FieldErrors};

use super::ApiError;

/// Reads the `tags[key]=value` parameters; all of them must match.
pub(super) fn tag_filter(params: &BTreeMap<String, String>) -> Result<Tags, ApiError> {
    let mut tags = Tags::new();
    for (key, value) in params.iter().filter(|(key, _)| key.starts_with("tags")) {
        let name =
            key.strip_prefix("tags[").and_then(|rest| rest.strip_suffix(']')).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| {
            ApiError::bad_request("invalid_request", "tags must be given as tags[key]=value")
        })?;
        tags.insert(name.to_owned(), value.clone());
    }
    // Tags that no object can have are a mistake, or another form of query; an empty list would hide the
    // mistake.
    let mut errors = FieldErrors::default();
    validate::tags(&mut errors, "tags", &tags);
    errors.into_result()?;
    Ok(tags)
}

/// Returns whether an object has all of these tags.
pub(super) fn has_tags(tags: &Tags, wanted: &Tags) -> bool {
    wanted.iter().all(|(key, value)| tags.get(key) == Some(value))
}
