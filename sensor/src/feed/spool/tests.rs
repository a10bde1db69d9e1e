use super::*;
use crate::event::{Body, Event, pb};
use proptest::prelude::*;
use prost::Message as _;
use std::collections::BTreeSet;

const SMALL: Limits = Limits { bytes: 256 << 10 };

fn owner(boot: &str) -> Owner {
    Owner { sensor: "host".to_owned(), boot: boot.to_owned() }
}

fn exec(seq: u64) -> Event {
    let argv = vec!["x".repeat(200)];
    Event { seq, body: Some(Body::Exec(pb::Exec { argv, ..Default::default() })), ..Default::default() }
}

fn denial(seq: u64) -> Event {
    let decision = pb::Decision { verdict: pb::Verdict::Deny.into(), ..Default::default() };
    let connection = pb::Connection { decision: Some(decision), ..Default::default() };
    Event { seq, body: Some(Body::Connection(connection)), ..Default::default() }
}

/// `count` events from `first` on, every eighth of them a denial.
fn batch(first: u64, count: u64) -> Sealed {
    let events = (first..first + count).map(|seq| if seq % 8 == 0 { denial(seq) } else { exec(seq) });
    let mut sealed = thin::seal(events);
    assert_eq!(sealed.len(), 1);
    sealed.remove(0)
}

fn events(batch: &Sealed) -> Vec<Event> {
    match pb::FeedRequest::decode(&*batch.bytes).unwrap().message.unwrap() {
        pb::feed_request::Message::Batch(batch) => batch.events,
        other => panic!("{other:?}"),
    }
}

/// Everything that can be read: owner's boot, events.
fn rest(spool: &mut Spool) -> Vec<(String, Event)> {
    let mut all = Vec::new();
    while let Some(owner) = spool.next_owner() {
        let batch = spool.next_batch().unwrap().unwrap();
        all.extend(events(&batch).into_iter().map(|e| (owner.boot.clone(), e)));
    }
    assert_eq!(spool.next_batch().unwrap(), None);
    all
}

/// Numbers that arrived, and how many were told lost.
fn sum(all: &[(String, Event)]) -> (BTreeSet<u64>, u64, u64) {
    let (mut seen, mut lost, mut denials) = (BTreeSet::new(), 0, 0);
    for (_, event) in all {
        match &event.body {
            Some(Body::Loss(loss)) => {
                lost += loss.count;
                denials += loss.denials;
                assert_eq!(loss.types.iter().map(|t| t.count).sum::<u64>(), loss.count);
            }
            _ => assert!(seen.insert(event.seq)),
        }
    }
    (seen, lost, denials)
}

fn open(dir: &Path, boot: &str) -> (Spool, Report) {
    Spool::open(dir, SMALL, owner(boot)).unwrap()
}

#[test]
fn batches_come_back_as_they_were_and_go_when_they_are_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    let batches: Vec<_> = (0..200).map(|n| batch(n * 4 + 1, 4)).collect();
    for batch in &batches {
        assert_eq!(spool.append(batch.clone()), Ok(Appended::Stored));
        assert_eq!(spool.next_batch().unwrap().as_ref(), Some(batch));
        spool.acked("a", batch.last_seq);
    }
    assert!(spool.bytes() < KEPT);
    spool.close("a", 800);
    drop(spool);
    let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(files, ["lock"]);
}

#[test]
fn what_was_not_acknowledged_comes_first_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    for n in 0..3 {
        spool.append(batch(n * 4 + 1, 4)).unwrap();
    }
    spool.next_batch().unwrap();
    drop(spool);
    let (mut spool, report) = open(dir.path(), "b");
    assert_eq!(report, Report::default());
    spool.append(batch(1, 2)).unwrap();
    assert_eq!(spool.next_owner().unwrap().boot, "a");
    let all = rest(&mut spool);
    let seqs: Vec<_> = all.iter().map(|(boot, e)| (boot.as_str(), e.seq)).collect();
    let expected: Vec<_> = (1..=12).map(|n| ("a", n)).chain([("b", 1), ("b", 2)]).collect();
    assert_eq!(seqs, expected);
    spool.acked("a", 12);
    assert!(!segment::path(dir.path(), 1).exists());
    spool.acked("b", 2);
    spool.close("b", 2);
    assert_eq!(spool.bytes(), 0);
}

#[test]
fn two_agents_do_not_share_a_spool() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path(), "a");
    assert!(matches!(Spool::open(dir.path(), SMALL, owner("b")), Err(SpoolError::InUse(_))));
}

