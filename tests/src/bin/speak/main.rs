//! An MCP server that moves its bytes by a system call of the test's choice.
//!
//!     speak [--write CALL] [--read CALL] [--fds WHERE] [--by WHO] [--shape SHAPE] [--every N]
//!
//! Legacy era. Tools: `echo {"bytes": N}` answers with a text of N bytes;
//! `fail` with an error of the tool; `refuse` with one of JSON-RPC.
//! `--every N`: only each Nth answer goes by CALL, the others by write(2).

mod answer;
mod descriptors;
mod input;
mod output;
mod ring;

use descriptors::Fds;
use input::Input;
use output::{Output, Shape};
use std::io::{self, IoSlice};

/// Who makes the calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Itself,
    /// A child that inherited the descriptors, one for each answer.
    Child,
    /// Threads, one for each answer.
    Threads,
}

fn usage(problem: &str) -> ! {
    eprintln!(
        "speak: {problem}\nusage: speak [--write {}] [--read {}] [--fds {}] [--by itself|child|threads] \
         [--shape whole|bytes|pieces|together] [--every N]",
        output::NAMES.join("|"),
        input::NAMES.join("|"),
        descriptors::NAMES.join("|")
    );
    std::process::exit(2);
}

fn main() -> io::Result<()> {
    let (mut write, mut read, mut fds) = ("write".to_owned(), "read".to_owned(), "plain".to_owned());
    let (mut by, mut shape, mut every) = (By::Itself, Shape::Whole, 1);
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| usage(&format!("{option} needs a value")));
        match (option.as_str(), value.as_str()) {
            ("--write", _) => write = value,
            ("--read", _) => read = value,
            ("--fds", _) => fds = value,
            ("--by", "itself") => by = By::Itself,
            ("--by", "child") => by = By::Child,
            ("--by", "threads") => by = By::Threads,
            ("--shape", name) => shape = Shape::named(name).unwrap_or_else(|| usage("--shape")),
            ("--every", n) => every = n.parse().unwrap_or_else(|_| usage("--every")),
            _ => usage(&format!("{option} {value}")),
        }
    }
    let Fds { input, output } = descriptors::moved(&fds).unwrap_or_else(|| usage(&format!("--fds {fds}")))?;
    let mut input = Input::new(&read, input).unwrap_or_else(|| usage(&format!("--read {read}")))?;
    let mut special =
        Output::new(&write, output, shape).unwrap_or_else(|| usage(&format!("--write {write}")))?;
    let mut plain = Output::new("write", output, Shape::Whole).expect("write is known")?;
    let mut answers = 0usize;
    while let Some(lines) = input.lines()? {
        let replies: Vec<Vec<u8>> = lines.iter().filter_map(|line| answer::to(line)).collect();
        if shape == Shape::Together {
            special.send(&replies)?;
            continue;
        }
        for reply in replies {
            answers += 1;
            let chosen = if answers.is_multiple_of(every) { &mut special } else { &mut plain };
            send(by, chosen, reply)?;
        }
    }
    Ok(())
}

fn send(by: By, output: &mut Output, reply: Vec<u8>) -> io::Result<()> {
    match by {
        By::Itself => output.send(&[reply]),
        By::Threads => {
            std::thread::scope(|scope| scope.spawn(|| output.send(&[reply])).join().expect("a writer"))
        }
        By::Child => {
            // SAFETY: this program has one thread here; the child only writes and leaves.
            match unsafe { libc::fork() } {
                -1 => Err(io::Error::last_os_error()),
                0 => {
                    let code = i32::from(output.send(&[reply]).is_err());
                    // SAFETY: ends the child without running its parent's destructors.
                    unsafe { libc::_exit(code) }
                }
                child => {
                    let mut status = 0;
                    // SAFETY: a child of this process and a valid place for its status.
                    unsafe { libc::waitpid(child, &mut status, 0) };
                    if status == 0 { Ok(()) } else { Err(io::Error::other("the child failed")) }
                }
            }
        }
    }
}

/// The number of bytes, or the error of the call just made.
fn counted(rc: isize) -> io::Result<usize> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc as usize) }
}

/// Sums what is in all pieces.
fn total(pieces: &[IoSlice<'_>]) -> usize {
    pieces.iter().map(|p| p.len()).sum()
}
