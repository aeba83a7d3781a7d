//! The resolver: from the bytes of a question to the bytes of its answer, and from a host to its addresses.
//!
//! Guarantees: questions of guests and hosts that the proxy resolves go through the same rules, the same cache and the same
//! filter of addresses, so that the address that is dialled is one that was checked. Addresses of no guest are not
//! answered. Nothing here waits but for an upstream resolver, and for that only as many questions as have a share.
//!
//! Cancel: a caller that waits may stop; the question to the upstream resolver goes on until its time limit, and its answer
//! is kept.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::answer::{Answer, Found, Key};
use super::cache::Cache;
use super::guard::{Addresses, Guarded, guard};
use super::in_flight::InFlight;
use super::limits::{LOCAL_TTL_SECS, WAITING_MAX, WAITING_PER_GUEST_MAX};
use super::message::{Question, Received, Transport, read};
use super::rate::Rates;
use super::report::{Counters, Counts, Event, OnEvent, Reason};
use super::rules::{Asker, Decision, Directory, Guest, decide};
use super::shares::{Share, Shares};
use super::upstream::Upstream;

/// A clock; tests have one that they can set.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// The parts that a resolver is made of.
pub struct Parts {
    pub directory: Arc<dyn Directory>,
    pub addresses: Arc<dyn Addresses>,
    pub upstream: Upstream,
    pub on_event: OnEvent,
    pub clock: Clock,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

/// The resolver of all guests.
#[derive(Debug)]
pub struct Resolver {
    parts: Parts,
    cache: Mutex<Cache>,
    rates: Mutex<Rates>,
    in_flight: Arc<InFlight>,
    waiting: Arc<Shares>,
    counters: Counters,
}

/// The first result of a question.
#[derive(Debug)]
pub(crate) enum Step {
    /// The message is not answered.
    Silence,
    Reply(Vec<u8>),
    /// The guest asks too often; the bytes are the refusal, if one can be written.
    TooOften(Option<Vec<u8>>),
    /// An upstream resolver is asked; [`Resolver::finish`] waits for it.
    Wait(Box<Pending>),
}

/// A question whose answer comes from an upstream resolver.
#[derive(Debug)]
pub(crate) struct Pending {
    question: Question,
    asked: Asked,
    share: Share,
}

/// The asker of a question and its content.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) guest: IpAddr,
    pub(super) is_mediated: bool,
    pub(super) key: Key,
}

/// An answer as a guest may have it.
pub(super) struct Checked {
    pub(super) code: ResponseCode,
    pub(super) records: Vec<Record>,
    /// The first address that was removed, if none was left.
    pub(super) denied: Option<IpAddr>,
}

