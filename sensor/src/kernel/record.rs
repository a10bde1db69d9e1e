//! Records of the rings, from bytes to types. Pure: a record that is short, of
//! an unknown kind or of another size is an error, never undefined behaviour.

use sensor_common::label::Label;
use sensor_common::listener::{Look, PIECE_BYTES};
use sensor_common::record::{
    Exec, Exit, Header, KIND_CANDIDATE, KIND_CHUNK, KIND_EXEC, KIND_EXIT, KIND_LOOK, KIND_MET, KIND_NAME,
    KIND_RELEASED, KIND_UNIX, KIND_VERDICT, NameVerdict, Released, UnixVerdict, Verdict,
};
use sensor_common::stdio::{Candidate, Chunk, Met};
use zerocopy::FromBytes;

#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    Verdict(Verdict),
    Name(Box<NameVerdict>),
    Unix(Box<UnixVerdict>),
    Exec(Box<Exec>),
    Exit(Exit),
    Candidate(Candidate),
    Released(Box<Released>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("a record of {0} bytes is too short for its header")]
    Short(usize),
    #[error("a record of unknown kind {0}")]
    Kind(u16),
    #[error("a record of kind {kind} has {got} bytes, not {want}")]
    Size { kind: u16, got: usize, want: usize },
}

/// Reads one record as the ring hands it out (it may pad to 8 bytes).
pub fn parse(bytes: &[u8]) -> Result<Record, RecordError> {
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| RecordError::Short(bytes.len()))?;
    fn whole<T: FromBytes>(bytes: &[u8], header: &Header) -> Result<T, RecordError> {
        let want = size_of::<T>();
        let error = RecordError::Size { kind: header.kind, got: bytes.len(), want };
        if usize::from(header.size) != want {
            return Err(error);
        }
        T::read_from_prefix(bytes).map(|(value, _)| value).map_err(|_| error)
    }
    Ok(match header.kind {
        KIND_VERDICT => Record::Verdict(whole(bytes, &header)?),
        KIND_NAME => Record::Name(Box::new(whole(bytes, &header)?)),
        KIND_UNIX => Record::Unix(Box::new(whole(bytes, &header)?)),
        KIND_EXEC => Record::Exec(Box::new(whole(bytes, &header)?)),
        KIND_EXIT => Record::Exit(whole(bytes, &header)?),
        KIND_CANDIDATE => Record::Candidate(whole(bytes, &header)?),
        KIND_RELEASED => Record::Released(Box::new(whole(bytes, &header)?)),
        kind => return Err(RecordError::Kind(kind)),
    })
}

impl Record {
    pub fn label(&self) -> Label {
        self.header().label
    }
}

/// A record of the ring of wires.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WireRecord<'a> {
    /// What moved, and those bytes of it that were read. The ring has room behind
    /// them, which is not theirs.
    Chunk(Chunk, &'a [u8]),
    Met(Met),
    /// Of a request to a program that nobody declared, likewise.
    Look(Look, &'a [u8]),
}

pub fn wire(bytes: &[u8]) -> Result<WireRecord<'_>, RecordError> {
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| RecordError::Short(bytes.len()))?;
    let size = |want| RecordError::Size { kind: header.kind, got: bytes.len(), want };
    match header.kind {
        KIND_CHUNK => {
            let (chunk, data) = Chunk::read_from_prefix(bytes).map_err(|_| size(size_of::<Chunk>()))?;
            let want = chunk.len as usize;
            match data.get(..want) {
                Some(data) if chunk.len <= chunk.moved => Ok(WireRecord::Chunk(chunk, data)),
                _ => Err(size(size_of::<Chunk>() + want)),
            }
        }
        KIND_MET => Met::read_from_prefix(bytes)
            .map(|(met, _)| WireRecord::Met(met))
            .map_err(|_| size(size_of::<Met>())),
        KIND_LOOK => {
            let (look, data) = Look::read_from_prefix(bytes).map_err(|_| size(size_of::<Look>()))?;
            let want = look.len as usize;
            match data.get(..want) {
                Some(data) if want <= PIECE_BYTES => Ok(WireRecord::Look(look, data)),
                _ => Err(size(size_of::<Look>() + want)),
            }
        }
        kind => Err(RecordError::Kind(kind)),
    }
}

impl Record {
    pub fn header(&self) -> &Header {
        match self {
            Record::Verdict(r) => &r.header,
            Record::Name(r) => &r.header,
            Record::Unix(r) => &r.header,
            Record::Exec(r) => &r.header,
            Record::Exit(r) => &r.header,
            Record::Candidate(r) => &r.header,
            Record::Released(r) => &r.header,
        }
    }
}

/// A path as exec records carry it, file name first: `node/bin/usr/`.
pub fn exe_path(record: &Exec) -> String {
    let len = (record.exe_len as usize).min(record.exe.len());
    path_from_leaf(&record.exe[..len])
}

pub fn path_from_leaf(leaf_first: &[u8]) -> String {
    let text = String::from_utf8_lossy(leaf_first);
    let mut path = String::with_capacity(text.len() + 1);
    for name in text.trim_end_matches('/').rsplit('/') {
        path.push('/');
        path.push_str(name);
    }
    path
}

/// argv of an exec record, and whether it was cut.
pub fn argv(record: &Exec) -> (Vec<String>, bool) {
    let len = (record.argv_len as usize).min(record.argv.len());
    let cut = record.argv_len as usize > record.argv.len();
    let bytes = &record.argv[..len];
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    if bytes.is_empty() {
        return (Vec::new(), cut);
    }
    (bytes.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect(), cut)
}

/// A NUL-padded name.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A `sun_path`; an abstract name begins with NUL, shown as `@`.
pub fn unix_path(path: &[u8]) -> String {
    match path.split_first() {
        Some((0, rest)) if rest.iter().any(|b| *b != 0) => {
            let end = rest.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
            format!("@{}", String::from_utf8_lossy(&rest[..end]))
        }
        _ => text(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    #[test]
    fn paths_turn_around() {
        assert_eq!(path_from_leaf(b"node/bin/usr/"), "/usr/bin/node");
        assert_eq!(path_from_leaf(b"init/"), "/init");
        assert_eq!(path_from_leaf(b""), "/");
        assert_eq!(unix_path(b"\0abc\0\0"), "@abc");
        assert_eq!(unix_path(b"/run/x\0\0"), "/run/x");
        assert_eq!(unix_path(&[0; 8]), "");
    }

    #[test]
    fn a_truncated_record_is_an_error() {
        let mut verdict = Verdict::default();
        verdict.header.kind = KIND_VERDICT;
        verdict.header.size = size_of::<Verdict>() as u16;
        let bytes = verdict.as_bytes();
        assert_eq!(parse(bytes), Ok(Record::Verdict(verdict)));
        for len in 0..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..1200), kind in 0u16..6) {
            let mut bytes = bytes;
            if bytes.len() > 2 { bytes[..2].copy_from_slice(&kind.to_ne_bytes()); }
            if let Ok(Record::Exec(exec)) = parse(&bytes) {
                let _ = (exe_path(&exec), argv(&exec));
            }
        }
    }
}
