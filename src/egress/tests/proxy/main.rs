//! The proxy between real clients and real servers on loopback. Numbers of rows are those of the attack table.

mod bounds;
mod certificates;
mod client;
mod explicit;
mod framing;
mod http2;
mod injection;
mod isolation;
mod observing;
mod origin;
mod passthrough;
mod plain;
mod rotation;
mod secrets;
mod streaming;
mod world;
