//! Arguments of every command. The help texts are the manual: `meterr man DIR` writes them as man
//! pages.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use meterr_operators::event::Reason;
use meterr_operators::ids::Positions;
use meterr_operators::time::Time;

use crate::copy::Location;
use crate::quantity::parse_duration;

mod backup;
mod cluster;
mod nats;
mod prices;
mod values;

pub use backup::{
    BackupCommand, BackupCreateArgs, BackupListArgs, BackupPruneArgs, BackupRestoreArgs,
    BackupStoreArgs, BackupVerifyArgs, MirrorArgs, PromoteArgs,
};
pub use cluster::{ClusterCommand, ClusterDrainArgs, ClusterMoveArgs, ClusterStatusArgs, WaitArgs};
pub use nats::NatsArgs;
pub use prices::{
    PricesCommand, PricesImportArgs, PricesListArgs, PricesPreviewArgs, PricesSetArgs,
};
use values::{
    base_url, date_or_time, group_by, location, org, per_million, position, reason, speed, zipf,
};

const EXAMPLES: &str = "\
Examples:
  meterr demo                              replay a real trace, watch spend change, no set-up
  meterr serve                             run the engine on this machine
  meterr publish events.ndjson             send usage events
  meterr query acme --by user              what each user of acme spent, day by day
  meterr watch acme                        see each change as it is committed
  meterr prices import prices.json         take over a price map, after showing what it changes
  meterr verify                            recompute everything from the log and compare
  meterr backup create --store file:///b   save all logs, what is new since the last time

Exit codes:
  0    done
  1    failed; the message on stderr says why
  2    wrong usage or configuration
  3    publish: some lines were rejected, the others are durable
  4    verify: a view differs from its recomputation, or a checkpoint does not verify;
       log copy: the copy differs from its source; backup verify: a backup is not sound
  5    the server cannot be reached, or does not answer in time
  130  interrupted

Results go to stdout, everything else to stderr. With --json, stdout has JSON of the same form as \
the HTTP API's answers, which GET /openapi.json describes.";

/// Keeps every figure of AI spend exact and live.
///
/// Producers publish usage events; meterr keeps spend per user, model, feature and organisation exact
/// through duplicates, late events, corrections and price changes, and shows each change within
/// milliseconds.
#[derive(Debug, Parser)]
#[command(
    name = "meterr",
    version,
    after_long_help = EXAMPLES,
    after_help = "Run `meterr --help` for examples and exit codes, `meterr help COMMAND` for more on one.",
    max_term_width = 100,
    arg_required_else_help = true,
    subcommand_required = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Replay a real trace through an engine of its own and show spend change
    Demo(DemoArgs),
    /// Run the engine
    Serve(ServeArgs),
    /// Send usage events to a server
    Publish(PublishArgs),
    /// Show an org's spend
    Query(QueryArgs),
    /// Follow an org's spend as it changes
    Watch(WatchArgs),
    /// Show the largest spenders
    Top(TopArgs),
    /// Show usage that no price is known for
    Unpriced(UnpricedArgs),
    /// Show and change the price book
    #[command(subcommand)]
    Prices(PricesCommand),
    /// List, read and replay events that were not counted
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Show or change the time zone of an org's days and months
    #[command(subcommand)]
    TimeZone(TimeZoneCommand),
    /// List, declare and remove views that are kept live
    #[command(subcommand)]
    Views(ViewsCommand),
    /// Show the state of every shard of a server
    Status(StatusArgs),
    /// Show the nodes of a cluster, drain one, move a shard
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Recompute every view from the log and compare (stop the server first)
    Verify(VerifyArgs),
    /// Look after the checkpoints of a stopped server
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Make, list, verify and restore backups of a server at work
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Let a second region follow: mirror all streams to other NATS servers
    Mirror(MirrorArgs),
    /// Let the second region take over: make its mirrors the deployment's own streams
    Promote(PromoteArgs),
    /// Move the logs of a stopped server
    #[command(subcommand)]
    Log(LogCommand),
    /// Write a workload and the views it must lead to
    Gen(GenArgs),
    /// Check and print the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completion script of a shell
    Completions(CompletionsArgs),
    /// Write man pages into a directory
    Man(ManArgs),
}

