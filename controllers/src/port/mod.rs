//! The port reconciler.
