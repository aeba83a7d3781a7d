//! The one file that knows every concrete type: builds and runs the daemon.
