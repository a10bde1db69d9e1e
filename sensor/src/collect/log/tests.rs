use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// One segment.
const SMALL: Settings = Settings { keep_bytes: u64::MAX, keep: Duration::ZERO };

fn small(keep_bytes: u64) -> Settings {
    Settings { keep_bytes, keep: Duration::ZERO }
}

fn origin(sensor: &str) -> Arc<Origin> {
    Arc::new(Origin { sensor: sensor.to_owned(), boot: "b".to_owned() })
}

fn events(sensor: &str, seqs: impl IntoIterator<Item = u64>) -> Vec<Event> {
    let event = |seq: u64| Event {
        seq,
        time_unix_ns: seq as i64 * 1000,
        sensor: sensor.to_owned(),
        boot: "b".to_owned(),
        body: Some(crate::event::Body::Finding(pb::Finding {
            detail: "x".repeat((seq % 7) as usize * 10),
            ..Default::default()
        })),
    };
    seqs.into_iter().map(event).collect()
}

/// Everything from `offset` on: sensor and number of each event, and how many
/// were missed.
fn read(log: &Log, offset: u64) -> (Vec<(String, u64)>, u64) {
    let mut reader = log.source().reader(offset);
    let (mut found, mut missed) = (Vec::new(), 0);
    loop {
        let before = reader.offset();
        match reader.read().unwrap() {
            Next::Events(events, next) => {
                assert_eq!(before + events.len() as u64, next);
                found.extend(events.into_iter().map(|e| (e.sensor, e.seq)));
            }
            Next::Missed { count, .. } => {
                assert_eq!(reader.offset(), before + count);
                missed += count;
            }
            Next::End => break,
        }
    }
    assert_eq!(reader.offset(), log.source().end());
    (found, missed)
}

fn seqs(found: &[(String, u64)], sensor: &str) -> Vec<u64> {
    found.iter().filter(|(s, _)| s == sensor).map(|(_, seq)| *seq).collect()
}

fn put(log: &mut Log, sensor: &str, numbers: impl IntoIterator<Item = u64>) -> usize {
    let new = log.append(&origin(sensor), &events(sensor, numbers)).unwrap();
    log.commit().unwrap();
    new
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir.join("log"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
        .collect();
    found.sort();
    found
}

#[test]
fn a_batch_that_comes_twice_is_stored_once_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), SMALL).unwrap();
    assert_eq!(put(&mut log, "a", 1..=3), 3);
    assert_eq!(put(&mut log, "b", 1..=1), 1);
    assert_eq!(put(&mut log, "a", 1..=3), 0);
    drop(log);
    let mut log = Log::open(dir.path(), SMALL).unwrap();
    assert_eq!((log.position(&origin("a")), log.position(&origin("b"))), (3, 1));
    assert_eq!(put(&mut log, "a", 2..=5), 2);
    let (found, missed) = read(&log, 0);
    assert_eq!((seqs(&found, "a"), seqs(&found, "b"), missed), (vec![1, 2, 3, 4, 5], vec![1], 0));
    assert_eq!(read(&log, 4).0, [("a".to_owned(), 4), ("a".to_owned(), 5)]);
}

#[test]
fn what_is_not_committed_is_neither_seen_nor_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), SMALL).unwrap();
    put(&mut log, "a", 1..=2);
    log.append(&origin("a"), &events("a", 3..=4)).unwrap();
    assert_eq!(read(&log, 0).0.len(), 2);
    log.roll_back();
    assert_eq!((log.position(&origin("a")), log.source().end()), (2, 2));
    assert_eq!(put(&mut log, "a", 3..=4), 2);
    assert_eq!(seqs(&read(&log, 0).0, "a"), [1, 2, 3, 4]);
}

#[test]
fn old_segments_go_positions_stay_and_a_reader_is_told_what_it_missed() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), small(16 << 10)).unwrap();
    put(&mut log, "b", 1..=1);
    for n in 0..100 {
        put(&mut log, "a", n * 10 + 1..=n * 10 + 10);
    }
    let oldest = log.source().oldest();
    assert!(oldest > 0, "something went");
    assert!(log.source().describe().bytes <= 16 << 10);
    let (found, missed) = read(&log, 10);
    assert_eq!(missed, oldest - 10);
    assert_eq!(seqs(&found, "a"), (oldest..=1000).collect::<Vec<_>>());
    drop(log);
    let log = Log::open(dir.path(), small(16 << 10)).unwrap();
    assert_eq!((log.position(&origin("a")), log.position(&origin("b"))), (1000, 1));
    assert_eq!(read(&log, 0), (found, oldest));
    assert_eq!(log.fleet().list(&[])[0].committed_seq, 1000);
}

