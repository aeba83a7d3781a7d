//! Tests of the runtime as a whole, in virtual time.
