//! Sizes in requests: memory, and the writable layer over an image.

use super::fields::Fields;
use crate::limits::{MEMORY_MAX, MEMORY_MIN, OVERLAY_MAX, OVERLAY_MIN};
use crate::quantity::Bytes;
use crate::validate::FieldErrors;

pub(super) fn memory(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Bytes> {
    size(fields, "size", "invalid_size", MEMORY_MIN, MEMORY_MAX, errors)
}

pub(super) fn overlay(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Bytes> {
    size(fields, "overlay_size", "invalid_overlay_size", OVERLAY_MIN, OVERLAY_MAX, errors)
}

/// Reads a size within bounds.
pub(super) fn size(
    fields: &mut Fields,
    key: &str,
    code: &'static str,
    low: Bytes,
    high: Bytes,
    errors: &mut FieldErrors,
) -> Option<Bytes> {
    let size: Bytes = fields.parsed(key, code, errors)?;
    if !(low..=high).contains(&size) {
        errors.push(fields.path(key), code, format!("must be from {low} to {high}"));
        return None;
    }
    Some(size)
}
