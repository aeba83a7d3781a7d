//! Environment variables on the wire.

use std::collections::BTreeMap;

use super::fields::Fields;
use crate::instance::Secret;
use crate::limits;
use crate::validate::{FieldErrors, printable};

const INVALID: &str = "invalid_request";
/// Number of characters of a name that a message repeats.
const NAME_CHARS_MAX: usize = 64;

/// Reads the variables of a new instance.
pub(super) fn read(fields: &mut Fields, errors: &mut FieldErrors) -> BTreeMap<String, Secret> {
    let env = fields.map("env", errors).unwrap_or_default();
    for (name, value) in env.iter().take(limits::ENV_MAX) {
        check(name, value, errors);
    }
    let env = env.into_iter().map(|(name, value)| (name, Secret(value))).collect();
    errors.take("env", INVALID, check_total(&env));
    env
}

/// Reads changes of variables; `null` removes one.
pub(super) fn read_changes(
    fields: &mut Fields,
    errors: &mut FieldErrors,
) -> BTreeMap<String, Option<Secret>> {
    let env = fields.map_of_optional("env", errors).unwrap_or_default();
    for (name, value) in env.iter().take(limits::ENV_MAX) {
        check(name, value.as_deref().unwrap_or_default(), errors);
    }
    let env: BTreeMap<_, _> = env.into_iter().map(|(name, value)| (name, value.map(Secret))).collect();
    let set = env.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect();
    errors.take("env", INVALID, check_total(&set));
    env
}

/// Checks that a program can be given all of these variables.
///
/// # Errors
/// Returns the limit that is exceeded, in words that continue the name of the field.
pub fn check_total(env: &BTreeMap<String, Secret>) -> Result<(), String> {
    if env.len() > limits::ENV_MAX {
        return Err(format!("has {} entries; at most {} are allowed", env.len(), limits::ENV_MAX));
    }
    if env.iter().map(|(name, value)| size(name, &value.0)).sum::<usize>() > limits::ENV_BYTES_MAX {
        return Err(format!("is larger than {} bytes", limits::ENV_BYTES_MAX));
    }
    Ok(())
}

/// Returns the bytes that a variable takes in the form `NAME=VALUE`, with the NUL at its end.
fn size(name: &str, value: &str) -> usize {
    name.len() + value.len() + 2
}

fn check(name: &str, value: &str, errors: &mut FieldErrors) {
    let at = format!("env[{}]", printable(name, NAME_CHARS_MAX));
    if name.is_empty() || name.contains(['=', '\0']) {
        errors.push(&at, INVALID, "has a name that is empty or contains '=' or a NUL");
    }
    if size(name, value) > limits::ENV_VAR_BYTES_MAX {
        let most = limits::ENV_VAR_BYTES_MAX;
        let message = format!("is longer than {most} bytes with its name, which no program can be given");
        errors.push(&at, INVALID, message);
    }
    // The value is a secret and is never repeated in a message.
    if value.contains('\0') {
        errors.push(&at, INVALID, "has a value that contains a NUL");
    }
}
