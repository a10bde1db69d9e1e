//! The terminal while `top` has it: a screen of its own, keys one by one. It gets
//! everything back when this is dropped.

use nix::sys::termios::{self, LocalFlags, SetArg, Termios};
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use tokio::sync::mpsc;

/// Alternate screen, no cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

pub(super) struct Screen {
    /// Of stdin before; `None`: it is no terminal.
    before: Option<Termios>,
}

pub(super) type Keys = mpsc::UnboundedReceiver<u8>;

impl Screen {
    pub(super) fn take() -> io::Result<Screen> {
        let mut before = None;
        if io::stdin().is_terminal() {
            let settings = termios::tcgetattr(io::stdin())?;
            let mut raw = settings.clone();
            // Ctrl-C stays a signal.
            raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
            termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
            before = Some(settings);
        }
        // From here on dropping it gives back what was taken.
        let screen = Screen { before };
        let mut out = io::stdout();
        out.write_all(ENTER.as_bytes())?;
        out.flush()?;
        Ok(screen)
    }

    /// Reads keys on a thread that nobody waits for.
    pub(super) fn keys(&mut self) -> Option<Keys> {
        self.before.as_ref()?;
        let (sender, keys) = mpsc::unbounded_channel();
        let reader = std::thread::Builder::new().name("keys".to_owned()).spawn(move || {
            for key in io::stdin().lock().bytes().map_while(Result::ok) {
                if sender.send(key).is_err() {
                    return;
                }
            }
        });
        reader.ok().map(|_| keys)
    }

    /// As much of the text as there is room for.
    pub(super) fn draw(&mut self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(frame(text, size()).as_bytes())?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = io::stdout();
        let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
        if let Some(before) = &self.before {
            let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Until `q` is pressed; forever where there are no keys.
pub(super) async fn quit(keys: &mut Option<Keys>) {
    if let Some(keys) = keys {
        while let Some(key) = keys.recv().await {
            if matches!(key, b'q' | b'Q') {
                return;
            }
        }
    }
    std::future::pending::<()>().await;
}

/// (columns, rows) of stdout.
fn size() -> (usize, usize) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which is what it is given.
    let asked = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    match asked {
        0 if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (80, 24),
    }
}

/// Overwrites what stands there, line by line, so that nothing flickers.
fn frame(text: &str, (columns, rows): (usize, usize)) -> String {
    let mut out = String::from("\x1b[H");
    let lines: Vec<&str> = text.lines().collect();
    for (i, line) in lines.iter().take(rows).enumerate() {
        if i > 0 {
            out.push_str("\r\n");
        }
        out.extend(line.chars().take(columns));
        out.push_str("\x1b[K");
    }
    out.push_str("\x1b[J");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_fits_the_screen_and_leaves_nothing_of_the_last() {
        assert_eq!(frame("größe\nb\nc\n", (3, 2)), "\x1b[Hgrö\x1b[K\r\nb\x1b[K\x1b[J");
    }
}
