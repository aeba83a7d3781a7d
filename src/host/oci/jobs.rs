//! Background jobs on content: fetches by source and digest, conversions by digest.
//!
//! Guarantees: there is one job for each key. It serves all owners that asked for it, ends when the last one forgets
//! it, has a deadline, and leaves the table however it ends, even by a panic. Its failure is reported to each owner
//! once. Fetches and conversions have separate permits. Each client has its own share of them, and each registry its
//! own share again, so that a slow registry or a greedy client delays no other.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stead_controllers::host::{HostError, HostErrorKind, Job};
use stead_schemas::names::{Digest, Uid};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use super::clients::Clients;
use super::layout::Source;
use super::shares::Shares;

/// Limit on simultaneous fetches from all registries together. Each uses some MiB and some descriptors.
const FETCHES_MAX: usize = 64;
/// Limit on one client's simultaneous fetches, so that other clients find permits.
const FETCHES_OF_CLIENT_MAX: usize = FETCHES_MAX / 4;
/// Time limit of one attempt to fetch an image. The received data is kept, and the next attempt waits behind others.
const FETCH_DEADLINE: Duration = Duration::from_secs(3600);
/// Time limit for merging and building one image. The largest takes some minutes on a slow disk.
const CONVERT_DEADLINE: Duration = Duration::from_secs(3600);
/// Time between two announcements of progress during a fetch.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// The identity of a job. Without a source it is the conversion of content that is already here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) source: Option<Source>,
    pub(super) digest: Digest,
}

/// A flag that tells work on blocking threads that its result is no longer needed.
#[derive(Debug, Clone)]
pub(in crate::host) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Creates the flag with its sender, which sets it when it is dropped.
    pub(in crate::host) fn new() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    pub(in crate::host) fn is_set(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }

    async fn set(&mut self) {
        // A dropped sender means that the job was taken off the table.
        let _ = self.0.wait_for(|is_set| *is_set).await;
    }
}

struct Entry {
    is_running: bool,
    /// Number of the job, in the order of arrival.
    number: u64,
    owners: BTreeSet<Uid>,
    /// Notification that another owner joins, whose client may have free permits.
    joined: Arc<Notify>,
    stop: watch::Sender<bool>,
}

/// A failure that is reported to several owners.
#[derive(Clone)]
struct Failure {
    kind: HostErrorKind,
    operation: &'static str,
    subject: String,
    cause: String,
}

impl Failure {
    fn of(error: &HostError) -> Self {
        let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        Self { kind: error.kind, operation: error.operation, subject: error.subject.clone(), cause }
    }

    fn into_error(self) -> HostError {
        HostError::new(self.kind, self.operation, self.subject).because(self.cause)
    }
}

#[derive(Default)]
struct Table {
    entries: BTreeMap<Key, Entry>,
    arrivals: u64,
    failed: BTreeMap<(Uid, Digest), Failure>,
}

/// The jobs of one daemon. Clones share them.
#[derive(Clone)]
pub(super) struct Jobs {
    inner: Arc<Inner>,
}

struct Inner {
    table: Mutex<Table>,
    fetches: Arc<Semaphore>,
    conversions: Arc<Semaphore>,
    registries: Shares<(Arc<str>, String)>,
    fetchers: Shares<Arc<str>>,
    clients: Clients,
    builders: Shares<Arc<str>>,
    changed: Box<dyn Fn(&Uid) + Send + Sync>,
}

