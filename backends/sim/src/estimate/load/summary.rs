//! The numbers of a load that people decide by.

use std::io::Write;

use halite::error::{Error, Result};

use super::{Outcome, Served};
use crate::Joules;

/// Counts of durations in buckets whose ends are less than 1 % apart.
#[derive(Debug, Clone, Default)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

/// Bits of a float that are left out, so that 128 buckets double a number.
const DROPPED: u32 = 52 - 7;
/// The bucket of the shortest duration, 2^-40 s.
const FIRST: u64 = (1023 - 40) << 7;

impl Histogram {
    /// Counts a duration in seconds so many times.
    pub fn add(&mut self, seconds: f64, times: u64) {
        if times == 0 {
            return;
        }
        // Positive floats are in the order of their bits.
        let bucket = (seconds.max(0.0).to_bits() >> DROPPED).saturating_sub(FIRST) as usize;
        if bucket >= self.counts.len() {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += times;
        self.total += times;
    }

    /// How many durations there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Returns the middle of the bucket that has the duration which a share of all does not exceed; 0 if there are none.
    pub fn percentile(&self, share: f64) -> f64 {
        let rank = rank(self.total, share);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen > rank
        });
        let middle =
            |bucket: usize| f64::from_bits(((bucket as u64 + FIRST) << DROPPED) + (1 << (DROPPED - 1)));
        bucket.map_or(0.0, middle)
    }
}

/// The place of a percentile among sorted numbers, from 0: the first one that is not exceeded by a share of all.
fn rank(total: u64, share: f64) -> u64 {
    ((share * total as f64).ceil() as u64).clamp(1, total.max(1)) - 1
}

/// The median, and what 90 % and 99 % of all do not exceed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Percentiles {
    /// The median.
    pub p50: f64,
    /// What 90 % do not exceed.
    pub p90: f64,
    /// What 99 % do not exceed.
    pub p99: f64,
}

impl Percentiles {
    fn of(served: &[Served], number: impl Fn(&Served) -> f64) -> Percentiles {
        let mut numbers: Vec<f64> = served.iter().map(number).collect();
        numbers.sort_unstable_by(f64::total_cmp);
        let at = |share| numbers.get(rank(numbers.len() as u64, share) as usize).copied().unwrap_or(0.0);
        Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

/// What users are promised.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Slo {
    /// The most seconds to the first token.
    pub first_token_s: Option<f64>,
    /// The most mean seconds between the tokens of a request.
    pub per_token_s: Option<f64>,
}

halite::setters!(const Slo { first_token_s: Option<f64>, per_token_s: Option<f64> });

impl Slo {
    /// Whether a request had all that was promised.
    pub fn holds(&self, served: &Served) -> bool {
        self.first_token_s.is_none_or(|most| served.first_token_s() <= most)
            && self.per_token_s.is_none_or(|most| served.per_token_s() <= most)
    }
}

impl std::str::FromStr for Slo {
    type Err = Error;

    /// Parses `ttft=SECONDS,tpot=SECONDS`, or one of both.
    fn from_str(text: &str) -> Result<Slo> {
        let mut slo = Slo::default();
        for item in text.split(',') {
            let bad = || {
                let expected = "ttft=SECONDS, tpot=SECONDS, or both with a comma, above 0";
                Error::argument("slo", expected, format!("`{item}`"))
            };
            let (name, number) = item.split_once('=').ok_or_else(bad)?;
            let number = number.parse().ok().filter(|s: &f64| *s > 0.0 && s.is_finite()).ok_or_else(bad)?;
            let field = match name {
                "ttft" => &mut slo.first_token_s,
                "tpot" => &mut slo.per_token_s,
                _ => return Err(bad()),
            };
            if field.replace(number).is_some() {
                return Err(bad());
            }
        }
        Ok(slo)
    }
}

/// The numbers of a load.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// Requests.
    pub requests: usize,
    /// Seconds from the first arrival to the last token.
    pub seconds: f64,
    /// Seconds to the first token.
    pub first_token_s: Percentiles,
    /// Seconds between two tokens.
    pub between_s: Percentiles,
    /// Seconds from arrival to end.
    pub total_s: Percentiles,
    /// Requests that ended, per second.
    pub requests_per_s: f64,
    /// Tokens that were generated, per second.
    pub tokens_per_s: f64,
    /// The share of the time that the chips ran steps.
    pub busy: f64,
    /// Mean number of texts in steps that generate text.
    pub batch: f64,
    /// Mean and largest number of requests that waited for a sequence.
    pub queue: (f64, usize),
    /// Times that requests lost their memory.
    pub preemptions: u64,
    /// The share of the prompts' tokens that was held already.
    pub reused: f64,
    /// The share of guesses that were right, if there were any.
    pub accepted: Option<f64>,
    /// The most bytes of KV cache that a chip had in use, and the bytes that it could have.
    pub kv_bytes: (u64, u64),
    /// The share of requests that had what was promised, if anything was.
    pub good: Option<f64>,
    /// Joules per generated token, prompts included.
    pub joules_per_token: Option<Joules>,
    /// Price per million generated tokens, prompts included.
    pub usd_per_million_tokens: Option<f64>,
}

