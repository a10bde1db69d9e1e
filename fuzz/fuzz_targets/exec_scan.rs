//! The walk over argv that the kernel does, against a plain reading of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sensor_common::exec::{Scan, Step};

#[derive(Debug, PartialEq, Eq)]
struct Argument {
    start: usize,
    base: usize,
    module: usize,
    script: bool,
}

fn walked(argv: &[u8]) -> Vec<Argument> {
    let mut scan = Scan::default();
    argv.iter()
        .enumerate()
        .filter_map(|(at, byte)| match scan.step(at as u32, *byte) {
            Step::Within => None,
            Step::Argument { start, base, module, script } => {
                Some(Argument { start: start as usize, base: base as usize, module: module as usize, script })
            }
        })
        .collect()
}

fn read(argv: &[u8]) -> Vec<Argument> {
    const MODULES: &[u8] = b"/node_modules/";
    let mut arguments = Vec::new();
    let (mut start, mut script_seen) = (0, false);
    for (index, text) in argv.split(|byte| *byte == 0).enumerate() {
        let terminated = start + text.len() < argv.len();
        if index > 0 && terminated {
            let base = start + text.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
            let module = (MODULES.len()..=text.len())
                .rev()
                .find(|end| text[..*end].ends_with(MODULES))
                .map_or(0, |end| start + end);
            let script = !script_seen && text.first() != Some(&b'-');
            script_seen |= script || matches!(text, b"-m" | b"-c" | b"-e" | b"-p");
            arguments.push(Argument { start, base, module, script });
        }
        start += text.len() + 1;
    }
    arguments
}

fuzz_target!(|argv: &[u8]| assert_eq!(walked(argv), read(argv)));
