//! Sums, chains, removal of old entries, and what is no ledger.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::civil::date;
use rusqlite::Connection;
use serde_json::json;

use super::*;

const DAY_MS: i64 = 86_400_000;
/// 2026-01-01.
const START_MS: i64 = 1_767_225_600_000;

fn ledger(folder: &Path) -> (Ledger, PathBuf) {
    let path = folder.join("ledger.db");
    (Ledger::open(&path, Durability::Normal).unwrap(), path)
}

/// Numbers that look random, the same ones each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn of<'a>(&mut self, texts: &[&'a str]) -> &'a str {
        texts[self.below(texts.len() as u64) as usize]
    }

    fn receipt(&mut self) -> Receipt {
        let part = |random: &mut Random| Part {
            replica: random.of(&["left", "right"]).into(),
            tokens: random.below(1000),
            device_us: random.below(1 << 30),
        };
        let (prompt_tokens, drafted_tokens) = (self.below(1 << 20), self.below(1 << 10));
        Receipt {
            request: format!("req-{}", self.below(u64::MAX)),
            client: self.of(&["ada", "bob \"the\" 'client'", "чарли"]).into(),
            model: self.of(&["small", "large"]).into(),
            endpoint: self.of(&["/v1/completions", "/v1/chat/completions"]).into(),
            outcome: self.of(&["end", "failed: device"]).into(),
            currency: self.of(&["EUR", "USD"]).into(),
            prompt_tokens,
            cached_tokens: self.below(prompt_tokens + 1),
            completion_tokens: self.below(1 << 31),
            drafted_tokens,
            accepted_tokens: self.below(drafted_tokens + 1),
            queue_us: self.below(1 << 31),
            prefill_us: self.below(1 << 31),
            decode_us: self.below(1 << 31),
            parts: (0..self.below(3)).map(|_| part(self)).collect(),
            kv_byte_seconds: self.below(1 << 31) << 24,
            read_bytes: self.below(1 << 31),
            energy_uj: (self.below(2) == 0).then(|| self.below(1 << 31)),
            cost_nano: self.below(1 << 31),
            ..Receipt::default()
        }
    }
}

/// Adds a receipt to the sums of its group.
fn add(usage: &mut Usage, r: &Receipt) {
    usage.requests += 1;
    usage.prompt_tokens += r.prompt_tokens;
    usage.cached_tokens += r.cached_tokens;
    usage.completion_tokens += r.completion_tokens;
    usage.drafted_tokens += r.drafted_tokens;
    usage.accepted_tokens += r.accepted_tokens;
    usage.queue_us += r.queue_us;
    usage.prefill_us += r.prefill_us;
    usage.decode_us += r.decode_us;
    usage.device_us += r.device_us().unwrap();
    usage.kv_byte_seconds += r.kv_byte_seconds;
    usage.read_bytes += r.read_bytes;
    usage.energy_uj += r.energy_uj.unwrap_or(0);
    usage.cost_nano += r.cost_nano;
}

/// The sums that [`Ledger::usage`] must have.
fn expected(receipts: &[(u64, Receipt)], by: &[By]) -> Vec<Usage> {
    let mut groups: BTreeMap<Vec<Option<String>>, Usage> = BTreeMap::new();
    for (day, r) in receipts {
        let key = |one: By, text: &str| by.contains(&one).then(|| text.to_owned());
        let mut start = Usage { currency: r.currency.clone(), ..Usage::default() };
        start.client = key(By::Client, &r.client);
        start.model = key(By::Model, &r.model);
        start.day = key(By::Day, &format!("2026-01-{:02}", day + 1));
        start.endpoint = key(By::Endpoint, &r.endpoint);
        start.outcome = key(By::Outcome, &r.outcome);
        let u = &start;
        let keys = [&u.client, &u.model, &u.day, &u.endpoint, &u.outcome, &Some(u.currency.clone())];
        let keys = keys.map(Clone::clone).to_vec();
        add(groups.entry(keys).or_insert(start), r);
    }
    groups.into_values().collect()
}

#[test]
fn sums_are_those_of_the_receipts_also_of_removed_ones() {
    let folder = tempfile::tempdir().unwrap();
    let (mut ledger, _) = ledger(folder.path());
    let (mut random, mut receipts) = (Random(1), Vec::new());
    for day in 0..20 {
        for n in 0..10 {
            let receipt = random.receipt();
            let unix_ms = START_MS + day as i64 * DAY_MS + n * 1000;
            ledger.append_at(unix_ms, &[Entry::receipt(&receipt).unwrap()]).unwrap();
            receipts.push((day, receipt));
        }
        ledger
            .append_at(START_MS, &[Entry::audit("server", "day", &json!({ "day": day })).unwrap()])
            .unwrap();
    }
    let all: [&[By]; 6] =
        [&[], &[By::Client], &[By::Model, By::Day], &[By::Day], &[By::Outcome, By::Client], &By::ALL];
    let check = |ledger: &Ledger| {
        ledger.verify(None).unwrap();
        for by in all {
            assert_eq!(ledger.usage(by, None, None).unwrap(), expected(&receipts, by), "{by:?}");
        }
        let some = &receipts[50..120];
        let (since, until) = (date(2026, 1, 6), date(2026, 1, 13));
        assert_eq!(
            ledger.usage(&[By::Model], Some(since), Some(until)).unwrap(),
            expected(some, &[By::Model])
        );
        assert_eq!(ledger.usage(&[], Some(until), Some(since)).unwrap(), []);
    };
    check(&ledger);
    assert_eq!(ledger.retain_at(START_MS + DAY_MS, 30).unwrap(), 0);
    let mut removed = 0;
    // Checkpoints are removed in their turn.
    for (day, days) in [(10, 5), (12, 5), (19, 1), (30, 3), (30, 0)] {
        removed += ledger.retain_at(START_MS + day * DAY_MS, days).unwrap();
        check(&ledger);
    }
    assert!(removed > 200, "{removed}");
    let left: i64 =
        ledger.connection.query_row("SELECT count(*) FROM entries", [], |row| row.get(0)).unwrap();
    assert!(left <= 4, "{left}");
}

