//! The fields of an event that no schema has had a place for yet.

use crate::event::{Event, json};
use serde_json::{Map, Value};

/// A native object, from which fields are taken. Empty text is no field.
#[derive(Debug, Default)]
pub struct Rest(Map<String, Value>);

impl Rest {
    pub fn of(event: &Event) -> Rest {
        match json::to_json(event) {
            Value::Object(fields) => Rest(fields),
            _ => Rest::default(),
        }
    }

    pub fn text(&mut self, key: &str) -> Option<String> {
        match self.0.remove(key) {
            Some(Value::String(text)) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    /// As it is; empty text is no field here either.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key).filter(|v| v.as_str().is_none_or(|text| !text.is_empty()))
    }

    /// What both schemas call a long is signed.
    pub fn number(&mut self, key: &str) -> Option<i64> {
        number(&self.0.remove(key)?)
    }

    /// A number that only names something.
    pub fn identifier(&mut self, key: &str) -> Option<String> {
        match self.0.remove(key) {
            Some(Value::Number(number)) => Some(number.to_string()),
            _ => None,
        }
    }

    /// As [`Rest::number`]; the field stays: the place for it is less exact.
    pub fn look_at_number(&self, key: &str) -> Option<i64> {
        number(self.0.get(key)?)
    }

    /// As [`Rest::text`]; the field stays, because its name is what people know.
    pub fn look_at(&self, key: &str) -> &str {
        self.0.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    pub fn strings(&mut self, key: &str) -> Option<Vec<String>> {
        let Some(Value::Array(list)) = self.0.remove(key) else { return None };
        let list: Vec<String> = list.iter().filter_map(|v| Some(v.as_str()?.to_owned())).collect();
        (!list.is_empty()).then_some(list)
    }

    /// Empty if there is none.
    pub fn object(&mut self, key: &str) -> Rest {
        match self.0.remove(key) {
            Some(Value::Object(fields)) => Rest(fields),
            _ => Rest::default(),
        }
    }

    pub fn objects(&mut self, key: &str) -> Vec<Rest> {
        let Some(Value::Array(list)) = self.0.remove(key) else { return Vec::new() };
        list.into_iter()
            .filter_map(|v| if let Value::Object(fields) = v { Some(Rest(fields)) } else { None })
            .collect()
    }

    pub fn drop_all(&mut self, keys: &[&str]) {
        for key in keys {
            self.0.remove(*key);
        }
    }

    /// What is left of an object that was taken out.
    pub fn put_back(&mut self, key: &str, object: Rest) {
        if let Some(value) = object.into_value() {
            self.0.insert(key.to_owned(), value);
        }
    }

    /// These fields, as an object of their own; `None` if there are none.
    pub fn split(&mut self, keys: &[&str]) -> Option<Rest> {
        let split: Map<String, Value> = keys.iter().filter_map(|key| self.0.remove_entry(*key)).collect();
        (!split.is_empty()).then_some(Rest(split))
    }

    pub fn into_value(self) -> Option<Value> {
        (!self.0.is_empty()).then_some(Value::Object(self.0))
    }
}

fn number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_u64().map(|_| i64::MAX))
}

/// The last part of a path.
pub fn file_name(path: &str) -> String {
    path.rsplit('/').next().unwrap_or(path).to_owned()
}

/// An address that reads as one: schemas refuse any other text.
pub fn is_address(text: &str) -> bool {
    text.parse::<std::net::IpAddr>().is_ok()
}
