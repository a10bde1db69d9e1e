//! From rules to the kernel's trie of names, which answers with the longest
//! match only: every entry carries its own port ranges and those of the
//! wildcards around it.

use super::compile::NameEntry;
use super::model::Rule;
use super::names::NamePattern;
use super::ports::{Place, PortError, PortSets, Source};
use sensor_common::name::{MAX_NAME, MAX_NAMES, NAME_ASK_ONLY, NameRule, readable, turned};
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameKeyError {
    #[error(transparent)]
    Ports(#[from] PortError),
    #[error(
        "more than {MAX_NAMES} host names in all profiles ({names} here, each once more for every one of \
         {search} search domains)"
    )]
    Names { names: usize, search: usize },
}

/// The rule number of an entry that stands for a completed name: never a rule's.
const COMPLETED: u32 = 0;

/// The names of one profile; `rules` are its egress rules with their numbers.
/// For each name and each domain of `search` the completed name may be asked
/// for, unless a rule covers it anyway.
pub fn compile(
    profile: u16,
    rules: &[(u32, &Rule)],
    search: &[String],
    sets: &mut PortSets,
    out: &mut Vec<NameEntry>,
) -> Result<(), NameKeyError> {
    let names: BTreeSet<&NamePattern> = rules.iter().flat_map(|(_, rule)| &rule.names).collect();
    if names.len().saturating_mul(1 + search.len()).saturating_add(out.len()) > MAX_NAMES as usize {
        return Err(NameKeyError::Names { names: names.len(), search: search.len() });
    }
    let mut places: Vec<(Vec<u8>, u32)> = Vec::with_capacity(names.len() * (1 + search.len()));
    for (id, rule) in rules {
        places.extend(rule.names.iter().map(|name| (turned(&name.name, name.below), *id)));
    }
    for name in names {
        for domain in search.iter().filter(|domain| name.name.len() + 1 + domain.len() <= MAX_NAME) {
            places.push((turned(&format!("{}.{domain}", name.name), name.below), COMPLETED));
        }
    }
    places.sort_unstable();
    places.dedup();
    let sources: HashMap<u32, Source> = rules.iter().map(|(id, rule)| (*id, Source::Rule(rule))).collect();
    let one_rule: HashMap<u32, Rc<[u32]>> = sources.keys().map(|id| (*id, Rc::from([*id]))).collect();
    // The wildcards of rules around the current entry, outermost first. Texts
    // that begin alike stand together, so that none has to be looked for.
    let mut around: Vec<(&[u8], u32)> = Vec::new();
    for here in places.chunk_by(|a, b| a.0 == b.0) {
        let text = here[0].0.as_slice();
        while around.last().is_some_and(|(outer, _)| !text.starts_with(outer)) {
            around.pop();
        }
        let outer = around.last().map(|(_, set)| *set);
        let ids: Rc<[u32]> = match here {
            [(_, id)] if *id != COMPLETED => Rc::clone(&one_rule[id]),
            _ => here.iter().map(|(_, id)| *id).filter(|id| *id != COMPLETED).collect(),
        };
        let rule = match outer {
            None if ids.is_empty() => NameRule { port_set: 0, flags: NAME_ASK_ONLY },
            _ => {
                let set = sets.merge(outer.unwrap_or(0), &ids, Place::Name, &sources)?;
                let Some(port_set) = set else {
                    let place = NamePattern { below: text.ends_with(b"."), name: name_of(text) }.to_string();
                    return Err(PortError::Ranges { place, what: "names" }.into());
                };
                NameRule { port_set, flags: 0 }
            }
        };
        if text.ends_with(b".") && !ids.is_empty() {
            around.push((text, rule.port_set));
        }
        out.push(NameEntry { profile, text: text.to_vec(), rule });
    }
    Ok(())
}

fn name_of(text: &[u8]) -> String {
    readable(text.strip_suffix(b".").unwrap_or(text))
}
