//! What the kernel's rings hand out, and what is read from it: any bytes are a
//! record or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcp_sensor::kernel::record::{self, Record};

fuzz_target!(|data: &[u8]| {
    match record::parse(data) {
        Ok(Record::Exec(exec)) => {
            let _ = (record::exe_path(&exec), record::argv(&exec), record::text(&exec.comm));
        }
        Ok(Record::Unix(unix)) => {
            let _ = record::unix_path(&unix.path);
        }
        Ok(Record::Name(name)) => {
            let _ = sensor_common::name::readable(&name.text);
        }
        Ok(Record::Verdict(_) | Record::Exit(_) | Record::Candidate(_) | Record::Released(_)) | Err(_) => {}
    }
    // The ring of wires is another's to fill, and read by the same rules.
    match record::wire(data) {
        Ok(record::WireRecord::Chunk(chunk, bytes)) => assert_eq!(bytes.len(), chunk.len as usize),
        Ok(record::WireRecord::Look(look, bytes)) => assert_eq!(bytes.len(), look.len as usize),
        Ok(record::WireRecord::Met(_)) | Err(_) => {}
    }
});
