//! The vm reconciler.
