//! DNS messages (RFC 1035, section 4): written field by field, so that every
//! field can be wrong, and read as the most gullible client would.

use std::net::IpAddr;

pub const A: u16 = 1;
pub const CNAME: u16 = 5;
pub const NULL: u16 = 10;
pub const TXT: u16 = 16;
pub const AAAA: u16 = 28;
/// RFC 9460: carries addresses and ECH keys.
pub const HTTPS: u16 = 65;
const OPT: u16 = 41;
const IN: u16 = 1;

/// Response, recursion desired and available.
pub const RESPONSE: u16 = 0x8180;
pub const TRUNCATED: u16 = 0x0200;
pub const NO_SUCH_NAME: u16 = 3;
const HEADER: usize = 12;
/// What a query says it can take over UDP (RFC 6891).
const UDP_SIZE: u16 = 4096;

/// The one question of a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub id: u16,
    /// As written, without the last dot.
    pub name: String,
    pub kind: u16,
}

impl Query {
    pub fn parse(bytes: &[u8]) -> Option<Query> {
        let (name, end) = read_name(bytes, HEADER)?;
        Some(Query { id: be16(bytes, 0)?, name, kind: be16(bytes, end)? })
    }

    pub fn is_for(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name)
    }

    pub fn kind_of(address: IpAddr) -> u16 {
        if address.is_ipv4() { A } else { AAAA }
    }
}

/// Labels without compression. A label of over 63 bytes is the test's mistake.
pub fn wire_name(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in text.split('.').filter(|l| !l.is_empty()) {
        assert!(label.len() < 64, "label {label}");
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

/// A compression pointer.
pub fn pointer(to: usize) -> Vec<u8> {
    (0xc000 | to as u16).to_be_bytes().to_vec()
}

/// Owner of a record: the name in the question.
pub fn asked() -> Vec<u8> {
    pointer(HEADER)
}

#[derive(Clone, Debug)]
pub struct Record {
    pub owner: Vec<u8>,
    pub kind: u16,
    pub class: u16,
    pub ttl: u32,
    pub data: Vec<u8>,
    /// Said instead of the data's length.
    pub said_len: Option<u16>,
}

impl Record {
    pub fn new(owner: Vec<u8>, kind: u16, data: Vec<u8>) -> Record {
        Record { owner, kind, class: IN, ttl: 60, data, said_len: None }
    }

    pub fn address(owner: Vec<u8>, address: IpAddr) -> Record {
        let data = match address {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        };
        Record::new(owner, Query::kind_of(address), data)
    }

    pub fn cname(owner: Vec<u8>, target: &str) -> Record {
        Record::new(owner, CNAME, wire_name(target))
    }

    pub fn ttl(self, ttl: u32) -> Record {
        Record { ttl, ..self }
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend(&self.owner);
        bytes.extend(self.kind.to_be_bytes());
        bytes.extend(self.class.to_be_bytes());
        bytes.extend(self.ttl.to_be_bytes());
        bytes.extend(self.said_len.unwrap_or(self.data.len() as u16).to_be_bytes());
        bytes.extend(&self.data);
    }
}

#[derive(Clone, Debug)]
pub struct Message {
    pub id: u16,
    pub flags: u16,
    /// Names in wire form, and types.
    pub questions: Vec<(Vec<u8>, u16)>,
    pub answers: Vec<Record>,
    pub authorities: Vec<Record>,
    pub additionals: Vec<Record>,
    /// Bytes after the last record.
    pub trailing: Vec<u8>,
}

impl Message {
    /// A query as resolvers in the C library send it, with EDNS.
    pub fn query(id: u16, name: &str, kind: u16) -> Message {
        let mut edns = Record::new(vec![0], OPT, Vec::new());
        edns.class = UDP_SIZE;
        edns.ttl = 0;
        Message {
            id,
            flags: 0x0100,
            questions: vec![(wire_name(name), kind)],
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: vec![edns],
            trailing: Vec::new(),
        }
    }

    /// The right answer's frame: same id, same question, no records yet.
    pub fn reply(query: &Query) -> Message {
        Message {
            id: query.id,
            flags: RESPONSE,
            questions: vec![(wire_name(&query.name), query.kind)],
            answers: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
            trailing: Vec::new(),
        }
    }

    pub fn answer(mut self, record: Record) -> Message {
        self.answers.push(record);
        self
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let sections = [&self.answers, &self.authorities, &self.additionals];
        let counts = [self.questions.len(), sections[0].len(), sections[1].len(), sections[2].len()];
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        for count in counts {
            bytes.extend((count as u16).to_be_bytes());
        }
        for (name, kind) in &self.questions {
            bytes.extend(name);
            bytes.extend(kind.to_be_bytes());
            bytes.extend(IN.to_be_bytes());
        }
        for record in sections.into_iter().flatten() {
            record.write(&mut bytes);
        }
        bytes.extend(&self.trailing);
        bytes
    }
}

/// As DNS over TCP frames it.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let mut bytes = (message.len() as u16).to_be_bytes().to_vec();
    bytes.extend(message);
    bytes
}

/// Every address in any section, whatever the owner: a client that believes
/// everything. What cannot be read ends it.
pub fn all_addresses(bytes: &[u8]) -> Vec<IpAddr> {
    let mut found = Vec::new();
    let _ = collect(bytes, &mut found);
    found
}

fn collect(bytes: &[u8], found: &mut Vec<IpAddr>) -> Option<()> {
    let mut at = HEADER;
    for _ in 0..be16(bytes, 4)? {
        at = skip_name(bytes, at)? + 4;
    }
    let records: usize = [6, 8, 10].iter().filter_map(|o| be16(bytes, *o)).map(usize::from).sum();
    for _ in 0..records {
        at = skip_name(bytes, at)?;
        let kind = be16(bytes, at)?;
        let len = usize::from(be16(bytes, at + 8)?);
        let data = bytes.get(at + 10..at + 10 + len)?;
        match kind {
            A => found.extend(<[u8; 4]>::try_from(data).map(IpAddr::from)),
            AAAA => found.extend(<[u8; 16]>::try_from(data).map(IpAddr::from)),
            _ => {}
        }
        at += 10 + len;
    }
    Some(())
}

fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            len if len >= 0xc0 => return Some(at + 2),
            len => at += 1 + usize::from(len),
        }
    }
}

