//! The inventory on disk: one JSON file, replaced as a whole.

use super::{Inventory, Known, MAX_LISTS, MAX_TOOLS, Which};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Of the file's form.
const VERSION: u32 = 1;
/// Some three times what [`super::MAX_TOOLS_IN_ALL`] tools take.
const MAX_BYTES: u64 = 64 << 20;

/// The file could not be read: it is kept aside, and what servers list next is
/// their first list.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}; kept as {}", path.display(), kept.display())]
pub struct Damage {
    pub path: PathBuf,
    pub kept: PathBuf,
    pub reason: String,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    servers: Vec<(&'a Which, &'a Known)>,
}

#[derive(Deserialize)]
struct Read {
    servers: Vec<(Which, Known)>,
}

/// Known before anything else of the file is believed.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// What an earlier run wrote; nothing, if there was none.
pub fn load(path: &Path) -> (Inventory, Option<Damage>) {
    match read(path) {
        Ok(inventory) => (inventory, None),
        Err(reason) => {
            let kept = path.with_extension("json.bad");
            let reason = match fs::rename(path, &kept) {
                Ok(()) => reason,
                Err(error) => format!("{reason}; it cannot be moved: {error}"),
            };
            (Inventory::default(), Some(Damage { path: path.to_owned(), kept, reason }))
        }
    }
}

fn read(path: &Path) -> Result<Inventory, String> {
    // Whatever stands there is not waited for.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Inventory::default()),
        Err(error) => return Err(error.to_string()),
    };
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err("not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("more than {MAX_BYTES} bytes"));
    }
    parse(&bytes)
}

pub(super) fn parse(bytes: &[u8]) -> Result<Inventory, String> {
    let Version { version } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if version != VERSION {
        return Err(format!("its form is version {version}; this mcp-sensor reads {VERSION}"));
    }
    let read: Read = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let mut inventory = Inventory::default();
    for (which, mut known) in read.servers {
        known.lists.truncate(MAX_LISTS);
        for list in &mut known.lists {
            while list.tools.len() > MAX_TOOLS {
                list.tools.pop_last();
                list.incomplete = true;
            }
        }
        let tools = known.tools();
        if let Some(before) = inventory.servers.insert(which.clone(), known) {
            inventory.tools -= before.tools();
        }
        inventory.tools += tools;
        inventory.make_room(&which);
    }
    Ok(inventory)
}

impl Inventory {
    /// The file's content, if it is not what was written last.
    pub fn unsaved(&mut self) -> Option<Vec<u8>> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        let written = Written { version: VERSION, servers: self.servers.iter().collect() };
        // Maps with text for keys, and nothing that fails: it always has a form.
        Some(serde_json::to_vec(&written).unwrap_or_default())
    }

    /// What [`Inventory::unsaved`] gave could not be written: it gives it again.
    pub fn not_saved(&mut self) {
        self.dirty = true;
    }
}

/// Replaces the file: after a crash the old one stands there, or the new one.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("json.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The name too; a directory without a parent is this one.
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}
