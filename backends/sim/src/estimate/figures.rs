//! The figures of a workload, and what layouts and designs are compared by.

use std::cmp::Ordering;

use super::system::Layout;

/// What comes of a workload on chips.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Figures {
    /// How the model is divided over chips.
    pub layout: Layout,
    /// Sequences.
    pub batch: u32,
    /// Seconds until every sequence has its first token.
    pub first_token_s: f64,
    /// Seconds of the middle decode step.
    pub step_s: f64,
    /// Total seconds.
    pub seconds: f64,
    /// Price per million generated tokens, prompts included; absent if the profile has no price.
    pub usd_per_million_tokens: Option<f64>,
    /// Bytes that the fullest chip needs.
    pub need_bytes: u64,
    /// Bytes of a chip's memory.
    pub have_bytes: u64,
}

impl Figures {
    /// Whether weights and cache fit the chips.
    pub fn fits(&self) -> bool {
        self.need_bytes <= self.have_bytes
    }
}

/// A figure that layouts and designs are compared by.
#[derive(Debug)]
#[non_exhaustive]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Whether more is better.
    pub is_more_better: bool,
    of: fn(&Figures) -> Option<f64>,
}

impl Default for &'static Metric {
    /// The total time.
    fn default() -> &'static Metric {
        Metric::named("seconds").unwrap_or(&Metric::all()[0])
    }
}

impl Metric {
    /// All of them.
    pub fn all() -> &'static [Metric] {
        const fn metric(
            name: &'static str,
            unit: &'static str,
            is_more_better: bool,
            of: fn(&Figures) -> Option<f64>,
        ) -> Metric {
            Metric { name, unit, is_more_better, of }
        }
        static ALL: [Metric; 7] = [
            metric("tokens_per_s", "tokens/s", true, |f| Some(f64::from(f.batch) / f.step_s)),
            metric("tokens_per_s_per_user", "tokens/s", true, |f| Some(1.0 / f.step_s)),
            metric("first_token_s", "s", false, |f| Some(f.first_token_s)),
            metric("step_s", "s", false, |f| Some(f.step_s)),
            metric("seconds", "s", false, |f| Some(f.seconds)),
            metric("usd_per_million_tokens", "US$", false, |f| f.usd_per_million_tokens),
            metric("need_bytes", "bytes", false, |f| Some(f.need_bytes as f64)),
        ];
        &ALL
    }

    /// Returns the metric of a name.
    pub fn named(name: &str) -> Option<&'static Metric> {
        Metric::all().iter().find(|metric| metric.name == name)
    }

    /// Returns the figure of a point.
    pub fn of(&self, figures: &Figures) -> Option<f64> {
        (self.of)(figures)
    }

    /// Orders figures, the better ones first, and those as good by their time. Without a price, the same chips cost as long as they
    /// take.
    pub(super) fn order(&self, one: &Figures, other: &Figures) -> Ordering {
        let sign = if self.is_more_better { -1.0 } else { 1.0 };
        let cost = |figures: &Figures| self.of(figures).map_or(0.0, |figure| sign * figure);
        cost(one).total_cmp(&cost(other)).then(one.seconds.total_cmp(&other.seconds))
    }
}