impl Resolver {
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            cache: Mutex::default(),
            rates: Mutex::default(),
            in_flight: Arc::default(),
            waiting: Shares::new(WAITING_PER_GUEST_MAX, WAITING_MAX),
            counters: Counters::default(),
        })
    }

    /// Returns the counts since the start.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the rights of a guest.
    pub(super) fn guest(&self, address: IpAddr) -> Option<Guest> {
        self.parts.directory.guest(address)
    }

    pub(super) fn now(&self) -> Instant {
        (self.parts.clock)()
    }

    /// Begins to answer a message from an address, and ends it if nobody else need be asked.
    pub(crate) fn begin(&self, address: IpAddr, transport: Transport, bytes: &[u8]) -> Step {
        let Some(guest) = self.guest(address) else {
            self.counters.from_nobody.add_one();
            return Step::Silence;
        };
        self.counters.questions.add_one();
        let received = read(bytes, transport);
        if !lock(&self.rates).take(address, self.now()) {
            return self.too_often(address, &received);
        }
        match received {
            Received::Question(question) => self.answer(address, &guest, question),
            Received::Silence => self.malformed(address, Reason::Malformed, Step::Silence),
            Received::Refused(reason, bytes) => self.malformed(address, reason, Step::Reply(bytes)),
        }
    }

    fn too_often(&self, address: IpAddr, received: &Received) -> Step {
        self.counters.too_many_questions.add_one();
        let Received::Question(question) = received else {
            self.report_unread(address, Reason::TooManyQuestions);
            return Step::TooOften(None);
        };
        self.report(address, &question.name, question.record_type, Reason::TooManyQuestions, None);
        Step::TooOften(question.reply(ResponseCode::Refused, Vec::new()))
    }

    fn malformed(&self, address: IpAddr, reason: Reason, step: Step) -> Step {
        self.counters.malformed.add_one();
        self.report_unread(address, reason);
        step
    }

    fn answer(&self, address: IpAddr, guest: &Guest, question: Question) -> Step {
        let asker = Asker { directory: self.parts.directory.as_ref(), address, guest };
        let (name, record_type) = (&question.name, question.record_type);
        let report = |reason| self.report(address, name, record_type, reason, None);
        let (code, data) = match decide(&asker, name, record_type) {
            Decision::Forward => return self.forward(address, guest, question),
            Decision::Answer(data) => (ResponseCode::NoError, Some(data)),
            Decision::Empty => (ResponseCode::NoError, None),
            Decision::NoSuchName(reason) => {
                self.counters.denied_names.add_one();
                report(reason);
                (ResponseCode::NXDomain, None)
            }
            Decision::Refuse(reason) => {
                self.counters.refused.add_one();
                report(reason);
                (ResponseCode::Refused, None)
            }
        };
        if code == ResponseCode::NoError {
            self.counters.answered_here.add_one();
        }
        let record = |data| Record::from_rdata(question.name.clone(), LOCAL_TTL_SECS, data);
        reply(&question, code, data.map(record).into_iter().collect())
    }

    fn forward(&self, guest: IpAddr, rights: &Guest, question: Question) -> Step {
        let key = Key { name: question.name.to_lowercase(), record_type: question.record_type };
        let asked = Asked { guest, is_mediated: matches!(rights, Guest::Mediated(_)), key };
        if let Some((answer, left)) = self.cached(&asked.key) {
            self.counters.answered_from_cache.add_one();
            let checked = self.check(&asked, &answer, left);
            return reply(&question, checked.code, spelled(checked.records, &question.name));
        }
        match self.share(&asked) {
            Some(share) => Step::Wait(Box::new(Pending { question, asked, share })),
            None => reply(&question, ResponseCode::ServFail, Vec::new()),
        }
    }

    /// Waits for an upstream resolver; returns the bytes of the answer, or `None` if none can be written.
    pub(crate) async fn finish(self: Arc<Self>, pending: Box<Pending>) -> Option<Vec<u8>> {
        let Pending { question, asked, share } = *pending;
        let (answer, left) = self.ask(&asked, share).await;
        let checked = self.check(&asked, &answer, left);
        question.reply(checked.code, spelled(checked.records, &question.name))
    }

    /// Returns the answer in the cache and the time for which it is valid still.
    pub(super) fn cached(&self, key: &Key) -> Option<(Arc<Answer>, Duration)> {
        lock(&self.cache).get(key, self.now())
    }

    /// Takes a share of the questions that may wait for an upstream resolver.
    pub(super) fn share(&self, asked: &Asked) -> Option<Share> {
        let share = self.waiting.take(asked.guest);
        if share.is_none() {
            self.counters.too_many_waiting.add_one();
            self.report(asked.guest, &asked.key.name, asked.key.record_type, Reason::TooManyWaiting, None);
        }
        share
    }

    /// Asks an upstream resolver, or waits for the answer to an equal question. The share is kept until both have ended:
    /// the wait here and the question there.
    pub(super) async fn ask(self: &Arc<Self>, asked: &Asked, share: Share) -> (Arc<Answer>, Duration) {
        let share = Arc::new(share);
        let sent = {
            let (resolver, asked, share) = (self.clone(), asked.clone(), share.clone());
            async move {
                resolver.counters.forwarded.add_one();
                let answer = Arc::new(resolver.parts.upstream.ask(&asked.key).await);
                if answer.found == Found::Failure {
                    resolver.counters.upstream_failures.add_one();
                }
                lock(&resolver.cache).insert(asked.key, answer.clone(), asked.guest, resolver.now());
                drop(share);
                answer
            }
        };
        let (answer, is_first) = self.in_flight.join(&asked.key, sent);
        if !is_first {
            self.counters.shared.add_one();
        }
        let answer = answer.await;
        let ttl = answer.ttl;
        (answer, ttl)
    }

    /// Returns what a guest may have of an answer that is valid for a time still.
    pub(super) fn check(&self, asked: &Asked, answer: &Answer, left: Duration) -> Checked {
        let negative = |code| Checked { code, records: Vec::new(), denied: None };
        let records = match &answer.found {
            Found::Records(records) => records,
            Found::Empty => return negative(ResponseCode::NoError),
            Found::NoSuchName => return negative(ResponseCode::NXDomain),
            Found::Failure => return negative(ResponseCode::ServFail),
        };
        let Guarded { mut records, removed, is_denied } =
            guard(records, |address| self.parts.addresses.may_reach(asked.guest, address));
        if removed.is_some() {
            self.counters.rebinding.add_one();
            let reason = if is_denied { Reason::Rebinding } else { Reason::RebindingInPart };
            self.report(asked.guest, &asked.key.name, asked.key.record_type, reason, removed);
        }
        if is_denied {
            return Checked { code: ResponseCode::NXDomain, records, denied: removed };
        }
        if asked.is_mediated {
            without_aliases(&mut records, &asked.key);
        }
        for record in &mut records {
            record.ttl = ttl_secs(left);
        }
        Checked { code: ResponseCode::NoError, records, denied: None }
    }

    /// Returns whether a guest may reach an address.
    pub(super) fn may_reach(&self, guest: IpAddr, address: IpAddr) -> bool {
        self.parts.addresses.may_reach(guest, address)
    }

    /// Decides on the host that the proxy looks up for a guest.
    pub(super) fn decide(&self, address: IpAddr, guest: &Guest, key: &Key) -> Decision {
        let asker = Asker { directory: self.parts.directory.as_ref(), address, guest };
        decide(&asker, &key.name, key.record_type)
    }

    fn report_unread(&self, guest: IpAddr, reason: Reason) {
        let event = Event { guest, name: String::new(), record_type: String::new(), reason, address: None };
        (self.parts.on_event)(event);
    }

    fn report(
        &self,
        guest: IpAddr,
        name: &Name,
        record_type: RecordType,
        reason: Reason,
        address: Option<IpAddr>,
    ) {
        let (name, record_type) = (name.to_ascii(), record_type.to_string());
        (self.parts.on_event)(Event { guest, name, record_type, reason, address });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn reply(question: &Question, code: ResponseCode, records: Vec<Record>) -> Step {
    question.reply(code, records).map_or(Step::Silence, Step::Reply)
}

/// Leaves only the addresses, as those of the name itself. What aliases a host has is nothing that a mediated guest
/// needs, and each is 250 bytes of whatever somebody outside would like to send in.
fn without_aliases(records: &mut Vec<Record>, key: &Key) {
    records.retain(|record| !matches!(record.data, RData::CNAME(_)));
    for record in records {
        record.name = key.name.clone();
    }
}

/// Spells the name that was asked for as the asker did, who may compare it.
fn spelled(mut records: Vec<Record>, name: &Name) -> Vec<Record> {
    for record in &mut records {
        if record.name == *name {
            record.name = name.clone();
        }
    }
    records
}

/// Returns the seconds of a TTL, rounded up: an answer that is valid still has not the TTL of one that is not.
fn ttl_secs(left: Duration) -> u32 {
    let secs = left.as_secs() + u64::from(left.subsec_nanos() > 0);
    u32::try_from(secs).unwrap_or(u32::MAX)
}
