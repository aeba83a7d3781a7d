//! The image reconciler.
