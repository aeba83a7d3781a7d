//! The network of an instance on the wire.

use super::bandwidth::BandwidthAsked;
use super::fields::Fields;
use super::unsupported;
use crate::validate::FieldErrors;

/// The `network` of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetworkAsked {
    /// True to connect the instance to the network of the host; `None` leaves that open.
    pub enabled: Option<bool>,
    pub bandwidth: BandwidthAsked,
    /// True if the request names more of the network than `enabled`.
    pub names_more: bool,
}

impl NetworkAsked {
    /// Reads the field of a request that changes an instance.
    pub(super) fn read(fields: &mut Fields, errors: &mut FieldErrors) -> Self {
        Self::read_with(fields, errors, unsupported::refuse_egress)
    }

    /// Reads the field; `read_egress` reads what is in it about mediated egress.
    pub(super) fn read_with(
        fields: &mut Fields,
        errors: &mut FieldErrors,
        read_egress: impl FnOnce(&mut Fields, &mut FieldErrors),
    ) -> Self {
        let Some(mut network) = fields.object("network", errors) else { return Self::default() };
        let enabled = network.flag("enabled", errors);
        let names_more = !network.is_empty();
        let bandwidth = BandwidthAsked::read(&mut network, errors);
        if enabled == Some(false) {
            let problems = bandwidth.without_network();
            problems.iter().for_each(|error| errors.push(&error.path, error.code, &error.message));
        }
        read_egress(&mut network, errors);
        network.finish(errors);
        Self { enabled, bandwidth, names_more }
    }
}
