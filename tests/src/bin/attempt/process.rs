//! The same attempt from a process that tries to be somebody else. The
//! attempt's name and what it needs stand after `--`.

use crate::wire::{Attempt, Stop, Tried, check, connect, send, socket_for};
use crate::{Target, find};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getppid, pipe, setsid};
use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

pub(crate) const ALL: &[(&str, Attempt)] = &[
    ("as-thread", as_thread),
    ("as-orphan-thread", as_orphan_thread),
    ("as-daemon", as_daemon),
    ("as-session-leader", as_session_leader),
    ("as-vforked", as_vforked),
    ("as-sibling", as_sibling),
    ("as-exec", as_exec),
    ("as-thread-exec", as_thread_exec),
    ("as-memfd", as_memfd),
    ("as-renamed", as_renamed),
    ("as-many-children", as_many_children),
    ("as-crowd", as_crowd),
    ("in-own-namespace", in_own_namespace),
    ("after-own-namespace", after_own_namespace),
    ("as-flood", as_flood),
    ("as-hammer", as_hammer),
    ("in-child-cgroup", in_child_cgroup),
];

fn error(step: &'static str) -> impl Fn(nix::Error) -> Stop {
    move |e| Stop { step, errno: e as i32 }
}

fn inner(t: &Target) -> Result<Attempt, Stop> {
    let name = t.rest.first().ok_or(Stop { step: "no attempt after --", errno: libc::EINVAL })?;
    find(name).ok_or(Stop { step: "no such attempt", errno: libc::EINVAL })
}

/// The way back of a result from another process.
fn write_result(pipe: &OwnedFd, result: Tried) {
    let text = match result {
        Ok(answered) => format!("ok {}", u8::from(answered)),
        Err(Stop { step, errno }) => format!("err {errno} {step}"),
    };
    let _ = nix::unistd::write(pipe, text.as_bytes());
}

fn read_result(pipe: OwnedFd) -> Tried {
    let mut text = String::new();
    let _ = std::fs::File::from(pipe).read_to_string(&mut text);
    let mut words = text.splitn(3, ' ');
    match (words.next(), words.next(), words.next()) {
        (Some("ok"), Some(answered), _) => Ok(answered == "1"),
        (Some("err"), Some(errno), step) => Err(Stop {
            step: Box::leak(step.unwrap_or("").to_string().into_boxed_str()),
            errno: errno.parse().unwrap_or(0),
        }),
        _ => Err(Stop { step: "the child said nothing", errno: libc::EPIPE }),
    }
}

