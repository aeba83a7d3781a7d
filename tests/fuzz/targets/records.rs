//! Records of a database, as a store finds them when it opens.
#![no_main]

use std::sync::Arc;

use futures::future::BoxFuture;
use stead_controllers::runtime::{Clock, Ids};
use stead_controllers::store::{Batch, Kv, KvError, SealError, Sealer, Store};
use stead_schemas::names::Uid;

/// Version of the stored form, which stands before the checksum.
const VERSION: u8 = 1;

struct Pairs(Vec<(Vec<u8>, Vec<u8>)>);

impl Kv for Pairs {
    fn load(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), KvError> {
        self.0.iter().for_each(|(key, value)| visit(key, value));
        Ok(())
    }
    fn commit(&self, _: Batch) -> BoxFuture<'_, Result<(), KvError>> {
        Box::pin(async { Ok(()) })
    }
}

/// Opens everything: what lies behind the seal is what is fuzzed.
struct Unsealed;

impl Sealer for Unsealed {
    fn seal(&self, plain: &[u8], _: &[u8]) -> Result<Vec<u8>, SealError> {
        Ok(plain.to_vec())
    }
    fn open(&self, sealed: &[u8], _: &[u8]) -> Result<Vec<u8>, SealError> {
        Ok(sealed.to_vec())
    }
}

struct Still;

impl Clock for Still {
    fn now(&self) -> jiff::Timestamp {
        jiff::Timestamp::UNIX_EPOCH
    }

    fn elapsed(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

impl Ids for Still {
    fn next(&self) -> Uid {
        "abcdefghijklmnopqrstuvwx".parse().expect("an id")
    }
}

// Lines by turns are a key and its value. A value that begins with `!` is stored as the rest is, another one with
// the checksum that it has to have.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let lines: Vec<&[u8]> = data.split(|&byte| byte == b'\n').collect();
    let pairs = lines.chunks_exact(2).map(|pair| (pair[0].to_vec(), stored(pair[0], pair[1])));
    let kinds = stead::assemble::kinds();
    let opened =
        Store::open(Pairs(pairs.collect()), Arc::new(Unsealed), Arc::new(Still), Arc::new(Still), kinds);
    if let Err(error) = opened {
        drop(error.to_string());
    }
});

fn stored(key: &[u8], line: &[u8]) -> Vec<u8> {
    if let Some(raw) = line.strip_prefix(b"!") {
        return raw.to_vec();
    }
    let mut sum = crc32fast::Hasher::new();
    sum.update(key);
    sum.update(line);
    [&[VERSION], &sum.finalize().to_le_bytes()[..], line].concat()
}
