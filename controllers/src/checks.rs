//! Invariants over a whole (store, machine) snapshot, written apart from every plan.
