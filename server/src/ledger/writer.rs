//! A thread that writes entries, many in one transaction.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

use super::{Entry, Ledger, LedgerError};

/// Entries that may wait for the drive. A sender of more waits.
const WAITING: usize = 1024;
/// Entries of a transaction at most.
const GROUP: usize = 256;

/// What is told of an entry: its number, once it is durable.
type Written = Result<i64, LedgerError>;

struct Job {
    entry: Entry,
    done: Box<dyn FnOnce(Written) + Send>,
}

/// A handle of the thread that writes to a ledger. The thread ends with the last handle, after all entries that were handed over.
#[derive(Debug, Clone)]
pub struct Writer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `None` only while the thread ends.
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`LedgerError::Malformed`] if the system has no thread left.
    pub fn new(ledger: Ledger) -> Result<Writer, LedgerError> {
        let (jobs, arriving) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || work(ledger, &arriving))
            .map_err(|e| LedgerError::Malformed(format!("a thread for the ledger: {e}")))?;
        Ok(Writer { shared: Arc::new(Shared { jobs: Some(jobs), thread: Some(thread) }) })
    }

    fn jobs(&self) -> Result<&SyncSender<Job>, LedgerError> {
        self.shared.jobs.as_ref().ok_or(LedgerError::Closed)
    }

    /// Adds an entry, and returns its number once it is durable. It blocks: a task of an asynchronous program calls [`Writer::append`].
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`] if it is not in the ledger, as on a full drive; [`LedgerError::Closed`].
    pub fn append_blocking(&self, entry: Entry) -> Written {
        let (sender, receiver) = sync_channel(1);
        // A caller that is gone needs no answer.
        let done = Box::new(move |written| drop(sender.send(written)));
        self.jobs()?.send(Job { entry, done }).map_err(|_| LedgerError::Closed)?;
        receiver.recv().map_err(|_| LedgerError::Closed)?
    }

    /// Adds an entry, and returns its number once it is durable. The entry is written even if nobody waits for this any more.
    ///
    /// # Errors
    /// As [`Writer::append_blocking`].
    pub async fn append(&self, entry: Entry) -> Written {
        let (sender, receiver) = oneshot::channel();
        let done = Box::new(move |written| drop(sender.send(written)));
        match self.jobs()?.try_send(Job { entry, done }) {
            Ok(()) => {}
            Err(TrySendError::Disconnected(_)) => return Err(LedgerError::Closed),
            // The drive is slow: wait without holding up other tasks.
            Err(TrySendError::Full(job)) => {
                let jobs = self.jobs()?.clone();
                let sent = tokio::task::spawn_blocking(move || jobs.send(job).is_ok()).await;
                if !matches!(sent, Ok(true)) {
                    return Err(LedgerError::Closed);
                }
            }
        }
        receiver.await.map_err(|_| LedgerError::Closed)?
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It reported its errors to those who sent entries.
            let _ = thread.join();
        }
    }
}

/// Writes what arrives until nobody can send any more.
fn work(mut ledger: Ledger, arriving: &Receiver<Job>) {
    while let Ok(first) = arriving.recv() {
        // While the drive synced the last transaction, others arrived: they share the next.
        let jobs = std::iter::once(first).chain(arriving.try_iter().take(GROUP - 1));
        let (entries, done): (Vec<Entry>, Vec<_>) = jobs.map(|job| (job.entry, job.done)).unzip();
        let written = ledger.append(&entries);
        for (place, done) in done.into_iter().rev().enumerate() {
            // The last entry has the number that was returned.
            done(written.clone().map(|last| last.saturating_sub_unsigned(place as u64)));
        }
    }
}
