//! The command line. Each subcommand is a file of its name.

mod bugtool;
mod bundle;
mod calls;
mod certs;
mod client;
mod collect;
mod collector;
mod confine;
mod doctor;
mod events;
mod exec;
mod exit;
mod fleet;
mod generate;
mod log;
mod names;
mod output;
mod policy;
mod release;
mod servers;
mod status;
mod tls;
mod tools;
mod top;

pub use calls::CallsArgs;
pub use certs::CertsCommand;
pub use collect::CollectArgs;
pub use exit::{Exit, Failure};
pub use fleet::FleetArgs;
pub use policy::PolicyCommand;
pub use tls::TlsArgs;
pub use tools::ToolsArgs;
pub use top::TopArgs;

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

pub const DEFAULT_CONTROL: &str = "/run/mcp-sensor/control.sock";
pub const DEFAULT_STATE_DIR: &str = "/var/lib/mcp-sensor";
pub const DEFAULT_POLICY: &str = "/etc/mcp-sensor/policy.yaml";
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7117";

/// Holds MCP servers to the network their profile allows, and records what they do.
#[derive(Debug, Parser)]
#[command(name = "mcp-sensor", version, propagate_version = true, after_help = exit::TABLE)]
#[command(max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// What to log on stderr: error, warn, info, debug, trace, or a filter such as "mcp_sensor::feed=debug".
    #[arg(long, global = true, env = "MCP_SENSOR_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,

    /// Form of the log.
    #[arg(long, global = true, env = "MCP_SENSOR_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Form of what a command prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Run(Box<RunArgs>),
    Collect(CollectArgs),
    Fleet(FleetArgs),
    Exec(ExecArgs),
    Status(StatusArgs),
    Servers(ServersArgs),
    Names(NamesArgs),
    Events(EventsArgs),
    Calls(CallsArgs),
    Tools(ToolsArgs),
    Top(TopArgs),
    #[command(subcommand)]
    Policy(PolicyCommand),
    Mode(ModeArgs),
    Release(ReleaseArgs),
    Doctor(DoctorArgs),
    Bugtool(BugtoolArgs),
    #[command(subcommand)]
    Certs(CertsCommand),
    Completions(CompletionsArgs),
    /// What the sensor starts to see whether it is refused.
    #[command(hide = true)]
    Canary,
    Man(ManArgs),
}

/// A number of MiB that the kernel makes a ring of.
fn ring_size(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(n) if n.is_power_of_two() && n <= 1024 => Ok(n),
        _ => Err("a power of two from 1 to 1024".to_owned()),
    }
}

/// Run the sensor on this host.
///
/// Prints one line `ready` on stdout (and notifies systemd) once every verdict is
/// enforced. The policy is read again when its file changes and on SIGHUP; a bad
/// file changes nothing.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor run
  mcp-sensor run --policy policy.yaml --control /tmp/s.sock --state-dir /tmp/s --events events.ndjson
  mcp-sensor run --collector https://collector.example:7117 --tls-ca ca.pem \\
    --tls-cert sensor-web-1.pem --tls-key sensor-web-1-key.pem --sensor web-1
  mcp-sensor run --metrics 9464 --otlp http://127.0.0.1:4317")]
pub struct RunArgs {
    /// Policy file (YAML).
    #[arg(long, env = "MCP_SENSOR_POLICY", value_name = "FILE", default_value = DEFAULT_POLICY)]
    pub policy: PathBuf,

    /// Unix socket that `status`, `events`, `exec`, … talk to.
    #[arg(long, env = "MCP_SENSOR_CONTROL", value_name = "SOCKET", default_value = DEFAULT_CONTROL)]
    pub control: PathBuf,

    /// Group that may read from the control socket (it always needs root to change something).
    #[arg(long, env = "MCP_SENSOR_CONTROL_GROUP", value_name = "GROUP")]
    pub control_group: Option<String>,

