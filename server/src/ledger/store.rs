//! The file: how it is opened, and how entries are added.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::de::DeserializeOwned;

use super::chain::{Hash, START, hash};
use super::{AuditEvent, Entry, Kind, LedgerError, Receipt, sqlite};

/// What SQLite's header says a file is: `HALI`.
const APPLICATION_ID: i64 = 0x4841_4c49;
/// The version of the schema.
const VERSION: i64 = 1;
/// The table and its index.
const SCHEMA: &str = include_str!("schema.sql");
/// What keeps entries as they are.
pub(super) const TRIGGERS: &str = include_str!("triggers.sql");
/// How long to wait for another process that writes.
const BUSY: Duration = Duration::from_secs(30);

/// When an entry survives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Every transaction is synced to the drive: it survives a power cut.
    #[default]
    Full,
    /// The drive is synced now and then: a transaction survives the end of the process, and a power cut may lose the newest ones. What
    /// remains is whole.
    Normal,
}

/// An entry of a ledger.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Stored<T> {
    /// Its number.
    pub seq: i64,
    /// When it was written, in milliseconds since 1970.
    pub unix_ms: i64,
    /// A [`Receipt`] or an [`AuditEvent`].
    pub content: T,
}

/// A ledger's file. Several processes may have one open.
#[derive(Debug)]
pub struct Ledger {
    pub(super) connection: Connection,
    pub(super) path: PathBuf,
}

