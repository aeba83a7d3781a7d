//! The agent: runs programs, copies files and inspects paths for the host.
//!
//! Each stream has its own thread, so a stream that waits delays no other stream. The memory of a thread is bounded
//! by the stream's window and by the outbox.
//! Cancel/crash: when the host goes away, every stream is closed and undoes its incomplete work (processes are ended
//! after a grace period, temporary files are removed).

mod aligned;
mod copy_from;
mod copy_to;
mod exec;
mod source;
mod sparse;
mod stat;
mod stream;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stead_schemas::guest::{Config, Frame, FrameKind, FromStream, Open, Request, Token};

use self::stream::Stream;
use crate::children::Children;
use crate::outbox::Outbox;

/// Limit on the number of open streams. Each may hold its window and a thread.
const STREAMS_MAX: usize = 256;
/// Limit on the descriptors of this process: a stream has at most eight, and the children's ends while a child is
/// spawned.
const OPEN_FILES: u64 = 16 * STREAMS_MAX as u64;
/// Stack size of a stream's thread, in bytes. These threads do not recurse.
const STACK_BYTES: usize = 256 << 10;

/// The instance as its program sees it. Programs run beside it start with the same values.
pub(crate) struct Instance {
    pub(crate) token: Token,
    pub(crate) config: Config,
    pub(crate) children: Children,
}

/// The agent with its open streams.
#[derive(Clone)]
pub(crate) struct Agent(Arc<Shared>);

struct Shared {
    streams: Mutex<BTreeMap<u32, Arc<Stream>>>,
    instance: Mutex<Option<Arc<Instance>>>,
    outbox: Arc<Outbox>,
}

impl Agent {
    pub(crate) fn new(outbox: Arc<Outbox>) -> Self {
        Self(Arc::new(Shared { streams: Mutex::default(), instance: Mutex::default(), outbox }))
    }

    /// Begins to serve streams. Called when the instance's program runs.
    pub(crate) fn enable(&self, instance: Instance) {
        raise_open_files();
        *self.0.instance.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(instance));
    }

    /// Takes over the identity of another instance: programs started from now on get its hostname, and requests must
    /// carry its token.
    pub(crate) fn take_identity(&self, token: Token, hostname: &str) {
        let mut instance = self.0.instance.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = instance.as_ref() {
            let config = Config { hostname: hostname.to_owned(), ..old.config.clone() };
            let children = old.children.clone();
            *instance = Some(Arc::new(Instance { token, config, children }));
        }
    }

    /// Handles a frame of a stream. Never waits, because the port's thread calls it.
    pub(crate) fn take(&self, frame: Frame) {
        if frame.kind == FrameKind::Open {
            return self.open(&frame);
        }
        let stream = self.streams().get(&frame.stream).cloned();
        // An unknown stream has ended already, and the host does not know it yet.
        if let Some(stream) = stream {
            stream.take(frame);
        }
    }

    /// Closes all streams: the host is gone or was replaced, so nothing that was begun for it goes on.
    pub(crate) fn close_all(&self) {
        let streams = std::mem::take(&mut *self.streams());
        streams.values().for_each(|stream| stream.close());
        self.0.outbox.clear();
    }

    fn open(&self, frame: &Frame) {
        let refuse = |message: &str| {
            let failed = FromStream::Failed { message: message.to_owned(), code: None, path: None };
            if let Ok(reported) = Frame::json(FrameKind::Message, frame.stream, &failed) {
                self.0.outbox.put_now(reported.encode());
            }
            self.0.outbox.put_now(Frame::bare(FrameKind::Close, frame.stream).encode());
        };
        let Some(open) = frame.parse::<Open>() else { return refuse("the request was not understood") };
        let instance = self.0.instance.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(instance) = instance else { return refuse("the guest is not ready") };
        if open.token != instance.token {
            return refuse("the request is not of this boot");
        }
        if self.streams().len() >= STREAMS_MAX {
            return refuse("too many streams at once");
        }
        let Ok(stream) = Stream::new(frame.stream, open.window, self.0.outbox.clone()) else {
            return refuse("the guest is out of file descriptors");
        };
        let stream = Arc::new(stream);
        self.streams().insert(frame.stream, stream.clone());
        let (agent, id) = (self.clone(), frame.stream);
        let thread = std::thread::Builder::new().name(format!("stream {id}")).stack_size(STACK_BYTES);
        let spawned = thread.spawn(move || {
            serve(&stream, open.request, &instance);
            agent.streams().remove(&id);
            stream.end();
        });
        if spawned.is_err() {
            self.streams().remove(&id);
            refuse("the guest cannot start a thread");
        }
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Stream>>> {
        self.0.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Raises the limit on open files so that all streams get their descriptors. Spawned programs get a lower limit.
fn raise_open_files() {
    let own = getrlimit(Resource::Nofile);
    let current = own.maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    // With a lower limit, streams beyond it are refused with a message.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..own });
}

fn serve(stream: &Arc<Stream>, request: Request, instance: &Instance) {
    match request {
        Request::Exec(request) => exec::run(stream, &request, instance),
        Request::CopyTo(request) => copy_to::run(stream, &request),
        Request::CopyFrom(request) => copy_from::run(stream, &request),
        Request::Stat(request) => drop(stream.message(&FromStream::Info(stat::observe(&request)))),
    }
}