    /// Where the sensor keeps what outlives it.
    #[arg(long, env = "MCP_SENSOR_STATE_DIR", value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,

    /// Write every event to this file too, one JSON object a line.
    #[arg(long, env = "MCP_SENSOR_EVENTS", value_name = "FILE")]
    pub events: Option<PathBuf>,

    /// Start a new file when `--events` would grow beyond this; 0: never.
    #[arg(long, env = "MCP_SENSOR_EVENTS_MAX_BYTES", value_name = "BYTES", default_value_t = 0)]
    pub events_max_bytes: u64,

    /// Full files kept beside the current one.
    #[arg(long, env = "MCP_SENSOR_EVENTS_KEEP", value_name = "N", default_value_t = 4)]
    pub events_keep: u32,

    /// Send events to this collector: https://HOST:PORT, on this host also http://127.0.0.1:PORT or
    /// unix:/PATH. Without it they are collected in this process, below the state directory. Again
    /// for others that are fed while those before do not take events, in this order.
    #[arg(long, env = "MCP_SENSOR_COLLECTOR", value_name = "ADDR", value_delimiter = ',')]
    pub collector: Vec<String>,

    #[command(flatten)]
    pub tls: TlsArgs,

    /// Group of this sensor: the collector gives it the policies of the group.
    #[arg(long, env = "MCP_SENSOR_GROUP", value_name = "NAME", requires = "collector")]
    pub group: Option<String>,

    /// Take policies from the collector that are signed with this key (PEM, `policy keygen` makes
    /// it); again for another key. What both the signed policy and --policy allow is allowed;
    /// without --policy's file, what the signed one allows.
    #[arg(
        long,
        env = "MCP_SENSOR_POLICY_KEY",
        value_name = "FILE",
        value_delimiter = ',',
        requires = "collector"
    )]
    pub policy_key: Vec<PathBuf>,

    /// Where events wait that the collector has not acknowledged; default: `spool` below the state
    /// directory. They outlive the sensor.
    #[arg(long, env = "MCP_SENSOR_SPOOL", value_name = "DIR", requires = "collector")]
    pub spool: Option<PathBuf>,

    /// What the spool may hold. Beyond it telemetry goes first, denials and findings last; what went
    /// is told by a loss event.
    #[arg(long, env = "MCP_SENSOR_SPOOL_BYTES", value_name = "BYTES", default_value_t = 256 << 20,
          value_parser = clap::value_parser!(u64).range(1 << 20..))]
    pub spool_bytes: u64,

    /// Serve metrics to Prometheus at http://ADDR/metrics, and /healthz and /readyz beside them. ADDR
    /// is PORT (on 127.0.0.1), IP:PORT or [IPV6]:PORT; whoever reaches it may read the names of servers and tools.
    #[arg(long, env = "MCP_SENSOR_METRICS", value_name = "ADDR",
          value_parser = crate::metrics::parse_address)]
    pub metrics: Option<std::net::SocketAddr>,

    /// Send the same metrics to this OpenTelemetry collector (OTLP over gRPC), twice a minute:
    /// http://HOST:4317, or https:// where it has TLS.
    #[arg(long, env = "MCP_SENSOR_OTLP", value_name = "URL")]
    pub otlp: Option<crate::metrics::Endpoint>,

    /// Cgroup (v2) that the programs are attached to; default: the root, found through mountinfo.
    #[arg(long, env = "MCP_SENSOR_CGROUP", value_name = "PATH")]
    pub cgroup: Option<PathBuf>,

    /// Name of this sensor in events; default: derived from /etc/machine-id.
    #[arg(long, env = "MCP_SENSOR_SENSOR", value_name = "NAME")]
    pub sensor: Option<String>,

    /// Tasks that can carry a label; default: pid_max.
    #[arg(long, env = "MCP_SENSOR_LABEL_CAPACITY", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub label_capacity: Option<u32>,

    /// Start although a core hook cannot be attached; what is not enforced is reported.
    #[arg(long, env = "MCP_SENSOR_ALLOW_DEGRADED", conflicts_with = "strict")]
    pub allow_degraded: bool,

    /// How stdio is read. Absent: by `function` where the kernel allows fexit programs, else by
    /// `syscall`.
    #[arg(long, env = "MCP_SENSOR_CAPTURE", value_name = "BACKEND", value_enum)]
    pub capture: Option<crate::kernel::capture::Backend>,

    /// Size of the ring that what servers say waits in, MiB: a power of two. One call that moves
    /// more than fits is recorded in part.
    #[arg(long, env = "MCP_SENSOR_STDIO_RING", value_name = "MIB", default_value = "8",
          value_parser = ring_size)]
    pub stdio_ring: u32,

    /// Seconds that the programs which read stdio stay attached after the last server or candidate,
    /// and from the start on. A server that comes later may have spoken before they are back: that
    /// is told as lost.
    #[arg(long, env = "MCP_SENSOR_STDIO_LINGER", value_name = "SECONDS", default_value = "300")]
    pub stdio_linger: u32,

    /// Let go of every server when the sensor is told to end (SIGTERM, SIGINT), as `mcp-sensor
    /// release` does. Without it what is enforced stays in the kernel until then, also when the
    /// sensor ends.
    #[arg(long, env = "MCP_SENSOR_RELEASE_ON_EXIT")]
    pub release_on_exit: bool,

    /// How often a labelled child of the sensor tries what must be refused, in every network namespace
    /// that servers use; what is not refused is a finding of severity `critical`, and the sensor is
    /// not ready. 0: never.
    #[arg(long, env = "MCP_SENSOR_CANARY_INTERVAL", value_name = "SECONDS", default_value = "60")]
    pub canary_interval: u32,

    /// Refuse to start if anything, optional hooks included, cannot be enforced here.
    #[arg(long, env = "MCP_SENSOR_STRICT")]
    pub strict: bool,
}

