//! What everyone else pays: calls of a process that has nothing to do with any
//! server, while the sensor has nothing to read, and while it reads one.

use std::{
    fs::OpenOptions,
    io::{self, Read as _, Write as _},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mcp_sensor_tests::cgroup::Subtree;

use crate::{
    Report,
    agent::{Agent, policy},
    client::{CPU, Server, Session, enter, pin},
    figures::median,
};

const CALLS: [&str; 3] = ["getppid()", "write() of 1 byte to /dev/null", "write() of 1 byte to a pipe"];
type Figures = [f64; CALLS.len()];

/// Prints the median nanoseconds of each call.
pub(crate) fn measure(milliseconds: u64) -> Result<()> {
    let time = Duration::from_millis(milliseconds);
    let parent = batches(
        time,
        || {
            // SAFETY: no memory is passed.
            unsafe { libc::syscall(libc::SYS_getppid) };
            Ok(())
        },
        || Ok(()),
    )?;
    let mut null = OpenOptions::new().write(true).open("/dev/null")?;
    let thrown = batches(time, || null.write(b"x").map(drop), || Ok(()))?;
    let (mut from, mut to) = io::pipe()?;
    let mut drain = [0; BATCH as usize];
    let piped = batches(time, || to.write(b"x").map(drop), || from.read_exact(&mut drain))?;
    println!("{parent} {thrown} {piped}");
    Ok(())
}

/// Calls that are timed together.
const BATCH: u32 = 500;

/// Nanoseconds of one call; `rest` is not timed.
fn batches(
    time: Duration,
    mut call: impl FnMut() -> io::Result<()>,
    mut rest: impl FnMut() -> io::Result<()>,
) -> Result<f64> {
    let mut samples = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let from = Instant::now();
        for _ in 0..BATCH {
            call()?;
        }
        samples.push(from.elapsed().as_nanos() as f64 / f64::from(BATCH));
        rest()?;
    }
    ensure!(!samples.is_empty(), "no sample in the given time");
    Ok(median(samples))
}

fn measured(cgroup: &Subtree) -> Result<Figures> {
    const MILLISECONDS: u64 = 200;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["others", "--milliseconds", &MILLISECONDS.to_string()]);
    // Pipes for both would make it a candidate.
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    enter(&mut command, cgroup.entrance()?);
    pin(&mut command, CPU);
    let said = command.output()?;
    let text = String::from_utf8_lossy(&said.stdout);
    let figures: Vec<f64> = text.split_whitespace().filter_map(|t| t.parse().ok()).collect();
    figures.try_into().ok().with_context(|| format!("no figures: {text:?}"))
}

/// A program on the tracepoint where system calls return that does nothing:
/// what the kernel takes for having any there. Gone when both are closed.
struct Empty {
    _program: OwnedFd,
    _link: OwnedFd,
}

impl Empty {
    fn attach() -> Result<Empty> {
        /// linux/bpf.h; `struct bpf_insn`: code, registers, offset, constant.
        const PROG_LOAD: libc::c_int = 5;
        const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
        const TYPE_RAW_TRACEPOINT: u32 = 17;
        const RETURN_0: [u64; 2] = [0xb7, 0x95];
        #[repr(C)]
        struct Load {
            kind: u32,
            instructions: u32,
            at: *const u64,
            license: *const libc::c_char,
        }
        #[repr(C)]
        struct Open {
            name: *const libc::c_char,
            program: i32,
            zero: i32,
        }
        let load = Load {
            kind: TYPE_RAW_TRACEPOINT,
            instructions: RETURN_0.len() as u32,
            at: RETURN_0.as_ptr(),
            license: c"GPL".as_ptr(),
        };
        let program = bpf(PROG_LOAD, &load).context("an empty program cannot be loaded")?;
        let open = Open { name: c"sys_exit".as_ptr(), program: program.as_raw_fd(), zero: 0 };
        let link = bpf(RAW_TRACEPOINT_OPEN, &open).context("an empty program cannot be attached")?;
        Ok(Empty { _program: program, _link: link })
    }
}

/// bpf(2), the commands that return a descriptor.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attributes, and what they point to, live over the call, and
    // their size is given; the kernel takes what is missing as zero.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just made and that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

struct Round {
    before: Figures,
    empty: Figures,
    idle: Figures,
    reading: Figures,
    after: Figures,
}

fn round(report: &Report) -> Result<Round> {
    let cgroup = Subtree::new()?;
    let before = measured(&cgroup)?;
    let empty = {
        let _attached = Empty::attach()?;
        measured(&cgroup)?
    };
    let (idle, reading) = {
        let agent = Agent::start_with(report, &cgroup, &policy(None), &["--stdio-linger", "0"])?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while agent.reads()? {
            ensure!(Instant::now() < deadline, "the sensor reads though there is nothing to read");
            std::thread::sleep(Duration::from_millis(100));
        }
        let idle = measured(&cgroup)?;
        let mut command = agent.launch(&std::env::current_exe()?)?;
        command.arg("echo");
        enter(&mut command, cgroup.entrance()?);
        let mut events = agent.events();
        let mut session = Session::open(Server::start(command)?)?;
        session.call("x")?;
        events.wait("the server's call", |e| e.kind == "tool_call")?;
        ensure!(agent.reads()?, "the sensor does not read");
        (idle, measured(&cgroup)?)
    };
    Ok(Round { before, empty, idle, reading, after: measured(&cgroup)? })
}

pub(crate) fn report(report: &Report) -> Result<String> {
    let rounds: Vec<Round> = (0..report.rounds).map(|_| round(report)).collect::<Result<_>>()?;
    let mut text = String::from(
        "\n### Everyone else\n\n| call of an unlabelled process | no sensor | sensor, nothing to read | \
         empty program on sys_exit | sensor reads a server |\n|---|---|---|---|---|\n",
    );
    for (at, call) in CALLS.into_iter().enumerate() {
        let without = |r: &Round| f64::midpoint(r.before[at], r.after[at]);
        let column = |of: fn(&Round) -> &Figures| {
            let added = median(rounds.iter().map(|r| of(r)[at] - without(r)));
            format!("{:.0} ns ({added:+.0} ns)", median(rounds.iter().map(|r| of(r)[at])))
        };
        text += &format!(
            "| {call} | {:.0} ns | {} | {} | {} |\n",
            median(rounds.iter().map(without)),
            column(|r| &r.idle),
            column(|r| &r.empty),
            column(|r| &r.reading)
        );
    }
    Ok(text
        + "\nIn brackets: more than without a sensor, in the same round. The empty program is what the kernel takes for \
               any program where system calls return, which is where the back end `syscall` sits.\n")
}
