//! The command line: parses, runs one command, prints results to stdout and everything else to
//! stderr, and turns the outcome into an exit code.
//!
//! Errors travel as `anyhow` chains and are printed once, here. What needs an engine inside the
//! process stands behind [`Commands`]; all other commands talk to a server over HTTP.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::Parser;
use meterr_connectors::nats::connection::ConnectError;
use meterr_connectors::nats::producer::NotSent;
use toml::Value;

use crate::config::{self, ConfigError, Loaded, Sources};
use crate::copy::Location;
use crate::settings::Settings;
use crate::telemetry;

pub mod args;
mod client;
mod cluster;
mod configuration;
mod console;
mod control;
mod dead_letters;
mod manual;
mod prices;
mod publish;
mod query;
mod sse;
mod table;
#[cfg(test)]
mod testing;
mod watch;

use args::{
    BackupCommand, BackupStoreArgs, CheckpointCommand, Cli, Command, ConfigArgs, DemoArgs, GenArgs,
    LogCommand, LogCopyArgs, MirrorArgs, PromoteArgs, ServeArgs, VerifyArgs,
};
pub use client::ClientError;
pub use console::Console;
pub use table::{Table, count};

/// How a command ended. The numbers are part of the command line's contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// Some lines were rejected, the others are durable.
    Rejected = 3,
    /// A view differs from its recomputation, a checkpoint does not verify, or a copy differs from its
    /// source.
    Different = 4,
    /// The server cannot be reached, or does not answer in time.
    Unreachable = 5,
    /// Interrupted.
    Interrupted = crate::shutdown::INTERRUPTED as isize,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Commands that run an engine, or a part of one, inside this process. The log is set up already;
/// results belong on the console's `out`.
pub trait Commands {
    /// `serve`: runs until shut down.
    ///
    /// # Errors
    /// When the engine cannot start, or stops by a fault.
    fn serve(&self, settings: Settings, args: &ServeArgs) -> anyhow::Result<Exit>;