/// How to reach the agent.
#[derive(Args, Debug, Clone)]
pub struct ControlArgs {
    /// The agent's control socket.
    #[arg(long, env = "MCP_SENSOR_CONTROL", value_name = "SOCKET", default_value = DEFAULT_CONTROL)]
    pub control: PathBuf,
}

#[derive(Args, Debug, Clone)]
pub struct OutputArgs {
    /// Form of the output.
    #[arg(short, long, env = "MCP_SENSOR_OUTPUT", value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Become an instance of a server, then execute a command.
///
/// The label is on this process before the command is executed, so nothing of
/// it runs unjudged. Descriptors other than stdin, stdout and stderr are closed.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor exec --server github -- npx -y @modelcontextprotocol/server-github
In a client's configuration, put it in front of the server's command:
  \"command\": \"mcp-sensor\", \"args\": [\"exec\", \"--server\", \"time\", \"--\", \"uvx\", \"mcp-server-time\"]
Where `mcp-sensor status` says that lsm_family, lsm_ptrace and lsm_bpf are not enforced:
  mcp-sensor exec --server time --confine -- uvx mcp-server-time")]
pub struct ExecArgs {
    #[command(flatten)]
    pub control: ControlArgs,

    /// The server, as the policy names it.
    #[arg(long, env = "MCP_SENSOR_SERVER", value_name = "NAME")]
    pub server: String,

    /// Refuse by seccomp what the kernel's BPF LSM would: families of sockets that are neither IP nor
    /// unix, bpf(), ptrace(), process_vm_readv(), process_vm_writev(), pidfd_getfd(), and io_uring.
    /// Not for servers in audit; nothing of it is recorded; programs gain no privileges by exec.
    #[arg(long)]
    pub confine: bool,

    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<std::ffi::OsString>,
}

/// What the sensor is, enforces, and has lost.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor status
  mcp-sensor status -o json
  mcp-sensor status --check || systemctl restart mcp-sensor")]
pub struct StatusArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// End with 9 if the sensor does not do its work: a hook is not attached any more, the rings are
    /// not read, no policy is in force. Prints only why.
    #[arg(long)]
    pub check: bool,
}