#[test]
fn what_is_too_old_goes_though_nothing_comes() {
    let dir = tempfile::tempdir().unwrap();
    let keep = Settings { keep_bytes: 1 << 20, keep: Duration::from_millis(1) };
    let mut log = Log::open(dir.path(), keep).unwrap();
    put(&mut log, "a", 1..=5);
    while log.source().oldest() < 5 {
        std::thread::sleep(Duration::from_millis(2));
        log.tidy();
    }
    assert_eq!(read(&log, 0), (Vec::new(), 5));
    assert_eq!(put(&mut log, "a", 1..=6), 1);
}

#[test]
fn a_record_cut_short_by_a_crash_is_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), SMALL).unwrap();
    put(&mut log, "a", 1..=4);
    put(&mut log, "a", 5..=6);
    drop(log);
    let file = segments(dir.path()).pop().unwrap();
    let length = fs::metadata(&file).unwrap().len();
    File::options().write(true).open(&file).unwrap().set_len(length - 3).unwrap();
    let mut log = Log::open(dir.path(), SMALL).unwrap();
    assert_eq!(log.position(&origin("a")), 4);
    assert_eq!(put(&mut log, "a", 1..=6), 2);
    assert_eq!(seqs(&read(&log, 0).0, "a"), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn numbers_are_not_given_twice_when_segments_are_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), SMALL).unwrap();
    put(&mut log, "a", 1..=50);
    log.begin_next().unwrap();
    put(&mut log, "a", 51..=60);
    log.begin_next().unwrap();
    drop(log);
    for file in segments(dir.path()).into_iter().skip(1) {
        fs::remove_file(file).unwrap();
    }
    let mut log = Log::open(dir.path(), SMALL).unwrap();
    assert_eq!((log.source().end(), log.position(&origin("a"))), (60, 60));
    assert_eq!(put(&mut log, "a", 55..=62), 2);
    let (found, missed) = read(&log, 0);
    assert_eq!((found.len(), missed, seqs(&found, "a").pop()), (52, 10, Some(62)));
}

#[test]
fn positions_of_files_of_lines_are_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut old =
        crate::collect::Store::open(dir.path(), crate::event::file::Rotation { max_bytes: 0, keep: 1 })
            .unwrap();
    old.append(&origin("a"), &events("a", 1..=5)).unwrap();
    old.commit().unwrap();
    drop(old);
    for _ in 0..2 {
        let mut log = Log::open(dir.path(), SMALL).unwrap();
        assert_eq!(log.position(&origin("a")), 5);
        assert_eq!(put(&mut log, "a", 1..=5), 0);
    }
}

#[test]
fn parts_of_other_times_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), small(64 << 20)).unwrap();
    for n in 0..100 {
        put(&mut log, "a", n * 300 + 1..=n * 300 + 300);
    }
    let mut reader = log.source().reader_of(0, (29_990_000, 29_995_000));
    let mut given = 0;
    while let Next::Events(events, _) = reader.read().unwrap() {
        given += events.len();
    }
    assert!(given > 0 && given < 20_000, "{given}");
    assert_eq!(reader.offset(), 30_000);
}

#[test]
fn two_collectors_do_not_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Log::open(dir.path(), SMALL).unwrap();
    assert!(matches!(Log::open(dir.path(), SMALL), Err(StoreError::InUse(_))));
}

