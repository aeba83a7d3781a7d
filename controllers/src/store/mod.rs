//! The typed store over a small trait `Kv`; it knows no kind.