/// Servers and their running instances.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor servers
  mcp-sensor servers --server github -o json")]
pub struct ServersArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Only this one.
    #[arg(long, value_name = "NAME")]
    pub server: Option<String>,
}

/// Addresses that servers learned by DNS: by which name, until when, from whom.
///
/// A rule by name opens the addresses that the server itself asked for, until
/// their time is over; connections that are open then stay open.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor names
  mcp-sensor names --server github -o json")]
pub struct NamesArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Only of this server.
    #[arg(long, value_name = "NAME")]
    pub server: Option<String>,
}

/// A verdict as `--verdict` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum VerdictArg {
    Allow,
    Deny,
    WouldDeny,
}

/// Recorded events.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor events --verdict deny
  mcp-sensor events --follow --server github -o json
  mcp-sensor events --since 10m
  mcp-sensor events --follow --format ocsf >> /var/log/mcp-sensor.ocsf.json
  mcp-sensor events --type finding,drift --format ecs
  mcp-sensor events --collector 127.0.0.1:7117 --sensor web-1 --since 2h
  mcp-sensor events --collector 127.0.0.1:7117 --follow --cursor-file /var/lib/siem/cursor -o json")]
pub struct EventsArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Read from this collector, not from the agent: https://HOST:PORT, http://127.0.0.1:PORT or
    /// unix:/PATH.
    #[arg(long, value_name = "ADDR")]
    pub collector: Option<String>,
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Follow a collector from here: `begin`, `now`, or a cursor in hex.
    #[arg(long, value_name = "begin|now|CURSOR", requires = "collector", requires = "follow",
          conflicts_with_all = ["since", "limit"])]
    pub from: Option<String>,
    /// Follow a collector from the cursor in this file, or from the beginning if there is none yet;
    /// keeps the cursor there after what was printed.
    #[arg(long, value_name = "FILE", requires = "collector", requires = "follow",
          conflicts_with_all = ["since", "limit", "from"])]
    pub cursor_file: Option<PathBuf>,
    /// Only of these sensors (several with commas).
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "collector")]
    pub sensor: Vec<String>,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Form for another system, one JSON object a line; takes precedence over --output.
    #[arg(long, value_enum)]
    pub format: Option<crate::format::Format>,
    /// Then those to come, until interrupted.
    #[arg(short, long)]
    pub follow: bool,
    /// Only of this server.
    #[arg(long, value_name = "NAME")]
    pub server: Option<String>,
    /// Only these verdicts (several with commas).
    #[arg(long, value_enum, value_delimiter = ',')]
    pub verdict: Vec<VerdictArg>,
    /// Only these types (several with commas): connection, dns, loss, …
    #[arg(long = "type", value_name = "TYPE", value_delimiter = ',',
          value_parser = clap::builder::PossibleValuesParser::new(crate::event::json::TYPES))]
    pub types: Vec<String>,
    /// Not older than this: 90s, 10m, 2h, 1d, or a time as in events.
    #[arg(long, value_name = "AGE|TIME")]
    pub since: Option<String>,
    /// At most so many past events, the newest.
    #[arg(short = 'n', long, value_name = "N")]
    pub limit: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    Audit,
    Enforce,
}

/// Switch one server between audit and enforce, until a policy is loaded (needs root).
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor mode --server github enforce")]
pub struct ModeArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// The server, as the policy names it.
    #[arg(long, value_name = "NAME")]
    pub server: String,
    #[arg(value_enum)]
    pub mode: ModeArg,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Let go of every server: take the sensor's programs and maps out of the kernel (needs root).
///
/// What a sensor enforces stays in force when it ends, is killed or upgraded. This is the way to
/// end it: labels, policy and counters go, and nothing is judged any more. Refused while the sensor
/// runs.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  systemctl stop mcp-sensor && mcp-sensor release
  mcp-sensor release --state-dir /tmp/s
  mcp-sensor release --pins /sys/fs/bpf/mcp_sensor/0123456789abcdef -o json")]
