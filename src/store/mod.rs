//! The embedded database behind `Kv`.
