//! One way to get a byte off the host per subcommand, each by the bare system
//! calls. Says on its last line of output what became of it.

mod control;
mod groups;
mod packet;
mod process;
mod reach;
mod sockets;
mod steps;
mod tcp;
mod tls;
mod udp;
mod unix;
mod uring;
mod wire;

use mcp_sensor_tests::report::{READY, Report};
use std::net::{IpAddr, SocketAddr};
use wire::{Attempt, Stop};

/// Where to, from the command line.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) to: IpAddr,
    pub(crate) port: u16,
    /// A first hop, a group's source, a second address: as the attempt says.
    pub(crate) via: Option<IpAddr>,
    /// What to exec instead of this program.
    pub(crate) program: Option<String>,
    pub(crate) rest: Vec<String>,
}

impl Target {
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::new(self.to, self.port)
    }

    pub(crate) fn via(&self) -> Result<IpAddr, Stop> {
        self.via.ok_or(Stop { step: "--via is missing", errno: libc::EINVAL })
    }
}

fn find(name: &str) -> Option<Attempt> {
    [
        tcp::ALL,
        udp::ALL,
        packet::ALL,
        groups::ALL,
        uring::ALL,
        process::ALL,
        sockets::ALL,
        control::ALL,
        unix::ALL,
        reach::ALL,
        steps::ALL,
    ]
    .iter()
    .flat_map(|all| all.iter())
    .find(|(n, _)| *n == name)
    .map(|(_, f)| *f)
}

fn usage(problem: &str) -> ! {
    eprintln!(
        "attempt: {problem}\nusage: attempt NAME --to IP [--port N] [--via IP] [--as UID] [--program PATH] [--pause] [-- REST…]"
    );
    std::process::exit(2);
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let Some(name) = arguments.next() else { usage("which?") };
    let mut target =
        Target { to: IpAddr::from([0, 0, 0, 0]), port: 0, via: None, program: None, rest: Vec::new() };
    while let Some(option) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| usage(&format!("{option} needs a value")));
        match option.as_str() {
            "--to" => target.to = value().parse().unwrap_or_else(|_| usage("--to: no IP address")),
            "--port" => target.port = value().parse().unwrap_or_else(|_| usage("--port: no port")),
            "--via" => target.via = Some(value().parse().unwrap_or_else(|_| usage("--via: no IP address"))),
            "--as" => become_user(value().parse().unwrap_or_else(|_| usage("--as: no user id"))),
            "--program" => target.program = Some(value()),
            "--pause" => pause(),
            "--" => {
                target.rest = arguments.collect();
                break;
            }
            other => usage(&format!("unknown option {other}")),
        }
    }
    let Some(attempt) = find(&name) else { usage(&format!("no attempt {name}")) };
    println!("{}", report(attempt(&target)));
}

pub(crate) fn report(result: wire::Tried) -> String {
    let report = match result {
        Ok(answered) => Report::Done { answered },
        Err(Stop { step, errno }) => Report::Stopped { step: step.to_string(), errno },
    };
    serde_json::to_string(&report).expect("a report is plain data")
}

fn become_user(uid: u32) {
    let (user, group) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(uid));
    let became = nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setresgid(group, group, group))
        .and_then(|()| nix::unistd::setresuid(user, user, user));
    became.unwrap_or_else(|e| usage(&format!("--as {uid}: {e}")));
}

/// Lets the test do something first.
pub(crate) fn pause() {
    println!("{READY}");
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
}