/// Where [`Ledger::verify`] finds a fault.
fn fault(path: &Path) -> i64 {
    match Ledger::open_read_only(path).unwrap().verify(None) {
        Err(LedgerError::Chain { seq, .. }) => seq,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_change_behind_the_ledger_is_found() {
    for (sql, seq) in [
        ("UPDATE entries SET body = json_set(body, '$.cost_nano', 0) WHERE seq = 3", 3),
        ("UPDATE entries SET unix_ms = unix_ms + 1 WHERE seq = 4", 4),
        ("UPDATE entries SET kind = 'audit' WHERE seq = 5", 5),
        ("UPDATE entries SET hash = zeroblob(32) WHERE seq = 6", 6),
        ("DELETE FROM entries WHERE seq = 2", 2),
        ("DELETE FROM entries WHERE seq = 1", 1),
        ("UPDATE entries SET seq = 99 WHERE seq = 10", 10),
        (
            "INSERT INTO entries (seq, unix_ms, kind, body, hash) VALUES (11, 0, 'receipt', '{}', zeroblob(32))",
            11,
        ),
        (
            "INSERT INTO entries (seq, unix_ms, kind, body, hash)
             SELECT 11, unix_ms, kind, body, hash FROM entries WHERE seq = 10",
            11,
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (mut ledger, path) = ledger(folder.path());
        let mut random = Random(2);
        let entries: Vec<Entry> = (0..10).map(|_| Entry::receipt(&random.receipt()).unwrap()).collect();
        ledger.append(&entries).unwrap();
        ledger.verify(None).unwrap();
        let other = Connection::open(&path).unwrap();
        let is_insert = sql.starts_with("INSERT");
        assert_eq!(other.execute(sql, []).is_ok(), is_insert, "{sql}");
        if !is_insert {
            ledger.verify(None).unwrap();
            other.execute_batch("DROP TRIGGER entries_never_change; DROP TRIGGER entries_stay").unwrap();
            other.execute(sql, []).unwrap();
        }
        assert_eq!(fault(&path), seq, "{sql}");
    }
}

#[test]
fn a_checkpoint_proves_what_it_stands_for() {
    let folder = tempfile::tempdir().unwrap();
    let (mut ledger, path) = ledger(folder.path());
    for day in 0..6 {
        ledger.append_at(START_MS + day * DAY_MS, &[Entry::audit("a", "b", &json!(day)).unwrap()]).unwrap();
    }
    let head = ledger.verify(None).unwrap().head;
    let second = ledger.events(2, 1).unwrap().pop().unwrap();
    let event = AuditEvent { who: "a".into(), what: "b".into(), detail: json!(1) };
    assert_eq!((second.seq, second.unix_ms, second.content), (2, START_MS + DAY_MS, event));
    assert_eq!(ledger.retain_at(START_MS + 5 * DAY_MS, 3).unwrap(), 2);
    let verified = ledger.verify(Some(&head)).unwrap();
    assert_eq!((verified.first_seq, verified.last_seq, verified.entries), (3, 7, 5));
    assert!(matches!(ledger.verify(Some(&"0".repeat(64))), Err(LedgerError::Chain { seq: 7, .. })));
    // Triggers hold again.
    let other = Connection::open(&path).unwrap();
    assert!(other.execute("DELETE FROM entries", []).is_err());
    // One more entry is gone than the checkpoint says.
    other.execute_batch("DROP TRIGGER entries_stay; DELETE FROM entries WHERE seq = 3").unwrap();
    assert_eq!(fault(&path), 3);
}

#[test]
fn what_is_no_ledger_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, sql: &str| {
        let path = folder.path().join(name);
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        path
    };
    let text = folder.path().join("text");
    std::fs::write(&text, "These are words, more of them than a header of SQLite has bytes. ".repeat(20))
        .unwrap();
    let other = file("other", "CREATE TABLE t (a); INSERT INTO t VALUES (1)");
    let foreign = file("foreign", "PRAGMA application_id = 7; CREATE TABLE t (a)");
    for path in [&text, &other, &foreign] {
        let before = std::fs::read(path).unwrap();
        let opened = Ledger::open(path, Durability::Full);
        assert!(matches!(opened, Err(LedgerError::NotALedger(_))), "{opened:?}");
        let opened = Ledger::open_read_only(path);
        assert!(matches!(opened, Err(LedgerError::NotALedger(_))), "{opened:?}");
        assert_eq!(std::fs::read(path).unwrap(), before);
    }
    let newer = {
        let (ledger, path) = ledger(folder.path());
        ledger.connection.pragma_update(None, "user_version", 2).unwrap();
        path
    };
    let opened = Ledger::open(&newer, Durability::Full);
    assert!(matches!(opened, Err(LedgerError::Newer { got: 2, most: 1, .. })), "{opened:?}");
    assert!(matches!(Ledger::open_read_only(&folder.path().join("none")), Err(LedgerError::Sqlite { .. })));
    assert!(matches!(Ledger::open(folder.path(), Durability::Full), Err(LedgerError::Sqlite { .. })));
}

#[test]
fn a_full_drive_is_an_error_and_the_chain_stays_right() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, path) = ledger(folder.path());
    ledger.connection.pragma_update(None, "max_page_count", 40).unwrap();
    let writer = Writer::new(ledger).unwrap();
    let entry = || Entry::audit("server", "fill", &json!("x".repeat(10_000))).unwrap();
    let mut written = 0;
    let error = loop {
        match writer.append_blocking(entry()) {
            Ok(seq) => written = seq,
            Err(error) => break error,
        }
        assert!(written < 100);
    };
    assert!(matches!(error, LedgerError::Sqlite { action: "writing", .. }), "{error}");
    // A small entry still fits, and comes after the last one that was told to be written.
    assert_eq!(
        writer.append_blocking(Entry::audit("server", "small", &json!(null)).unwrap()).unwrap(),
        written + 1
    );
    drop(writer);
    assert_eq!(Ledger::open_read_only(&path).unwrap().verify(None).unwrap().last_seq, written + 1);
}

