//! Parts of a policy as text.

use sensor_common::UDP;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Write};
use std::ops::RangeInclusive;

type PortList = Vec<(u16, u16)>;

/// One rule for all places with the same ports, in at most `most` ranges.
pub fn write_rules<P: Display>(
    places: &BTreeMap<(u8, P), BTreeSet<u16>>,
    most: usize,
    key: &str,
    yaml: &mut String,
) {
    let mut grouped: BTreeMap<(u8, PortList), Vec<&P>> = BTreeMap::new();
    for ((protocol, place), ports) in places {
        let ranges = ranges(ports, most).into_iter().map(RangeInclusive::into_inner).collect();
        grouped.entry((*protocol, ranges)).or_default().push(place);
    }
    for ((protocol, ports), places) in grouped {
        let addresses: Vec<String> = places.iter().map(|place| quote(&place.to_string())).collect();
        let ports: Vec<String> = ports
            .iter()
            .map(|(low, high)| if low == high { low.to_string() } else { format!("{low}-{high}") })
            .collect();
        let _ = writeln!(yaml, "      - {key}: [{}]", addresses.join(", "));
        let _ = writeln!(yaml, "        ports: [{}]", ports.join(", "));
        if protocol == UDP {
            yaml.push_str("        protocol: udp\n");
        }
    }
}

/// Exact, unless there are more than the kernel holds: then the smallest gaps
/// are closed.
fn ranges(ports: &BTreeSet<u16>, most: usize) -> Vec<RangeInclusive<u16>> {
    let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some(last) if u32::from(*last.end()) + 1 == u32::from(*port) => *last = *last.start()..=*port,
            _ => ranges.push(*port..=*port),
        }
    }
    if ranges.len() > most {
        let mut gaps: Vec<(u16, usize)> =
            ranges.windows(2).enumerate().map(|(i, pair)| (pair[1].start() - pair[0].end(), i + 1)).collect();
        gaps.sort_unstable_by(|a, b| b.cmp(a));
        let mut cuts: Vec<usize> = gaps.iter().take(most - 1).map(|(_, at)| *at).collect();
        cuts.sort_unstable();
        let mut joined = Vec::with_capacity(most);
        let mut from = 0;
        for cut in cuts.into_iter().chain([ranges.len()]) {
            joined.push(*ranges[from].start()..=*ranges[cut - 1].end());
            from = cut;
        }
        return joined;
    }
    ranges
}

/// A double-quoted text that is the same in JSON and YAML: YAML takes no DEL, C1
/// control or surrogate as it is.
pub fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            ' '..='~' => quoted.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(quoted, "\\u{unit:04x}");
                }
            }
        }
    }
    quoted.push('"');
    quoted
}
