//! What a request used, and what that costs.

use halite::backend::energy::{self, Energy};
use serde::{Deserialize, Serialize};

use super::Amount;

/// What one request used. All counts are whole numbers, so that sums are exact.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Receipt {
    /// The id of the request, as in the header `x-request-id`.
    pub request: String,
    /// The SHA-256 of the request's idempotency key, if it had one.
    pub idempotency_sha256: Option<String>,
    /// The client's name.
    pub client: String,
    /// The model's name.
    pub model: String,
    /// The SHA-256 of the model's file, where it is known.
    pub model_sha256: Option<String>,
    /// The address: `/v1/completions`.
    pub endpoint: String,
    /// When the request arrived, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// How it ended: `end`, `length`, `stop`, `context_full`, `content_filter`, `deadline`, `cancelled` or `failed`.
    pub outcome: String,
    /// Tokens of the prompt, with those that were cached.
    pub prompt_tokens: u64,
    /// Tokens of the prompt whose KV cache was there already.
    pub cached_tokens: u64,
    /// Tokens that were generated.
    pub completion_tokens: u64,
    /// Tokens that speculative decoding proposed.
    pub drafted_tokens: u64,
    /// Proposed tokens that the model confirmed.
    pub accepted_tokens: u64,
    /// Time in the queue.
    pub queue_us: u64,
    /// Time from the first step to the first token.
    pub prefill_us: u64,
    /// Time from the first token to the end.
    pub decode_us: u64,
    /// Who did the work: more than one part after a failover.
    pub parts: Vec<Part>,
    /// Bytes of the KV cache, each times the seconds that it was held.
    pub kv_byte_seconds: u64,
    /// Bytes of weights and KV cache that its steps read. Requests that share a step share its weights.
    pub read_bytes: u64,
    /// Energy in millionths of a joule, where it is known.
    pub energy_uj: Option<u64>,
    /// How the energy is known; `None` also if that differs between parts.
    pub energy_source: Option<EnergySource>,
    /// The cost in billionths of the currency.
    pub cost_nano: u64,
    /// The currency of the cost.
    pub currency: String,
}

/// The work of one replica for a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Part {
    /// The replica's name.
    pub replica: String,
    /// Tokens that it generated.
    pub tokens: u64,
    /// Time of its device, without the step that failed.
    pub device_us: u64,
}

/// How the energy of a request is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum EnergySource {
    /// Counters of the processor.
    Rapl,
    /// A sensor of the machine.
    Hwmon,
    /// The device itself.
    Device,
    /// An estimate from a chip's profile.
    Profile,
}

impl Receipt {
    /// Adds the energy of a device.
    pub(crate) fn used(&mut self, energy: Energy) {
        let (before, is_first) = (self.energy_uj.unwrap_or(0), self.energy_uj.is_none());
        self.energy_uj = Some(before.saturating_add((energy.joules * 1e6).round() as u64));
        let source = match energy.source {
            energy::EnergySource::Rapl => Some(EnergySource::Rapl),
            energy::EnergySource::Hwmon => Some(EnergySource::Hwmon),
            energy::EnergySource::Device => Some(EnergySource::Device),
            energy::EnergySource::Profile => Some(EnergySource::Profile),
            _ => None,
        };
        // One name for several sources would be wrong for some of it.
        self.energy_source = source.filter(|source| is_first || self.energy_source == Some(*source));
    }
}

/// Counts of a receipt that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: expected at most {most}, got {got}")]
pub struct Implausible {
    /// The count.
    pub field: &'static str,
    /// The most that it can be.
    pub most: u64,
    /// What it is.
    pub got: u128,
}

/// The most that a count may be: SQLite's integers have a sign.
const MOST: u64 = i64::MAX as u64;

fn at_most(field: &'static str, got: u128, most: u64) -> Result<u64, Implausible> {
    match u64::try_from(got) {
        Ok(n) if n <= most => Ok(n),
        _ => Err(Implausible { field, most, got }),
    }
}

