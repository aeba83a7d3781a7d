//! Fields of the wire that later work implements. They are validated against the contract now, and refused
//! by name when they ask for something that this server cannot do yet. A value that asks for nothing is
//! accepted.

use super::fields::Fields;
use crate::validate::FieldErrors;

const INVALID: &str = "invalid_request";
const UNSUPPORTED: &str = "not_supported";

fn refuse(errors: &mut FieldErrors, path: String) {
    errors.push(path, UNSUPPORTED, "is not supported by this server yet");
}

/// Reads all such fields of a create request.
pub(super) fn refuse_fields(fields: &mut Fields, errors: &mut FieldErrors) {
    devices(fields, errors);
    gpu(fields, errors);
    credentials(fields, errors);
}

/// Reads the field `egress` of `network`.
pub(super) fn refuse_egress(network: &mut Fields, errors: &mut FieldErrors) {
    let Some(mut egress) = network.object("egress", errors) else { return };
    if let Some(mut enforcement) = egress.object("enforcement", errors) {
        let mode = enforcement.text("mode", errors);
        if mode.as_deref().is_some_and(|mode| !matches!(mode, "all" | "http_https_only")) {
            errors.push(enforcement.path("mode"), INVALID, "must be all or http_https_only");
        }
        enforcement.finish(errors);
    }
    if egress.flag("enabled", errors) == Some(true) {
        refuse(errors, egress.path("enabled"));
    }
    egress.finish(errors);
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

fn credentials(fields: &mut Fields, errors: &mut FieldErrors) {
    let Some(credentials) = fields.object("credentials", errors) else { return };
    let path = fields.path("credentials");
    let entries = credentials.entries(errors);
    let is_asked = !entries.is_empty();
    for (_, mut credential) in entries {
        match credential.object("source", errors) {
            Some(mut source) => {
                source.required_text("env", errors);
                source.finish(errors);
            }
            None => errors.push(credential.path("source"), INVALID, "is required"),
        }
        let injections = credential.objects("inject", errors);
        if injections.is_empty() {
            errors.push(credential.path("inject"), INVALID, "needs at least one entry");
        }
        for mut inject in injections {
            inject.texts("hosts", 64, 253, errors);
            match inject.object("as", errors) {
                Some(mut target) => {
                    target.required_text("header", errors);
                    let format = target.required_text("format", errors);
                    if format.is_some_and(|format| !format.contains("${value}")) {
                        errors.push(target.path("format"), INVALID, "must contain ${value}");
                    }
                    target.finish(errors);
                }
                None => errors.push(inject.path("as"), INVALID, "is required"),
            }
            inject.finish(errors);
        }
        credential.finish(errors);
    }
    if is_asked {
        refuse(errors, path);
    }
}