    /// `demo`: the settings are those in force with the flags applied; the data directory is the
    /// command's own business.
    ///
    /// # Errors
    /// As `serve`.
    fn demo(
        &self,
        settings: Settings,
        args: &DemoArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit>;

    /// `verify`: [`Exit::Different`] when anything differs.
    ///
    /// # Errors
    /// When the log cannot be read.
    fn verify(
        &self,
        settings: Settings,
        args: &VerifyArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit>;

    /// `checkpoint …`: `verify` ends in [`Exit::Different`] when one does not verify.
    ///
    /// # Errors
    /// When the store or the file cannot be read or written.
    fn checkpoint(
        &self,
        settings: Settings,
        command: &CheckpointCommand,
        console: &mut Console,
    ) -> anyhow::Result<Exit>;

    /// `backup …`: `verify` and `restore` end in [`Exit::Different`] when something is not as it was
    /// saved.
    ///
    /// # Errors
    /// When the store, the deployment or the key cannot be used.
    fn backup(
        &self,
        settings: Settings,
        command: &BackupCommand,
        console: &mut Console,
    ) -> anyhow::Result<Exit>;

    /// `mirror`.
    ///
    /// # Errors
    /// When either region cannot be used.
    fn mirror(
        &self,
        settings: Settings,
        args: &MirrorArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit>;

    /// `promote`.
    ///
    /// # Errors
    /// When the mirrors do not fit together, or a region cannot be used.
    fn promote(
        &self,
        settings: Settings,
        args: &PromoteArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit>;

    /// `log copy`: [`Exit::Different`] when the copy differs from its source.
    ///
    /// # Errors
    /// When it cannot be copied or compared.
    fn log_copy(
        &self,
        settings: Settings,
        args: &LogCopyArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit>;

    /// `gen`.
    ///
    /// # Errors
    /// When an output cannot be written.
    fn generate(&self, args: &GenArgs, console: &mut Console) -> anyhow::Result<Exit>;
}

/// A wrong use of the command line that the parser cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// Runs the process's command line.
pub fn main(commands: &dyn Commands) -> ExitCode {
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect::<Vec<_>>();
    run(std::env::args_os(), &environment, &mut Console::of_process(), commands).into()
}

/// Runs a command line.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    environment: &[(String, String)],
    console: &mut Console,
    commands: &dyn Commands,
) -> Exit {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Prints help and versions to stdout, errors to stderr. There is nothing to do about a
            // failure to print.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Done };
        }
    };
    let result = dispatch(&cli.command, environment, console, commands);
    let result = result.and_then(|exit| console.out.flush().map(|()| exit).map_err(Into::into));
    result.unwrap_or_else(|error| {
        if broken_pipe(&error) {
            // Whoever read our output has seen enough, as in `meterr query acme | head`.
            return Exit::Done;
        }
        let _ = writeln!(console.err, "error: {error:#}");
        exit_of(&error)
    })
}

fn dispatch(
    command: &Command,
    environment: &[(String, String)],
    console: &mut Console,
    commands: &dyn Commands,
) -> anyhow::Result<Exit> {
    let load = |config: &ConfigArgs, flags: Vec<Flag>| settings(config, environment, flags);
    let http = |address: Option<std::net::SocketAddr>| {
        let flag =
            |a: std::net::SocketAddr| ("--http", "http.address", Value::String(a.to_string()));
        address.map(flag).into_iter().collect::<Vec<Flag>>()
    };
    match command {
        Command::Serve(args) => {
            let mut flags = http(args.http);
            if let Some(node) = &args.node {
                flags.push(("--node", "cluster.node", Value::String(node.clone())));
            }
            if args.replica {
                flags.push(("--replica", "cluster.replica", Value::Boolean(true)));
            }
            let loaded = load(&args.config, flags)?;
            log(&loaded, "info")?;
            commands.serve(loaded.settings, args)
        }
        Command::Demo(args) => {
            let loaded = load(&ConfigArgs::default(), http(args.http))?;
            log(&loaded, "warn")?;
            commands.demo(loaded.settings, args, console)
        }
        Command::Verify(args) => {
            let loaded = load(&args.config, Vec::new())?;
            log(&loaded, "warn")?;
            commands.verify(loaded.settings, args, console)
        }
        Command::Checkpoint(command) => {
            let config = match command {
                CheckpointCommand::List(args) | CheckpointCommand::Verify(args) => &args.config,
                CheckpointCommand::Export(args) | CheckpointCommand::Import(args) => &args.config,
            };
            let loaded = load(config, Vec::new())?;
            log(&loaded, "warn")?;
            commands.checkpoint(loaded.settings, command, console)
        }
        Command::Backup(command) => {
            let BackupStoreArgs { store, key_file, config, .. } = command.store();
            let path = |path: &std::path::Path| Value::String(path.display().to_string());
            let store =
                store.as_ref().map(|url| ("--store", "backup.store", Value::String(url.clone())));
            let key = key_file.as_deref().map(|file| ("--key-file", "backup.key_file", path(file)));
            let loaded = settings(config, environment, store.into_iter().chain(key).collect())?;
            log(&loaded, "warn")?;
            commands.backup(loaded.settings, command, console)
        }
        Command::Mirror(args) => {
            let loaded = load(&args.config, vec![])?;
            log(&loaded, "warn")?;
            commands.mirror(loaded.settings, args, console)
        }
        Command::Promote(args) => {
            let loaded = load(&args.config, vec![])?;
            log(&loaded, "warn")?;
            commands.promote(loaded.settings, args, console)
        }
        Command::Log(LogCommand::Copy(args)) => {
            if args.from == args.to {
                return Err(UsageError("--from and --to are the same place".to_owned()).into());
            }
            // The rest of [nats] counts only with an address.
            let url = [&args.from, &args.to].into_iter().find_map(|location| match location {
                Location::Nats(url) => Some(Value::String(url.clone())),
                Location::Embedded(_) => None,
            });
            let config = ConfigArgs { config: args.config.clone(), ..ConfigArgs::default() };
            let loaded = load(
                &config,
                url.map(|url| ("--from or --to", "nats.url", url)).into_iter().collect(),
            )?;
            log(&loaded, "warn")?;
            commands.log_copy(loaded.settings, args, console)
        }
        Command::Gen(args) => commands.generate(args, console),
        Command::Publish(args) => publish::publish(args, console),
        Command::Query(args) => query::query(args, console),
        Command::Watch(args) => watch::watch(args, console),
        Command::Top(args) => query::top(args, console),
        Command::Unpriced(args) => query::unpriced(args, console),
        Command::Prices(command) => prices::prices(command, console),
        Command::DeadLetters(command) => dead_letters::dead_letters(command, console),
        Command::TimeZone(command) => control::time_zone(command, console),
        Command::Views(command) => control::views(command, console),
        Command::Status(args) => control::status(args, console),
        Command::Cluster(command) => cluster::cluster(command, console),
        Command::Config(command) => configuration::configuration(command, environment, console),
        Command::Completions(args) => manual::completions(args, console),
        Command::Man(args) => manual::man(args, console),
    }
}

/// A flag that sets something of the configuration: the flag, the key, the value.
type Flag = (&'static str, &'static str, Value);

/// Reads the configuration that a command's arguments name.
fn settings(
    args: &ConfigArgs,
    environment: &[(String, String)],
    mut flags: Vec<Flag>,
) -> anyhow::Result<Loaded> {
    if let Some(dir) = &args.data_dir {
        let Some(dir) = dir.to_str() else {
            return Err(UsageError(format!("--data-dir {dir:?} is not UTF-8")).into());
        };
        flags.push(("--data-dir", "node.data_dir", Value::String(dir.to_owned())));
    }
    if let Some(url) = &args.nats {
        flags.push(("--nats", "nats.url", Value::String(url.clone())));
    }
    let environment = environment.to_vec();
    Ok(config::load(&Sources { file: args.config.clone(), environment, flags })?)
}

/// Sets up the log, at `level` where the configuration does not ask for one.
fn log(loaded: &Loaded, level: &str) -> anyhow::Result<()> {
    let mut wanted = loaded.settings.telemetry.clone();
    if !loaded.origins.contains_key("telemetry.log") {
        level.clone_into(&mut wanted.log);
    }
    match telemetry::init(&wanted) {
        // A process that runs several commands keeps its first log.
        Ok(()) | Err(telemetry::TelemetryError::Twice) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if error.is::<UsageError>() || error.is::<ConfigError>() {
        return Exit::Usage;
    }
    match error.downcast_ref::<ConnectError>() {
        Some(ConnectError::Address { .. } | ConnectError::Credentials { .. }) => {
            return Exit::Usage;
        }
        Some(ConnectError::Refused { .. }) => return Exit::Unreachable,
        Some(ConnectError::Old { .. }) | None => {}
    }
    if error.downcast_ref::<NotSent>().is_some_and(NotSent::silent) {
        return Exit::Unreachable;
    }
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. } | ClientError::Silent { .. }) => Exit::Unreachable,
        _ => Exit::Failed,
    }
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::testing::{NoCommands, run, run_with};
    use super::*;

