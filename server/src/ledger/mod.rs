//! The ledger: what every request used, and what happened to the server, in a file that nobody changes unseen.
//!
//! A ledger is an SQLite file with one table. An entry is a [`Receipt`], an audit event, or a checkpoint. Each has a hash over itself and
//! the hash before it, so that a change of one entry breaks the chain from there on ([`Ledger::verify`]). Entries are only added; only
//! [`Ledger::retain`] removes the oldest, and leaves their sums and their last hash in a checkpoint.
//!
//! A server writes through a [`Writer`], whose calls return once an entry is on the drive.

mod amount;
mod chain;
mod receipt;
mod store;
#[cfg(test)]
mod tests;
mod usage;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use amount::{Amount, NoAmount};
pub use chain::Verified;
pub use receipt::{EnergySource, Implausible, Part, Prices, Receipt};
pub use store::{Durability, Ledger, Stored};
pub use usage::{By, Usage};
pub use writer::Writer;

/// Maximum bytes of a receipt or an audit event.
const MAX_BODY_BYTES: usize = 1 << 16;

/// What went wrong with a ledger.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// SQLite failed: a full drive, a file that cannot be written, or one that is damaged.
    #[error("{path}: {action} failed: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: Arc<rusqlite::Error>,
    },
    /// The file is another one.
    #[error("{0}: expected a ledger, or no file")]
    NotALedger(PathBuf),
    /// The file was written by a newer version.
    #[error("{path}: expected version {most} of ledgers or an older one, got {got}; update halite")]
    Newer {
        /// The file.
        path: PathBuf,
        /// The newest version that is known.
        most: i64,
        /// The file's version.
        got: i64,
    },
    /// An entry does not have the hash that its content and the entry before it give.
    #[error("{path}: entry {seq}: {what}")]
    Chain {
        /// The file.
        path: PathBuf,
        /// The number of the first wrong entry.
        seq: i64,
        /// What is wrong.
        what: String,
    },
    /// A receipt has counts that cannot be.
    #[error("a receipt: {0}")]
    Receipt(#[from] Implausible),
    /// An entry has too many bytes.
    #[error("an entry: expected at most {MAX_BODY_BYTES} bytes of JSON, got {0}")]
    TooLong(usize),
    /// An entry, or a time, cannot be written or read.
    #[error("{0}")]
    Malformed(String),
    /// A sum has more than 63 bits.
    #[error("{0}: a sum has more than 63 bits; ask for fewer days")]
    Overflow(PathBuf),
    /// The thread that writes has ended.
    #[error("the ledger is closed")]
    Closed,
}

/// Makes an error of SQLite one of a ledger.
fn sqlite(path: &Path, action: &'static str) -> impl FnOnce(rusqlite::Error) -> LedgerError {
    move |source| match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => LedgerError::NotALedger(path.to_owned()),
        _ if source.to_string().contains("integer overflow") => LedgerError::Overflow(path.to_owned()),
        _ => LedgerError::Sqlite { path: path.to_owned(), action, source: Arc::new(source) },
    }
}

/// What kinds of entries there are. No kind contains `{`, with which every body begins, so that a hash over both tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Receipt,
    Audit,
    Checkpoint,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Receipt => "receipt",
            Kind::Audit => "audit",
            Kind::Checkpoint => "checkpoint",
        }
    }
}

/// Something that happened to the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditEvent {
    /// Who did it: a client's name, or `server`.
    pub who: String,
    /// What was done: `clients.reload`.
    pub what: String,
    /// More about it.
    pub detail: Value,
}

/// What is added to a ledger: a kind, and JSON, which is stored and hashed as it is here.
#[derive(Debug, Clone)]
pub struct Entry {
    kind: Kind,
    body: String,
}

impl Entry {
    /// The receipt of a request.
    ///
    /// # Errors
    /// [`LedgerError::Receipt`] for counts that cannot be, [`LedgerError::TooLong`].
    pub fn receipt(receipt: &Receipt) -> Result<Entry, LedgerError> {
        receipt.check()?;
        Entry::new(Kind::Receipt, receipt)
    }

    /// An audit event, as the fields of [`AuditEvent`].
    ///
    /// # Errors
    /// [`LedgerError::TooLong`].
    pub fn audit(who: &str, what: &str, detail: &Value) -> Result<Entry, LedgerError> {
        let event = AuditEvent { who: who.to_owned(), what: what.to_owned(), detail: detail.clone() };
        Entry::new(Kind::Audit, &event)
    }

    fn new(kind: Kind, body: &impl Serialize) -> Result<Entry, LedgerError> {
        let body = to_json(body)?;
        match body.len() <= MAX_BODY_BYTES {
            true => Ok(Entry { kind, body }),
            false => Err(LedgerError::TooLong(body.len())),
        }
    }
}

fn to_json(body: &impl Serialize) -> Result<String, LedgerError> {
    serde_json::to_string(body).map_err(|e| LedgerError::Malformed(format!("an entry: {e}")))
}
