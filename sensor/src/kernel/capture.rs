//! The programs that read stdio wires: verified at the start, attached only
//! while there is something to read. Two back ends behind one handle.

use super::load::chain;
use super::sys;
use aya::programs::Program;
use aya::{Btf, Ebpf};
use aya_obj::btf::BtfKind;
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;
use tracing::debug;

/// Which programs find the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// fexit on the functions that read and write pipes and unix sockets.
    Function,
    /// Tracepoints where system calls return and where io_uring completes.
    Syscall,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Function => "function",
            Backend::Syscall => "syscall",
        })
    }
}

/// A program of the function back end: its name and those of others for kernels
/// that refuse it, the kernel's names for what it sits on, and whether the back
/// end is worth nothing without it.
const FUNCTIONS: [(&[&str], &[&str], bool); 12] = [
    (&["pipe_write"], &["anon_pipe_write", "pipe_write"], true),
    (&["pipe_read"], &["anon_pipe_read", "pipe_read"], true),
    (&["unix_send"], &["unix_stream_sendmsg"], true),
    (&["unix_receive"], &["unix_stream_recvmsg"], true),
    (&["tcp_send"], &["tcp_sendmsg"], false),
    // The second would also be taken where the first is, and read nonsense.
    (&["tcp_receive", "tcp_receive_of_4"], &["tcp_recvmsg"], false),
    (&["fifo_write"], &["fifo_pipe_write"], false),
    (&["fifo_read"], &["fifo_pipe_read"], false),
    (&["spliced"], &["do_splice"], false),
    (&["teed"], &["do_tee"], false),
    (&["vmspliced"], &["__x64_sys_vmsplice"], false),
    (&["sent_file"], &["__x64_sys_sendfile64"], false),
];

const TRACEPOINTS: [(&str, &str); 2] = [("syscall", "sys_exit"), ("uring", "io_uring_complete")];

/// A verified program, and the tracepoint it belongs to; fexit programs know
/// their function themselves.
struct Ready {
    name: &'static str,
    fd: OwnedFd,
    tracepoint: Option<&'static str>,
}

/// Why nothing can be read here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CaptureError(String);

pub struct Capture {
    pub backend: Backend,
    programs: Vec<Ready>,
    links: Vec<OwnedFd>,
    /// Why the better back end is not the one; ways that are not seen.
    pub notes: Vec<String>,
}

impl Capture {
    /// Verifies the programs of the best back end, or of the one that is wanted.
    pub(super) fn prepare(ebpf: &mut Ebpf, wanted: Option<Backend>) -> Result<Capture, CaptureError> {
        let mut notes = Vec::new();
        if wanted != Some(Backend::Syscall) {
            match functions(ebpf, &mut notes) {
                Ok(programs) => {
                    return Ok(Capture { backend: Backend::Function, programs, links: Vec::new(), notes });
                }
                Err(reason) if wanted == Some(Backend::Function) => return Err(CaptureError(reason)),
                Err(reason) => notes.push(format!("no fexit here: {reason}")),
            }
        }
        let mut programs = Vec::new();
        for (name, tracepoint) in TRACEPOINTS {
            match raw_tracepoint(ebpf, name) {
                Ok(fd) => programs.push(Ready { name, fd, tracepoint: Some(tracepoint) }),
                Err(reason) if name == "syscall" => return Err(CaptureError(reason)),
                Err(reason) => notes.push(format!("{name}: {reason}")),
            }
        }
        Ok(Capture { backend: Backend::Syscall, programs, links: Vec::new(), notes })
    }

    pub fn attached(&self) -> bool {
        !self.links.is_empty()
    }

    pub fn attach(&mut self) -> io::Result<()> {
        if self.attached() {
            return Ok(());
        }
        let started = Instant::now();
        let mut links = Vec::new();
        for program in &self.programs {
            match sys::raw_tracepoint_open(program.fd.as_fd(), program.tracepoint) {
                Ok(link) => links.push(link),
                // io_uring may not be built in.
                Err(error) if program.name == "uring" => debug!(%error, "io_uring cannot be watched"),
                Err(error) => return Err(error),
            }
        }
        self.links = links;
        debug!(backend = %self.backend, elapsed_us = started.elapsed().as_micros(), "reading stdio");
        Ok(())
    }

    pub fn detach(&mut self) {
        self.links.clear();
    }
}

fn raw_tracepoint(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd, String> {
    let Some(Program::RawTracePoint(program)) = ebpf.program_mut(name) else {
        return Err("not in the kernel object".to_owned());
    };
    if program.fd().is_err() {
        program.load().map_err(|e| chain(&e))?;
    }
    let fd = program.fd().map_err(|e| chain(&e))?;
    fd.as_fd().try_clone_to_owned().map_err(|e| e.to_string())
}

fn functions(ebpf: &mut Ebpf, notes: &mut Vec<String>) -> Result<Vec<Ready>, String> {
    let btf = Btf::from_sys_fs().map_err(|e| chain(&e))?;
    let mut programs = Vec::new();
    for (names, candidates, needed) in FUNCTIONS {
        let mut reasons = Vec::new();
        let ready = names.iter().find_map(|name| match function(ebpf, &btf, name, candidates) {
            Ok(fd) => Some(Ready { name, fd, tracepoint: None }),
            Err(reason) => {
                reasons.push(format!("{name}: {reason}"));
                None
            }
        });
        match ready {
            Some(ready) => programs.push(ready),
            None if needed => return Err(reasons.join("; ")),
            None => notes.append(&mut reasons),
        }
    }
    Ok(programs)
}

fn function(ebpf: &mut Ebpf, btf: &Btf, name: &str, candidates: &[&str]) -> Result<OwnedFd, String> {
    let Some(Program::FExit(program)) = ebpf.program_mut(name) else {
        return Err("not in the kernel object".to_owned());
    };
    let known = |name: &&&str| btf.id_by_type_name_kind(name, BtfKind::Func).is_ok();
    let mut reason = format!("this kernel has no {}", candidates.join(" and no "));
    for candidate in candidates.iter().filter(known) {
        match program.load(candidate, btf) {
            Ok(()) => {
                let fd = program.fd().map_err(|e| chain(&e))?;
                return fd.as_fd().try_clone_to_owned().map_err(|e| e.to_string());
            }
            Err(error) => reason = chain(&error),
        }
    }
    Err(reason)
}
