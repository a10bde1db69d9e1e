//! The table of docs/formats.md is what the code does.

use super::{all, kind, value};
use crate::event::{Event, decision, json, pb};
use crate::format::{ecs, ocsf};
use std::collections::BTreeSet;

const DOCS: &str = include_str!("../../../../docs/formats.md");

fn joined(set: impl IntoIterator<Item = String>) -> String {
    let set: BTreeSet<String> = set.into_iter().collect();
    set.into_iter().collect::<Vec<_>>().join("; ")
}

fn table() -> String {
    // An event with no number is one of those that are empty.
    let known = |e: &Event| {
        e.body.as_ref().and_then(decision).is_none_or(|d| d.verdict() != pb::Verdict::Unspecified)
    };
    let events: Vec<Event> = all().into_iter().filter(|e| e.seq != 0 && known(e)).collect();
    let mut table =
        "| `type` | OCSF class | activity | ECS `event.kind`: `category` / `type` |\n|---|---|---|---|\n"
            .to_owned();
    for name in json::TYPES.into_iter().filter(|t| *t != "repeat").chain(["unknown"]) {
        let of: Vec<_> = events.iter().filter(|e| kind(e) == name).collect();
        let ocsf = of.iter().map(|e| value(&ocsf::render(e)));
        let ecs = of.iter().map(|e| value(&ecs::render(e)));
        let class =
            joined(ocsf.clone().map(|o| format!("{} {}", o["class_uid"], o["class_name"].as_str().unwrap())));
        let activity =
            joined(ocsf.map(|o| format!("{} {}", o["activity_id"], o["activity_name"].as_str().unwrap())));
        let words = |v: &serde_json::Value| {
            v.as_array().into_iter().flatten().filter_map(|w| w.as_str()).collect::<Vec<_>>().join(", ")
        };
        let ecs = joined(ecs.map(|e| {
            let e = &e["event"];
            let kind = e["kind"].as_str().unwrap();
            match words(&e["category"]) {
                none if none.is_empty() => kind.to_owned(),
                category => format!("{kind}: {category} / {}", words(&e["type"])),
            }
        }));
        table.push_str(&format!("| `{name}` | {class} | {activity} | {ecs} |\n"));
    }
    table
}

#[test]
fn the_documented_table_is_true() {
    let table = table();
    assert!(DOCS.contains(&table), "docs/formats.md should hold:\n\n{table}");
}