/// Without compression: a question has none.
fn read_name(bytes: &[u8], mut at: usize) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    loop {
        let len = usize::from(*bytes.get(at)?);
        let label = bytes.get(at + 1..at + 1 + len)?;
        at += 1 + len;
        if len == 0 {
            return Some((labels.join("."), at));
        }
        labels.push(String::from_utf8_lossy(label).into_owned());
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_as_it_was_written() {
        let bytes = Message::query(7, "Api.Example.test.", AAAA).to_bytes();
        let query = Query::parse(&bytes).unwrap();
        assert_eq!(query, Query { id: 7, name: "Api.Example.test".into(), kind: AAAA });
        assert!(query.is_for("api.example.TEST"));
        assert_eq!(Query::parse(&bytes[..20]), None);
    }

    #[test]
    fn addresses_are_found_in_every_section() {
        let query = Query { id: 1, name: "a.test".into(), kind: A };
        let ips: Vec<IpAddr> = ["192.0.2.1", "2001:db8::1"].map(|i| i.parse().unwrap()).to_vec();
        let mut message = Message::reply(&query)
            .answer(Record::cname(asked(), "b.test"))
            .answer(Record::address(wire_name("b.test"), ips[0]));
        message.additionals.push(Record::address(pointer(HEADER), ips[1]));
        let bytes = message.to_bytes();
        assert_eq!(all_addresses(&bytes), ips);
        assert_eq!(all_addresses(&bytes[..bytes.len() - 1]), ips[..1]);
    }
}
