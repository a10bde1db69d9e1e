//! Events as they come, on stdout: a table, or JSON lines. A terminal or pipe
//! that stalls slows nobody: what it has no room for is counted and said.

use crate::event::text::{HEADINGS, Tone, row};
use crate::event::{Event, json};
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// Groups of events that may wait for the terminal.
const WAITING: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Cells padded to columns, colours if the terminal wants them.
    Table {
        color: bool,
    },
    Json,
}

impl Style {
    /// A table with the colours that stdout takes; `None` if it is no terminal.
    pub fn of_terminal() -> Option<Style> {
        let terminal = io::stdout().is_terminal();
        terminal.then(|| Style::Table { color: wants_color() })
    }
}

/// Nobody said no (no-color.org), and the terminal is no dumb one.
pub fn wants_color() -> bool {
    let no = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    !no && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Cheap to clone; the printing thread ends when the last one is dropped.
#[derive(Clone)]
pub struct View {
    groups: SyncSender<Vec<Arc<Event>>>,
    missed: Arc<AtomicU64>,
}

impl View {
    /// Prints on `out` from a thread of its own, until every `View` is dropped
    /// or `out` fails.
    pub fn spawn(style: Style, out: impl Write + Send + 'static) -> io::Result<(View, Printer)> {
        let (groups, waiting) = sync_channel(WAITING);
        let (ended, end) = sync_channel(0);
        let missed = Arc::new(AtomicU64::new(0));
        let view = View { groups, missed: missed.clone() };
        std::thread::Builder::new().name("view".to_owned()).spawn(move || {
            let _ended = ended;
            if let Err(error) = print(style, &waiting, &missed, io::BufWriter::new(out)) {
                tracing::warn!(%error, "events are no longer printed");
            }
        })?;
        Ok((view, Printer { end }))
    }

    /// Never waits.
    pub fn show(&self, events: Vec<Arc<Event>>) {
        if let Err(TrySendError::Full(events)) = self.groups.try_send(events) {
            self.missed.fetch_add(events.len() as u64, Ordering::Relaxed);
        }
    }
}

/// The printing thread.
pub struct Printer {
    end: Receiver<()>,
}

impl Printer {
    /// Waits until everything is printed; a stalled output is not waited for
    /// longer than this. True: everything is.
    pub fn finish(&self, wait: Duration) -> bool {
        self.end.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected)
    }
}

fn print(
    style: Style,
    groups: &Receiver<Vec<Arc<Event>>>,
    missed: &AtomicU64,
    mut out: impl Write,
) -> io::Result<()> {
    write_headings(style, &mut out)?;
    out.flush()?;
    while let Ok(group) = groups.recv() {
        for event in &group {
            write_event(style, event, &mut out)?;
        }
        match (missed.swap(0, Ordering::Relaxed), style) {
            (0, _) => (),
            (count, Style::Json) => {
                let loss = serde_json::json!({
                    "type": "loss", "where": "view", "reason": "slow_output", "count": count,
                });
                writeln!(out, "{loss}")?;
            }
            (count, Style::Table { .. }) => {
                writeln!(out, "… {count} events were stored but not shown: the output was too slow")?;
            }
        }
        out.flush()?;
    }
    Ok(())
}

/// What stands above the events: the headings of a table.
pub fn write_headings(style: Style, out: &mut impl Write) -> io::Result<()> {
    match style {
        Style::Json => Ok(()),
        Style::Table { color } => write_cells(out, HEADINGS, Tone::Plain, color),
    }
}

/// One event in the given style.
pub fn write_event(style: Style, event: &Event, out: &mut impl Write) -> io::Result<()> {
    match style {
        Style::Json => json::write_line(event, out),
        Style::Table { color } => {
            let row = row(event);
            write_cells(out, row.cells(), row.tone, color)
        }
    }
}

fn write_cells(out: &mut impl Write, cells: [&str; 4], tone: Tone, color: bool) -> io::Result<()> {
    let [time, what, server, detail] = cells;
    let code = match tone {
        _ if !color => "",
        Tone::Plain => "",
        Tone::Good => "\x1b[32m",
        Tone::Bad => "\x1b[31m",
        Tone::Warning => "\x1b[33m",
    };
    let end = if code.is_empty() { "" } else { "\x1b[0m" };
    writeln!(out, "{time:<12}  {code}{what:<10}{end}  {server:<16}  {detail}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Blocks until told, then keeps what is written.
    struct Stalled {
        go: Receiver<()>,
        gone: bool,
        text: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Stalled {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            if !self.gone {
                self.go.recv().map_err(io::Error::other)?;
                self.gone = true;
            }
            self.text.send(buf.to_vec()).map_err(io::Error::other)?;
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stalled_output_holds_nobody_up_and_says_what_it_left_out() {
        let (go, wait) = mpsc::channel();
        let (text, written) = mpsc::channel();
        let (view, printer) = View::spawn(Style::Json, Stalled { go: wait, gone: false, text }).unwrap();
        let total = 10 * WAITING as u64;
        for seq in 1..=total {
            view.show(vec![Arc::new(Event { seq, ..Default::default() })]);
        }
        go.send(()).unwrap();
        drop(view);
        assert!(printer.finish(Duration::from_secs(30)));
        let text = String::from_utf8(written.try_iter().flatten().collect()).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let shown = lines.iter().filter(|v| v["type"] != "loss").count() as u64;
        let lost: u64 =
            lines.iter().filter(|v| v["type"] == "loss").map(|v| v["count"].as_u64().unwrap()).sum();
        assert!(lost > 0);
        assert_eq!(shown + lost, total);
    }
}
