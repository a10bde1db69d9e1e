//! Where a body ends (RFC 9112 sections 6 and 7).

/// Of the trailers of a chunked body, and of what follows a chunk's size.
const TRAILER_BYTES: u32 = 64 * 1024;
/// Hexadecimal digits of a chunk's size.
const SIZE_DIGITS: u8 = 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// So many bytes are still to come.
    Length(u64),
    Chunked(Chunked),
    /// All until the connection ends.
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunked {
    Size {
        size: u64,
        digits: u8,
    },
    /// The rest of the size's line.
    Extension {
        size: u64,
        length: u32,
    },
    Data {
        left: u64,
    },
    /// The line end behind the data.
    Behind,
    /// `length` of all trailers; the current line has something on it.
    Trailers {
        length: u32,
        filled: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// More is to come.
    No,
    Yes,
    /// It is not framed as it says.
    Broken,
}

impl Framing {
    pub(super) const fn chunked() -> Self {
        Self::Chunked(Chunked::Size { size: 0, digits: 0 })
    }

    pub(super) fn is_over(self) -> bool {
        self == Self::Length(0)
    }

    /// That many bytes went by unseen. `None`: nobody can tell what comes next.
    pub(super) fn skip(&mut self, lost: u64) -> Option<End> {
        match self {
            Self::Close => Some(End::No),
            Self::Length(left) => {
                *left = left.checked_sub(lost)?;
                Some(if *left == 0 { End::Yes } else { End::No })
            }
            Self::Chunked(chunked) => {
                let Chunked::Data { left } = chunked else { return None };
                *left = left.checked_sub(lost)?;
                if *left == 0 {
                    *chunked = Chunked::Behind;
                }
                Some(End::No)
            }
        }
    }

    /// The next bytes of content among `bytes`, how many bytes they and the
    /// framing before them take, and whether the body ends there.
    pub(super) fn take<'a>(&mut self, bytes: &'a [u8]) -> (&'a [u8], usize, End) {
        match self {
            Self::Close => (bytes, bytes.len(), End::No),
            Self::Length(left) => {
                let now = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= now as u64;
                (&bytes[..now], now, if *left == 0 { End::Yes } else { End::No })
            }
            Self::Chunked(chunked) => chunked.take(bytes),
        }
    }
}

impl Chunked {
    fn take<'a>(&mut self, bytes: &'a [u8]) -> (&'a [u8], usize, End) {
        for (at, &byte) in bytes.iter().enumerate() {
            if let Self::Data { left } = self {
                let now = (bytes.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= now as u64;
                if *left == 0 {
                    *self = Self::Behind;
                }
                return (&bytes[at..at + now], at + now, End::No);
            }
            match self.framing(byte) {
                End::No => {}
                end => return (&[], at + 1, end),
            }
        }
        (&[], bytes.len(), End::No)
    }

    fn framing(&mut self, byte: u8) -> End {
        *self = match (*self, byte) {
            (Self::Size { size, digits }, _) if byte.is_ascii_hexdigit() && digits < SIZE_DIGITS => {
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                Self::Size { size: size << 4 | u64::from(digit), digits: digits + 1 }
            }
            (Self::Size { digits: 0, .. }, _) => return End::Broken,
            (Self::Size { size, .. } | Self::Extension { size, .. }, b'\n') if size > 0 => {
                Self::Data { left: size }
            }
            (Self::Size { .. } | Self::Extension { .. }, b'\n') => {
                Self::Trailers { length: 0, filled: false }
            }
            (Self::Size { size, .. }, b'\r' | b';' | b' ' | b'\t') => Self::Extension { size, length: 0 },
            (Self::Extension { size, length }, _) if length < TRAILER_BYTES => {
                Self::Extension { size, length: length + 1 }
            }
            (Self::Behind, b'\r') => Self::Behind,
            (Self::Behind, b'\n') => Self::Size { size: 0, digits: 0 },
            (Self::Trailers { filled: false, .. }, b'\n') => return End::Yes,
            (Self::Trailers { length, filled }, _) if length < TRAILER_BYTES => {
                Self::Trailers { length: length + 1, filled: byte != b'\n' && (filled || byte != b'\r') }
            }
            _ => return End::Broken,
        };
        End::No
    }
}
