//! The network reconciler.
