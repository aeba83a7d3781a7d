//! Host capabilities: the real adapters of the ports.
