//! The journal of requests with an idempotency key: their tokens, so that a request goes on after its client or the server was gone.
//!
//! It is a file of lines, each a checksum and JSON. Lines are only added; a line that was not written whole is skipped at the next start. They are handed to the system with each step, and not synced: a killed process loses none, a power cut the newest.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

/// A journal that has grown by so many bytes is written anew, without what nobody needs any more.
const COMPACT_BYTES: u64 = 64 << 20;
/// Maximum requests; more are not kept.
const MAX_RECORDS: usize = 100_000;
/// How long a request is kept.
const KEPT_MS: u64 = 24 * 60 * 60 * 1000;

/// What a line says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Began {
        key: String,
        of: String,
        seed: u64,
        unix_ms: u64,
    },
    /// Tokens, of which the first one is the text's token `at`.
    Tokens {
        key: String,
        at: usize,
        tokens: Vec<u32>,
    },
    /// A receipt has so many of its tokens, and its prompt.
    Billed {
        key: String,
        tokens: usize,
    },
    /// It is complete.
    Ended {
        key: String,
        finish: String,
    },
}

/// What is known of a request.
#[derive(Debug, Clone, Default)]
struct Record {
    /// What it asks, as a hash.
    of: String,
    seed: u64,
    unix_ms: u64,
    tokens: Vec<u32>,
    billed: Option<usize>,
    finish: Option<String>,
    is_running: bool,
}

#[derive(Debug)]
struct State {
    file: File,
    bytes: u64,
    records: HashMap<String, Record>,
}

/// The requests of a server that have a key.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    state: Mutex<State>,
}

/// Why a request with a key is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Conflict {
    #[error("the request with this idempotency key is under way")]
    Running,
    #[error("the idempotency key belongs to another request")]
    Other,
}

/// A request in the journal. It counts as under way until this is dropped.
#[derive(Debug)]
pub(crate) struct Entry {
    journal: Arc<Journal>,
    key: String,
    /// The seed with which it began.
    pub seed: u64,
    /// Tokens that it has.
    pub tokens: Vec<u32>,
    /// Tokens of which a receipt was written, with the prompt.
    pub billed: Option<usize>,
    /// How it ended, if it is complete.
    pub finish: Option<String>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(record) = self.journal.state().records.get_mut(&self.key) {
            record.is_running = false;
        }
    }
}

fn checked(line: &Line) -> std::io::Result<String> {
    let json = serde_json::to_string(line)?;
    Ok(format!("{:016x} {json}\n", XxHash3_64::oneshot(json.as_bytes())))
}

/// Reads a line; `None` if it is not whole.
fn parsed(line: &str) -> Option<Line> {
    let (sum, json) = line.split_once(' ')?;
    let is_whole = u64::from_str_radix(sum, 16).ok()? == XxHash3_64::oneshot(json.as_bytes());
    serde_json::from_str(json).ok().filter(|_| is_whole)
}

impl State {
    fn apply(&mut self, line: Line) {
        match line {
            Line::Began { key, of, seed, unix_ms } => {
                self.records.insert(key, Record { of, seed, unix_ms, ..Record::default() });
            }
            Line::Tokens { key, at, tokens } => {
                // After a line that could not be written, the text has a gap, and ends before it.
                if let Some(record) = self.records.get_mut(&key).filter(|record| record.tokens.len() == at) {
                    record.tokens.extend(tokens);
                }
            }
            Line::Ended { key, finish } => {
                if let Some(record) = self.records.get_mut(&key) {
                    record.finish = Some(finish);
                }
            }
            Line::Billed { key, tokens } => {
                if let Some(record) = self.records.get_mut(&key) {
                    record.billed = Some(tokens);
                }
            }
        }
    }

    /// Writes a line, and does what it says. A line that cannot be written is logged: the request goes on, and cannot be resumed.
    fn write(&mut self, line: Line) {
        let text = match checked(&line) {
            Ok(text) => text,
            Err(error) => return tracing::error!(%error, "not in the journal"),
        };
        match self.file.write_all(text.as_bytes()) {
            Ok(()) => {
                self.bytes += text.len() as u64;
                self.apply(line);
            }
            Err(error) => {
                tracing::error!(%error, "not in the journal");
                // What was written of it is a line of its own. If this fails too, the next line is lost with it.
                let _ = self.file.write_all(b"\n");
            }
        }
    }
}

/// Writes records to a new file, instead of the one at this place.
fn written(path: &Path, records: HashMap<String, Record>) -> std::io::Result<State> {
    let new_path = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true);
    // Tokens are texts.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = BufWriter::new(options.open(&new_path)?);
    for (key, record) in &records {
        let key = || key.clone();
        let Record { of, seed, unix_ms, tokens, billed, finish, .. } = record.clone();
        let mut lines =
            vec![Line::Began { key: key(), of, seed, unix_ms }, Line::Tokens { key: key(), at: 0, tokens }];
        lines.extend(billed.map(|tokens| Line::Billed { key: key(), tokens }));
        lines.extend(finish.map(|finish| Line::Ended { key: key(), finish }));
        for line in &lines {
            file.write_all(checked(line)?.as_bytes())?;
        }
    }
    let file = file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    file.sync_all()?;
    std::fs::rename(&new_path, path)?;
    Ok(State { file, bytes: 0, records })
}

