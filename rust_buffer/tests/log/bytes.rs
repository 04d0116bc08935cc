//! The page that draws the format, `README.md`, against the bytes that are written.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::Path,
};

use _rust_buffer::{
    log::{Arrays, FORMAT},
    state::codec,
    state::group::{Kind, Phase},
    state::record::{Admit, Annotate, Appended, Claimed, LeftOut, Plan, Quota, Reason, Record, Score, SegmentLoss},
    state::successes::Drawn,
    state::trajectory::{Outcome, Stop},
    state::turn::Turn,
};
use tempfile::tempdir;

use super::{end, file, open};

const PAGE: &str = include_str!("../../README.md");

/// The rows of the first table under a heading.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let lines = PAGE.lines().skip_while(|line| *line != heading).skip_while(|line| !line.starts_with('|'));
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect();
    lines.take_while(|line| line.starts_with('|')).skip(2).map(cells).collect()
}

/// Where each field of a fixed head is.
fn fields(heading: &str) -> BTreeMap<&'static str, Range<usize>> {
    let mut at = 0;
    let mut fields = BTreeMap::new();
    for row in table(heading) {
        let (offset, bytes): (usize, usize) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        assert_eq!((offset, offset % bytes), (at, 0), "{row:?} follows what is before it, aligned");
        at += bytes;
        fields.insert(row[2], offset..at);
    }
    assert_eq!(at, 32, "{heading}");
    fields
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn crc(parts: &[&[u8]]) -> u64 {
    u64::from(parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part)))
}

/// Asserts the named numbers of the head at the start of `bytes`.
fn holds(heading: &str, bytes: &[u8], expected: &[(&str, u64)]) {
    let fields = fields(heading);
    for (name, value) in expected {
        assert_eq!(number(&bytes[fields[name].clone()]), *value, "{heading}: {name}");
    }
}

fn check_file_header(bytes: &[u8], number: u64, first: u64) {
    assert_eq!(&bytes[fields("### File header")["magic"].clone()], b"PMDFLOW\0");
    let crc = crc(&[&bytes[..12], &bytes[16..32]]);
    holds(
        "### File header",
        bytes,
        &[("format", FORMAT.into()), ("crc", crc), ("number", number), ("zero", 0), ("first", first)],
    );
}

/// A whole frame without damage.
fn check_frame(bytes: &[u8], (lsn, synced, kind): (u64, u64, u64), header: &[u8], arrays: &[&[u8]]) {
    let padded = |len: usize| len.next_multiple_of(8);
    let table = 32..32 + 8 * arrays.len();
    let first = table.end + padded(header.len());
    let len = first + arrays.iter().map(|array| padded(array.len())).sum::<usize>();
    let crc_of_head = crc(&[&bytes[..4], &bytes[8..first]]);
    let (n, header_len) = (arrays.len() as u64, header.len() as u64);
    let head = [("len", len as u64), ("crc", crc_of_head), ("lsn", lsn), ("synced", synced), ("kind", kind)];
    holds("### Frame", bytes, &head);
    holds("### Frame", bytes, &[("zero", 0), ("narrays", n), ("header_len", header_len)]);
    assert_eq!(&bytes[table.end..table.end + header.len()], header);
    let mut at = first;
    for (array, entry) in arrays.iter().zip(bytes[table].chunks(8)) {
        assert_eq!((number(&entry[..4]), number(&entry[4..])), (array.len() as u64, crc(&[array])));
        assert_eq!(&bytes[at..at + array.len()], *array);
        assert!(bytes[at + array.len()..at + padded(array.len())].iter().all(|byte| *byte == 0));
        at += padded(array.len());
    }
}

