//! Shell completions and man pages, both made from the definition of the arguments.

use anyhow::Context;
use clap::CommandFactory;

use super::args::{Cli, CompletionsArgs, ManArgs};
use super::{Console, Exit};

/// `meterr completions`
pub(super) fn completions(args: &CompletionsArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "meterr", &mut script);
    console.out.write_all(&script)?;
    Ok(Exit::Done)
}

/// `meterr man`
pub(super) fn man(args: &ManArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let dir = &args.dir;
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
        .with_context(|| format!("cannot write man pages into {}", dir.display()))?;
    writeln!(console.err, "man pages written to {}", dir.display())?;
    Ok(Exit::Done)
}
