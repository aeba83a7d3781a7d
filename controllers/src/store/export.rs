//! A consistent copy of the whole store, for backups.
//!
//! The writer takes the copy between two groups, so that it is one durable state. It costs the writer one
//! reference for each object; the caller does the sealing and writing.

use std::borrow::Cow;

use super::codec::{self, Sealer};
use super::error::StoreError;
use super::key::Key;
use super::object::Erased;
use super::{Store, TransactError};

/// A durable state of the whole store.
#[derive(Debug)]
pub struct Export {
    pub(super) objects: Vec<Erased>,
    /// The names and claims of these objects.
    pub(super) marks: Vec<Key>,
    pub revision: u64,
    /// Number of records that cannot be read and are not part of the export.
    pub unreadable: usize,
}

impl Export {
    /// Number of pairs that [`Export::pairs`] yields.
    #[must_use]
    pub fn len(&self) -> usize {
        self.objects.len() + self.marks.len() + 1
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns the pairs of keys and values of a database that holds this state.
    pub fn pairs<'a>(
        &'a self,
        sealer: &'a dyn Sealer,
    ) -> impl Iterator<Item = Result<(String, Vec<u8>), StoreError>> + 'a {
        let objects = self.objects.iter().map(move |object| {
            let meta = object.meta();
            let key = Key::Object { kind: Cow::Borrowed(object.kind()), uid: meta.uid.clone() }.to_string();
            let failed = |cause: String| StoreError::Encode { key: key.clone(), cause };
            let plain = object.encode().map_err(|error| failed(error.to_string()))?;
            let value = codec::seal(sealer, &key, &plain).map_err(|error| failed(error.to_string()))?;
            Ok((key, value))
        });
        let marks = self.marks.iter().map(|key| {
            let text = key.to_string();
            let value = codec::frame(&text, &[]);
            Ok((text, value))
        });
        let revision = std::iter::once_with(|| {
            let text = Key::Revision.to_string();
            let value = codec::frame(&text, &self.revision.to_le_bytes());
            Ok((text, value))
        });
        objects.chain(marks).chain(revision)
    }
}

impl Store {
    /// Takes a copy of the whole store.
    ///
    /// # Errors
    /// Returns an error if the writer has ended, has too much to do, or cannot store earlier writes.
    pub async fn export(&self) -> Result<Export, StoreError> {
        let taken = self.transact(|tx| Ok::<_, std::convert::Infallible>(tx.export())).await;
        taken.map_err(|error| match error {
            TransactError::Store(error) => error,
            TransactError::Refused(never) => match never {},
        })
    }
}