#[test]
fn sums_that_do_not_fit_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (mut ledger, _) = ledger(folder.path());
    let receipt = Receipt { cost_nano: i64::MAX as u64, ..Receipt::default() };
    let entry = Entry::receipt(&receipt).unwrap();
    ledger.append_at(START_MS, std::slice::from_ref(&entry)).unwrap();
    assert_eq!(ledger.usage(&[], None, None).unwrap()[0].cost_nano, i64::MAX as u64);
    ledger.append_at(START_MS, &[entry]).unwrap();
    assert!(matches!(ledger.usage(&[], None, None), Err(LedgerError::Overflow(_))));
    // Nothing is removed whose sum cannot be kept.
    assert!(matches!(ledger.retain_at(START_MS + 9 * DAY_MS, 1), Err(LedgerError::Overflow(_))));
    assert_eq!(ledger.verify(None).unwrap().entries, 2);
    let too_long = Entry::audit("a", "b", &json!("x".repeat(MAX_BODY_BYTES)));
    assert!(matches!(too_long, Err(LedgerError::TooLong(_))));
}

#[test]
fn several_writers_share_one_chain() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let writers: Vec<Writer> =
        (0..2).map(|_| Writer::new(Ledger::open(&path, Durability::Normal).unwrap()).unwrap()).collect();
    std::thread::scope(|scope| {
        for n in 0..8 {
            let writer = writers[n % 2].clone();
            scope.spawn(move || {
                let mut last = 0;
                for _ in 0..20 {
                    let receipt = Receipt { client: format!("{n}"), prompt_tokens: 1, ..Receipt::default() };
                    let seq = writer.append_blocking(Entry::receipt(&receipt).unwrap()).unwrap();
                    assert!(seq > last);
                    last = seq;
                }
            });
        }
    });
    let ledger = Ledger::open_read_only(&path).unwrap();
    assert_eq!(ledger.verify(None).unwrap().entries, 160);
    let usage = ledger.usage(&[By::Client], None, None).unwrap();
    assert!(usage.len() == 8 && usage.iter().all(|usage| usage.prompt_tokens == 20));
}

#[tokio::test]
async fn tasks_wait_until_their_entries_are_durable() {
    let folder = tempfile::tempdir().unwrap();
    let (ledger, path) = ledger(folder.path());
    let writer = Writer::new(ledger).unwrap();
    // More than may wait at once.
    let tasks: Vec<_> = (0..3000)
        .map(|n| {
            let writer = writer.clone();
            let receipt = Receipt { completion_tokens: n, ..Receipt::default() };
            tokio::spawn(async move { writer.append(Entry::receipt(&receipt).unwrap()).await })
        })
        .collect();
    let mut seqs = Vec::new();
    for task in tasks {
        seqs.push(task.await.unwrap().unwrap());
    }
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=3000).collect::<Vec<_>>());
    let ledger = Ledger::open_read_only(&path).unwrap();
    assert_eq!(ledger.usage(&[], None, None).unwrap()[0].completion_tokens, 2999 * 3000 / 2);
}
