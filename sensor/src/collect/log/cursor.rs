//! Where a reader of the log is, as bytes that outlive the collector.

/// Bytes of a cursor: version, log, number of the next event, sum.
const LENGTH: usize = 21;
const VERSION: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub log: u64,
    /// Number of the next event.
    pub offset: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CursorError {
    #[error("this is no cursor of a collector")]
    Malformed,
    #[error("the cursor is of a newer collector (version {0})")]
    Version(u8),
}

impl Cursor {
    pub fn to_bytes(self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.log.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Of what somebody kept; may be anything.
    pub fn read(bytes: &[u8]) -> Result<Cursor, CursorError> {
        let version = *bytes.first().ok_or(CursorError::Malformed)?;
        if version != VERSION {
            return Err(CursorError::Version(version));
        }
        let bytes: &[u8; LENGTH] = bytes.try_into().map_err(|_| CursorError::Malformed)?;
        let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        if bytes[17..] != crc32c::crc32c(&bytes[..17]).to_le_bytes() {
            return Err(CursorError::Malformed);
        }
        Ok(Cursor { log: word(1), offset: word(9) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_was_given_and_nothing_else_is() {
        let cursor = Cursor { log: 0x0123_4567_89ab_cdef, offset: u64::MAX - 5 };
        let bytes = cursor.to_bytes();
        assert_eq!(Cursor::read(&bytes), Ok(cursor));
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 4;
            assert!(Cursor::read(&other).is_err(), "byte {at}");
            assert!(Cursor::read(&bytes[..at]).is_err());
        }
        assert_eq!(Cursor::read(&[2]), Err(CursorError::Version(2)));
    }
}
