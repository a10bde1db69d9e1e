//! What the kernel knows of a file, asked of the kernel itself.

use super::load::map_fd;
use super::maps::Shared;
use super::sys;
use aya::Ebpf;
use aya::maps::{Array, Map, MapData};
use sensor_common::identity::FileId;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// The program `identify` and the map it answers in.
pub struct Identifier {
    program: OwnedFd,
    /// One call at a time.
    found: Mutex<Array<MapData, Shared<FileId>>>,
}

impl Identifier {
    pub(super) fn open(ebpf: &Ebpf, program: BorrowedFd<'_>) -> Result<Identifier, String> {
        let fd = ebpf.map("IDENTIFIED").and_then(map_fd).ok_or("no map `IDENTIFIED` in the kernel object")?;
        let data = fd.try_clone_to_owned().map_err(|e| e.to_string())?;
        let map = MapData::from_fd(data).and_then(Map::from_map_data).map_err(|e| e.to_string())?;
        Ok(Identifier {
            program: program.try_clone_to_owned().map_err(|e| e.to_string())?,
            found: Mutex::new(Array::try_from(map).map_err(|e| e.to_string())?),
        })
    }

    /// The file behind a descriptor of this process.
    pub fn of(&self, file: BorrowedFd<'_>) -> io::Result<FileId> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        sys::run_raw_tracepoint(self.program.as_fd(), file.as_raw_fd() as u64)?;
        let id = found.get(&0, 0).map_err(io::Error::other)?.0;
        if id.ino == 0 { Err(io::Error::other("it cannot be read")) } else { Ok(id) }
    }
}
