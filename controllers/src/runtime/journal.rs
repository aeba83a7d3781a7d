//! Entries that passes write for people: the steps they take, how they end, and what that changed.
//!
//! A pass that finds everything as the spec asks and writes nothing makes no entry.

use stead_schemas::meta::OwnerRef;
use stead_schemas::names::Uid;

use super::reconciler::Outcome;

/// The object that a pass is about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub kind: &'static str,
    pub uid: &'a Uid,
    pub owner: Option<&'a OwnerRef>,
    /// True if the object should exist: it is recorded and not being deleted.
    pub is_desired: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Entry<'a> {
    /// A step starts. The name is one of [`Action::NAMES`](super::Action).
    Acting(&'static str),
    /// A description of the new status, in the kind's own words.
    Note(&'a str),
    Ended(&'a Outcome),
}

/// Receives the entries of passes. It is called between the steps of a pass, so it must not block for long.
/// Failures of the journal do not affect the pass.
pub trait Journal: Send + Sync + 'static {
    fn report(&self, subject: Subject<'_>, entry: Entry<'_>);
}

/// A journal that keeps nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoJournal;

impl Journal for NoJournal {
    fn report(&self, _: Subject<'_>, _: Entry<'_>) {}
}
