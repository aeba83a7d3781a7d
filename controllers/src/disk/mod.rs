//! The disk reconciler.
