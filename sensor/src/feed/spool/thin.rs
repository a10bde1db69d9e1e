//! What is given up when there is no room: telemetry first, then all. What is
//! gone is told in its place, as a `Loss` at the number of the last event that
//! went, with a count for each type.

use crate::event::{Body, Class, Event, class, is_denial, json, now, pb};
use crate::feed::batch::{Open, Sealed};
use pb::feed_request::Message;
use prost::Message as _;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Events that are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Gone {
    pub count: u64,
    pub denials: u64,
    pub first_seq: u64,
    pub last_seq: u64,
    pub types: BTreeMap<String, u64>,
}

impl Gone {
    fn add(&mut self, event: &Event) {
        match &event.body {
            // It stands for what was lost before.
            Some(Body::Loss(loss)) => {
                self.count += loss.count;
                self.denials += loss.denials;
                for part in &loss.types {
                    *self.types.entry(part.r#type.clone()).or_default() += part.count;
                }
                let untold = loss.count.saturating_sub(loss.types.iter().map(|t| t.count).sum());
                if untold > 0 {
                    *self.types.entry(format!("loss:{}", loss.reason)).or_default() += untold;
                }
                self.reach(if loss.first_seq == 0 { event.seq } else { loss.first_seq }, event.seq);
            }
            body => {
                self.count += 1;
                self.denials += u64::from(body.as_ref().is_some_and(is_denial));
                let name = body.as_ref().map_or("unknown", json::type_name);
                *self.types.entry(name.to_owned()).or_default() += 1;
                self.reach(event.seq, event.seq);
            }
        }
    }

    pub(super) fn join(&mut self, other: &Gone) {
        self.count += other.count;
        self.denials += other.denials;
        for (name, count) in &other.types {
            *self.types.entry(name.clone()).or_default() += count;
        }
        if other.last_seq > 0 {
            self.reach(other.first_seq, other.last_seq);
        }
    }

    pub(super) fn reach(&mut self, first: u64, last: u64) {
        self.first_seq = if self.first_seq == 0 { first } else { self.first_seq.min(first) };
        self.last_seq = self.last_seq.max(last);
    }

    /// The event that tells, at the number of the last one that is gone.
    pub(super) fn told(&self, reason: &str) -> Event {
        let types = self
            .types
            .iter()
            .map(|(name, count)| pb::TypeCount { r#type: name.clone(), count: *count })
            .collect();
        let loss = pb::Loss {
            r#where: "spool".to_owned(),
            reason: reason.to_owned(),
            count: self.count,
            denials: self.denials,
            first_seq: self.first_seq,
            last_seq: self.last_seq,
            types,
        };
        Event { seq: self.last_seq, time_unix_ns: now(), body: Some(Body::Loss(loss)), ..Default::default() }
    }
}

/// The events of a batch; `None`: it is none.
fn events(batch: &Sealed) -> Option<Vec<Event>> {
    match pb::FeedRequest::decode(&*batch.bytes).ok()?.message? {
        Message::Batch(batch) => Some(batch.events),
        Message::Hello(_) | Message::Bundle(_) => None,
    }
}

/// The first number that a batch accounts for, told lost or there.
pub(super) fn first_of(batch: &Sealed) -> Option<u64> {
    let events = events(batch)?;
    let first = |event: &Event| match &event.body {
        Some(Body::Loss(loss)) if loss.first_seq > 0 => loss.first_seq.min(event.seq),
        _ => event.seq,
    };
    events.iter().map(first).min()
}

/// Batches of these events, as few as they fit into.
pub(super) fn seal(events: impl IntoIterator<Item = Event>) -> Vec<Sealed> {
    let (mut open, mut sealed) = (Open::default(), Vec::new());
    for event in events {
        let event = Arc::new(event);
        if open.push(&event).is_err() {
            sealed.extend(open.seal());
            // One that came out of a batch fits into an empty one.
            let _ = open.push(&event);
        }
    }
    sealed.extend(open.seal());
    sealed
}

/// The batch without its telemetry. Losses in it stay as they are.
pub(super) fn without_telemetry(batch: &Sealed) -> (Vec<Sealed>, Gone) {
    let Some(all) = events(batch) else {
        return (Vec::new(), of_unread(batch));
    };
    let (mut kept, mut gone) = (Vec::new(), Gone::default());
    for event in all {
        match event.body.as_ref().map_or(Class::Telemetry, class) {
            Class::Essential => kept.push(event),
            Class::Telemetry => gone.add(&event),
        }
    }
    if gone.count > 0 {
        let at = kept.partition_point(|e| e.seq < gone.last_seq);
        kept.insert(at, gone.told("evicted"));
    }
    (seal(kept), gone)
}

/// What goes when all of a batch does.
pub(super) fn all_of(batch: &Sealed) -> Gone {
    let Some(events) = events(batch) else { return of_unread(batch) };
    let mut gone = Gone::default();
    events.iter().for_each(|event| gone.add(event));
    gone
}

/// Of one that cannot be read, its head says how many it had.
fn of_unread(batch: &Sealed) -> Gone {
    Gone {
        count: batch.events as u64,
        first_seq: batch.first_seq,
        last_seq: batch.last_seq,
        ..Gone::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: u64, body: Body) -> Event {
        Event { seq, body: Some(body), ..Default::default() }
    }

    fn exec(seq: u64) -> Event {
        event(seq, Body::Exec(pb::Exec::default()))
    }

    fn denial(seq: u64) -> Event {
        let decision = pb::Decision { verdict: pb::Verdict::Deny.into(), ..Default::default() };
        event(seq, Body::Connection(pb::Connection { decision: Some(decision), ..Default::default() }))
    }

    fn one(events: Vec<Event>) -> Sealed {
        let mut sealed = seal(events);
        assert_eq!(sealed.len(), 1);
        sealed.remove(0)
    }

    #[test]
    fn telemetry_goes_and_is_told_by_type_in_its_place() {
        let batch = one(vec![exec(1), denial(2), exec(3), exec(4), denial(5)]);
        let (kept, gone) = without_telemetry(&batch);
        assert_eq!((gone.count, gone.denials, gone.first_seq, gone.last_seq), (3, 0, 1, 4));
        let kept = events(&kept[0]).unwrap();
        assert_eq!(kept.iter().map(|e| e.seq).collect::<Vec<_>>(), [2, 4, 5]);
        let Some(Body::Loss(loss)) = &kept[1].body else { panic!("{kept:?}") };
        assert_eq!((loss.reason.as_str(), loss.count), ("evicted", 3));
        assert_eq!((loss.types[0].r#type.as_str(), loss.types[0].count), ("exec", 3));
        let (again, gone) = without_telemetry(&one(kept.clone()));
        assert_eq!((events(&again[0]).unwrap(), gone), (kept, Gone::default()));
    }

    #[test]
    fn what_all_of_a_batch_stood_for_is_counted() {
        let (kept, _) = without_telemetry(&one(vec![exec(1), denial(2), exec(3)]));
        let gone = all_of(&kept[0]);
        assert_eq!((gone.count, gone.denials, gone.first_seq, gone.last_seq), (3, 1, 1, 3));
        assert_eq!(gone.types, BTreeMap::from([("exec".to_owned(), 2), ("connection".to_owned(), 1)]));
    }
}
