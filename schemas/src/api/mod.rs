//! Wire types: what strangers read and write, apart from the stored types.
