//! From logits to a token: penalties, then top-k, top-p, min-p, temperature and a draw.

use halite_kernels::isa::Scalar;
use halite_kernels::math;

use crate::error::{Error, Result};
use crate::rng::SplitMix64;

/// How tokens are chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens until their probabilities reach this sum; 1 keeps all (Holtzman et al. 2019).
    pub top_p: f32,
    /// Keeps tokens at least this likely relative to the most likely one; 0 keeps all (Nguyen et al. 2024).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 does nothing (Keskar et al. 2019).
    pub repeat_penalty: f32,
    /// Taken off a recent token's logit for each time that it occurred.
    pub frequency_penalty: f32,
    /// Taken off a recent token's logit once.
    pub presence_penalty: f32,
    /// How many tokens are recent.
    pub penalty_window: usize,
    /// The seed of the draws.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 64,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    fn check(&self) -> Result<()> {
        let in_range = |what, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::argument(what, format!("{low} to {high}"), value))
        };
        in_range("temperature", self.temperature, 0.0, 100.0)?;
        in_range("top_p", self.top_p, 0.0, 1.0)?;
        in_range("min_p", self.min_p, 0.0, 1.0)?;
        in_range("repeat_penalty", self.repeat_penalty, 0.01, 100.0)?;
        in_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        in_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
    }

    fn penalises(&self) -> bool {
        self.penalty_window > 0
            && (self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0)
    }

    /// Whether the most likely token is always taken, so that a backend may find it and logits need not be read.
    pub fn is_arg_max(&self) -> bool {
        self.temperature == 0.0 && !self.penalises()
    }
}

/// Chooses tokens. All memory is reserved when it is made.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    rng: SplitMix64,
    /// Token and logit (later: probability) of the candidates.
    candidates: Vec<(u32, f32)>,
    /// A ring of the last tokens.
    recent: Vec<u32>,
    next: usize,
}

impl Sampler {
    /// A sampler for a vocabulary of this size.
    ///
    /// # Errors
    /// [`Error::Argument`] for options out of range.
    pub fn new(options: SamplerOptions, vocab_size: usize) -> Result<Sampler> {
        options.check()?;
        Ok(Sampler {
            rng: SplitMix64::new(options.seed),
            candidates: Vec::with_capacity(vocab_size),
            recent: Vec::with_capacity(options.penalty_window.min(1 << 20)),
            next: 0,
            options,
        })
    }

    /// The options.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Counts a token as recent. Call it for the prompt's tokens and for each one chosen.
    pub fn accept(&mut self, token: u32) {
        let window = self.options.penalty_window.min(self.recent.capacity());
        if self.recent.len() < window {
            self.recent.push(token);
        } else if let Some(place) = self.recent.get_mut(self.next) {
            *place = token;
            self.next = (self.next + 1) % window;
        }
    }

