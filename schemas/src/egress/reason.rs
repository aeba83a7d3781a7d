//! Decisions on connections and requests, and their reasons.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A decision of the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    Allowed,
    Refused,
    /// Allowed because the policy only observes; it would have been refused otherwise.
    Observed,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $word:literal, $text:literal;)*) => {
        /// The reason for a refusal, for the end of a connection, or for a note in the audit log.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[$doc])* #[serde(rename = $word)] $name,)*
        }

        impl Reason {
            /// Lists all reasons.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Returns the word of the audit log.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }

            /// Returns a sentence for the guest.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

reasons! {
    TooManyConnections => "too_many_connections", "this instance has too many connections";
    TooManyHandshakes => "too_many_handshakes", "this instance has too many unfinished handshakes";
    HelloTimeout => "hello_timeout", "the first bytes did not arrive in time";
    HelloTooLarge => "hello_too_large", "the ClientHello is larger than 16 KiB";
    BadHello => "bad_hello", "the ClientHello is malformed";
    HeadTimeout => "head_timeout", "the head of the request did not arrive in time";
    BadRequest => "bad_request", "the request is malformed";
    BadHost => "bad_host", "the request does not name one valid host";
    UnknownProtocol => "unknown_protocol", "the connection carries neither HTTP/1 nor TLS";
    MethodNotAllowed => "method_not_allowed", "the method is not allowed";
    UpgradeNotAllowed => "upgrade_not_allowed", "an upgrade to HTTP/2 is not allowed";
    HostNotAllowed => "host_not_allowed", "the policy does not allow the host";
    NameMismatch => "name_mismatch", "the server name of TLS is not the host of CONNECT";
    /// The `Host` or the `:authority` of a request differs from the host of its connection.
    Misdirected => "misdirected", "the request names a host that is not the host of its connection";
    AddressDenied => "address_denied", "the host has no address that guests may reach";
    /// A note: some addresses of the answer to a question were removed, and the others were returned.
    AddressesRemoved => "addresses_removed", "the host also has addresses that guests may not reach";
    BadQuestion => "bad_question", "the question for a name is malformed, or of a kind that is not answered";
    RecordTypeNotAllowed => "record_type_not_allowed", "records of this type are not returned";
    NameTooLong => "name_too_long", "the name is too long";
    UnknownInstance => "unknown_instance", "no instance has the name";
    TooManyQuestions => "too_many_questions", "this instance asks for too many names";
    NameNotFound => "name_not_found", "the host's name was not found";
    NamesFailed => "names_failed", "the host's name could not be resolved";
    UpstreamUnreachable => "upstream_unreachable", "the host cannot be connected to";
    UpstreamTimeout => "upstream_timeout", "the host did not take the connection in time";
    UpstreamCertificate => "upstream_certificate",
        "the certificate of the host was not accepted; a missing intermediate certificate is not fetched";
    ClientCertificate => "client_certificate", "the host asks for a client certificate, which is not supported";
    UpstreamTls => "upstream_tls", "the TLS handshake with the host failed";
    UpstreamProtocol => "upstream_protocol", "the host's answer is malformed";
    UpstreamClosed => "upstream_closed", "the host closed the connection";
    NoCommonProtocol => "no_common_protocol", "the client offers no protocol that can be forwarded";
    /// The guest does not trust the certificate of its own authority: a program has its own trust store.
    GuestRefusedCertificate => "guest_refused_certificate", "the client did not accept the certificate";
    GuestTls => "guest_tls", "the TLS handshake with the client failed";
    PlaceholderElsewhere => "placeholder_elsewhere",
        "the request carries the placeholder of a credential that is not for this host";
    TooManyCertificates => "too_many_certificates", "this instance asks for too many new certificates";
    PolicyChanged => "policy_changed", "the policy no longer allows the connection";
    Idle => "idle", "no byte was transferred for too long";
    Loop => "loop", "the destination is the proxy itself";
    Broken => "broken", "the connection was broken";
    /// A note: the tunnel carries a protocol that is neither TLS nor HTTP.
    Opaque => "opaque", "the tunnel carries an unknown protocol";
    /// A note: a credential is for this host, but the request is not encrypted.
    CredentialNeedsTls => "credential_needs_tls", "credentials are injected only over TLS";
    Internal => "internal", "the proxy failed";
}

impl Reason {
    /// Returns the decision that a reason goes with: a failure of the guest's or the server's is no refusal.
    #[must_use]
    pub fn decision(self) -> Decision {
        match self {
            Self::AddressesRemoved
            | Self::NameNotFound
            | Self::NamesFailed
            | Self::UpstreamUnreachable
            | Self::UpstreamTimeout
            | Self::UpstreamTls
            | Self::UpstreamProtocol
            | Self::UpstreamClosed
            | Self::GuestRefusedCertificate
            | Self::GuestTls
            | Self::Idle
            | Self::Broken
            | Self::Opaque
            | Self::CredentialNeedsTls
            | Self::Internal => Decision::Allowed,
            _ => Decision::Refused,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stored_word_of_a_reason_is_its_name_in_snake_case() {
        for reason in Reason::ALL {
            let stored = serde_json::to_value(reason).expect("a word");
            assert_eq!(stored, reason.as_str());
            assert!(reason.as_str().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'));
            assert_eq!(serde_json::from_value::<Reason>(stored).expect("read back"), *reason);
        }
    }
}