#[test]
fn a_log_has_the_bytes_that_the_page_draws() {
    let dir = tempdir().unwrap();
    let (log, _) = open(dir.path());
    let (_, first) = log.append(7, b"header", &Arrays::of(&[b"abc", b"12345678"])).unwrap();
    assert!(log.sync_through(1, std::time::Duration::MAX).unwrap());
    let (_, second) = log.append(8, b"", &Arrays::default()).unwrap();
    log.write_snapshot(log.position(), b"state").unwrap();
    log.close().unwrap();

    let bytes = fs::read(file(dir.path(), 1)).unwrap();
    check_file_header(&bytes, 1, 1);
    assert_eq!(first.offset, 32);
    check_frame(&bytes[32..], (1, 0, 7), b"header", &[b"abc", b"12345678"]);
    assert_eq!((second.offset, second.len), (end(&first), 32));
    check_frame(&bytes[second.offset as usize..], (2, 1, 8), b"", &[]);
    check_frame(&bytes[end(&second) as usize..], (2, 2, 255), b"", &[]);

    let snapshot = fs::read(dir.path().join("index")).unwrap();
    check_file_header(&snapshot, 1, 3);
    check_frame(&snapshot[32..], (2, 2, 0), &end(&second).to_le_bytes(), &[b"state"]);
}

/// One record of each kind, each field set.
fn records() -> Vec<Record> {
    let (request_id, prompt_id) = (String::new(), String::new());
    let (cursor, kind, groups) = (Some(1), Kind::Train, vec![1]);
    let drawn = Some(Drawn { key: 1, number: 2 });
    let admit =
        Admit { request_id, cursor, kind, prompt_id, prompt_len: 1, size: 1, max_tokens: 1, priority: 1, drawn };
    let (version, temperature, stop, extra) = (0, 1.0, Some(Stop::Stop), vec![("a".into(), "<i4".into())]);
    let item =
        Appended { trajectory: 0, len: 1, version, temperature, observed: true, stop, extra, over: 1, crc: None };
    let short = Appended { extra: Vec::new(), crc: Some(7), ..item.clone() };
    let copied = Appended { stop: None, over: 0, ..item.clone() };
    let (outcome, components, phase) = (Outcome::Scored, BTreeMap::from([("a".into(), 1.0)]), Some(Phase::Claimed(1)));
    let score = Score { trajectory: 0, outcome, reward: 0.5, components, failed: false, phase };
    let (max_staleness, segment_loss, asked) = (Some(1), SegmentLoss::All, Some(2));
    let planned = Plan { rule: "rule".into(), seed: Some(7), num_steps: 2, steps: BTreeMap::from([(1, 1)]) };
    let plan = Some(planned.clone());
    let claimed = Claimed {
        iteration: 1,
        version,
        max_staleness,
        segment_loss,
        groups: groups.clone(),
        asked,
        plan,
        successes: vec![(1, 0.5)],
    };
    vec![
        Record::Quota(0, Quota { groups: 1, tokens: 1, tokens_per_segment: Some(1) }),
        Record::Admit(admit),
        Record::Lease(vec![0]),
        Record::Append(vec![item.clone(), Appended { version: 1, ..item }]),
        Record::Score(score),
        Record::Publish(0, Some(1), LeftOut { filter: [1].into(), veto: [2].into() }),
        Record::Restore(5, 3),
        Record::Claim(claimed),
        Record::Evict(groups.clone(), Reason::Discarded("why".into())),
        Record::Evict(groups.clone(), Reason::NoSignal(Some(0.5))),
        Record::Commit(1),
        Record::Uncommit(1),
        Record::Drop(1),
        Record::Late(groups),
        Record::Annotate(Annotate {
            trajectory: 1,
            scorer: "teacher".into(),
            columns: vec![("teacher".into(), "<f4".into())],
        }),
        Record::Fork(1, 2),
        Record::Turn(1, Turn { offset: 2, rewards: [("r".to_owned(), 0.5)].into(), key: Some("k".to_owned()) }),
        Record::Plan(1, planned),
        Record::Compact(vec![copied.clone(), Appended { version: 1, ..copied }]),
        Record::Move(1),
        Record::Append(vec![short.clone(), Appended { trajectory: 300, version: 1, ..short.clone() }, short]),
    ]
}