impl Receipt {
    /// Checks that parts are no more than their wholes, and that every count can be stored.
    ///
    /// # Errors
    /// [`Implausible`] names the first count that cannot be.
    pub fn check(&self) -> Result<(), Implausible> {
        for (field, got, most) in [
            ("started_unix_ms", self.started_unix_ms, MOST),
            ("prompt_tokens", self.prompt_tokens, MOST),
            ("cached_tokens", self.cached_tokens, self.prompt_tokens),
            ("completion_tokens", self.completion_tokens, MOST),
            ("drafted_tokens", self.drafted_tokens, MOST),
            ("accepted_tokens", self.accepted_tokens, self.drafted_tokens),
            ("queue_us", self.queue_us, MOST),
            ("prefill_us", self.prefill_us, MOST),
            ("decode_us", self.decode_us, MOST),
            ("kv_byte_seconds", self.kv_byte_seconds, MOST),
            ("read_bytes", self.read_bytes, MOST),
            ("energy_uj", self.energy_uj.unwrap_or(0), MOST),
            ("cost_nano", self.cost_nano, MOST),
        ] {
            at_most(field, got.into(), most)?;
        }
        at_most("parts.tokens", self.parts.iter().map(|part| u128::from(part.tokens)).sum(), MOST)?;
        self.device_us().map(drop)
    }

    /// The time of all devices.
    ///
    /// # Errors
    /// [`Implausible`] if it cannot be stored.
    pub fn device_us(&self) -> Result<u64, Implausible> {
        at_most("parts.device_us", self.parts.iter().map(|part| u128::from(part.device_us)).sum(), MOST)
    }
}

/// What the units of a receipt cost. A price that is absent is zero.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// The currency: `EUR`.
    pub currency: String,
    /// The price of a million tokens of prompts.
    #[serde(default)]
    pub per_million_prompt_tokens: Amount,
    /// The price of a million tokens of prompts that were cached [default: that of other tokens of prompts].
    #[serde(default)]
    pub per_million_cached_tokens: Option<Amount>,
    /// The price of a million tokens that were generated.
    #[serde(default)]
    pub per_million_completion_tokens: Amount,
    /// The price of a second of a device.
    #[serde(default)]
    pub per_device_second: Amount,
    /// The price of a joule.
    #[serde(default)]
    pub per_joule: Amount,
}

/// Millionths in one: all prices are for a million of the receipt's units.
const MILLION: u128 = 1_000_000;