    /// Chooses a token.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are no logits or one of them is NaN.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.is_empty() || logits.iter().any(|l| l.is_nan()) {
            return Err(Error::argument("logits", "numbers", if logits.is_empty() { "none" } else { "NaN" }));
        }
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(i, &l)| (i as u32, l)));
        if self.options.penalises() {
            self.penalise();
        }
        if self.options.temperature == 0.0 {
            let best =
                self.candidates.iter().fold((0, f32::NEG_INFINITY), |b, &c| if c.1 > b.1 { c } else { b });
            return Ok(best.0);
        }
        self.keep_top_k();
        self.probabilities(1.0);
        self.keep_top_p();
        self.keep_min_p();
        // The temperature applies to what the filters left, as in llama.cpp's default order.
        for c in &mut self.candidates {
            c.1 = logits[c.0 as usize];
        }
        if self.options.penalises() {
            self.penalise();
        }
        self.probabilities(self.options.temperature);
        let total: f32 = self.candidates.iter().map(|c| c.1).sum();
        let mut left = self.rng.unit() * total;
        for &(token, p) in &self.candidates {
            left -= p;
            if left < 0.0 {
                return Ok(token);
            }
        }
        Ok(self.candidates.last().map_or(0, |c| c.0))
    }

    fn penalise(&mut self) {
        let o = &self.options;
        for (token, logit) in &mut self.candidates {
            let count = self.recent.iter().filter(|t| *t == token).count();
            if count > 0 {
                *logit = if *logit > 0.0 { *logit / o.repeat_penalty } else { *logit * o.repeat_penalty };
                *logit -= count as f32 * o.frequency_penalty + o.presence_penalty;
            }
        }
    }

    /// Leaves the most likely candidates, most likely first.
    fn keep_top_k(&mut self) {
        // Falling logit, then rising id: a total order, so that the choice is reproducible.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, order);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(order);
    }

    /// Turns the candidates' logits into probabilities.
    fn probabilities(&mut self, temperature: f32) {
        let max = self.candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.1));
        let mut sum = 0.0;
        for c in &mut self.candidates {
            c.1 = math::exp(Scalar, [(c.1 - max) / temperature; 16])[0];
            sum += c.1;
        }
        for c in &mut self.candidates {
            c.1 /= sum;
        }
    }

    fn keep_top_p(&mut self) {
        let mut sum = 0.0;
        let top_p = self.options.top_p;
        let enough = self.candidates.iter().position(|c| {
            sum += c.1;
            sum >= top_p
        });
        if let Some(last) = enough {
            self.candidates.truncate(last + 1);
        }
    }

    fn keep_min_p(&mut self) {
        let least = self.candidates.first().map_or(0.0, |c| c.1) * self.options.min_p;
        self.candidates.retain(|c| c.1 >= least);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(options: SamplerOptions) -> Sampler {
        Sampler::new(options, 8).unwrap()
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(sampler(SamplerOptions::default()).sample(&[0.0, 3.0, 3.0, 1.0]).unwrap(), 1);
    }

    #[test]
    fn a_seed_repeats_and_seeds_differ() {
        let draw = |seed| {
            let mut s = sampler(SamplerOptions { temperature: 1.0, seed, min_p: 0.0, ..Default::default() });
            (0..32).map(|_| s.sample(&[1.0, 1.1, 0.9, 1.0]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let mut s =
            sampler(SamplerOptions { temperature: 1.0, min_p: 0.0, top_p: 1.0, ..Default::default() });
        let n = 20_000;
        let logits = [3f32.ln(), 0.0];
        let hits = (0..n).filter(|_| s.sample(&logits).unwrap() == 0).count();
        assert!((hits as f32 / n as f32 - 0.75).abs() < 0.02, "{hits}");
    }

    #[test]
    fn filters_cut_the_tail() {
        let hot =
            SamplerOptions { temperature: 50.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
        let seen = |options: SamplerOptions| {
            let mut s = sampler(options);
            let mut seen: Vec<u32> = (0..500).map(|_| s.sample(&[4.0, 3.9, 1.0, 0.9]).unwrap()).collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(seen(hot.clone()), [0, 1, 2, 3]);
        assert_eq!(seen(SamplerOptions { top_k: 2, ..hot.clone() }), [0, 1]);
        assert_eq!(seen(SamplerOptions { top_p: 0.8, ..hot.clone() }), [0, 1]);
        assert_eq!(seen(SamplerOptions { min_p: 0.5, ..hot }), [0, 1]);
    }

    #[test]
    fn penalties_push_recent_tokens_down() {
        let logits = [2.0, 1.9];
        let mut s = sampler(SamplerOptions { repeat_penalty: 1.5, ..Default::default() });
        assert_eq!(s.sample(&logits).unwrap(), 0);
        s.accept(0);
        assert_eq!(s.sample(&logits).unwrap(), 1);
        let mut s =
            sampler(SamplerOptions { frequency_penalty: 0.06, penalty_window: 2, ..Default::default() });
        s.accept(0);
        assert_eq!(s.sample(&logits).unwrap(), 0);
        s.accept(0);
        assert_eq!(s.sample(&logits).unwrap(), 1);
        // Only the last two tokens count.
        s.accept(1);
        s.accept(1);
        assert_eq!(s.sample(&logits).unwrap(), 0);
    }

    #[test]
    fn bad_options_and_logits_are_errors() {
        for bad in [
            SamplerOptions { temperature: -1.0, ..Default::default() },
            SamplerOptions { temperature: f32::NAN, ..Default::default() },
            SamplerOptions { top_p: 1.5, ..Default::default() },
            SamplerOptions { min_p: -0.1, ..Default::default() },
            SamplerOptions { repeat_penalty: 0.0, ..Default::default() },
        ] {
            assert!(matches!(Sampler::new(bad, 4), Err(Error::Argument { .. })));
        }
        assert!(sampler(SamplerOptions::default()).sample(&[]).is_err());
        assert!(sampler(SamplerOptions::default()).sample(&[f32::NAN, 1.0]).is_err());
    }
}