/// Where the server is and how to print what it says.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// Server to ask
    #[arg(
        long,
        env = "METERR_URL",
        hide_env_values = true,
        default_value = "http://127.0.0.1:8080",
        value_parser = base_url,
        help_heading = "Server"
    )]
    pub url: String,
    /// Longest time to wait for an answer
    #[arg(long, default_value = "60s", value_parser = parse_duration, help_heading = "Server")]
    pub timeout: Duration,
    /// Print JSON as the HTTP API answers it
    #[arg(long)]
    pub json: bool,
}

/// Which configuration to use.
#[derive(Debug, Clone, Default, Args)]
pub struct ConfigArgs {
    /// Configuration file, laid over the defaults of `meterr config print --defaults`
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of logs and checkpoints (node.data_dir)
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// NATS servers whose JetStream keeps the logs (nats.url), instead of files
    #[arg(long, value_name = "URL")]
    pub nats: Option<String>,
}

/// `demo`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  meterr demo\n  meterr demo --speed 100\n  meterr demo --once --json | jq ."
)]
pub struct DemoArgs {
    /// Stop after one pass over the trace, with the final figures on stdout
    #[arg(long)]
    pub once: bool,
    /// Print JSON instead of a live table
    #[arg(long)]
    pub json: bool,
    /// How much faster than the trace's own time to replay; 0 means as fast as possible
    #[arg(long, default_value_t = 60.0, value_parser = speed)]
    pub speed: f64,
    /// Address of the HTTP API (http.address); port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub http: Option<SocketAddr>,
}

/// `serve`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  meterr serve
  meterr serve --config config/examples/server.toml
  METERR__TELEMETRY__FORMAT=json meterr serve --data-dir /var/lib/meterr
  meterr serve --nats nats://10.0.0.1:4222,nats://10.0.0.2:4222 --node a --data-dir /var/lib/meterr
  meterr serve --nats nats://10.0.0.1:4222 --replica

Nodes on the same NATS servers share the shards; see `meterr cluster --help`. The first SIGTERM or Ctrl-C drains and stops in order; a second one exits at once with code 130. \
Nothing acknowledged is lost either way.")]
pub struct ServeArgs {
    /// Which configuration to use.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Address of the HTTP API (http.address); port 0 takes a free one, printed on stdout
    #[arg(long, value_name = "ADDR")]
    pub http: Option<SocketAddr>,
    /// Name of this node in a cluster (cluster.node)
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Follow every shard and answer questions, and own none (cluster.replica)
    #[arg(long)]
    pub replica: bool,
    /// Go on where a shard stopped because its log's time jumped ahead (log.time_jump_max)
    #[arg(long)]
    pub accept_time_jump: bool,
}

/// `publish`
#[derive(Debug, Clone, Args)]
#[command(after_long_help = "\
The file has one JSON event a line (NDJSON). A line is rejected alone: the others count, the \
rejected ones are listed with their line numbers, and the exit code is 3. Sending again after any \
failure is safe, since an event counts once by its id.

Examples:
  meterr publish events.ndjson
  zcat old.ndjson.gz | meterr publish - --backfill
  tail -F usage.log | meterr publish -
  meterr publish events.ndjson --rejected-to fix-me.ndjson --json
  meterr publish events.ndjson --nats nats://127.0.0.1:4222

With --nats, events go to the usage streams of JetStream in messages of one shard each, and the last \
position stands for a server that reads them: nothing has counted them yet. Ctrl-C finishes what is \
under way and says what was not sent.")]
pub struct PublishArgs {
    /// File with one event a line, or - for stdin
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    /// Take usage older than the horizon too; copies of it are recognised only from now on
    #[arg(long)]
    pub backfill: bool,
    /// Most events in one request (1000 when not given) or NATS message (100), at most 1000 so that
    /// the server lists every rejected line
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000), value_name = "N")]
    pub batch_lines: Option<u32>,
    /// Requests under way at once (4 when not given, at most 64) or NATS messages (256)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4_096), value_name = "N")]
    pub in_flight: Option<u16>,
    /// Attempts per request before giving up, when the server is busy or away; with --nats, --timeout
    /// says how long each message is tried
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000), value_name = "N")]
    pub attempts: u32,
    /// Write rejected lines there, to be mended and published again
    #[arg(long, value_name = "FILE")]
    pub rejected_to: Option<PathBuf>,
    /// Where the NATS server is, if events go there.
    #[command(flatten)]
    pub nats: NatsArgs,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Window size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WindowArg {
    /// Hours of UTC
    Hour,
    /// Days in the org's time zone
    Day,
    /// Months in the org's time zone
    Month,
    /// All time
    All,
}

