//! Hashes that stay the same however a server orders keys and tools, writes
//! numbers, and whichever era it speaks.

use super::super::{ListedTool, ToolsPage};
use super::{MAX_TEXT, MAX_TOOLS};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt;

/// SHA-256; its text form is hex, lower case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Hash, D::Error> {
        let text = String::deserialize(d)?;
        let mut hash = [0; 32];
        hex::decode_to_slice(&text, &mut hash).map_err(D::Error::custom)?;
        Ok(Hash(hash))
    }
}

/// A tool in hashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ToolHashes {
    /// At most [`MAX_TEXT`] bytes; of a longer one the rest is in `whole`.
    pub name: String,
    /// Over all that follows and the name.
    pub whole: Hash,
    pub description: Hash,
    /// Of input and output.
    pub schema: Hash,
    /// What clients show and what they may infer (`readOnlyHint`, …).
    pub annotations: Hash,
}

impl ToolHashes {
    /// Only what a client gives its model or its user counts; all else of a tool
    /// (`_meta`, `execution`, `icons`) may differ by era. `null` is as absent.
    pub fn of(tool: &ListedTool) -> ToolHashes {
        let part = |keys: &[&str]| {
            let present = keys.iter().filter_map(|key| {
                let value = tool.tool.get(key).filter(|value| !value.is_null())?;
                Some(((*key).to_owned(), value.clone()))
            });
            hash(&Value::Object(present.collect::<Map<_, _>>()))
        };
        let description = part(&["description"]);
        let schema = part(&["inputSchema", "outputSchema"]);
        let annotations = part(&["annotations", "title"]);
        let mut whole = Sha256::new();
        for part in [&description, &schema, &annotations] {
            whole.update(part.0);
        }
        whole.update(tool.name.as_bytes());
        let name = tool.name[..tool.name.floor_char_boundary(MAX_TEXT)].to_owned();
        ToolHashes { name, whole: Hash(whole.finalize().into()), description, schema, annotations }
    }

    pub fn event(&self) -> crate::event::pb::Tool {
        crate::event::pb::Tool {
            name: self.name.clone(),
            hash: self.whole.to_string(),
            description_hash: self.description.to_string(),
            schema_hash: self.schema.to_string(),
        }
    }
}

/// Of the JSON in canonical form (RFC 8785): keys sorted, numbers as ECMAScript
/// writes them, so that 1, 1.0 and 1e0 are the same.
fn hash(value: &Value) -> Hash {
    let mut sha = Sha256::new();
    // A Value has neither NaN nor keys that are no text, and a hash takes any
    // bytes: this does not fail.
    let written = serde_json_canonicalizer::to_writer(value, &mut sha);
    debug_assert!(written.is_ok(), "{written:?}");
    Hash(sha.finalize().into())
}

/// A list of tools in hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListHashes {
    /// Sorted by name.
    pub tools: Vec<ToolHashes>,
    /// SHA-256 over name, a zero byte and `whole` of each.
    pub hash: Hash,
    /// There are more tools, or more of them, than these.
    pub incomplete: bool,
}

impl ListHashes {
    pub fn of(mut tools: Vec<ToolHashes>, incomplete: bool) -> ListHashes {
        tools.sort_unstable();
        let mut sha = Sha256::new();
        for tool in &tools {
            sha.update(tool.name.as_bytes());
            sha.update([0]);
            sha.update(tool.whole.0);
        }
        ListHashes { tools, hash: Hash(sha.finalize().into()), incomplete }
    }

    /// One for each name. Tools that share a name, one in the other's shadow,
    /// count as one that is both.
    pub(super) fn by_name(&self) -> impl Iterator<Item = ToolHashes> {
        let mut names: BTreeMap<&str, ToolHashes> = BTreeMap::new();
        for tool in &self.tools {
            names
                .entry(&tool.name)
                .and_modify(|first| {
                    first.whole = both(first.whole, tool.whole);
                    first.description = both(first.description, tool.description);
                    first.schema = both(first.schema, tool.schema);
                    first.annotations = both(first.annotations, tool.annotations);
                })
                .or_insert_with(|| tool.clone());
        }
        names.into_values()
    }
}

fn both(a: Hash, b: Hash) -> Hash {
    Hash(Sha256::new().chain_update(a.0).chain_update(b.0).finalize().into())
}

/// The pages of a connection's `tools/list`, put together: one list.
#[derive(Debug, Default)]
pub struct Pages {
    open: bool,
    cut: bool,
    tools: Vec<ToolHashes>,
}

impl Pages {
    /// A page came. The lists that ended with it: one that nobody asked the rest
    /// of, and the page's own.
    pub fn add(&mut self, page: &ToolsPage) -> Vec<ListHashes> {
        let mut ended = Vec::new();
        if page.first {
            ended.extend(self.end());
        } else if !self.open {
            // Its beginning was not seen.
            self.cut = true;
        }
        self.open = true;
        let room = MAX_TOOLS - self.tools.len();
        self.cut |= page.cut || page.tools.len() > room;
        self.tools.extend(page.tools.iter().take(room).map(ToolHashes::of));
        if page.last {
            self.open = false;
            ended.push(ListHashes::of(std::mem::take(&mut self.tools), std::mem::take(&mut self.cut)));
        }
        ended
    }

    /// The connection has ended: the list that is not whole, if there is one.
    pub fn end(&mut self) -> Option<ListHashes> {
        let open = std::mem::take(&mut self.open);
        self.cut = false;
        let tools = std::mem::take(&mut self.tools);
        open.then(|| ListHashes::of(tools, true))
    }
}
