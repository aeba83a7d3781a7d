//! Fields of the wire that later work implements. They are validated against the contract now, and refused
//! by name when they ask for something that this server cannot do yet. A value that asks for nothing is
//! accepted.

use super::egress::EgressAsked;
use super::fields::Fields;
use crate::validate::FieldErrors;

const UNSUPPORTED: &str = "not_supported";

fn refuse(errors: &mut FieldErrors, path: String) {
    errors.push(path, UNSUPPORTED, "is not supported by this server yet");
}

/// Reads all such fields of a create request.
pub(super) fn refuse_fields(fields: &mut Fields, errors: &mut FieldErrors) {
    devices(fields, errors);
    gpu(fields, errors);
}

/// Reads the field `egress` of the `network` of a request that changes an instance.
pub(super) fn refuse_egress(network: &mut Fields, errors: &mut FieldErrors) {
    if EgressAsked::read(network, errors).enabled {
        errors.push(network.path("egress.enabled"), UNSUPPORTED, "is decided when an instance is created");
    }
}

fn devices(fields: &mut Fields, errors: &mut FieldErrors) {
    let devices = fields.texts("devices", 64, 256, errors);
    if devices.is_some_and(|devices| !devices.is_empty()) {
        refuse(errors, fields.path("devices"));
    }
}

fn gpu(fields: &mut Fields, errors: &mut FieldErrors) {
    let Some(mut gpu) = fields.object("gpu", errors) else { return };
    if gpu.text("profile", errors).is_some_and(|profile| !profile.is_empty()) {
        refuse(errors, gpu.path("profile"));
    }
    gpu.finish(errors);
}

/// Reads the `credentials` of a request that changes an instance.
pub(super) fn refuse_credentials(fields: &mut Fields, errors: &mut FieldErrors) {
    let Some(credentials) = fields.object("credentials", errors) else { return };
    if !credentials.is_empty() {
        errors.push(fields.path("credentials"), UNSUPPORTED, "are decided when an instance is created");
    }
}