impl WindowArg {
    /// Its name in the HTTP API.
    pub fn name(self) -> &'static str {
        match self {
            WindowArg::Hour => "hour",
            WindowArg::Day => "day",
            WindowArg::Month => "month",
            WindowArg::All => "all",
        }
    }
}

/// `query`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  meterr query acme
  meterr query acme --window month --by model
  meterr query acme --user u-17 --window hour --from 2026-01-02
  meterr query acme --min-position 3:1042        # waits until that publish is counted
  meterr query acme --by tag:team --json | jq '.rows[].cost'")]
pub struct QueryArgs {
    /// The org
    #[arg(value_parser = org)]
    pub org: String,
    /// Only this user's spend
    #[arg(long)]
    pub user: Option<String>,
    /// Window size
    #[arg(long, value_enum, default_value = "day")]
    pub window: WindowArg,
    /// Group by none, user, model, provider, feature or tag:NAME
    #[arg(long, default_value = "none", value_parser = group_by)]
    pub by: String,
    /// Only windows that begin at or after this date or RFC 3339 time
    #[arg(long, value_name = "TIME", value_parser = date_or_time)]
    pub from: Option<Time>,
    /// Only windows that begin before this date or RFC 3339 time
    #[arg(long, value_name = "TIME", value_parser = date_or_time)]
    pub to: Option<Time>,
    /// Wait until this position, as publishing printed it, is counted
    #[arg(long, value_name = "POSITION", value_parser = position)]
    pub min_position: Option<Positions>,
    /// Most rows
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N")]
    pub limit: u32,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `watch`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Prints every row of the org as it is, then for each commit the rows it changed, with their new \
totals. Goes on after interruptions where it stopped.

Examples:
  meterr watch acme
  meterr watch acme --events 1              # one snapshot, then stop
  meterr watch acme --json                  # one JSON object an event, as the HTTP API sends it
  meterr watch acme --nats nats://127.0.0.1:4222")]
pub struct WatchArgs {
    /// The org
    #[arg(value_parser = org)]
    pub org: String,
    /// Stop after this many events
    #[arg(long, value_name = "N")]
    pub events: Option<u64>,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
    /// Where the NATS server is, instead of HTTP.
    #[command(flatten)]
    pub nats: NatsArgs,
}

/// What the rows of a top list are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TopByArg {
    /// Orgs
    Org,
    /// Users, with their org
    User,
    /// Models
    Model,
    /// Features
    Feature,
}

impl TopByArg {
    /// Its name in the HTTP API.
    pub fn name(self) -> &'static str {
        match self {
            TopByArg::Org => "org",
            TopByArg::User => "user",
            TopByArg::Model => "model",
            TopByArg::Feature => "feature",
        }
    }
}

/// `top`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  meterr top
  meterr top --by model --window month -n 5
  meterr top --by user --org acme --at 2026-01-02")]
pub struct TopArgs {
    /// What to rank
    #[arg(long, value_enum, default_value = "org")]
    pub by: TopByArg,
    /// Window size (hour ranks orgs only)
    #[arg(long, value_enum, default_value = "day")]
    pub window: WindowArg,
    /// The window that holds this date or RFC 3339 time, instead of the current one
    #[arg(long, value_name = "TIME", value_parser = date_or_time)]
    pub at: Option<Time>,
    /// Rows
    #[arg(short, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000), value_name = "N")]
    pub n: u32,
    /// Only this org's users, models or features
    #[arg(long, value_parser = org)]
    pub org: Option<String>,
    /// Wait until this position, as publishing printed it, is counted
    #[arg(long, value_name = "POSITION", value_parser = position)]
    pub min_position: Option<Positions>,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `unpriced`
#[derive(Debug, Clone, Args)]
pub struct UnpricedArgs {
    /// The org
    #[arg(value_parser = org)]
    pub org: String,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `dead-letters …`
#[derive(Debug, Clone, Subcommand)]
pub enum DeadLettersCommand {
    /// List events that were not counted, newest first
    List(DeadLettersListArgs),
    /// Show one with its bytes
    Show(DeadLettersShowArgs),
    /// Publish one again, as it is or mended
    Replay(DeadLettersReplayArgs),
}

/// `dead-letters list`
#[derive(Debug, Clone, Args)]
pub struct DeadLettersListArgs {
    /// Only of this reason
    #[arg(long, value_parser = reason)]
    pub reason: Option<Reason>,
    /// Only of this shard
    #[arg(long)]
    pub shard: Option<u16>,
    /// Only older than the one with this id
    #[arg(long, value_name = "ID")]
    pub before: Option<String>,
    /// Most rows
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000), value_name = "N")]
    pub limit: u32,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `dead-letters show`