    /// Remembers what it was asked.
    #[derive(Default)]
    struct Asked(RefCell<Vec<(String, Settings)>>);

    impl Commands for Asked {
        fn serve(&self, settings: Settings, args: &ServeArgs) -> anyhow::Result<Exit> {
            let what = format!("serve {}", args.accept_time_jump);
            self.0.borrow_mut().push((what, settings));
            Ok(Exit::Interrupted)
        }
        fn demo(
            &self,
            settings: Settings,
            _: &DemoArgs,
            console: &mut Console,
        ) -> anyhow::Result<Exit> {
            self.0.borrow_mut().push(("demo".to_owned(), settings));
            writeln!(console.out, "shown")?;
            Ok(Exit::Done)
        }
        fn verify(
            &self,
            settings: Settings,
            _: &VerifyArgs,
            _: &mut Console,
        ) -> anyhow::Result<Exit> {
            self.0.borrow_mut().push(("verify".to_owned(), settings));
            Ok(Exit::Different)
        }
        fn checkpoint(
            &self,
            settings: Settings,
            _: &CheckpointCommand,
            _: &mut Console,
        ) -> anyhow::Result<Exit> {
            self.0.borrow_mut().push(("checkpoint".to_owned(), settings));
            Err(io::Error::from(io::ErrorKind::BrokenPipe).into())
        }
        fn backup(
            &self,
            settings: Settings,
            _: &BackupCommand,
            _: &mut Console,
        ) -> anyhow::Result<Exit> {
            self.0.borrow_mut().push(("backup".to_owned(), settings));
            Ok(Exit::Done)
        }
        fn mirror(&self, _: Settings, _: &MirrorArgs, _: &mut Console) -> anyhow::Result<Exit> {
            Ok(Exit::Done)
        }
        fn promote(&self, _: Settings, _: &PromoteArgs, _: &mut Console) -> anyhow::Result<Exit> {
            Ok(Exit::Done)
        }
        fn log_copy(
            &self,
            settings: Settings,
            args: &LogCopyArgs,
            _: &mut Console,
        ) -> anyhow::Result<Exit> {
            self.0.borrow_mut().push((format!("log copy {}", args.to), settings));
            Ok(Exit::Done)
        }
        fn generate(&self, _: &GenArgs, _: &mut Console) -> anyhow::Result<Exit> {
            Err(anyhow::anyhow!("disk full").context("cannot write \"x\""))
        }
    }