fn wait_until(what: &'static str, mut done: impl FnMut() -> bool) -> Result<(), Stop> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !done() {
        if Instant::now() > deadline {
            return Err(Stop { step: what, errno: libc::ETIMEDOUT });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn as_thread(t: &Target) -> Tried {
    let (attempt, t) = (inner(t)?, t.clone());
    std::thread::spawn(move || attempt(&t)).join().unwrap_or(Err(Stop { step: "thread", errno: libc::EIO }))
}

/// The main thread is gone (a zombie leader) before the attempt is made.
fn as_orphan_thread(t: &Target) -> Tried {
    let (attempt, t) = (inner(t)?, t.clone());
    std::thread::spawn(move || {
        let leader = format!("/proc/self/task/{}/stat", std::process::id());
        let gone = wait_until("the leader lives on", || {
            std::fs::read_to_string(&leader)
                .map_or(true, |s| s.rsplit(')').next().is_some_and(|r| r.starts_with(" Z")))
        });
        let report = crate::report(gone.and_then(|()| attempt(&t)));
        println!("{report}");
        let _ = std::io::stdout().flush();
        std::process::exit(0);
    });
    // SAFETY: ends this thread only; nothing on its stack is borrowed by others.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("the thread has ended")
}

/// Runs `f` in a child made by fork() and returns what it says.
pub(crate) fn in_child(f: impl FnOnce() -> Tried) -> Tried {
    let (read, write) = pipe().map_err(error("pipe"))?;
    // SAFETY: this program has one thread here.
    match unsafe { fork() }.map_err(error("fork"))? {
        ForkResult::Child => {
            drop(read);
            write_result(&write, f());
            // SAFETY: no destructors of the parent are to run.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { .. } => {
            drop(write);
            read_result(read)
        }
    }
}

/// Double fork: the process that tries is init's child in its own session.
fn as_daemon(t: &Target) -> Tried {
    let attempt = inner(t)?;
    in_child(|| {
        setsid().map_err(error("setsid"))?;
        let middle = Pid::this();
        // SAFETY: this program has one thread here.
        match unsafe { fork() }.map_err(error("fork"))? {
            // SAFETY: ends the middle process without a word.
            ForkResult::Parent { .. } => unsafe { libc::_exit(0) },
            ForkResult::Child => {
                wait_until("no new parent", || getppid() != middle)?;
                attempt(t)
            }
        }
    })
}

fn as_session_leader(t: &Target) -> Tried {
    let attempt = inner(t)?;
    in_child(|| {
        setsid().map_err(error("setsid"))?;
        attempt(t)
    })
}

/// This program again, for `rest` as its arguments.
fn again(t: &Target) -> Result<Vec<CString>, Stop> {
    let mut all = vec!["attempt".to_string()];
    let mut rest = t.rest.iter().cloned();
    all.extend(rest.next());
    all.extend(["--to".into(), t.to.to_string(), "--port".into(), t.port.to_string()]);
    if let Some(via) = t.via {
        all.extend(["--via".into(), via.to_string()]);
    }
    all.push("--".into());
    all.extend(rest.map(|r| revealed(&r)));
    let all = all.into_iter().map(CString::new).collect::<Result<_, _>>();
    all.map_err(|_| Stop { step: "NUL in an argument", errno: libc::EINVAL })
}

/// `%x` stands for `--x`: an argument that is to make a server only later must
/// not stand in the first command line.
fn revealed(argument: &str) -> String {
    argument.strip_prefix('%').map_or_else(|| argument.to_string(), |rest| format!("--{rest}"))
}

fn itself() -> CString {
    c"/proc/self/exe".to_owned()
}

/// posix_spawn: CLONE_VM | CLONE_VFORK, then exec.
fn as_vforked(t: &Target) -> Tried {
    let arguments = again(t)?;
    let mut pointers: Vec<_> = arguments.iter().map(|a| a.as_ptr().cast_mut()).collect();
    pointers.push(std::ptr::null_mut());
    let mut pid = 0;
    let (program, no) = (itself(), std::ptr::null());
    // SAFETY: the argument vector ends in null and outlives the call.
    let rc = unsafe {
        libc::posix_spawn(
            &mut pid,
            program.as_ptr(),
            no,
            std::ptr::null(),
            pointers.as_ptr(),
            std::ptr::null(),
        )
    };
    if rc != 0 {
        return Err(Stop { step: "posix_spawn", errno: rc });
    }
    waitpid(Pid::from_raw(pid), None).map_err(error("waitpid"))?;
    // The child has printed the report.
    std::process::exit(0);
}

/// CLONE_PARENT: a brother of the labelled process, not its child.
fn as_sibling(t: &Target) -> Tried {
    let attempt = inner(t)?;
    let (read, write) = pipe().map_err(error("pipe"))?;
    let flags = (libc::CLONE_PARENT | libc::SIGCHLD) as libc::c_long;
    // SAFETY: like fork(): no new stack, this program has one thread here.
    let pid =
        check("clone(CLONE_PARENT)", unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } as isize)?;
    if pid == 0 {
        drop(read);
        write_result(&write, attempt(t));
        // SAFETY: no destructors of the parent are to run.
        unsafe { libc::_exit(0) }
    }
    drop(write);
    read_result(read)
}

/// exec with `rest` as arguments: the first is the attempt, the others may look
/// like another server.
fn as_exec(t: &Target) -> Tried {
    let arguments = again(t)?;
    let program = t.via_program().unwrap_or_else(itself);
    let Err(e) = nix::unistd::execv(&program, &arguments);
    Err(Stop { step: "execv", errno: e as i32 })
}

/// A thread that is not the leader execs: the leader's id is taken over.
fn as_thread_exec(t: &Target) -> Tried {
    let t = t.clone();
    std::thread::spawn(move || as_exec(&t)).join().unwrap_or(Err(Stop { step: "thread", errno: libc::EIO }))
}

/// The program without a path.
fn as_memfd(t: &Target) -> Tried {
    let program = std::fs::read("/proc/self/exe").map_err(|_| Stop { step: "read", errno: libc::EIO })?;
    let fd = nix::sys::memfd::memfd_create(c"server", nix::sys::memfd::MFdFlags::empty());
    let fd = fd.map_err(error("memfd_create"))?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&program).map_err(|_| Stop { step: "write", errno: libc::EIO })?;
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL");
    let Err(e) = nix::unistd::execv(&path, &again(t)?);
    Err(Stop { step: "execv", errno: e as i32 })
}