impl Jobs {
    /// Creates the table. `share` is the limit on simultaneous conversions, and on simultaneous fetches from one
    /// registry for one client.
    pub(super) fn new(share: usize, clients: Clients, changed: Box<dyn Fn(&Uid) + Send + Sync>) -> Self {
        let inner = Inner {
            table: Mutex::default(),
            fetches: Arc::new(Semaphore::new(FETCHES_MAX)),
            conversions: Arc::new(Semaphore::new(share)),
            registries: Shares::of(share),
            fetchers: Shares::of(FETCHES_OF_CLIENT_MAX),
            clients,
            // One client gets all permits but one, so that another client can get one, unless there is only one.
            builders: Shares::of(share.saturating_sub(1).max(1)),
            changed,
        };
        Self { inner: Arc::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn announce(&self, owner: &Uid) {
        (self.inner.changed)(owner);
    }

    /// Waits for the permits of a conversion, for an import of this client.
    pub(super) async fn conversion_of(&self, client: &Arc<str>) -> Permits {
        let own = self.inner.builders.share(client.clone()).acquire_owned().await.ok();
        Permits {
            _own: own,
            _of_registry: None,
            _global: self.inner.conversions.clone().acquire_owned().await.ok(),
        }
    }

    /// Begins a job, or joins the one that already runs, which then serves this owner too. Returns the failure of the
    /// last job that served the owner, once.
    pub(super) fn begin<Work>(
        &self,
        owner: &Uid,
        key: &Key,
        work: impl FnOnce(Stop) -> Work,
    ) -> Result<(), HostError>
    where
        Work: Future<Output = Result<(), HostError>> + Send + 'static,
    {
        let (stop, number) = {
            let mut table = self.lock();
            if let Some(failure) = table.failed.remove(&(owner.clone(), key.digest.clone())) {
                return Err(failure.into_error());
            }
            if let Some(entry) = table.entries.get_mut(key) {
                entry.owners.insert(owner.clone());
                entry.joined.notify_one();
                return Ok(());
            }
            let (stop, stopped) = Stop::new();
            table.arrivals += 1;
            let (number, owners) = (table.arrivals, BTreeSet::from([owner.clone()]));
            let joined = Arc::default();
            table.entries.insert(key.clone(), Entry { is_running: false, number, owners, joined, stop });
            (stopped, number)
        };
        let work = work(stop.clone());
        let end = End { jobs: self.clone(), key: key.clone(), number, result: None };
        tokio::spawn(async move {
            let (mut stop, mut end) = (stop, end);
            let result = tokio::select! {
                biased;
                () = stop.set() => Ok(()),
                result = end.jobs.run(&end.key, work) => result,
            };
            end.result = Some(result);
            drop(end);
        });
        Ok(())
    }

    async fn run(
        &self,
        key: &Key,
        work: impl Future<Output = Result<(), HostError>>,
    ) -> Result<(), HostError> {
        let deadline = if key.source.is_some() { FETCH_DEADLINE } else { CONVERT_DEADLINE };
        let permits = self.permits(key).await;
        if let Some(entry) = self.lock().entries.get_mut(key) {
            entry.is_running = true;
        }
        self.report(key);
        let late = || {
            let words = format!("it is not done within {} min; it goes on later", deadline.as_secs() / 60);
            HostError::new(HostErrorKind::Transient, "bring", key.digest.as_str()).because(words)
        };
        let result = tokio::time::timeout(deadline, self.with_progress(key, work)).await;
        drop(permits);
        result.unwrap_or_else(|_| Err(late()))
    }

    /// Waits for the permits of a job. The permits of any client that it serves are enough.
    async fn permits(&self, key: &Key) -> Permits {
        loop {
            let served =
                self.lock().entries.get(key).map(|entry| (entry.owners.clone(), entry.joined.clone()));
            // A job that is off the table ends with its stop flag.
            let Some((owners, joined)) = served else { return std::future::pending().await };
            let clients: BTreeSet<Arc<str>> =
                owners.iter().map(|owner| self.inner.clients.of(owner)).collect();
            let waiting = clients.into_iter().map(|client| Box::pin(self.permits_of(key, client)));
            tokio::select! {
                biased;
                (permits, ..) = futures::future::select_all(waiting) => return permits,
                () = joined.notified() => {}
            }
        }
    }

    /// Takes the narrower shares first, so that a job waiting for one holds no global permit.
    async fn permits_of(&self, key: &Key, client: Arc<str>) -> Permits {
        let inner = &self.inner;
        let take = async |share: Arc<Semaphore>| share.acquire_owned().await.ok();
        match &key.source {
            Some(source) => {
                let registry_jobs =
                    take(inner.registries.share((client.clone(), source.registry.clone()))).await;
                let own = take(inner.fetchers.share(client)).await;
                Permits { _own: own, _of_registry: registry_jobs, _global: take(inner.fetches.clone()).await }
            }
            None => {
                let own = take(inner.builders.share(client)).await;
                Permits { _own: own, _of_registry: None, _global: take(inner.conversions.clone()).await }
            }
        }
    }

    /// Announces progress while the work goes on.
    async fn with_progress<T>(&self, key: &Key, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(PROGRESS_INTERVAL, &mut work).await {
                Ok(done) => return done,
                Err(_) => self.report(key),
            }
        }
    }

    fn report(&self, key: &Key) {
        let owners = self.lock().entries.get(key).map(|entry| entry.owners.clone());
        owners.unwrap_or_default().iter().for_each(|owner| self.announce(owner));
    }

    /// Returns the current job for an owner's content: the fetch that serves the owner, or the conversion.
    pub(super) fn of(&self, owner: &Uid, digest: &Digest) -> Option<Job> {
        let table = self.lock();
        let concerns = |key: &Key, entry: &Entry| {
            key.digest == *digest && (key.source.is_none() || entry.owners.contains(owner))
        };
        let (key, entry) = table.entries.iter().find(|(key, entry)| concerns(key, entry))?;
        if entry.is_running {
            return Some(if key.source.is_some() { Job::Fetching } else { Job::Converting });
        }
        let registry = |key: &Key| key.source.as_ref().map(|source| source.registry.clone());
        let before = table.entries.iter().filter(|(other, queued)| {
            !queued.is_running && queued.number < entry.number && registry(other) == registry(key)
        });
        Some(Job::Queued { position: u32::try_from(before.count() + 1).unwrap_or(u32::MAX) })
    }

    /// Ends the jobs that serve this owner alone.
    pub(super) fn forget(&self, owner: &Uid) {
        let mut table = self.lock();
        table.failed.retain(|(of, _), _| of != owner);
        for entry in table.entries.values_mut().filter(|entry| entry.owners.contains(owner)) {
            entry.owners.remove(owner);
            if entry.owners.is_empty() {
                entry.stop.send_replace(true);
            }
        }
        // A request that arrives before the old job has ended begins a new job.
        table.entries.retain(|_, entry| !entry.owners.is_empty());
    }

    /// Lists all owners that a job serves, or that still have a failure to be reported.
    pub(super) fn owners(&self) -> BTreeSet<Uid> {
        let table = self.lock();
        let working = table.entries.values().flat_map(|entry| entry.owners.iter());
        working.chain(table.failed.keys().map(|(owner, _)| owner)).cloned().collect()
    }
}

/// The permits of a job or an import. They are given back when the value is dropped.
pub(super) struct Permits {
    _own: Option<OwnedSemaphorePermit>,
    _of_registry: Option<OwnedSemaphorePermit>,
    _global: Option<OwnedSemaphorePermit>,
}

/// A guard that takes a job off the table, however the job ends.
struct End {
    jobs: Jobs,
    key: Key,
    number: u64,
    /// Result of the job, or `None` after a panic.
    result: Option<Result<(), HostError>>,
}

impl Drop for End {
    fn drop(&mut self) {
        let panicked = || {
            let words = "the work on it panicked";
            HostError::new(HostErrorKind::Transient, "bring", self.key.digest.as_str()).because(words)
        };
        let failure = match self.result.take() {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(Failure::of(&error)),
            None => Some(Failure::of(&panicked())),
        };
        let owners = {
            let mut table = self.jobs.lock();
            // A forgotten job may have a successor under the same key.
            if table.entries.get(&self.key).is_none_or(|entry| entry.number != self.number) {
                return;
            }
            let Some(entry) = table.entries.remove(&self.key) else { return };
            for owner in &entry.owners {
                if let Some(failure) = &failure {
                    table.failed.insert((owner.clone(), self.key.digest.clone()), failure.clone());
                }
            }
            entry.owners
        };
        owners.iter().for_each(|owner| self.jobs.announce(owner));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::sync::Notify;

    use super::*;

    fn uid(first: char) -> Uid {
        format!("{first}{:023}", 0).parse().expect("a letter and digits")
    }

    fn key() -> Key {
        Key { source: None, digest: format!("sha256:{}", "a".repeat(64)).parse().expect("valid") }
    }

    fn fetch(digit: char, registry: &str) -> Key {
        let reference = format!("{registry}/x").parse().expect("a reference");
        Key {
            source: Some(Source::of(&reference)),
            digest: format!("sha256:{}", digit.to_string().repeat(64)).parse().expect("valid"),
        }
    }

    fn failed() -> HostError {
        HostError::new(HostErrorKind::Denied, "bring", "it").because("for a reason")
    }

    /// Creates jobs and a channel of the announced owners.
    fn jobs() -> (Jobs, mpsc::Receiver<Uid>) {
        let (notifier, notified) = mpsc::channel();
        let notifier = Mutex::new(notifier);
        let changed = move |owner: &Uid| {
            // The receiver of a finished test is gone.
            let _ = notifier.lock().expect("no panic holds it").send(owner.clone());
        };
        (Jobs::new(1, Clients::default(), Box::new(changed)), notified)
    }

    async fn ended(jobs: &Jobs) {
        while !jobs.lock().entries.is_empty() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_job_that_panics_leaves_the_table_and_is_reported_as_a_failure() {
        let (jobs, _notified) = jobs();
        jobs.begin(&uid('a'), &key(), |_| async { panic!("of the work") }).expect("begun");
        ended(&jobs).await;
        let error = jobs.begin(&uid('a'), &key(), |_| async { Ok(()) }).expect_err("reported");
        assert_eq!(error.kind, HostErrorKind::Transient);
        jobs.begin(&uid('a'), &key(), |_| async { Ok(()) }).expect("begun anew");
        ended(&jobs).await;
        jobs.begin(&uid('a'), &key(), |_| async { Ok(()) }).expect("it went well");
    }

    #[tokio::test]
    async fn one_client_leaves_permits_to_others_and_who_joins_its_job_lends_it_their_own() {
        let (jobs, _notified) = jobs();
        let (greedy, other): (Arc<str>, Arc<str>) = ("greedy".into(), "other".into());
        let begin = |owner: char, client: &Arc<str>, key: &Key| {
            jobs.inner.clients.asked_by(&uid(owner), client);
            jobs.begin(&uid(owner), key, |_| std::future::pending()).expect("begun");
        };
        let settle = async || {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        };
        let is_running = |owner: char, key: &Key| jobs.of(&uid(owner), &key.digest) == Some(Job::Fetching);
        let keys = ['1', '2'].map(|digit| fetch(digit, "127.0.0.1:1"));
        begin('a', &greedy, &keys[0]);
        begin('b', &greedy, &keys[1]);
        settle().await;
        assert!(is_running('a', &keys[0]) && !is_running('b', &keys[1]), "one at a time of a registry");
        // Another client's fetch from the same registry does not wait for them.
        let own = fetch('3', "127.0.0.1:1");
        begin('c', &other, &own);
        settle().await;
        assert!(is_running('c', &own));
        jobs.forget(&uid('c'));
        settle().await;
        begin('d', &other, &keys[1]);
        settle().await;
        assert!(is_running('d', &keys[1]) && is_running('b', &keys[1]), "it goes on by the other's permit");
        // One client does not get all permits, however many registries it uses.
        let many: Vec<Key> =
            (0..FETCHES_MAX).map(|number| fetch('4', &format!("127.0.0.1:{}", number + 10))).collect();
        for key in &many {
            begin('e', &greedy, key);
        }
        let late = fetch('5', "127.0.0.1:9");
        begin('f', &other, &late);
        settle().await;
        assert!(is_running('f', &late));
        assert_eq!(jobs.inner.fetches.available_permits(), FETCHES_MAX - FETCHES_OF_CLIENT_MAX - 2);
    }

    #[tokio::test]
    async fn every_owner_is_notified_of_the_failure_once() {
        let (jobs, notified) = jobs();
        let go = Arc::new(Notify::new());
        let begin = |owner: char| {
            let go = go.clone();
            jobs.begin(&uid(owner), &key(), |_| async move {
                go.notified().await;
                Err(failed())
            })
        };
        begin('a').expect("begun");
        begin('b').expect("joined");
        go.notify_one();
        ended(&jobs).await;
        for owner in ['a', 'b'] {
            let error = begin(owner).expect_err("reported");
            assert_eq!(
                (error.kind, error.chain().as_str()),
                (HostErrorKind::Denied, failed().chain().as_str())
            );
        }
        assert!(jobs.owners().is_empty());
        let notified: BTreeSet<Uid> = notified.try_iter().collect();
        assert_eq!(notified, BTreeSet::from([uid('a'), uid('b')]));
    }

    #[tokio::test]
    async fn a_job_ends_with_its_last_owner_and_not_before() {
        let (jobs, _notified) = jobs();
        let stop = Arc::new(Mutex::new(None));
        let seen = stop.clone();
        let work = move |stop: Stop| {
            *seen.lock().expect("no panic holds it") = Some(stop);
            std::future::pending()
        };
        jobs.begin(&uid('a'), &key(), work).expect("begun");
        jobs.begin(&uid('b'), &key(), |_| std::future::pending()).expect("joined");
        let is_set = || stop.lock().expect("no panic holds it").as_ref().is_some_and(Stop::is_set);
        jobs.forget(&uid('a'));
        assert!(!is_set() && jobs.of(&uid('b'), &key().digest).is_some());
        jobs.forget(&uid('b'));
        assert!(is_set() && jobs.of(&uid('b'), &key().digest).is_none());
        // The next request begins another job, which the end of the first does not affect.
        jobs.begin(&uid('c'), &key(), |_| std::future::pending()).expect("begun");
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(jobs.of(&uid('c'), &key().digest), Some(Job::Converting), "the permit was given back");
    }
}