    #[test]
    fn commands_of_the_engine_get_checked_settings_with_flags_applied() {
        let asked = Asked::default();
        let ran = run_with(
            &["serve", "--data-dir", "/d", "--http", "127.0.0.1:1", "--accept-time-jump"],
            None,
            &asked,
        );
        assert_eq!(ran.exit, Exit::Interrupted);
        let ran = run_with(&["demo", "--http", "127.0.0.1:0"], None, &asked);
        assert_eq!((ran.exit, ran.out.as_str()), (Exit::Done, "shown\n"));
        let ran = run_with(&["verify", "--data-dir", "/v"], None, &asked);
        assert_eq!(ran.exit, Exit::Different);
        let copy = ["log", "copy", "--from", "embedded:/l", "--to", "nats:n1:4222"];
        assert_eq!(run_with(&copy, None, &asked).exit, Exit::Done);
        let backup =
            ["backup", "list", "--store", "file:///b", "--key-file", "k", "--data-dir", "/b"];
        assert_eq!(run_with(&backup, None, &asked).exit, Exit::Done);
        let ran = run_with(&["checkpoint", "list", "--data-dir", "/c"], None, &asked);
        assert_eq!((ran.exit, ran.err.as_str()), (Exit::Done, ""), "a closed pipe is no error");
        let asked = asked.0.into_inner();
        let dirs: Vec<_> = asked
            .iter()
            .map(|(what, settings)| (what.as_str(), settings.node.data_dir.to_str().unwrap()))
            .collect();
        let expected = [
            ("serve true", "/d"),
            ("demo", "./meterr-data"),
            ("verify", "/v"),
            ("log copy nats:n1:4222", "./meterr-data"),
            ("backup", "/b"),
            ("checkpoint", "/c"),
        ];
        assert_eq!(dirs, expected);
        assert_eq!(asked[0].1.http.address.port(), 1);
        let nats = asked[3].1.nats.as_ref().unwrap();
        assert_eq!(nats.connection.url, "n1:4222");
        let backup = &asked[4].1.backup;
        assert_eq!(backup.store.as_deref(), Some("file:///b"));
        assert_eq!(backup.key_file.as_deref(), Some(std::path::Path::new("k")));
        let same = ["log", "copy", "--from", "embedded:/l", "--to", "embedded:/l"];
        let ran = run(&same);
        assert_eq!(
            (ran.exit, ran.err.contains("the same place")),
            (Exit::Usage, true),
            "{}",
            ran.err
        );
    }

    #[test]
    fn an_error_is_one_chain_printed_once() {
        let ran = run_with(&["gen", "d"], None, &Asked::default());
        assert_eq!(
            (ran.exit, ran.err.as_str()),
            (Exit::Failed, "error: cannot write \"x\": disk full\n")
        );
    }

    #[test]
    fn a_wrong_flag_is_reported_like_a_wrong_setting() {
        let ran = run(&["serve", "--http", "0.0.0.0:80"]);
        assert_eq!(ran.exit, Exit::Usage);
        assert!(
            ran.err.starts_with(
                "error: 1 setting is wrong:\n  http.address = \"0.0.0.0:80\" (from --http) must be"
            ),
            "{}",
            ran.err
        );
        assert_eq!(run(&["serve", "--config", "/no/such"]).exit, Exit::Usage);
    }

    #[test]
    fn the_environment_is_part_of_the_configuration() {
        let mut console = Console {
            input: None,
            out: Box::new(io::sink()),
            err: Box::new(io::sink()),
            interactive: false,
            progress: false,
        };
        let args = ["meterr", "config", "check"].map(OsString::from);
        let environment = vec![("METERR__NODE__SHARDS".to_owned(), "0".to_owned())];
        assert_eq!(super::run(args, &environment, &mut console, &NoCommands), Exit::Usage);
    }

    #[test]
    fn completions_and_man_pages_are_made() {
        let ran = run(&["completions", "bash"]);
        assert!(ran.out.contains("dead-letters"), "{}", ran.out);
        let dir = tempfile::tempdir().unwrap();
        let man = dir.path().join("man1");
        let ran = run(&["man", man.to_str().unwrap()]);
        assert_eq!(ran.exit, Exit::Done, "{}", ran.err);
        let page = std::fs::read_to_string(man.join("meterr-publish.1")).unwrap();
        assert!(page.contains("rejected"), "{page}");
    }
}
