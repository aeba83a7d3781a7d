//! The requirements of a route: its method, its scopes, and the way in which its requests take time.

use axum::routing::MethodFilter;

use super::auth::Scope;
use super::pools::Pool;

/// A method of the table.
#[derive(Debug, Clone, Copy)]
pub(super) enum Verb {
    Get,
    Post,
    Put,
    Patch,
    Delete,
}

impl Verb {
    pub(super) fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Post => MethodFilter::POST,
            Self::Put => MethodFilter::PUT,
            Self::Patch => MethodFilter::PATCH,
            Self::Delete => MethodFilter::DELETE,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }
}

/// The requirements of a route on its requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    /// The scopes that are needed, all of them.
    pub(super) scopes: &'static [Scope],
    pub(super) pool: Pool,
    pub(super) has_streamed_body: bool,
    /// True if requests are recorded in the audit log.
    pub(super) is_audited: bool,
    /// True if the response continues as long as its reader and the token do.
    pub(super) goes_on: bool,
}

/// Makes the rule of a route that is answered at once, for bearers of all these scopes.
pub(super) const fn needs(scopes: &'static [Scope]) -> Rule {
    Rule { scopes, pool: Pool::Short, has_streamed_body: false, is_audited: false, goes_on: false }
}

impl Rule {
    /// Marks a route whose response waits for a state that may come late.
    pub(super) const fn waits(self) -> Self {
        Self { pool: Pool::Waits, ..self }
    }

    /// Marks a route whose response waits for the host or a guest to do something.
    pub(super) const fn works(self) -> Self {
        Self { pool: Pool::Verbs, ..self }
    }

    /// Marks a route whose response may be a stream without an end of its own.
    pub(super) const fn goes_on(self) -> Self {
        Self { goes_on: true, ..self }
    }

    /// Marks a route that changes something although its method does not show it.
    pub(super) const fn audited(self) -> Self {
        Self { is_audited: true, ..self }
    }

    /// Marks a route whose handler reads the body itself, whatever its length.
    pub(super) const fn streams(self) -> Self {
        Self { has_streamed_body: true, ..self }
    }
}