#[test]
fn beyond_the_limit_telemetry_goes_first_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    const COUNT: u64 = 160;
    for n in 0..COUNT {
        spool.append(batch(n * 16 + 1, 16)).unwrap();
    }
    assert!(spool.bytes() <= SMALL.bytes);
    let all = rest(&mut spool);
    assert!(all.is_sorted_by(|a, b| a.1.seq < b.1.seq));
    let (seen, lost, denials) = sum(&all);
    assert_eq!(seen.len() as u64 + lost, COUNT * 16);
    assert!(lost > 0 && denials == 0, "{lost} {denials}");
    assert!((1..=COUNT * 16).filter(|n| n % 8 == 0).all(|n| seen.contains(&n)), "each denial is there");
    assert_eq!(spool.given().evicted, lost);
}

#[test]
fn when_only_denials_are_left_the_oldest_go_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    let mut total = 0;
    for _ in 0..1500 {
        let events = (total + 1..total + 65).map(|seq| if seq % 2 == 0 { denial(seq) } else { exec(seq) });
        for batch in thin::seal(events) {
            spool.append(batch).unwrap();
        }
        total += 64;
    }
    assert!(spool.bytes() <= SMALL.bytes);
    drop(spool);
    let (mut spool, _) = open(dir.path(), "b");
    let all = rest(&mut spool);
    let (seen, lost, denials) = sum(&all);
    assert_eq!(seen.len() as u64 + lost, total);
    assert!(denials > 0 && denials < lost);
    let told = all.iter().filter(|(_, e)| matches!(e.body, Some(Body::Loss(_)))).count();
    assert!(told < 1500, "{told} losses");
    assert!(all.is_sorted_by(|a, b| a.1.seq < b.1.seq));
}

#[test]
fn a_record_cut_short_by_a_power_cut_is_told_and_the_rest_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    for n in 0..3 {
        spool.append(batch(n * 4 + 1, 4)).unwrap();
    }
    drop(spool);
    let path = segment::path(dir.path(), 1);
    let length = fs::metadata(&path).unwrap().len();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 7).unwrap();
    let (mut spool, report) = open(dir.path(), "b");
    assert_eq!(report.files.len(), 1, "{report:?}");
    let all = rest(&mut spool);
    let seqs: Vec<_> = all.iter().map(|(_, e)| e.seq).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let Some(Body::Loss(loss)) = &all[8].1.body else { panic!("{all:?}") };
    assert_eq!((loss.reason.as_str(), loss.count), ("damaged", 0), "nobody knows how many");
}

#[test]
fn damage_at_a_segments_end_is_counted_up_to_the_next_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    let mut last = 0;
    // Into the third segment.
    while !segment::path(dir.path(), 3).exists() {
        spool.append(batch(last + 1, 4)).unwrap();
        last += 4;
    }
    drop(spool);
    for number in [1, 2] {
        let path = segment::path(dir.path(), number);
        let length = fs::metadata(&path).unwrap().len();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 7).unwrap();
    }
    let (mut spool, report) = open(dir.path(), "b");
    assert_eq!((report.files.len(), spool.given().damaged), (2, 8), "{report:?}");
    let all = rest(&mut spool);
    assert!(all.is_sorted_by(|a, b| a.1.seq < b.1.seq));
    let told: Vec<_> = all
        .iter()
        .filter_map(|(_, e)| match &e.body {
            Some(Body::Loss(loss)) => Some((loss.count, loss.first_seq..=loss.last_seq)),
            _ => None,
        })
        .collect();
    let seen: BTreeSet<u64> =
        all.iter().filter(|(_, e)| !matches!(e.body, Some(Body::Loss(_)))).map(|(_, e)| e.seq).collect();
    assert!(told.iter().all(|(count, range)| *count == 4 && range.clone().count() == 4), "{told:?}");
    assert!((1..=last).all(|seq| seen.contains(&seq) != told.iter().any(|(_, r)| r.contains(&seq))));
}

#[test]
fn damage_while_it_runs_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    for n in 0..6 {
        spool.append(batch(n * 4 + 1, 4)).unwrap();
    }
    spool.next_batch().unwrap();
    let path = segment::path(dir.path(), 1);
    let mut bytes = fs::read(&path).unwrap();
    let third = bytes.len() / 2;
    bytes[third] ^= 0xff;
    fs::write(&path, &bytes).unwrap();
    let all = rest(&mut spool);
    let lost: u64 = all
        .iter()
        .map(|(_, e)| match &e.body {
            Some(Body::Loss(l)) => l.count,
            _ => 0,
        })
        .sum();
    assert_eq!((lost, spool.given().damaged), (4, 4));
    assert_eq!(all.len() as u64, 24 - 4 - 4 + 1);
    spool.append(batch(25, 4)).unwrap();
    assert_eq!(rest(&mut spool).len(), 4, "it is written on after its repair");
}

#[test]
fn a_file_of_somebody_else_stays_and_hinders_nobody() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path()).unwrap();
    fs::write(segment::path(dir.path(), 7), "{\"seq\":1}").unwrap();
    fs::write(dir.path().join("notes"), "x").unwrap();
    let (mut spool, report) = open(dir.path(), "a");
    assert_eq!(report.files.len(), 1);
    assert!(dir.path().join("0000000000000007.bad").exists() && dir.path().join("notes").exists());
    spool.append(batch(1, 4)).unwrap();
    assert!(segment::path(dir.path(), 8).exists(), "no number twice");
    assert_eq!(rest(&mut spool).len(), 4);
}

