//! What clients use, and their limits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::{Client, Denied};
use crate::basics::now_ms;
use crate::ledger::{By, Ledger, LedgerError, Receipt};

const MINUTE_MS: u64 = 60_000;

/// The day in UTC.
fn day(unix_ms: u64) -> Date {
    let time = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.unwrap_or(Timestamp::MAX).to_zoned(TimeZone::UTC).date()
}

/// The next day; the last one that there is has none.
fn after(day: Date) -> Date {
    day.tomorrow().unwrap_or(day)
}

/// Seconds until a day begins, at least one.
fn seconds_until(day: Date, unix_ms: u64) -> u64 {
    let start = day.to_zoned(TimeZone::UTC).ok();
    let start_ms = start.and_then(|start| u64::try_from(start.timestamp().as_millisecond()).ok());
    start_ms.unwrap_or(0).saturating_sub(unix_ms).div_ceil(1000).max(1)
}

/// What one client used.
#[derive(Debug, Default)]
pub(super) struct Counts(Mutex<Used>);

#[derive(Debug)]
struct Used {
    /// The bucket of requests: what is in it, in requests times [`MINUTE_MS`], and when. `None` is a full one.
    bucket: Option<(u64, u64)>,
    running: u32,
    day: Date,
    day_tokens: u64,
    /// The cost since the month of `day` began.
    month_nano: u64,
}

impl Default for Used {
    fn default() -> Used {
        Used { bucket: None, running: 0, day: Date::ZERO, day_tokens: 0, month_nano: 0 }
    }
}

impl Used {
    /// Starts a new day and a new month where one has begun. A clock that goes back does not.
    fn turn(&mut self, today: Date) {
        if today > self.day {
            if (today.year(), today.month()) != (self.day.year(), self.day.month()) {
                self.month_nano = 0;
            }
            (self.day, self.day_tokens) = (today, 0);
        }
    }
}

impl Counts {
    fn lock(&self) -> MutexGuard<'_, Used> {
        // Numbers are whole even where a thread panicked.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A request that counts as one that runs, until it is dropped.
#[derive(Debug)]
pub struct Admission {
    client: Arc<Client>,
}

impl Admission {
    /// The client.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Counts what the request used. A request in progress is not ended, so that limits of tokens and cost can be passed by those that
    /// were admitted before.
    pub fn charge(&self, receipt: &Receipt) {
        self.charge_at(receipt, now_ms());
    }

    pub(super) fn charge_at(&self, receipt: &Receipt, unix_ms: u64) {
        let mut used = self.client.counts.lock();
        used.turn(day(unix_ms));
        used.day_tokens =
            used.day_tokens.saturating_add(receipt.prompt_tokens).saturating_add(receipt.completion_tokens);
        used.month_nano = used.month_nano.saturating_add(receipt.cost_nano);
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut used = self.client.counts.lock();
        used.running = used.running.saturating_sub(1);
    }
}

/// Admits a request, or says what it is beyond. A request that is refused counts nowhere.
pub(super) fn admit(client: &Arc<Client>, unix_ms: u64) -> Result<Admission, Denied> {
    let config = client.config();
    let today = day(unix_ms);
    let mut used = client.counts.lock();
    used.turn(today);
    if let Some(limit) = config.budget.filter(|limit| used.month_nano >= limit.nano) {
        let next = after(today.last_of_month());
        return Err(Denied::Budget { limit, next, retry_after_s: seconds_until(next, unix_ms) });
    }
    if let Some(limit) = config.tokens_per_day.filter(|limit| used.day_tokens >= *limit) {
        let next = after(today);
        let retry_after_s = seconds_until(next, unix_ms);
        return Err(Denied::TokensPerDay { limit, used: used.day_tokens, next, retry_after_s });
    }
    if let Some(limit) = config.max_concurrent.filter(|limit| used.running >= *limit) {
        return Err(Denied::Concurrent { limit });
    }
    if let Some(limit) = config.requests_per_minute {
        let (rate, full) = (u64::from(limit), u64::from(limit) * MINUTE_MS);
        // A clock that goes back fills nothing.
        let (level, at_ms) = used.bucket.unwrap_or((full, unix_ms));
        let level = unix_ms.saturating_sub(at_ms).saturating_mul(rate).saturating_add(level).min(full);
        let Some(left) = level.checked_sub(MINUTE_MS) else {
            used.bucket = Some((level, unix_ms));
            let retry_after_s = (MINUTE_MS - level).div_ceil(rate.max(1)).div_ceil(1000);
            return Err(Denied::RequestsPerMinute { limit, retry_after_s });
        };
        used.bucket = Some((left, unix_ms));
    }
    used.running = used.running.saturating_add(1);
    Ok(Admission { client: client.clone() })
}

/// Counts what a ledger has of this day and month, where it is more than what is counted already.
pub(super) fn recover(
    clients: &BTreeMap<String, Arc<Client>>,
    ledger: &Ledger,
    currency: &str,
    unix_ms: u64,
) -> Result<(), LedgerError> {
    let today = day(unix_ms);
    let counts = |name: &Option<String>| Some(&clients.get(name.as_deref()?)?.counts);
    let mut tokens: BTreeMap<&str, u64> = BTreeMap::new();
    let of_day = ledger.usage(&[By::Client], Some(today), None)?;
    for usage in &of_day {
        // One client may have costs in several currencies.
        let sum = tokens.entry(usage.client.as_deref().unwrap_or_default()).or_default();
        *sum = sum.saturating_add(usage.prompt_tokens).saturating_add(usage.completion_tokens);
    }
    for client in clients.values() {
        let mut used = client.counts.lock();
        used.turn(today);
        used.day_tokens = used.day_tokens.max(tokens.get(client.name()).copied().unwrap_or(0));
    }
    for usage in ledger.usage(&[By::Client], Some(today.first_of_month()), None)? {
        if let (true, Some(counts)) = (usage.currency == currency, counts(&usage.client)) {
            let mut used = counts.lock();
            used.month_nano = used.month_nano.max(usage.cost_nano);
        }
    }
    Ok(())
}
