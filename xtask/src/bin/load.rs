//! What `cargo xtask bench` times: one operation in a tight loop, pinned to a
//! CPU, from inside a cgroup.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::wait::{WaitStatus, waitpid},
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    },
    unistd::{ForkResult, Pid, fork},
};

#[derive(Parser)]
struct Arguments {
    /// Moves itself there first
    #[arg(long)]
    cgroup: Option<PathBuf>,
    #[arg(long)]
    cpu: Option<usize>,
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Accepts and drains TCP, lets UDP overflow; ends with its stdin
    Listen,
    /// Prints the median nanoseconds of one call, or bytes a second
    Run {
        operation: Operation,
        #[arg(long)]
        tcp: u16,
        #[arg(long)]
        drain: u16,
        #[arg(long)]
        udp: u16,
        #[arg(long)]
        milliseconds: u64,
    },
    /// Sends to addresses that are allowed and have no route: each send is
    /// judged and recorded, and no packet follows. Prints how many
    Flood {
        #[arg(long)]
        per_second: u64,
        /// When to begin, milliseconds since 1970
        #[arg(long)]
        at: u64,
        #[arg(long)]
        milliseconds: u64,
    },
    /// Starts programs and connects, so many times a second each. Prints how many
    /// programs, how many connections, and the CPU seconds of it all
    Chores {
        #[arg(long)]
        execs: u64,
        #[arg(long)]
        connects: u64,
        #[arg(long)]
        tcp: u16,
        #[arg(long)]
        milliseconds: u64,
        /// The audit rules' own
        #[arg(long)]
        login_uid: u32,
    },
    /// Says `ready` when so many children sleep; ends with its stdin, and they
    /// with it
    Crowd { children: usize },
}

#[derive(Clone, Copy, ValueEnum)]
enum Operation {
    TcpConnect,
    UdpConnect,
    UdpSendto,
    TcpThroughput,
    ForkExec,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(cgroup) = &arguments.cgroup {
        let procs = cgroup.join("cgroup.procs");
        fs::write(&procs, std::process::id().to_string())
            .with_context(|| format!("cannot move to {}", procs.display()))?;
    }
    if let Some(cpu) = arguments.cpu {
        let mut cpus = CpuSet::new();
        cpus.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)?;
    }
    match arguments.role {
        Role::Listen => listen(),
        Role::Run { operation, tcp, drain, udp, milliseconds } => {
            let time = Duration::from_millis(milliseconds);
            let figure = match operation {
                Operation::TcpConnect => tcp_connect(tcp, time)?,
                Operation::UdpConnect => udp_connect(udp, time)?,
                Operation::UdpSendto => udp_sendto(udp, time)?,
                Operation::TcpThroughput => tcp_throughput(drain, time)?,
                Operation::ForkExec => fork_exec(time)?,
            };
            println!("{figure}");
            Ok(())
        }
        Role::Flood { per_second, at, milliseconds } => {
            println!("{}", flood(per_second, at, Duration::from_millis(milliseconds))?);
            Ok(())
        }
        Role::Chores { execs, connects, tcp, milliseconds, login_uid } => {
            fs::write("/proc/self/loginuid", login_uid.to_string()).context("cannot set the login uid")?;
            chores((execs, connects), tcp, Duration::from_millis(milliseconds))
        }
        Role::Crowd { children } => crowd(children),
    }
}

fn listen() -> Result<()> {
    let any = (Ipv4Addr::LOCALHOST, 0);
    let (accept, drain, sink) = (TcpListener::bind(any)?, TcpListener::bind(any)?, UdpSocket::bind(any)?);
    println!("{} {} {}", accept.local_addr()?.port(), drain.local_addr()?.port(), sink.local_addr()?.port());
    io::stdout().flush()?;
    thread::spawn(move || {
        for connection in accept.incoming() {
            drop(connection);
        }
    });
    thread::spawn(move || {
        for connection in drain.incoming().flatten() {
            thread::spawn(move || swallow(connection));
        }
    });
    // Nobody reads the sink: a full queue drops at a constant price, where a
    // reader would add the noise of its wake-ups.
    let mut ends = Vec::new();
    io::stdin().read_to_end(&mut ends)?;
    drop(sink);
    Ok(())
}

/// Answers the end of the stream with the number of bytes it carried.
fn swallow(mut connection: TcpStream) {
    let mut buffer = vec![0; 256 * 1024];
    let mut sum = 0_u64;
    while let Ok(read) = connection.read(&mut buffer) {
        if read == 0 {
            let _ = connection.write_all(&sum.to_be_bytes());
            return;
        }
        sum += read as u64;
    }
}

fn median(samples: &mut [f64]) -> Result<f64> {
    if samples.is_empty() {
        bail!("no sample in the given time");
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[samples.len() / 2])
}

fn stream() -> Result<OwnedFd> {
    // SAFETY: no pointer is passed; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("socket");
    }
    // SAFETY: a descriptor that was just made and that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets()) },
        sin_zero: [0; 8],
    }
}

