//! The `stead` program: `serve` is the daemon, every other verb a client or a tool.

use std::process::ExitCode;

fn main() -> ExitCode {
    stead::cli::main()
}
