//! The books of a server: receipts of requests and audit events, on their way to the ledger.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde_json::{Value, json};

use crate::ledger::{Entry, LedgerError, Receipt, Writer};

/// Where receipts go. Without a ledger they are only told to clients.
#[derive(Debug, Default)]
pub(crate) struct Books {
    ledger: Option<Writer>,
    /// The last entry could not be written.
    is_failing: AtomicBool,
}

impl Books {
    pub fn new(ledger: Option<Writer>) -> Books {
        Books { ledger, is_failing: AtomicBool::new(false) }
    }

    async fn write(&self, entry: Result<Entry, LedgerError>) -> Result<(), LedgerError> {
        let Some(ledger) = &self.ledger else { return Ok(()) };
        let written = match entry {
            Ok(entry) => ledger.append(entry).await.map(drop),
            Err(error) => Err(error),
        };
        self.is_failing.store(written.is_err(), Relaxed);
        written.inspect_err(|error| tracing::error!(%error, "not in the ledger"))
    }

    /// Writes a receipt. Returns whether it is in the ledger, if there is one.
    pub async fn receipt(&self, receipt: &Receipt) -> bool {
        self.write(Entry::receipt(receipt)).await.is_ok()
    }

    /// Writes an audit event.
    pub async fn audit(&self, who: &str, what: &str, detail: &Value) {
        // What cannot be written is logged.
        let _ = self.write(Entry::audit(who, what, detail)).await;
    }

    /// Whether work can be recorded. If the last entry could not be written, another one is tried.
    ///
    /// # Errors
    /// Why not.
    pub async fn check(&self) -> Result<(), LedgerError> {
        match self.is_failing.load(Relaxed) {
            false => Ok(()),
            true => self.write(Entry::audit("server", "ledger.retry", &json!({}))).await,
        }
    }
}
