//! The proxy of mediated egress.