impl Summary {
    /// Sums up a load.
    pub fn new(outcome: &Outcome, slo: Option<Slo>) -> Summary {
        let Outcome { served, totals, .. } = outcome;
        let seconds = outcome.seconds().max(f64::MIN_POSITIVE);
        let tokens: f64 = served.iter().map(|served| f64::from(served.request.generate)).sum();
        let prompts: f64 = served.iter().map(|served| f64::from(served.request.prompt)).sum();
        let reused: f64 = served.iter().map(|served| f64::from(served.reused)).sum();
        let waited: f64 = served.iter().map(|served| served.began_s - served.request.arrival_s).sum();
        let good = |slo: Slo| served.iter().filter(|served| slo.holds(served)).count() as f64;
        let count = served.len().max(1) as f64;
        let gaps = &totals.gaps;
        let (p50, p90, p99) = (gaps.percentile(0.5), gaps.percentile(0.9), gaps.percentile(0.99));
        Summary {
            requests: served.len(),
            seconds,
            first_token_s: Percentiles::of(served, Served::first_token_s),
            between_s: Percentiles { p50, p90, p99 },
            total_s: Percentiles::of(served, Served::total_s),
            requests_per_s: served.len() as f64 / seconds,
            tokens_per_s: tokens / seconds,
            busy: totals.busy_s / (seconds * f64::from(outcome.servers)),
            batch: totals.texts as f64 / totals.text_steps.max(1) as f64,
            queue: (waited / seconds, totals.queue),
            preemptions: served.iter().map(|served| u64::from(served.preemptions)).sum(),
            reused: reused / prompts.max(1.0),
            accepted: (totals.drafted.0 > 0).then(|| totals.drafted.1 as f64 / totals.drafted.0 as f64),
            kv_bytes: (outcome.kv_peak_bytes, outcome.kv_bytes),
            good: slo.map(|slo| good(slo) / count),
            joules_per_token: outcome.joules.map(|joules| tokens.max(1.0).recip() * joules),
            usd_per_million_tokens: outcome.usd.map(|usd| 1e6 * usd / tokens.max(1.0)),
        }
    }
}

/// The share of requests that must have what was promised at the knee.
pub const GOOD: f64 = 0.99;
/// How many times the first token may take as long as at the lowest rate, by the 99th percentile, if nothing was promised.
pub const SLOWER: f64 = 5.0;

/// Returns the index of the knee of a sweep, in ascending order of rates: the highest rate, with all lower ones, at which [`GOOD`] of the
/// requests have what was promised; or, if nothing was promised, at which the 99th percentile of the time to the first token is at most
/// [`SLOWER`] times that of the lowest rate.
pub fn knee(sweep: &[Summary]) -> Option<usize> {
    let lowest = sweep.first()?.first_token_s.p99;
    let holds = |summary: &&Summary| match summary.good {
        Some(good) => good >= GOOD,
        None => summary.first_token_s.p99 <= SLOWER * lowest,
    };
    sweep.iter().take_while(holds).count().checked_sub(1)
}

/// Writes the requests of a load as CSV, one a line.
///
/// # Errors
/// Those of the writer.
pub fn write_csv(served: &[Served], out: impl Write) -> std::io::Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    csv.write_record([
        "arrival_s",
        "prompt_tokens",
        "generated_tokens",
        "reused_tokens",
        "began_s",
        "first_token_s",
        "end_s",
        "preemptions",
    ])?;
    for Served { request, began_s, first_s, end_s, reused, preemptions } in served {
        csv.write_record([
            request.arrival_s.to_string(),
            request.prompt.to_string(),
            request.generate.to_string(),
            reused.to_string(),
            began_s.to_string(),
            first_s.to_string(),
            end_s.to_string(),
            preemptions.to_string(),
        ])?;
    }
    csv.flush()
}
