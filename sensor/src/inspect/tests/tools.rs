use std::collections::HashSet;

use serde::Deserialize;
use serde_json::Value;

use crate::inspect::{Found, Key, Kind, tool};

#[derive(Deserialize)]
struct Listed {
    server: String,
    package: String,
    tools: Vec<Value>,
}

#[derive(Deserialize)]
struct Planted {
    source: String,
    rule: String,
    tool: Value,
    #[serde(default)]
    others: HashSet<(String, String)>,
}

fn check(tool: &Value, others: &HashSet<(String, String)>) -> Vec<Found> {
    tool::check(tool, others, &Key::new(&[3; 32]))
}

/// The tools of real servers, as `tools/list` gave them out.
fn real() -> Vec<Listed> {
    [
        include_str!("data/listed-everything.json"),
        include_str!("data/listed-filesystem.json"),
        include_str!("data/listed-context7.json"),
        include_str!("data/listed-notion.json"),
        include_str!("data/listed-fetch.json"),
        include_str!("data/listed-git.json"),
        include_str!("data/listed-time.json"),
        include_str!("data/listed-sqlite.json"),
    ]
    .map(|text| serde_json::from_str(text).unwrap())
    .into()
}

#[test]
fn nothing_is_found_in_the_tools_of_real_servers() {
    let servers = real();
    for server in &servers {
        let name = |tool: &Value| tool["name"].as_str().unwrap().to_owned();
        let own: HashSet<String> = server.tools.iter().map(name).collect();
        let others: HashSet<_> = servers
            .iter()
            .filter(|other| other.server != server.server)
            .flat_map(|other| other.tools.iter().map(|tool| (other.server.clone(), name(tool))))
            .filter(|(_, name)| !own.contains(name))
            .collect();
        assert!(!server.tools.is_empty() && others.len() > 40);
        for tool in &server.tools {
            assert_eq!(check(tool, &others), [], "{} {}", server.package, tool["name"]);
        }
    }
}

#[test]
fn every_planted_sample_is_found() {
    let planted: Vec<Planted> = serde_json::from_str(include_str!("data/poisoned.json")).unwrap();
    assert!(planted.len() >= 40);
    let missed: Vec<String> = planted
        .iter()
        .filter_map(|sample| {
            let found = check(&sample.tool, &sample.others);
            assert!(found.iter().all(|f| f.kind == Kind::ToolPoisoning && f.place.starts_with('/')));
            let rules: Vec<&str> = found.iter().map(|f| f.rule).collect();
            (!rules.contains(&sample.rule.as_str()))
                .then(|| format!("{}: {} not in {rules:?}: {}", sample.source, sample.rule, sample.tool))
        })
        .collect();
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn what_only_looks_alike_is_not_found() {
    let benign: Vec<Value> = serde_json::from_str(include_str!("data/benign.json")).unwrap();
    assert!(benign.len() >= 30);
    let found: Vec<String> = benign
        .iter()
        .map(|tool| (tool, check(tool, &HashSet::new())))
        .filter(|(_, found)| !found.is_empty())
        .map(|(tool, found)| format!("{found:?}: {tool}"))
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}
