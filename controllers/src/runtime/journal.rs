//! What passes tell people: the steps they take, how they end, and what that changed.
//!
//! Told only when something is: a pass that finds all as wished and writes nothing says nothing.

use stead_schemas::meta::OwnerRef;
use stead_schemas::names::Uid;

use super::reconciler::Outcome;

/// Which object a pass is about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub kind: &'static str,
    pub uid: &'a Uid,
    pub owner: Option<&'a OwnerRef>,
    /// It shall be there: the object is recorded and not being deleted.
    pub is_wished: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Entry<'a> {
    /// A step is begun; one of [`Action::NAMES`](super::Action).
    Acting(&'static str),
    /// In the kind's own words: what the new status says.
    Remark(&'a str),
    Ended(&'a Outcome),
}

/// Takes what passes tell. Called between the steps of a pass: it must not block for long, and
/// whether it succeeds is not the pass's matter.
pub trait Journal: Send + Sync + 'static {
    fn tell(&self, subject: Subject<'_>, entry: Entry<'_>);
}

/// Keeps nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoJournal;

impl Journal for NoJournal {
    fn tell(&self, _: Subject<'_>, _: Entry<'_>) {}
}