#[derive(Debug, Clone, Args)]
pub struct DeadLettersShowArgs {
    /// Its id, as `meterr dead-letters list` shows it
    pub id: String,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `dead-letters replay`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  meterr dead-letters replay 3-88-1         # was too_far_ahead then, is not any more
  echo '{\"id\":…}' | meterr dead-letters replay 3-88-1 --mended -")]
pub struct DeadLettersReplayArgs {
    /// Its id, as `meterr dead-letters list` shows it
    pub id: String,
    /// File with the line to publish in its place, or - for stdin
    #[arg(long, value_name = "FILE|-")]
    pub mended: Option<PathBuf>,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `time-zone …`
#[derive(Debug, Clone, Subcommand)]
pub enum TimeZoneCommand {
    /// Show an org's time zone
    Get(TimeZoneGetArgs),
    /// Change an org's time zone; its days and months are cut anew, history included
    Set(TimeZoneSetArgs),
}

/// `time-zone get`
#[derive(Debug, Clone, Args)]
pub struct TimeZoneGetArgs {
    /// The org
    #[arg(value_parser = org)]
    pub org: String,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `time-zone set`
#[derive(Debug, Clone, Args)]
pub struct TimeZoneSetArgs {
    /// The org
    #[arg(value_parser = org)]
    pub org: String,
    /// IANA time zone, such as Europe/Berlin
    pub time_zone: String,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `views …`
#[derive(Debug, Clone, Subcommand)]
pub enum ViewsCommand {
    /// List declared views
    List(ViewsListArgs),
    /// Declare a view, which is then kept live
    Declare(ViewsDeclareArgs),
    /// Remove a declared view
    Remove(ViewsRemoveArgs),
}

/// `views list`
#[derive(Debug, Clone, Args)]
pub struct ViewsListArgs {
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `views declare`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  meterr views declare user_by_feature --by user,feature --window day"
)]
pub struct ViewsDeclareArgs {
    /// Its name: 1 to 64 of a-z, 0-9 and _
    pub name: String,
    /// One to four of user, model, provider, feature, tag:NAME
    #[arg(long, required = true, value_delimiter = ',')]
    pub by: Vec<String>,
    /// Window size
    #[arg(long, value_enum, default_value = "day")]
    pub window: WindowArg,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `views remove`
#[derive(Debug, Clone, Args)]
pub struct ViewsRemoveArgs {
    /// Its name
    pub name: String,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `status`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Of several nodes any can be asked; `meterr cluster status` shows the nodes too. Exit code 1 when a \
shard is stopped.")]
pub struct StatusArgs {
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `verify`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Reads the log from its beginning, recomputes every view the slow and obvious way, and compares \
with what was committed. Exit code 4 when anything differs.

Examples:
  meterr verify
  meterr verify --data-dir /var/lib/meterr --shard 3 --json")]
pub struct VerifyArgs {
    /// Which configuration to use.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Only this shard; may be given several times
    #[arg(long, value_name = "N")]
    pub shard: Vec<u16>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `checkpoint …`
#[derive(Debug, Clone, Subcommand)]
pub enum CheckpointCommand {
    /// List checkpoints
    List(CheckpointArgs),
    /// Verify every checkpoint; exit code 4 when one does not
    Verify(CheckpointArgs),
    /// Write the newest checkpoint of a shard that verifies into a file
    Export(CheckpointFileArgs),
    /// Take a checkpoint from a file
    Import(CheckpointFileArgs),
}

/// `checkpoint list` and `checkpoint verify`
#[derive(Debug, Clone, Args)]
pub struct CheckpointArgs {
    /// Which configuration to use.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Only this shard; may be given several times
    #[arg(long, value_name = "N")]
    pub shard: Vec<u16>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `checkpoint export` and `checkpoint import`
#[derive(Debug, Clone, Args)]
pub struct CheckpointFileArgs {
    /// The shard
    #[arg(long)]
    pub shard: u16,
    /// The file
    pub file: PathBuf,
    /// Which configuration to use.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `log …`
#[derive(Debug, Clone, Subcommand)]
pub enum LogCommand {
    /// Copy a deployment to NATS or back, and compare everything
    Copy(LogCopyArgs),
}

/// `log copy`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Copies all logs with positions, log times and identities, so that checkpoints stay good. The target \
must be empty or hold the beginning of the same deployment: an interrupted copy goes on when the same \
command is run again. Then every record is read back and compared, every view is recomputed from both \
sides, and every row is compared; exit code 4 when anything differs. Nobody may write to the source \
meanwhile; it is left as it was.

Examples:
  meterr log copy --from embedded:/var/lib/meterr --to nats://10.0.0.1:4222 --replicas 3
  meterr log copy --from nats://10.0.0.1:4222 --to embedded:/srv/meterr
  meterr log copy --from embedded:old --to embedded:new --json

User, password and certificates for NATS come from the configuration ([nats]) or the URL.")]
pub struct LogCopyArgs {
    /// Where the deployment is
    #[arg(long, value_name = "embedded:DIR|nats:URL", value_parser = location)]
    pub from: Location,
    /// Where it is to be
    #[arg(long, value_name = "embedded:DIR|nats:URL", value_parser = location)]
    pub to: Location,
    /// Servers that keep a copy of each stream created (nats.replicas)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub replicas: Option<u8>,
    /// Configuration file, laid over the defaults of `meterr config print --defaults`
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `gen`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Writes events.ndjson, prices.json (to be imported first), expected/*.csv and, last of all, \
workload.json, whose presence means that the directory is complete. Shares are in percent of the \
events, such as 5 or 0.1%. The same options give the same bytes.

Examples:
  meterr gen /tmp/workload --events 1000000
  meterr prices import /tmp/workload/prices.json --yes
  meterr publish /tmp/workload/events.ndjson")]
pub struct GenArgs {
    /// Directory to write into, created when absent
    pub dir: PathBuf,
    /// Events; the lines are a little more
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000), value_name = "N")]
    pub events: u64,
    /// Seed of everything random
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Orgs
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub orgs: u32,
    /// Users of all orgs together
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000), value_name = "N")]
    pub users: u32,
    /// Exponent of Zipf's law over orgs and users, 0 (all alike) to 4
    #[arg(long, default_value_t = 1.1, value_parser = zipf, value_name = "X")]
    pub zipf: f64,
    /// Date or RFC 3339 time of the first event
    #[arg(long, default_value = "2026-01-01", value_name = "TIME", value_parser = date_or_time)]
    pub start: Time,
    /// Days the events are spread over
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3_660), value_name = "N")]
    pub days: u32,
    /// Share of events older than those around them
    #[arg(long, default_value = "2", value_name = "PERCENT", value_parser = per_million)]
    pub late: u32,
    /// By how many hours they are older, at most
    #[arg(long, default_value_t = 72, value_parser = clap::value_parser!(u32).range(0..=87_840), value_name = "N")]
    pub late_hours_max: u32,
    /// Share of events sent a second time
    #[arg(long, default_value = "1", value_name = "PERCENT", value_parser = per_million)]
    pub duplicates: u32,
    /// Share of events corrected by a revision
    #[arg(long, default_value = "0.5", value_name = "PERCENT", value_parser = per_million)]
    pub corrections: u32,
    /// Share of events taken back by a void
    #[arg(long, default_value = "0.2", value_name = "PERCENT", value_parser = per_million)]
    pub voids: u32,
    /// How many events later the second line of an event is sent, at most
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000), value_name = "N")]
    pub resend_distance_max: u64,
    /// Print what was written as JSON
    #[arg(long)]
    pub json: bool,
}

/// `config …`
#[derive(Debug, Clone, Subcommand)]
pub enum ConfigCommand {
    /// Check the configuration and report every problem at once
    Check(ConfigCheckArgs),
    /// Print the configuration in force and where it comes from
    Print(ConfigPrintArgs),
}

/// `config check`
#[derive(Debug, Clone, Args)]
pub struct ConfigCheckArgs {
    /// Which configuration to use.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `config print`
#[derive(Debug, Clone, Args)]
pub struct ConfigPrintArgs {
    /// Which configuration to use.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print the file of all keys with their defaults and what they mean instead
    #[arg(long, conflicts_with_all = ["config", "data_dir", "json"])]
    pub defaults: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `completions`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  meterr completions bash > ~/.local/share/bash-completion/completions/meterr
  meterr completions zsh > ~/.zfunc/_meterr
  meterr completions fish > ~/.config/fish/completions/meterr.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// `man`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  meterr man ~/.local/share/man/man1 && man meterr-publish")]
pub struct ManArgs {
    /// The directory, created when absent
    pub dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("meterr").chain(line.split(' ')))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_parses() {
        for line in [
            "demo",
            "demo --once --json --speed 0 --http 127.0.0.1:0",
            "serve",
            "serve --config c.toml --data-dir d --http 127.0.0.1:1 --accept-time-jump",
            "publish -",
            "publish f --backfill --url http://h:1 --batch-lines 7 --in-flight 2 --attempts 3 \
             --rejected-to r --json --timeout 5s",
            "query acme",
            "query acme --user u --window month --by tag:team --from 2026-01-02 \
             --to 2026-01-02T03:00:00+01:00 --min-position 3:1,c:2 --limit 5 --json",
            "watch acme --json --events 3",
            "top --by user --window all -n 3 --org acme --at 2026-01-02 --json",
            "unpriced acme --json",
            "prices list --model m --json",
            "prices import f --effective-from 2026-01-02 --yes --json",
            "prices preview -",
            "prices set p m --input 1 --cached-input 0.1 --cache-write 2 --cache-write-1h 3 \
             --output 4 --reasoning 5 --audio-input 6 --audio-output 7 --image 8 --search 9 \
             --tier batch --min-input-tokens 128000 --org acme --effective-from 2026-01-01 --yes",
            "prices set p m --withdraw",
            "dead-letters list --reason too_late --shard 3 --before 3-1-1 --limit 5",
            "dead-letters show 3-1-1 --json",
            "dead-letters replay 3-1-1 --mended -",
            "time-zone get acme",
            "time-zone set acme Europe/Berlin",
            "views list",
            "views declare v --by user,tag:team --window hour",
            "views remove v",
            "status --json",
            "cluster status --json",
            "cluster drain n2 --wait --wait-max 5m",
            "cluster drain n2 --undo --json",
            "cluster move 3 n2 --wait",
            "cluster move 3 --auto",
            "verify --config c --data-dir d --shard 1 --shard 2 --json",
            "checkpoint list --json",
            "checkpoint verify --shard 1",
            "checkpoint export --shard 1 f",
            "checkpoint import --shard 1 f --data-dir d",
            "log copy --from embedded:d --to nats://h:4222 --replicas 3 --config c --json",
            "gen d --events 5 --seed 7 --orgs 1 --users 1 --zipf 0 --start 2026-01-01 --days 2 \
             --late 0.1 --late-hours-max 3 --duplicates 5% --corrections 1 --voids 1 \
             --resend-distance-max 9 --json",
            "config check --config c --json",
            "config print --defaults",
            "completions zsh",
            "man d",
        ] {
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            if let Err(error) = parse(&line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn wrong_arguments_say_what_would_be_right() {
        for (line, expected) in [
            ("query a.b", "an org is 1 to 128 characters"),
            ("query a --by week", "must be none, user, model, provider, feature or tag:NAME"),
            ("query a --from yesterday", "or a date such as 2026-01-02"),
            ("query a --from 2026-02-30", "no such day in the calendar"),
            ("query a --min-position x", "not a position such as"),
            ("query a --url https://h", "only http is spoken"),
            ("query a --url h:80", "must begin with http://"),
            ("query a --url http://h/path", "must be a host and port only"),
            ("query a --timeout 5", "a whole number with the unit"),
            ("publish f --batch-lines 0", "1..=1000"),
            ("gen d --late 101", "must be a percentage from 0 to 100"),
            ("gen d --late NaN", "must be a percentage from 0 to 100"),
            ("gen d --zipf 5", "must be a number from 0 to 4"),
            ("dead-letters list --reason late", "must be one of malformed, missing_field"),
            ("prices set p m --withdraw --input 1", "cannot be used with"),
            ("log copy --from d --to embedded:e", "must be embedded:DIR or nats:URL"),
            ("log copy --from embedded:d --to nats:a --replicas 6", "6 is not in 1..=5"),
            ("cluster move 3", "required arguments were not provided"),
            ("cluster move 3 n2 --auto", "cannot be used with"),
            ("cluster move x n2", "invalid digit"),
            ("cluster drain n2 --wait-max 5m", "required arguments were not provided"),
            ("demo --speed -1", "unexpected argument"),
            ("serve --nat x", "unexpected argument '--nat'"),
        ] {
            let error = parse(line).map(drop).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn help_teaches_with_examples_and_exit_codes() {
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("meterr publish events.ndjson") && help.contains("  3    publish"));
    }
}
