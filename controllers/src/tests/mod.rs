//! Tests of what several rooms do together.

mod registry_asks;
mod verbs;
