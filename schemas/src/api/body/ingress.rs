//! Bodies of requests about ingresses.

use schemars::JsonSchema;

use crate::api::schema::{False, HostPattern, IngressTargetName, NewName, TagMap};
use crate::limits;

/// The body of `POST /ingresses`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct IngressCreate {
    /// Name of the ingress, unique on this host.
    pub name: NewName,
    /// Rules, which all apply.
    #[schemars(length(min = 1, max = limits::INGRESS_RULES_MAX))]
    pub rules: Vec<IngressRuleRequest>,
    /// Key-value pairs for filters of lists.
    pub tags: Option<TagMap>,
}

/// A rule that leads requests to an instance.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct IngressRuleRequest {
    /// Requests that the rule is about.
    #[schemars(rename = "match")]
    pub matched: IngressMatchRequest,
    /// Instance that answers them.
    pub target: IngressTargetRequest,
    /// True for HTTPS. It is not supported yet: only `false` is accepted.
    pub tls: Option<False>,
    /// True to redirect HTTP to HTTPS. It needs `tls`, so only `false` is accepted.
    pub redirect_http: Option<False>,
    /// Header without which requests are refused.
    pub request_header_auth: Option<RequestHeaderAuthRequest>,
}

/// The requests that a rule is about.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct IngressMatchRequest {
    /// Host name of the requests. A label in braces matches any label, and may name the instance.
    pub hostname: HostPattern,
    /// Port of this host; 80 by default.
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u32>,
}

/// The instance that answers the requests of a rule.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct IngressTargetRequest {
    /// Name or id of the instance, or a label in braces of the host name.
    pub instance: IngressTargetName,
    /// Port of the instance.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u32,
}

/// A header that requests must have exactly once.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RequestHeaderAuthRequest {
    /// Name of the header; names with a meaning in HTTP are refused.
    #[schemars(regex(pattern = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"), length(min = 1, max = limits::HEADER_NAME_BYTES_MAX))]
    pub header: String,
    /// Value of the header, without blanks at its ends.
    #[schemars(
        regex(pattern = r"^[!-~][ -~]*[!-~]$"),
        length(min = *limits::HEADER_AUTH_BYTES.start(), max = *limits::HEADER_AUTH_BYTES.end())
    )]
    pub value: String,
}
