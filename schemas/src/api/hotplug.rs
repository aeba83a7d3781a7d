//! Requests about memory that a running guest can give back and get again.

use super::fields::Fields;
use super::sizes::size;
use crate::limits::{HOTPLUG_MAX, MEMORY_BLOCK};
use crate::quantity::Bytes;
use crate::validate::FieldErrors;

/// The field for the part of the hotplug memory that the guest should have.
pub const HOTPLUGGED: &str = "hotplugged_size";

/// The fields about hotplug memory of a request, in whole blocks of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct HotplugAsked {
    pub(super) size: Option<Bytes>,
    pub(super) part: Option<Bytes>,
}

impl HotplugAsked {
    pub(super) fn read(fields: &mut Fields, errors: &mut FieldErrors) -> Self {
        let mut read = |key, code| size(fields, key, code, Bytes(0), HOTPLUG_MAX, errors).map(whole_blocks);
        Self { size: read("hotplug_size", "invalid_hotplug_size"), part: read(HOTPLUGGED, "invalid_request") }
    }
}

/// Checks that the guest can have as much hotplug memory as it should.
///
/// # Errors
/// Returns what the field [`HOTPLUGGED`] must be.
pub fn check_part(part: Option<Bytes>, hotplug: Bytes) -> Result<(), String> {
    match part {
        Some(part) if part > hotplug => Err(format!("must be at most hotplug_size, which is {hotplug}")),
        Some(_) | None => Ok(()),
    }
}

/// Rounds a size up to whole blocks of memory.
fn whole_blocks(size: Bytes) -> Bytes {
    Bytes(size.0.div_ceil(MEMORY_BLOCK.0).saturating_mul(MEMORY_BLOCK.0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sizes_are_whole_blocks_and_a_part_is_no_more_than_the_whole() {
        let mut errors = FieldErrors::default();
        let body = json!({"hotplug_size": "1GB", "hotplugged_size": "129MB"});
        let mut fields = Fields::body(body, &mut errors);
        let asked = HotplugAsked::read(&mut fields, &mut errors);
        assert!(errors.is_empty());
        assert_eq!(asked, HotplugAsked { size: Some(Bytes(1 << 30)), part: Some(Bytes(256 << 20)) });
        assert_eq!(check_part(asked.part, Bytes(256 << 20)), Ok(()));
        assert_eq!(
            check_part(asked.part, Bytes(128 << 20)),
            Err("must be at most hotplug_size, which is 128.0 MB".to_owned())
        );
        let body = json!({"hotplug_size": "33GB", "hotplugged_size": "-1"});
        let mut fields = Fields::body(body, &mut errors);
        HotplugAsked::read(&mut fields, &mut errors);
        let paths: Vec<_> = errors.iter().map(|error| error.path.clone()).collect();
        assert_eq!(paths, ["hotplug_size", "hotplugged_size"]);
    }
}