fn connect(socket: &impl AsRawFd, to: &libc::sockaddr_in) -> io::Result<()> {
    let size = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: `to` is a whole sockaddr_in and `size` is its size.
    let result = unsafe { libc::connect(socket.as_raw_fd(), std::ptr::from_ref(to).cast(), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A socket whose close resets: it leaves no TIME-WAIT behind that would use up
/// the ports.
fn resetting() -> Result<OwnedFd> {
    let socket = stream()?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: `linger` lives over the call and its size is given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            std::ptr::from_ref(&linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error()).context("SO_LINGER");
    }
    Ok(socket)
}

/// connect() alone is timed.
fn tcp_connect(port: u16, time: Duration) -> Result<f64> {
    let to = address(port);
    let mut samples = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let socket = resetting()?;
        let from = Instant::now();
        connect(&socket, &to).context("connect")?;
        samples.push(from.elapsed().as_nanos() as f64);
    }
    median(&mut samples)
}

/// Nanoseconds of one call, over batches long enough for the clock.
fn batches(time: Duration, calls: u32, mut call: impl FnMut() -> io::Result<()>) -> Result<f64> {
    let mut samples = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let from = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        samples.push(from.elapsed().as_nanos() as f64 / f64::from(calls));
    }
    median(&mut samples)
}

fn udp_connect(port: u16, time: Duration) -> Result<f64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let to = address(port);
    batches(time, 500, || connect(&socket, &to))
}

fn udp_sendto(port: u16, time: Duration) -> Result<f64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    batches(time, 200, || socket.send_to(b"x", to).map(drop))
}

fn tcp_throughput(port: u16, time: Duration) -> Result<f64> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    let chunk = vec![0x5a; 128 * 1024];
    let from = Instant::now();
    while from.elapsed() < time {
        connection.write_all(&chunk)?;
    }
    connection.shutdown(std::net::Shutdown::Write)?;
    let mut sum = [0; 8];
    connection.read_exact(&mut sum)?;
    Ok(u64::from_be_bytes(sum) as f64 / from.elapsed().as_secs_f64())
}

fn fork_exec(time: Duration) -> Result<f64> {
    let mut samples = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let from = Instant::now();
        exec_true()?;
        samples.push(from.elapsed().as_nanos() as f64);
    }
    median(&mut samples)
}

fn exec_true() -> Result<()> {
    // SAFETY: this program has one thread, and the child only calls
    // execv and _exit, both async-signal-safe.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let argv = [c"/bin/true".as_ptr(), std::ptr::null()];
            // SAFETY: a NUL-terminated path and a NULL-terminated array.
            unsafe {
                libc::execv(argv[0], argv.as_ptr());
                libc::_exit(127);
            }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => bail!("/bin/true: {other:?}"),
        },
    }
}

fn flood(per_second: u64, at: u64, time: Duration) -> Result<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let begin = UNIX_EPOCH + Duration::from_millis(at);
    thread::sleep(begin.duration_since(SystemTime::now()).unwrap_or_default());
    let from = Instant::now();
    let mut sent = 0;
    while from.elapsed() < time {
        let due = (from.elapsed().as_secs_f64() * per_second as f64) as u64;
        while sent < due {
            // Never the peer of the send before, which is recorded once only.
            let to = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1 + (sent % 2) as u8), 9);
            match socket.send_to(b"x", to) {
                Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => sent += 1,
                other => bail!("send to an address without a route: {other:?}"),
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(sent)
}

/// Programs and connections a second.
fn chores((execs, connects): (u64, u64), port: u16, time: Duration) -> Result<()> {
    let to = address(port);
    let due = |per_second: u64, from: Instant| (from.elapsed().as_secs_f64() * per_second as f64) as u64;
    let (from, mut executed, mut connected) = (Instant::now(), 0, 0);
    while from.elapsed() < time {
        while executed < due(execs, from).min(execs * time.as_millis() as u64 / 1000) {
            exec_true()?;
            executed += 1;
        }
        while connected < due(connects, from).min(connects * time.as_millis() as u64 / 1000) {
            connect(&resetting()?, &to)?;
            connected += 1;
        }
        thread::sleep(Duration::from_millis(2));
    }
    let mut cpu = Duration::ZERO;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        for time in [usage.user_time(), usage.system_time()] {
            cpu += Duration::from_micros(time.num_microseconds() as u64);
        }
    }
    println!("{executed} {connected} {}", cpu.as_secs_f64());
    Ok(())
}

fn crowd(children: usize) -> Result<()> {
    for _ in 0..children {
        // SAFETY: this program has one thread, and the child only makes system
        // calls.
        if let ForkResult::Child = unsafe { fork() }? {
            // SAFETY: no memory is passed.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
        }
    }
    println!("ready");
    io::stdout().flush()?;
    let mut ends = Vec::new();
    io::stdin().read_to_end(&mut ends)?;
    Ok(())
}
