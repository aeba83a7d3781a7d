//! VMM drivers behind the port `Machines`.
