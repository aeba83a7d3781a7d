//! Tests of the interaction of several modules.

mod registry_asks;
mod room;
mod verbs;