/// Writes `rest[1]` over its own argv, as npx does, then waits for the test.
fn as_renamed(t: &Target) -> Tried {
    let attempt = inner(t)?;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // proc(5): arg_start and arg_end are fields 48 and 49.
    let fields: Vec<usize> =
        stat.rsplit(')').next().unwrap_or("").split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
    let (start, end) = (fields[45], fields[46]);
    let words: Vec<String> = t.rest[1..].iter().map(|r| revealed(r)).collect();
    let mut text = words.join("\0").into_bytes();
    text.resize(end - start, 0);
    // SAFETY: the kernel says that argv lies there; it is writable memory of
    // this process and nothing reads it as Rust data.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), start as *mut u8, text.len()) };
    crate::pause();
    attempt(t)
}

/// `rest[1]` children, each of which tries once; some have ended before others
/// begin. The last error stands for all.
fn as_many_children(t: &Target) -> Tried {
    let attempt = inner(t)?;
    let count: usize = t.rest.get(1).and_then(|c| c.parse().ok()).unwrap_or(100);
    let mut result = Ok(false);
    let mut running = 0;
    for i in 0..count {
        // SAFETY: this program has one thread here.
        match unsafe { fork() }.map_err(error("fork"))? {
            ForkResult::Child => {
                // A grandchild now and then, and the child does not wait for it.
                // SAFETY: as above.
                let deeper = i % 16 == 0 && unsafe { fork() }.is_ok_and(|f| f.is_child());
                let code = match attempt(t) {
                    Ok(_) => 0,
                    Err(e) => e.errno.clamp(1, 255),
                };
                let _ = deeper;
                // SAFETY: no destructors of the parent are to run.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { .. } => running += 1,
        }
        while running > 0 && (running >= 32 || i + 1 == count) {
            match nix::sys::wait::wait().map_err(error("wait"))? {
                nix::sys::wait::WaitStatus::Exited(_, 0) => {}
                nix::sys::wait::WaitStatus::Exited(_, errno) => {
                    result = Err(Stop { step: "child", errno });
                }
                _ => result = Err(Stop { step: "child", errno: libc::EIO }),
            }
            running -= 1;
        }
    }
    result
}

/// `rest[1]` children at one time, which try when all are there.
fn as_crowd(t: &Target) -> Tried {
    let attempt = inner(t)?;
    let count: usize = t.rest.get(1).and_then(|c| c.parse().ok()).unwrap_or(100);
    let (gate, open) = pipe().map_err(error("pipe"))?;
    for _ in 0..count {
        // SAFETY: this program has one thread here.
        if unsafe { fork() }.map_err(error("fork"))?.is_child() {
            // SAFETY: closes this process's copy; the gate opens when the last writer closes.
            unsafe { libc::close(open.as_raw_fd()) };
            let _ = nix::unistd::read(&gate, &mut [0]);
            let code = attempt(t).map_or_else(|e| e.errno.clamp(1, 255), |_| 0);
            // SAFETY: no destructors of the parent are to run.
            unsafe { libc::_exit(code) }
        }
    }
    drop(open);
    let mut result = Err(Stop { step: "children", errno: libc::EPERM });
    for _ in 0..count {
        match nix::sys::wait::wait().map_err(error("wait"))? {
            nix::sys::wait::WaitStatus::Exited(_, libc::EPERM) => {}
            nix::sys::wait::WaitStatus::Exited(_, 0) => result = Ok(false),
            nix::sys::wait::WaitStatus::Exited(_, errno) => return Err(Stop { step: "child", errno }),
            _ => return Err(Stop { step: "child", errno: libc::EIO }),
        }
    }
    result
}

/// All of `rest` at once, each in a thread of its own, until the test closes the
/// input. `kept`: one UDP socket, connected once, whose packets alone are judged.
/// The answer is that of every try; that they differ is an answer as well.
fn as_hammer(t: &Target) -> Tried {
    use std::sync::atomic::{AtomicBool, Ordering};
    let over = std::sync::Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for name in &t.rest {
        let (t, over) = (t.clone(), over.clone());
        let mut once: Box<dyn FnMut() -> Tried + Send> = match name.as_str() {
            "kept" => {
                let socket = socket_for(t.to, libc::SOCK_DGRAM, 0)?;
                connect(&socket, t.address())?;
                Box::new(move || send(&socket, mcp_sensor_tests::report::PAYLOAD, 0).map(|_| true))
            }
            name => {
                let attempt = find(name).ok_or(Stop { step: "no such attempt", errno: libc::EINVAL })?;
                Box::new(move || attempt(&t))
            }
        };
        threads.push(std::thread::spawn(move || {
            let mut outcomes = std::collections::BTreeMap::new();
            while !over.load(Ordering::Relaxed) {
                let outcome = once().map_or_else(|stop| stop.errno, |_| 0);
                *outcomes.entry(outcome).or_insert(0u64) += 1;
                // The sniffer is to see every frame.
                std::thread::sleep(Duration::from_micros(200));
            }
            outcomes
        }));
    }
    println!("{}", mcp_sensor_tests::report::READY);
    let _ = std::io::stdin().read(&mut [0]);
    over.store(true, Ordering::Relaxed);
    let mut all = std::collections::BTreeSet::new();
    for (name, thread) in t.rest.iter().zip(threads) {
        let outcomes = thread.join().map_err(|_| Stop { step: "a thread", errno: libc::EIO })?;
        eprintln!("{name}: {outcomes:?}");
        all.extend(outcomes.into_keys());
    }
    match (all.len(), all.first()) {
        (1, Some(0)) => Ok(true),
        (1, Some(errno)) => Err(Stop { step: "every try", errno: *errno }),
        _ => Err(Stop { step: "tries differ", errno: libc::EIO }),
    }
}

/// Over and over at full speed, until the test closes the input.
fn as_flood(t: &Target) -> Tried {
    let attempt = inner(t)?;
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::spawn({
        let over = over.clone();
        move || {
            let _ = std::io::stdin().read(&mut [0]);
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    });
    println!("{}", mcp_sensor_tests::report::READY);
    let mut result = Ok(false);
    let mut port = 1u16;
    while !over.load(std::sync::atomic::Ordering::Relaxed) {
        // `rest[1]` = "spread": another port each time, so that no two denials are the same.
        let mut each = t.clone();
        if t.rest.get(1).is_some_and(|r| r == "spread") {
            port = port.wrapping_add(1).max(1);
            each.port = port;
        }
        result = attempt(&each);
    }
    result
}

/// Sockets made in a network namespace of its own, where it is root: loopback
/// comes up, and the attempt goes to itself.
fn in_own_namespace(t: &Target) -> Tried {
    let attempt = inner(t)?;
    own_namespace()?;
    loopback_up()?;
    let address = std::net::SocketAddr::new(t.to, t.port);
    let udp = std::net::UdpSocket::bind(address)
        .map_err(|e| Stop { step: "bind", errno: e.raw_os_error().unwrap_or(0) })?;
    let _ = attempt(t)?;
    let _ = udp.set_read_timeout(Some(Duration::from_millis(500)));
    let mut bytes = [0; 64];
    udp.recv(&mut bytes)
        .map(|_| true)
        .map_err(|e| Stop { step: "recv", errno: e.raw_os_error().unwrap_or(0) })
}

/// The socket is older than the namespace and still stands in the host's.
fn after_own_namespace(t: &Target) -> Tried {
    let s = socket_for(t.to, libc::SOCK_DGRAM, 0)?;
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(error("unshare"))?;
    crate::wire::sendto(&s, mcp_sensor_tests::report::PAYLOAD, 0, t.address())?;
    Ok(crate::wire::answered(&s))
}

/// Where it is root, and may have any address.
pub(crate) fn own_namespace() -> Result<(), Stop> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(error("unshare"))
}

pub(crate) fn loopback_up() -> Result<(), Stop> {
    let s = crate::wire::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    // RTM_NEWLINK for interface 1 with IFF_UP: nlmsghdr, ifinfomsg.
    let mut request = Vec::new();
    request.extend(32u32.to_ne_bytes());
    request.extend(libc::RTM_NEWLINK.to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16 | libc::NLM_F_ACK as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([0; 4]);
    request.extend(1i32.to_ne_bytes());
    request.extend((libc::IFF_UP as u32).to_ne_bytes());
    request.extend((libc::IFF_UP as u32).to_ne_bytes());
    send(&s, &request, 0)?;
    if crate::wire::answered(&s) { Ok(()) } else { Err(Stop { step: "RTM_NEWLINK", errno: libc::EIO }) }
}

impl Target {
    /// `--program PATH`
    fn via_program(&self) -> Option<CString> {
        self.program.as_ref().and_then(|p| CString::new(p.as_str()).ok())
    }
}

/// `rest[1]`: a cgroup's folder. Makes one below it and moves there first.
fn in_child_cgroup(t: &Target) -> Tried {
    let attempt = inner(t)?;
    let io = |step| move |e: std::io::Error| Stop { step, errno: e.raw_os_error().unwrap_or(0) };
    let child = std::path::Path::new(&t.rest[1]).join("of-its-own");
    std::fs::create_dir_all(&child).map_err(io("mkdir"))?;
    std::fs::write(child.join("cgroup.procs"), "0").map_err(io("cgroup.procs"))?;
    attempt(t)
}
