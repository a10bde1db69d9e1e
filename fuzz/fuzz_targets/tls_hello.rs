//! The first bytes that a hostile server sends to an address it learned by name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sensor_common::name::MAX_NAME;
use sensor_common::tls::server_name;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(name) = server_name(bytes) {
        assert!(name.len() <= MAX_NAME);
        assert!(!name.bytes().any(|b| b == 0 || b.is_ascii_uppercase()), "{name}");
        assert!(bytes[0] == 22 && bytes[5] == 1);
        // Nothing beyond the record counts.
        let end = 5 + usize::from(u16::from_be_bytes([bytes[3], bytes[4]]));
        assert_eq!(server_name(&bytes[..end]), Ok(name));
    }
});