#[derive(Clone, Debug)]
enum Step {
    /// Batches of so many events of one of three sensors, in one commit.
    Put(Vec<(u8, u8)>),
    /// Sent again from this far back.
    Again(u8, u8),
    /// Not committed when the collector is killed; so many of its bytes reach
    /// the disk.
    Crash(u8, u8, u16),
    /// A byte of a committed record changes.
    Damage(u16, u8),
    /// The state that is saved beside the log is lost.
    Forget,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec((0u8..3, 1u8..40), 1..4).prop_map(Step::Put),
        2 => (0u8..3, 1u8..50).prop_map(|(s, n)| Step::Again(s, n)),
        2 => (0u8..3, 1u8..40, any::<u16>()).prop_map(|(s, n, cut)| Step::Crash(s, n, cut)),
        2 => (any::<u16>(), 1u8..=255).prop_map(|(at, by)| Step::Damage(at, by)),
        1 => Just(Step::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Whatever happens, every committed event is read once and in order, or
    /// counted as missing; what was not committed is not there.
    #[test]
    fn every_committed_event_is_read_or_counted(steps in prop::collection::vec(step(), 1..25)) {
        let dir = tempfile::tempdir().unwrap();
        // Segments of 1500 bytes.
        let settings = small(8 * 1500);
        let mut log = Log::open(dir.path(), settings).unwrap();
        // What each number of the log stands for; what a sensor has sent.
        let mut stored: BTreeMap<u64, (String, u64)> = BTreeMap::new();
        let mut damaged = BTreeSet::new();
        let name = |s: u8| format!("s{s}");
        for step in steps {
            match step {
                Step::Put(batches) => {
                    let mut next = log.source().end();
                    for (s, count) in batches {
                        let from = log.position(&origin(&name(s))) + 1;
                        let numbers = from..from + u64::from(count);
                        log.append(&origin(&name(s)), &events(&name(s), numbers.clone())).unwrap();
                        for seq in numbers {
                            stored.insert(next, (name(s), seq));
                            next += 1;
                        }
                    }
                    log.commit().unwrap();
                    prop_assert_eq!(log.source().end(), next);
                }
                Step::Again(s, back) => {
                    let last = log.position(&origin(&name(s)));
                    let from = last.saturating_sub(u64::from(back)) + 1;
                    prop_assert_eq!(put(&mut log, &name(s), from..=last), 0);
                }
                Step::Crash(s, count, cut) => {
                    let from = log.position(&origin(&name(s))) + 1;
                    let before = (log.source().end(), from - 1);
                    log.append(&origin(&name(s)), &events(&name(s), from..from + u64::from(count))).unwrap();
                    // A full segment before it was committed by the way.
                    let (active, committed) = (log.active.bytes, log.committed.bytes);
                    let base = log.active.base;
                    drop(log);
                    let file = File::options().write(true).open(segment::path(&dir.path().join("log"), base)).unwrap();
                    file.set_len(committed + u64::from(cut) % (active - committed)).unwrap();
                    log = Log::open(dir.path(), settings).unwrap();
                    prop_assert_eq!(log.source().end(), before.0);
                    // What damage took may be sent again.
                    let position = log.position(&origin(&name(s)));
                    prop_assert!(position == before.1 || position < before.1 && !damaged.is_empty());
                }
                Step::Damage(at, by) => {
                    // Not the last record, nor the head of a file.
                    let files = segments(dir.path());
                    let file = &files[usize::from(at) % files.len()];
                    let mut bytes = fs::read(file).unwrap();
                    let mut records = Vec::new();
                    let mut start = record::HEADER;
                    for item in Items::new(&bytes, record::HEADER) {
                        match item {
                            Item::Record(record, end) => {
                                records.push((start..end, record.head));
                                start = end;
                            }
                            Item::Damage(length) => start += length,
                        }
                    }
                    let last = Some(file) == files.last();
                    let whole = records.len().saturating_sub(usize::from(last));
                    if whole > 0 {
                        let (range, head) = records[usize::from(at) / 7 % whole].clone();
                        bytes[range.start + usize::from(at) % range.len()] ^= by;
                        fs::write(file, bytes).unwrap();
                        damaged.extend(head.offset..head.end());
                    }
                }
                Step::Forget => {
                    let all_there = damaged.is_empty() && log.source().oldest() == 0;
                    drop(log);
                    if all_there {
                        let _ = fs::remove_file(dir.path().join("log/state.json"));
                    }
                    log = Log::open(dir.path(), settings).unwrap();
                }
            }
            let oldest = log.source().oldest();
            let kept: Vec<_> = stored
                .iter()
                .filter(|(n, _)| **n >= oldest && !damaged.contains(*n))
                .map(|(_, e)| e.clone())
                .collect();
            let (found, missed) = read(&log, 0);
            prop_assert_eq!(missed + found.len() as u64, stored.len() as u64);
            prop_assert_eq!(found, kept);
        }
    }

    #[test]
    fn anything_may_be_read(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Header::read(&bytes);
        let _ = Cursor::read(&bytes);
        let mut at = 0;
        for item in Items::new(&bytes, 0) {
            at = match item {
                Item::Record(_, end) => end,
                Item::Damage(skipped) => at + skipped,
            };
        }
        prop_assert_eq!(at, bytes.len());
    }
}
