//! `mcp-sensor exec`: label this process, then become the command.

use super::{ExecArgs, Exit, Failure, client, confine};
use crate::event::pb;
use nix::sys::signal::{SigHandler, Signal, signal};
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

/// Arguments sent as evidence, and bytes of each.
const MAX_ARGUMENTS: usize = 64;
const MAX_ARGUMENT: usize = 1024;

pub(super) fn run(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let command: Vec<CString> = args
        .command
        .iter()
        .map(|part| CString::new(part.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|_| Failure::new(Exit::Usage, "the command contains a NUL byte"))?;
    let mode = client::block_on(label(args))?;
    // From here on this process is the server: nothing but the exec is left.
    close_descriptors()?;
    restore_signals()?;
    if args.confine && mode == pb::Mode::Enforce {
        confine::apply().map_err(|why| {
            Failure::new(Exit::Prerequisite, format!("the command cannot be confined: {why}"))
                .hint("leave out --confine where the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)")
        })?;
    } else if args.confine {
        eprintln!("mcp-sensor: `{}` is in audit, which refuses nothing: not confined", args.server);
    }
    let name = &command[0];
    let Err(errno) = nix::unistd::execvp(name, &command);
    let exit = match errno {
        nix::Error::ENOENT => Exit::CommandNotFound,
        _ => Exit::CannotExecute,
    };
    let message = format!("{}: {}", args.command[0].display(), errno.desc());
    Err(Failure::new(exit, message)
        .hint("the command after `--` must be an executable in PATH, or a path to one")
        .into())
}

/// In which mode the server is.
async fn label(args: &ExecArgs) -> anyhow::Result<pb::Mode> {
    let mut control = client::connect(&args.control).await?;
    let argument = |part: &std::ffi::OsString| {
        String::from_utf8_lossy(&part.as_bytes()[..part.len().min(MAX_ARGUMENT)]).into_owned()
    };
    let argv = args.command.iter().take(MAX_ARGUMENTS).map(argument).collect();
    let request = pb::LaunchRequest { server: args.server.clone(), argv };
    let answer = control.launch(request).await.map_err(|s| client::failed(&s))?.into_inner();
    tracing::debug!(instance = %answer.instance, profile = %answer.profile, "labelled");
    Ok(answer.mode())
}

/// Sockets and files of whoever started this are no business of a server's.
fn close_descriptors() -> anyhow::Result<()> {
    // SAFETY: plain numbers. Nothing in this process uses a descriptor above 2
    // any more: the runtime and its connection are dropped.
    let done = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if done == 0 {
        return Ok(());
    }
    // Before 5.9, or behind a seccomp filter that does not know it.
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // SAFETY: as above; EBADF for the directory's own descriptor is fine.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Rust's start-up ignores SIGPIPE, which an exec would pass on. The mask and
/// everything else are as the caller left them.
fn restore_signals() -> anyhow::Result<()> {
    // SAFETY: a default disposition runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map_err(io::Error::from)?;
    Ok(())
}