pub struct ReleaseArgs {
    /// State directory of the sensor, as `run` was given it.
    #[arg(long, env = "MCP_SENSOR_STATE_DIR", value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// The pin directory itself, where its state directory is not known any more.
    #[arg(long, value_name = "DIR", conflicts_with = "state_dir")]
    pub pins: Option<PathBuf>,
    /// Also while a sensor runs that holds it: it goes on running, and enforces nothing.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What this host can enforce: each prerequisite and each hook.
#[derive(Args, Debug, Clone)]
pub struct DoctorArgs {
    /// Cgroup (v2) to try the programs on; default: the root.
    #[arg(long, env = "MCP_SENSOR_CGROUP", value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Make one archive with what a maintainer needs to know of this sensor.
///
/// What this host can enforce, what the sensor says of itself, its policy, the newest of its
/// findings and losses, its log, what the kernel has loaded. Arguments of programs are left out, and
/// so is what the rules for secrets and personal data find. What cannot be had is named in
/// manifest.json. It needs root to be complete.
#[derive(Args, Debug, Clone)]
#[command(after_help = "Examples:
  mcp-sensor bugtool
  mcp-sensor bugtool --file /tmp/sensor.tar.gz
  ssh web-1 mcp-sensor bugtool --file - | tar -tz")]
pub struct BugtoolArgs {
    #[command(flatten)]
    pub control: ControlArgs,
    /// Policy file of the sensor.
    #[arg(long, env = "MCP_SENSOR_POLICY", value_name = "FILE", default_value = DEFAULT_POLICY)]
    pub policy: PathBuf,
    /// The archive, which must not be there yet; `-`: stdout. Default: a file with the time in its
    /// name, in this directory.
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Completions for a shell, on stdout.
#[derive(Args, Debug, Clone)]
pub struct CompletionsArgs {
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Write man pages into a directory.
#[derive(Args, Debug, Clone)]
pub struct ManArgs {
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// The whole program; `main` is this.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = log::start(&cli.log, cli.log_format) {
        return exit::report(&error);
    }
    let done = match &cli.command {
        Command::Run(args) => crate::agent::run((**args).clone()),
        Command::Collect(args) => collect::run(args),
        Command::Fleet(args) => fleet::run(args),
        Command::Exec(args) => exec::run(args),
        Command::Status(args) => status::run(args),
        Command::Servers(args) => servers::run(args),
        Command::Names(args) => names::run(args),
        Command::Events(args) => events::run(args),
        Command::Calls(args) => calls::run(args),
        Command::Tools(args) => tools::run(args),
        Command::Top(args) => top::run(args),
        Command::Policy(command) => policy::run(command),
        Command::Mode(args) => servers::mode(args),
        Command::Release(args) => release::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bugtool(args) => bugtool::run(args),
        Command::Certs(command) => certs::run(command),
        Command::Canary => crate::agent::canary::child::run(),
        Command::Completions(args) => generate::completions(args),
        Command::Man(args) => generate::man(args),
    };
    done.unwrap_or_else(|error| exit::report(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_does_in_words_of_its_own() {
        fn walk(command: &clap::Command, said: &mut std::collections::HashSet<String>) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty() && said.insert(about.clone()), "{}: {about:?}", command.get_name());
            command.get_subcommands().for_each(|c| walk(c, said));
        }
        walk(&Cli::command(), &mut std::collections::HashSet::new());
    }

    #[test]
    fn every_option_of_run_has_a_variable_with_the_prefix() {
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        for option in run.get_arguments() {
            let expected = format!("MCP_SENSOR_{}", option.get_id().as_str().to_uppercase());
            assert_eq!(option.get_env().and_then(|v| v.to_str()), Some(expected.as_str()));
        }
    }
}
