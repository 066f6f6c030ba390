//! Sums over receipts.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use rusqlite::params;
use serde::{Deserialize, Serialize};

use super::store::Ledger;
use super::{LedgerError, sqlite};

/// What sums are grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum By {
    /// The client.
    Client,
    /// The model.
    Model,
    /// The day in UTC on which the receipt was written.
    Day,
    /// The address.
    Endpoint,
    /// How the request ended.
    Outcome,
}

impl By {
    /// All of them.
    pub const ALL: [By; 5] = [By::Client, By::Model, By::Day, By::Endpoint, By::Outcome];

    /// Its name, which is the column's.
    pub fn name(self) -> &'static str {
        match self {
            By::Client => "client",
            By::Model => "model",
            By::Day => "day",
            By::Endpoint => "endpoint",
            By::Outcome => "outcome",
        }
    }
}

/// Sums over the receipts of one group. Costs in different currencies are different groups.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Usage {
    /// The client, if the sums are by client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// The model, if the sums are by model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The day, as `2026-01-31`, if the sums are by day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub day: Option<String>,
    /// The address, if the sums are by address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// How requests ended, if the sums are by that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// The currency of the cost.
    pub currency: String,
    /// Receipts.
    pub requests: u64,
    /// As in [`Receipt`](super::Receipt), summed up; so are the others.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were cached.
    pub cached_tokens: u64,
    /// Tokens that were generated.
    pub completion_tokens: u64,
    /// Tokens that were proposed.
    pub drafted_tokens: u64,
    /// Proposed tokens that were confirmed.
    pub accepted_tokens: u64,
    /// Time in the queue.
    pub queue_us: u64,
    /// Time of steps for prompts.
    pub prefill_us: u64,
    /// Time of steps for generated tokens.
    pub decode_us: u64,
    /// Time of devices.
    pub device_us: u64,
    /// Bytes of the KV cache times seconds.
    pub kv_byte_seconds: u64,
    /// Bytes of weights and KV cache that steps read.
    pub read_bytes: u64,
    /// Energy, where it is known.
    pub energy_uj: u64,
    /// The cost in billionths of the currency.
    pub cost_nano: u64,
}

/// The sums of [`Usage`] that are fields of receipts.
const SUMS: [&str; 12] = [
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "queue_us",
    "prefill_us",
    "decode_us",
    "kv_byte_seconds",
    "read_bytes",
    "energy_uj",
    "cost_nano",
];

/// The time of devices, which the parts of a receipt have.
const DEVICE_US: &str =
    "(SELECT coalesce(sum(part.value ->> 'device_us'), 0) FROM json_each(entries.body, '$.parts') AS part)";

/// Maps names to SQL, separated by commas.
fn list(names: &[&str], sql: impl Fn(&str) -> String) -> String {
    names.iter().map(|name| sql(name)).collect::<Vec<_>>().join(", ")
}

impl Ledger {
    /// Exact sums over receipts from `since` to before `until`, days in UTC, also over those that [`Ledger::retain`] removed.
    ///
    /// # Errors
    /// [`LedgerError::Overflow`], [`LedgerError::Sqlite`], [`LedgerError::Malformed`].
    pub fn usage(
        &self,
        by: &[By],
        since: Option<Date>,
        until: Option<Date>,
    ) -> Result<Vec<Usage>, LedgerError> {
        self.sums(by, since, until, i64::MAX)
    }

    /// The same over entries up to a number.
    pub(super) fn sums(
        &self,
        by: &[By],
        since: Option<Date>,
        until: Option<Date>,
        through_seq: i64,
    ) -> Result<Vec<Usage>, LedgerError> {
        // Texts before and after those of all days.
        let text = |day: Option<Date>, open: &str| day.map_or(open.to_owned(), |day| day.to_string());
        let (since_day, until_day) = (text(since, ""), text(until, "~"));
        let (since_ms, until_ms) = (unix_ms(since, i64::MIN)?, unix_ms(until, i64::MAX)?);
        let read = || {
            let mut select = self.connection.prepare(&query(by))?;
            let bounds = params![through_seq, since_ms, until_ms, since_day, until_day];
            let rows = select.query_map(bounds, |row| row.get::<_, String>(0))?;
            rows.collect::<Result<Vec<_>, _>>()
        };
        let parse = |json: &String| {
            serde_json::from_str(json)
                .map_err(|e| LedgerError::Malformed(format!("a sum of the ledger: {e}")))
        };
        read().map_err(sqlite(&self.path, "summing up"))?.iter().map(parse).collect()
    }
}

/// When a day begins, in milliseconds since 1970.
fn unix_ms(day: Option<Date>, open: i64) -> Result<i64, LedgerError> {
    let Some(day) = day else { return Ok(open) };
    let start = day.to_zoned(TimeZone::UTC).map_err(|e| LedgerError::Malformed(format!("{day}: {e}")))?;
    Ok(start.timestamp().as_millisecond())
}

/// SQL whose rows are [`Usage`] as JSON. Its parameters are the last entry, then the first time and the time after the last: in
/// milliseconds, and as days.
fn query(by: &[By]) -> String {
    let group = |name: &str| by.iter().any(|by| by.name() == name);
    let groups = list(&By::ALL.map(By::name), |name| match group(name) {
        true => format!("'{name}', {name}"),
        false => format!("'{name}', NULL"),
    });
    let mut keys: Vec<&str> = By::ALL.iter().map(|by| by.name()).filter(|name| group(name)).collect();
    keys.push("currency");
    let keys = keys.join(", ");
    let sums = list(&SUMS, |name| format!("'{name}', sum({name})"));
    let of_receipts = list(&SUMS, |name| format!("coalesce(body ->> '{name}', 0) AS {name}"));
    let of_totals = list(&SUMS, |name| format!("total.value ->> '{name}'"));
    format!(
        "WITH facts AS (
            SELECT client, model, date(unix_ms / 1000, 'unixepoch') AS day, body ->> 'endpoint' AS endpoint,
                body ->> 'outcome' AS outcome, body ->> 'currency' AS currency, 1 AS requests,
                {DEVICE_US} AS device_us, {of_receipts}
            FROM entries
            WHERE kind = 'receipt' AND seq <= ?1 AND unix_ms >= ?2 AND unix_ms < ?3
            UNION ALL
            SELECT total.value ->> 'client', total.value ->> 'model', total.value ->> 'day', total.value ->> 'endpoint',
                total.value ->> 'outcome', total.value ->> 'currency', total.value ->> 'requests',
                total.value ->> 'device_us', {of_totals}
            FROM entries, json_each(entries.body, '$.totals') AS total
            WHERE kind = 'checkpoint' AND seq <= ?1 AND total.value ->> 'day' >= ?4 AND total.value ->> 'day' < ?5
        )
        SELECT json_object({groups}, 'currency', currency, 'requests', sum(requests), 'device_us', sum(device_us), {sums})
        FROM facts GROUP BY {keys} ORDER BY {keys}"
    )
}
