//! DNS messages of a hostile server, and of a hostile resolver. The first byte
//! says what they are: 1 framed (TCP), 2 an answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sensor_common::dns;
use sensor_common::name::{MAX_NAME, turned};

fuzz_target!(|bytes: &[u8]| {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    let (framed, answers) = (mode & 1 != 0, mode & 2 != 0);
    let (questions, whole) = dns::read(bytes, framed, answers);
    assert!(!whole || answers || bytes.len() <= dns::QUERY_BYTES as usize);
    for question in &questions {
        assert!(question.name.len() <= MAX_NAME, "{}", question.name);
        assert!(!question.name.bytes().any(|b| b == 0 || b.is_ascii_uppercase()), "{}", question.name);
        let _ = turned(&question.name, false);
        assert!(answers || question.addresses.is_empty());
        for (addr, _) in &question.addresses {
            assert!(
                question.qtype == if addr.is_v4() && question.qtype == dns::A { dns::A } else { dns::AAAA }
            );
        }
    }
});
