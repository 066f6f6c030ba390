//! The chain of hashes: how it is checked, and how the oldest entries leave it.

use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::store::{Ledger, TRIGGERS, now_unix_ms};
use super::{By, Entry, Kind, LedgerError, Usage, sqlite, to_json};
use crate::basics::hex;

/// A SHA-256.
pub(super) type Hash = [u8; 32];

/// The hash before the first entry.
pub(super) const START: Hash = [0; 32];

/// Milliseconds of a day.
const DAY_MS: i64 = 86_400_000;

/// The hash of an entry: of the hash before it, its number and time as 8 bytes each (most significant first), its kind and its body.
pub(super) fn hash(before: &Hash, seq: i64, unix_ms: i64, kind: &str, body: &str) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update(before);
    hasher.update(seq.to_be_bytes());
    hasher.update(unix_ms.to_be_bytes());
    hasher.update(kind);
    hasher.update(body);
    hasher.finalize().into()
}

/// A chain that is right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Entries that were checked.
    pub entries: u64,
    /// The number of the first entry: more than 1 after [`Ledger::retain`].
    pub first_seq: i64,
    /// The number of the last entry.
    pub last_seq: i64,
    /// The last entry's hash, in hexadecimal digits. Kept elsewhere, it shows later that nobody wrote the whole chain anew.
    pub head: String,
}

/// What stands for entries that were removed.
#[derive(Serialize, Deserialize)]
struct Checkpoint {
    /// The number of the last one.
    through_seq: i64,
    /// Its hash.
    through_sha256: String,
    /// What their receipts and checkpoints sum up to.
    totals: Vec<Usage>,
}

impl Ledger {
    /// Walks the chain, and checks every hash. `known` is a hash, in hexadecimal digits, that one of the entries must have.
    ///
    /// # Errors
    /// [`LedgerError::Chain`] names the first wrong entry; [`LedgerError::Sqlite`].
    pub fn verify(&self, known: Option<&str>) -> Result<Verified, LedgerError> {
        let failed = |e| sqlite(&self.path, "reading")(e);
        let wrong = |seq, what: String| LedgerError::Chain { path: self.path.clone(), seq, what };
        // One state of the file, whatever others write meanwhile.
        let _snapshot = self.connection.unchecked_transaction().map_err(failed)?;
        let intact: String =
            self.connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(failed)?;
        if intact != "ok" {
            return Err(wrong(0, format!("the file is damaged: {intact}")));
        }
        let (mut last_seq, before) = self.removed()?;
        let first_seq = last_seq + 1;
        let mut before: Hash = match before {
            None => START,
            Some(text) => unhex(&text).ok_or_else(|| {
                wrong(last_seq, format!("expected a SHA-256 in a checkpoint, got {text:?}"))
            })?,
        };
        let (mut entries, mut is_known) = (0, known.is_none());
        let sql = "SELECT seq, unix_ms, kind, body, hash FROM entries ORDER BY seq";
        let mut select = self.connection.prepare(sql).map_err(failed)?;
        let mut rows = select.query([]).map_err(failed)?;
        while let Some(row) = rows.next().map_err(failed)? {
            let read = || {
                let text = |column| row.get_ref(column)?.as_str().map_err(rusqlite::Error::from);
                Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, text(2)?, text(3)?, row.get::<_, Hash>(4)?))
            };
            let (seq, unix_ms, kind, body, got) =
                read().map_err(|e: rusqlite::Error| wrong(last_seq + 1, e.to_string()))?;
            if seq != last_seq + 1 {
                return Err(wrong(last_seq + 1, format!("it is missing: the next entry is {seq}")));
            }
            let expected = hash(&before, seq, unix_ms, kind, body);
            if got != expected {
                return Err(wrong(seq, format!("expected the hash {}, got {}", hex(&expected), hex(&got))));
            }
            is_known |= known.is_some_and(|known| known.eq_ignore_ascii_case(&hex(&got)));
            (before, last_seq, entries) = (got, seq, entries + 1);
        }
        if let (Some(known), false) = (known, is_known) {
            return Err(wrong(last_seq, format!("no entry up to here has the hash {known}")));
        }
        Ok(Verified { entries, first_seq, last_seq, head: hex(&before) })
    }

    /// The number and the hash of the last entry that was removed, as the latest checkpoint has them.
    fn removed(&self) -> Result<(i64, Option<String>), LedgerError> {
        let sql = "SELECT body ->> 'through_seq', body ->> 'through_sha256' FROM entries \
                   WHERE kind = 'checkpoint' ORDER BY seq DESC LIMIT 1";
        let latest = self.connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).optional();
        Ok(latest.map_err(sqlite(&self.path, "reading a checkpoint"))?.unwrap_or((0, None)))
    }

    /// Removes the entries that are older than so many whole days, and adds a checkpoint with their last hash and the sums of their
    /// receipts, so that the chain remains provable and [`Ledger::usage`] the same. Returns how many entries it removed. Audit events
    /// among them are gone.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`], [`LedgerError::Overflow`]; then nothing is removed.
    pub fn retain(&mut self, days: u32) -> Result<u64, LedgerError> {
        self.retain_at(now_unix_ms()?, days)
    }

    pub(super) fn retain_at(&mut self, unix_ms: i64, days: u32) -> Result<u64, LedgerError> {
        let today = unix_ms.div_euclid(DAY_MS);
        let from_ms = (today - i64::from(days)).saturating_mul(DAY_MS);
        self.write("removing old entries", |ledger| {
            let failed = |e| sqlite(&ledger.path, "removing old entries")(e);
            // Only a beginning is removed, also where the clock once went back.
            let sql = "SELECT seq, hash FROM entries \
                       WHERE seq < coalesce((SELECT min(seq) FROM entries WHERE unix_ms >= ?), 9223372036854775807) \
                       ORDER BY seq DESC LIMIT 1";
            let last = ledger
                .connection
                .query_row(sql, [from_ms], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Hash>(1)?)));
            let Some((through_seq, through)) = last.optional().map_err(failed)? else { return Ok(0) };
            let totals = ledger.totals(through_seq)?;
            let checkpoint = Checkpoint { through_seq, through_sha256: hex(&through), totals };
            let checkpoint = Entry { kind: Kind::Checkpoint, body: to_json(&checkpoint)? };
            ledger.insert(unix_ms, &[checkpoint])?;
            let remove = || {
                ledger
                    .connection
                    .execute_batch("DROP TRIGGER IF EXISTS entries_never_change; DROP TRIGGER IF EXISTS entries_stay;")?;
                let removed =
                    ledger.connection.execute("DELETE FROM entries WHERE seq <= ?", params![through_seq])?;
                ledger.connection.execute_batch(TRIGGERS)?;
                Ok(removed as u64)
            };
            remove().map_err(failed)
        })
    }

    /// The sums of entries up to a number, as finely as they may be asked for.
    fn totals(&self, through_seq: i64) -> Result<Vec<Usage>, LedgerError> {
        self.sums(&[By::Client, By::Model, By::Day, By::Endpoint, By::Outcome], None, None, through_seq)
    }
}

/// Reads a SHA-256 of hexadecimal digits.
fn unhex(text: &str) -> Option<Hash> {
    let mut hash = START;
    if text.len() != 2 * hash.len() || !text.is_ascii() {
        return None;
    }
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(hash)
}