impl Journal {
    /// Opens a journal, or makes one. Requests that are a day old are dropped.
    ///
    /// # Errors
    /// [`halite::Error::Io`] for a file that cannot be read or written.
    pub fn open(path: &Path, now_ms: u64) -> Result<Journal, halite::Error> {
        let failed = |source| halite::Error::Io { path: path.to_owned(), source };
        let mut records = HashMap::new();
        if path.exists() {
            let mut old = State { file: File::open(path).map_err(failed)?, bytes: 0, records };
            let mut lines = BufReader::new(File::open(path).map_err(failed)?).split(b'\n');
            while let Some(line) = lines.next().transpose().map_err(failed)? {
                // One that is not whole was being written when the process or the drive ended.
                if let Some(line) = std::str::from_utf8(&line).ok().and_then(parsed) {
                    old.apply(line);
                }
            }
            records = old.records;
        }
        records.retain(|_, record| now_ms.saturating_sub(record.unix_ms) < KEPT_MS);
        let state = written(path, records).map_err(failed)?;
        Ok(Journal { path: path.to_owned(), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a request, or finds what it has. `of` is a hash of what it asks.
    ///
    /// # Errors
    /// [`Conflict`].
    pub fn begin(self: &Arc<Self>, key: &str, of: &str, seed: u64, now_ms: u64) -> Result<Entry, Conflict> {
        let mut state = self.state();
        if state.bytes > COMPACT_BYTES || state.records.len() >= MAX_RECORDS {
            let mut records = std::mem::take(&mut state.records);
            let is_old = |record: &Record| now_ms.saturating_sub(record.unix_ms) >= KEPT_MS;
            records.retain(|_, record| record.is_running || !is_old(record));
            let kept = records.clone();
            match written(&self.path, records) {
                Ok(new) => *state = new,
                Err(error) => {
                    tracing::error!(%error, "the journal is not written anew");
                    (state.records, state.bytes) = (kept, 0);
                }
            }
        }
        if !state.records.contains_key(key) && state.records.len() < MAX_RECORDS {
            let (key, of) = (key.to_owned(), of.to_owned());
            state.write(Line::Began { key, of, seed, unix_ms: now_ms });
        }
        let (journal, key) = (self.clone(), key.to_owned());
        let Some(record) = state.records.get_mut(&key) else {
            // It could not be written, or there are too many.
            return Ok(Entry { journal, key, seed, tokens: Vec::new(), billed: None, finish: None });
        };
        if record.of != of {
            return Err(Conflict::Other);
        }
        if std::mem::replace(&mut record.is_running, true) {
            return Err(Conflict::Running);
        }
        let (seed, tokens, billed) = (record.seed, record.tokens.clone(), record.billed);
        let finish = record.finish.clone();
        drop(state);
        Ok(Entry { journal, key, seed, tokens, billed, finish })
    }
}

impl Entry {
    /// Adds tokens, of which the first one is the text's token `at`.
    pub fn push(&self, at: usize, tokens: &[u32]) {
        self.journal.state().write(Line::Tokens { key: self.key.clone(), at, tokens: tokens.to_vec() });
    }

    /// Notes that the text is complete.
    pub fn ended(&self, finish: &str) {
        self.journal.state().write(Line::Ended { key: self.key.clone(), finish: finish.to_owned() });
    }

    /// Notes that a receipt has the prompt and so many tokens.
    pub fn billed(&self, tokens: usize) {
        self.journal.state().write(Line::Billed { key: self.key.clone(), tokens });
    }
}

#[cfg(test)]
mod tests {
    use super::{Conflict, Journal, KEPT_MS};
    use std::sync::Arc;

    #[test]
    fn a_request_goes_on_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let journal = Arc::new(Journal::open(&path, 0).unwrap());
        let entry = journal.begin("a", "asks", 7, 1000).unwrap();
        assert_eq!((entry.seed, entry.tokens.len(), entry.billed), (7, 0, None));
        entry.push(0, &[1, 2]);
        entry.push(2, &[3]);
        // After a gap.
        entry.push(4, &[5]);
        assert_eq!(journal.begin("a", "asks", 8, 2000).unwrap_err(), Conflict::Running);
        drop(entry);
        assert_eq!(journal.begin("a", "asks else", 8, 2000).unwrap_err(), Conflict::Other);
        // A line that was not written whole.
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(b"0123456789abcdef {\"tokens\":{\"key\":\"a\",\"tok");
        std::fs::write(&path, bytes).unwrap();
        for _ in 0..2 {
            let journal = Arc::new(Journal::open(&path, 3000).unwrap());
            let entry = journal.begin("a", "asks", 9, 3000).unwrap();
            assert_eq!((entry.seed, &entry.tokens[..], entry.billed), (7, &[1, 2, 3][..], None));
        }
        let journal = Arc::new(Journal::open(&path, 3000).unwrap());
        journal.begin("a", "asks", 9, 3000).unwrap().billed(3);
        let journal = Arc::new(Journal::open(&path, 3000).unwrap());
        assert_eq!(journal.begin("a", "asks", 9, 3000).unwrap().billed, Some(3));
        drop(journal);
        // A day later it is gone.
        let journal = Arc::new(Journal::open(&path, 1000 + KEPT_MS).unwrap());
        assert_eq!(journal.begin("a", "asks else", 9, 1000 + KEPT_MS).unwrap().seed, 9);
    }
}