#[test]
fn records_have_the_kinds_and_fields_that_the_page_lists() {
    let mut written: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for record in records() {
        let header = codec::encode(&record).unwrap();
        #[allow(clippy::zero_sized_map_values)] // The names are what is looked at.
        let fields: BTreeMap<String, serde::de::IgnoredAny> = rmp_serde::from_slice(&header).unwrap();
        written.entry(record.kind().to_string()).or_default().extend(fields.into_keys());
        assert_eq!(codec::decode(record.kind(), &header).unwrap(), record);
    }
    let names = |row: &Vec<&str>| row[2].split(", ").map(str::to_owned).collect();
    let listed: BTreeMap<_, _> = table("### Records").iter().map(|row| (row[0].to_owned(), names(row))).collect();
    assert_eq!(written, listed);
}

#[test]
fn a_field_that_this_program_does_not_know_is_ignored() {
    for record in records() {
        let header = codec::encode(&record).unwrap();
        assert!(header[0] & 0xf0 == 0x80, "a short map");
        let longer = [&[header[0] + 1], &header[1..], b"\xa5added\x93\x01\x02\xa1x"].concat();
        assert_eq!(codec::decode(record.kind(), &longer).unwrap(), record);
    }
}

/// What format 3 wrote: the name, and the fields by position.
#[test]
fn records_of_format_3_are_read() {
    fn header<T: serde::Serialize>(name: &str, fields: T) -> Vec<u8> {
        rmp_serde::to_vec(&BTreeMap::from([(name, fields)])).unwrap()
    }
    let none: [u64; 0] = [];
    let quota = Record::Quota(3, Quota { groups: 8, tokens: 100, tokens_per_segment: None });
    let item = (5_u64, 8_u32, 3_i64, 1.0_f32, false, None::<u8>, none);
    let claim = (7_i64, 3_i64, Some(4_u32), "All", [1_u64, 2]);
    let claimed = Claimed {
        iteration: 7,
        version: 3,
        max_staleness: Some(4),
        segment_loss: SegmentLoss::All,
        groups: vec![1, 2],
        asked: None,
        plan: None,
        successes: Vec::new(),
    };
    let appended = Appended {
        trajectory: 5,
        len: 8,
        version: 3,
        temperature: 1.0,
        observed: false,
        stop: None,
        extra: Vec::new(),
        over: 0,
        crc: None,
    };
    let written = [
        (header("Quota", (3_i64, (8_u64, 100_u64, None::<u32>))), quota),
        (header("Lease", [5_u64, 6]), Record::Lease(vec![5, 6])),
        (header("Append", [item]), Record::Append(vec![appended])),
        (header("Claim", claim), Record::Claim(claimed)),
        (header("Evict", ([9_u64], "OverAge")), Record::Evict(vec![9], Reason::OverAge)),
        (header("Commit", 7_i64), Record::Commit(7)),
    ];
    for (bytes, record) in written {
        assert_eq!(codec::decode(record.kind(), &bytes).unwrap(), record);
    }
}

/// All sources in which a named test may be.
fn sources(dir: &Path, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "py") {
            into.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_point_of_the_contract_names_tests_that_there_are() {
    let (root, mut text) = (Path::new(env!("CARGO_MANIFEST_DIR")), String::new());
    for dir in ["tests", "src", "../tests/store"] {
        sources(&root.join(dir), &mut text);
    }
    let contract = PAGE.split("## The durability contract").nth(1).unwrap().split("## Tests").next().unwrap();
    let names: Vec<&str> =
        contract.split('`').filter_map(|code| code.rsplit_once("::")).map(|(_, name)| name).collect();
    assert!(names.len() > 30, "{names:?}");
    for name in names {
        assert!(text.contains(&format!("fn {name}(")) || text.contains(&format!("def {name}(")), "{name} is no test");
    }
}