impl Prices {
    /// The cost of a receipt, in billionths of the currency. The sum of all products is exact; it is rounded once, at the end, and half a
    /// billionth is rounded up.
    ///
    /// # Errors
    /// [`Implausible`] as [`Receipt::check`], or if the cost cannot be stored.
    pub fn cost(&self, receipt: &Receipt) -> Result<u64, Implausible> {
        receipt.check()?;
        let cached = self.per_million_cached_tokens.unwrap_or(self.per_million_prompt_tokens);
        let products = [
            (receipt.prompt_tokens - receipt.cached_tokens, self.per_million_prompt_tokens),
            (receipt.cached_tokens, cached),
            (receipt.completion_tokens, self.per_million_completion_tokens),
            (receipt.device_us()?, self.per_device_second),
            (receipt.energy_uj.unwrap_or(0), self.per_joule),
        ];
        // Below 2^63 times 2^64 each, so five of them may not fit.
        let too_much = Implausible { field: "cost_nano", most: MOST, got: u128::MAX };
        let sum = products
            .iter()
            .map(|(count, price)| u128::from(*count) * u128::from(price.nano))
            .try_fold(MILLION / 2, u128::checked_add)
            .ok_or(too_much)?;
        at_most("cost_nano", sum / MILLION, MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(text: &str) -> Amount {
        text.parse().unwrap()
    }

    #[test]
    fn a_cost_is_the_exact_sum_rounded_once() {
        let prices: Prices = serde_json::from_str(
            r#"{"currency": "EUR", "per_million_prompt_tokens": 0.15, "per_million_cached_tokens": "0.075",
                "per_million_completion_tokens": "0.6", "per_device_second": "0.0001", "per_joule": "0.00000007"}"#,
        )
        .unwrap();
        let receipt = Receipt {
            prompt_tokens: 1000,
            cached_tokens: 200,
            completion_tokens: 50,
            parts: vec![
                Part { replica: "a".into(), tokens: 20, device_us: 1_500_000 },
                Part { replica: "b".into(), tokens: 30, device_us: 500_000 },
            ],
            energy_uj: Some(12_000_000),
            ..Receipt::default()
        };
        // 120,000 + 15,000 + 30,000 + 200,000 + 840.
        assert_eq!(prices.cost(&receipt), Ok(365_840));
    }

    #[test]
    fn energy_of_several_devices_is_a_sum_whose_source_is_known_if_it_is_one() {
        let mut receipt = Receipt::default();
        receipt.used(Energy::new(0.5, energy::EnergySource::Profile));
        receipt.used(Energy::new(0.25, energy::EnergySource::Profile));
        assert_eq!((receipt.energy_uj, receipt.energy_source), (Some(750_000), Some(EnergySource::Profile)));
        for _ in 0..2 {
            receipt.used(Energy::new(0.125, energy::EnergySource::Rapl));
            assert_eq!(receipt.energy_source, None);
        }
        assert_eq!(receipt.energy_uj, Some(1_000_000));
    }

    #[test]
    fn half_a_billionth_is_rounded_up() {
        // One token at 0.0005 per million costs half a billionth.
        let prices = Prices { per_million_prompt_tokens: amount("0.0005"), ..Prices::default() };
        let cost = |prompt_tokens| prices.cost(&Receipt { prompt_tokens, ..Receipt::default() }).unwrap();
        assert_eq!((cost(0), cost(1), cost(2), cost(3)), (0, 1, 1, 2));
        let prices = Prices { per_million_prompt_tokens: amount("0.000499999"), ..Prices::default() };
        assert_eq!(prices.cost(&Receipt { prompt_tokens: 1, ..Receipt::default() }), Ok(0));
        // Cached tokens cost as much as others unless they have a price.
        assert_eq!(prices.per_million_cached_tokens, None);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let field = |receipt: Receipt| receipt.check().unwrap_err().field;
        assert_eq!(field(Receipt { cached_tokens: 1, ..Receipt::default() }), "cached_tokens");
        assert_eq!(
            field(Receipt { accepted_tokens: 3, drafted_tokens: 2, ..Receipt::default() }),
            "accepted_tokens"
        );
        assert_eq!(field(Receipt { queue_us: u64::MAX, ..Receipt::default() }), "queue_us");
        let part = Part { device_us: u64::MAX, ..Part::default() };
        assert_eq!(
            field(Receipt { parts: vec![part.clone(), part], ..Receipt::default() }),
            "parts.device_us"
        );
        let dear = Prices {
            per_million_prompt_tokens: Amount { nano: u64::MAX },
            per_million_completion_tokens: Amount { nano: u64::MAX },
            per_device_second: Amount { nano: u64::MAX },
            ..Prices::default()
        };
        let much = Receipt {
            prompt_tokens: i64::MAX as u64,
            completion_tokens: i64::MAX as u64,
            parts: vec![Part { device_us: i64::MAX as u64, ..Part::default() }],
            ..Receipt::default()
        };
        assert_eq!(dear.cost(&much).unwrap_err().field, "cost_nano");
        assert_eq!(
            dear.cost(&Receipt { prompt_tokens: 1 << 40, ..Receipt::default() }).unwrap_err().field,
            "cost_nano"
        );
    }
}