impl Ledger {
    /// Opens a ledger, or makes a new one where there is no file.
    ///
    /// # Errors
    /// [`LedgerError::NotALedger`] and [`LedgerError::Newer`] for files that are not touched; [`LedgerError::Sqlite`].
    pub fn open(path: &Path, durability: Durability) -> Result<Ledger, LedgerError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let mut ledger = Ledger::connect(path, flags)?;
        let is_new = ledger.check(true)?;
        let failed = sqlite(path, "opening");
        let prepare = |ledger: &mut Ledger| {
            let connection = &mut ledger.connection;
            connection.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
            let synchronous = match durability {
                Durability::Full => "full",
                Durability::Normal => "normal",
            };
            connection.pragma_update(None, "synchronous", synchronous)?;
            // A plain sync leaves data in the drive's cache on macOS.
            connection.pragma_update(None, "fullfsync", true)
        };
        prepare(&mut ledger).map_err(failed)?;
        if is_new {
            ledger.create()?;
        }
        Ok(ledger)
    }

    /// Opens a ledger to read it.
    ///
    /// # Errors
    /// As [`Ledger::open`]; also if there is no file.
    pub fn open_read_only(path: &Path) -> Result<Ledger, LedgerError> {
        let ledger = Ledger::connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        ledger.check(false)?;
        Ok(ledger)
    }

    fn connect(path: &Path, flags: OpenFlags) -> Result<Ledger, LedgerError> {
        let open = || {
            let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
            connection.busy_timeout(BUSY)?;
            // The schema of a file from elsewhere calls no functions with effects, and cannot damage memory.
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
            Ok(connection)
        };
        let connection = open().map_err(sqlite(path, "opening"))?;
        Ok(Ledger { connection, path: path.to_owned() })
    }

    /// Checks what the file is. Returns whether it is new, where it may be.
    fn check(&self, may_be_new: bool) -> Result<bool, LedgerError> {
        let number = |sql: &str| self.connection.query_row(sql, [], |row| row.get::<_, i64>(0));
        let read = || {
            let tables = number("SELECT count(*) FROM sqlite_schema")?;
            Ok((number("PRAGMA application_id")?, number("PRAGMA user_version")?, tables))
        };
        match read().map_err(sqlite(&self.path, "reading the header"))? {
            (0, 0, 0) if may_be_new => Ok(true),
            (APPLICATION_ID, 1..=VERSION, _) => Ok(false),
            (APPLICATION_ID, got, _) if got > VERSION => {
                Err(LedgerError::Newer { path: self.path.clone(), most: VERSION, got })
            }
            _ => Err(LedgerError::NotALedger(self.path.clone())),
        }
    }

    fn create(&mut self) -> Result<(), LedgerError> {
        self.write("creating", |ledger| {
            // Another process may have been first.
            if ledger.check(true)? {
                let make = || {
                    ledger.connection.execute_batch(SCHEMA)?;
                    ledger.connection.execute_batch(TRIGGERS)?;
                    ledger.connection.pragma_update(None, "application_id", APPLICATION_ID)?;
                    ledger.connection.pragma_update(None, "user_version", VERSION)
                };
                make().map_err(sqlite(&ledger.path, "creating"))?;
            }
            Ok(())
        })
    }

    /// Runs `work` in a transaction: all of it is stored, or nothing.
    pub(super) fn write<T>(
        &mut self,
        action: &'static str,
        work: impl FnOnce(&Ledger) -> Result<T, LedgerError>,
    ) -> Result<T, LedgerError> {
        let failed = |e| sqlite(&self.path, action)(e);
        let transaction = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate);
        let transaction = transaction.map_err(failed)?;
        let result = work(self)?;
        transaction.commit().map_err(failed)?;
        Ok(result)
    }

    /// The last entry's number and hash.
    pub(super) fn head(&self) -> Result<(i64, Hash), LedgerError> {
        let last = "SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1";
        let last = self.connection.query_row(last, [], |row| Ok((row.get(0)?, row.get(1)?))).optional();
        Ok(last.map_err(sqlite(&self.path, "reading the last entry"))?.unwrap_or((0, START)))
    }

    /// Adds entries in one transaction, and returns the number of the last one. On an error, none of them is in the ledger.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`].
    pub fn append(&mut self, entries: &[Entry]) -> Result<i64, LedgerError> {
        self.append_at(now_unix_ms()?, entries)
    }

    pub(super) fn append_at(&mut self, unix_ms: i64, entries: &[Entry]) -> Result<i64, LedgerError> {
        self.write("writing", |ledger| ledger.insert(unix_ms, entries))
    }

    /// Adds entries within a transaction.
    pub(super) fn insert(&self, unix_ms: i64, entries: &[Entry]) -> Result<i64, LedgerError> {
        // Read each time: another process may have written, and a transaction may have failed.
        let (mut seq, mut last) = self.head()?;
        let mut add = || {
            let sql = "INSERT INTO entries (seq, unix_ms, kind, body, hash) VALUES (?, ?, ?, ?, ?)";
            let mut insert = self.connection.prepare(sql)?;
            for Entry { kind, body } in entries {
                seq += 1;
                last = hash(&last, seq, unix_ms, kind.name(), body);
                insert.execute(params![seq, unix_ms, kind.name(), body, last])?;
            }
            Ok(seq)
        };
        add().map_err(sqlite(&self.path, "writing"))
    }

    /// The receipts with this number or later ones, at most so many.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`], [`LedgerError::Malformed`].
    pub fn receipts(&self, from_seq: i64, most: u32) -> Result<Vec<Stored<Receipt>>, LedgerError> {
        self.stored(Kind::Receipt, from_seq, most)
    }

    /// The audit events with this number or later ones, at most so many.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`], [`LedgerError::Malformed`].
    pub fn events(&self, from_seq: i64, most: u32) -> Result<Vec<Stored<AuditEvent>>, LedgerError> {
        self.stored(Kind::Audit, from_seq, most)
    }

    fn stored<T: DeserializeOwned>(
        &self,
        kind: Kind,
        from_seq: i64,
        most: u32,
    ) -> Result<Vec<Stored<T>>, LedgerError> {
        let read = || {
            let sql =
                "SELECT seq, unix_ms, body FROM entries WHERE kind = ? AND seq >= ? ORDER BY seq LIMIT ?";
            let mut select = self.connection.prepare(sql)?;
            let rows = select.query_map(params![kind.name(), from_seq, most], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })?;
            rows.collect::<Result<Vec<(i64, i64, String)>, _>>()
        };
        let parse = |(seq, unix_ms, body): (i64, i64, String)| {
            let content = serde_json::from_str(&body);
            let content = content.map_err(|e| LedgerError::Malformed(format!("entry {seq}: {e}")))?;
            Ok(Stored { seq, unix_ms, content })
        };
        read().map_err(sqlite(&self.path, "reading"))?.into_iter().map(parse).collect()
    }
}

/// The time, in milliseconds since 1970.
pub(super) fn now_unix_ms() -> Result<i64, LedgerError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok();
    let unix_ms = since.and_then(|since| i64::try_from(since.as_millis()).ok());
    unix_ms.ok_or_else(|| LedgerError::Malformed("the clock: expected a time after 1970".into()))
}
