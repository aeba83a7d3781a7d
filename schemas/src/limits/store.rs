//! Limits of the store.

/// Largest number of stored objects of one kind; lists and memory stay bounded.
pub const OBJECTS_PER_KIND_MAX: usize = 100_000;
/// Largest number of transactions that wait for the store's writer: some seconds of work; more would only
/// wait longer.
pub const STORE_QUEUE_MAX: usize = 1024;
/// Largest number of transactions that one commit makes durable: they share its cost well, and the wait of
/// the first is bounded.
pub const STORE_GROUP_MAX: usize = 256;
/// Largest number of keys of failed commits, which are all written again with the next commit. Beyond this
/// number new objects are refused, so that neither memory nor the next commit grows for as long as a disk
/// fails.
pub const STORE_SUSPECTS_MAX: usize = 4096;
/// Number of events that a watcher may lag behind before it must list again; about 200 bytes each.
pub const WATCH_RING_EVENTS: usize = 16_384;