#[test]
fn the_last_segment_of_an_earlier_run_is_mended_and_not_written_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    spool.append(batch(1, 8)).unwrap();
    drop(spool);
    let (mut spool, _) = open(dir.path(), "b");
    let path = segment::path(dir.path(), 1);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(rest(&mut spool).len(), 1, "the loss");
    spool.append(batch(1, 8)).unwrap();
    assert!(rest(&mut spool).iter().all(|(boot, _)| boot == "b"));
}

#[test]
fn what_was_given_from_memory_is_not_safe_until_it_is_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = open(dir.path(), "a");
    spool.waiting.push_back(batch(1, 4));
    spool.next_batch().unwrap().unwrap();
    assert_eq!(spool.append(batch(5, 4)), Ok(Appended::Waiting));
    spool.acked("a", 3);
    assert_eq!(spool.append(batch(9, 4)), Ok(Appended::Waiting));
    spool.acked("a", 4);
    assert_eq!(spool.append(batch(13, 4)), Ok(Appended::Stored));
}

#[derive(Clone, Debug)]
enum Step {
    Append(u64),
    Read(usize),
    Ack,
    Restart,
    Flip(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1u64..60).prop_map(Step::Append),
        4 => (0usize..6).prop_map(Step::Read),
        2 => Just(Step::Ack),
        1 => Just(Step::Restart),
        1 => any::<usize>().prop_map(Step::Flip),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever happens, a number is read or told lost, and order is kept.
    #[test]
    fn every_event_is_read_or_told(steps in prop::collection::vec(step(), 1..120)) {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { bytes: 96 << 10 };
        let mut boot = 0u64;
        let (mut spool, _) = Spool::open(dir.path(), limits, owner("0")).unwrap();
        let mut next = 1;
        let mut made: Vec<(u64, u64)> = Vec::new(); // boot, seq
        let mut read: Vec<(u64, Event)> = Vec::new();
        let mut damaged = false;
        for step in steps {
            match step {
                Step::Append(count) => {
                    spool.append(batch(next, count)).unwrap();
                    made.extend((next..next + count).map(|seq| (boot, seq)));
                    next += count;
                }
                Step::Read(count) => {
                    for _ in 0..count {
                        let Some(owner) = spool.next_owner() else { break };
                        let batch = spool.next_batch().unwrap().unwrap();
                        let boot: u64 = owner.boot.parse().unwrap();
                        read.extend(events(&batch).into_iter().map(|e| (boot, e)));
                    }
                }
                Step::Ack => {
                    if let Some((boot, event)) = read.last() {
                        spool.acked(&boot.to_string(), event.seq);
                    }
                }
                Step::Restart => {
                    drop(spool);
                    boot += 1;
                    next = 1;
                    spool = Spool::open(dir.path(), limits, owner(&boot.to_string())).unwrap().0;
                }
                Step::Flip(at) => {
                    let mut files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
                    files.retain(|p| p.extension().is_some_and(|e| e == "seg"));
                    files.sort();
                    if let Some(path) = files.get(at % files.len().max(1)) {
                        let mut bytes = fs::read(path).unwrap();
                        let at = 40 + at % bytes.len().saturating_sub(40).max(1);
                        if let Some(byte) = bytes.get_mut(at) {
                            *byte ^= 0x55;
                            damaged = true;
                        }
                        fs::write(path, bytes).unwrap();
                    }
                }
            }
        }
        while let Some(owner) = spool.next_owner() {
            let batch = spool.next_batch().unwrap().unwrap();
            let boot: u64 = owner.boot.parse().unwrap();
            read.extend(events(&batch).into_iter().map(|e| (boot, e)));
        }
        let mut told: Vec<(u64, std::ops::RangeInclusive<u64>)> = Vec::new();
        let mut seen = BTreeSet::new();
        for (boot, event) in &read {
            match &event.body {
                Some(Body::Loss(loss)) => {
                    // At the end of what is left of a file nobody knows how many there were.
                    let to = if loss.count == 0 { u64::MAX } else { loss.last_seq };
                    told.push((*boot, loss.first_seq..=to));
                }
                _ => {
                    seen.insert((*boot, event.seq));
                }
            }
        }
        for (boot, seq) in &made {
            let is_told = told.iter().any(|(b, range)| b == boot && range.contains(seq));
            // Of a damaged end only that there was one is known.
            let some = damaged && told.iter().any(|(b, _)| b == boot);
            prop_assert!(seen.contains(&(*boot, *seq)) || is_told || some, "{boot}/{seq}");
        }
    }
}
