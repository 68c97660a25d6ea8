//! The `meterr` binary.

use std::process::ExitCode;

// The system's allocator keeps what short-lived batches took from many threads; this one gives it
// back and costs less a call.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    meterr_engine::cli::main(&meterr_engine::commands::Engine)
}
