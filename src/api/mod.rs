//! The HTTP API: wire to store and back.
