//! Sampling a token from logits: penalties, then top-k, top-p, min-p, temperature and a random draw.

use halite_kernels::float::DefaultFloats;
use halite_kernels::isa::Cpu as Isa;
use halite_kernels::rows::Exp;

use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::rng::SplitMix64;

/// Maximum number of recent tokens.
pub const MAX_PENALTY_WINDOW: usize = 1 << 20;

/// Options of the sampler. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SamplerOptions {
    /// Temperature, which divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probabilities sum to this; 1 keeps all (Holtzman et
    /// al. 2019).
    pub top_p: f32,
    /// Drops tokens less likely than this times the most likely one; 0 keeps all (Nguyen et al. 2024).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1: off (Keskar et al. 2019).
    pub repeat_penalty: f32,
    /// Subtracted from a token's logit for each recent occurrence.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of every recent token.
    pub presence_penalty: f32,
    /// Number of tokens that the penalties look back, at most [`MAX_PENALTY_WINDOW`].
    pub penalty_window: usize,
    /// Numbers added to the logits of tokens, before the penalties. A token may have one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random draws.
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
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

crate::setters!(SamplerOptions {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repeat_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    penalty_window: usize,
    logit_bias: Vec<(u32, f32)>,
    seed: u64,
});

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
        in_range("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        self.logit_bias.iter().try_for_each(|&(_, bias)| in_range("logit_bias", bias, -1000.0, 1000.0))
    }

    fn penalises(&self) -> bool {
        self.penalty_window > 0
            && (self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0)
    }

    /// Returns the number of most likely tokens that a choice depends on, or `None` if it may depend on all.
    /// A backend can compute these tokens, so that the host need not read all logits.
    pub fn needed(&self) -> Option<usize> {
        match (self.penalises() || !self.logit_bias.is_empty(), self.temperature == 0.0, self.top_k) {
            (true, ..) => None,
            (false, true, _) => Some(1),
            (false, false, k) => (k > 0).then_some(k),
        }
    }
}

/// Checks that logits are finite or minus infinity (an impossible token), and that at least one is finite.
/// The error describes the first wrong value.
pub(crate) fn check_logits(logits: impl Iterator<Item = f32> + Clone) -> Result<(), String> {
    // No branches, so that the compiler vectorises the loop.
    let (mut wrong, mut possible) = (false, false);
    for x in logits.clone() {
        wrong |= x.is_nan() | (x == f32::INFINITY);
        possible |= x > f32::NEG_INFINITY;
    }
    if possible && !wrong {
        return Ok(());
    }
    let none = if logits.clone().next().is_none() { "none" } else { "only -inf" };
    let bad = { logits }.find(|x| x.is_nan() || *x == f32::INFINITY);
    Err(bad.map_or(none.into(), |x| x.to_string()))
}

/// A token and its logit after penalties, in one number: candidates sort by decreasing logit, then by increasing token. The total
/// order makes choices reproducible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate(u64);

impl Candidate {
    fn new(token: u32, logit: f32) -> Candidate {
        // The bits of floats ascend with them but for negative ones, which descend.
        let bits = logit.to_bits();
        let ascending = bits ^ ((bits.cast_signed() >> 31).cast_unsigned() | 1 << 31);
        Candidate(u64::from(!ascending) << 32 | u64::from(token))
    }

    fn token(self) -> u32 {
        self.0 as u32
    }

    fn logit(self) -> f32 {
        let descending = (self.0 >> 32) as u32;
        f32::from_bits(!descending ^ ((descending.cast_signed() >> 31).cast_unsigned() | 1 << 31))
    }
}

/// The candidate for a token.
fn find(candidates: &mut [Candidate], token: u32, ordered: bool) -> Option<&mut Candidate> {
    let at = match ordered {
        true => candidates.binary_search_by_key(&token, |c| c.token()).ok(),
        false => candidates.iter().position(|c| c.token() == token),
    };
    candidates.get_mut(at?)
}

/// The sum of some numbers, in lanes.
fn sum(x: &[f32]) -> f64 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut sums = [0f64; 16];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    sums.iter().sum::<f64>() + rest.iter().map(|x| f64::from(*x)).sum::<f64>()
}

/// How likely a chosen token was, by the model's logits alone.
#[derive(Debug, Clone, PartialEq)]
// Exhaustive: a value of its own.
pub struct Logprobs {
    /// The token.
    pub token: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens and theirs, most likely first.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Of a token, with `count` most likely ones.
    pub fn of(logits: &[f32], token: u32, count: usize) -> Logprobs {
        let _floats = DefaultFloats::set();
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
        let mut weights: Vec<f32> = logits.iter().map(|logit| logit - max).collect();
        Isa::detect().run(Exp { x: &mut weights });
        let log_total = max + sum(&weights).ln() as f32;
        let logprob = |token: u32| logits.get(token as usize).map_or(f32::NEG_INFINITY, |x| x - log_total);
        // Decreasing logit, then increasing id, as in sampling.
        let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let mut top: Vec<u32> = (0..logits.len() as u32).collect();
        if count < top.len() {
            top.select_nth_unstable_by(count, order);
            top.truncate(count);
        }
        top.sort_unstable_by(order);
        Logprobs { token, logprob: logprob(token), top: top.into_iter().map(|t| (t, logprob(t))).collect() }
    }
}

/// Chooses tokens. [`Sampler::new`] reserves all memory.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    rng: SplitMix64,
    candidates: Vec<Candidate>,
    /// Of each candidate: proportional to its probability.
    weights: Vec<f32>,
    isa: Isa,
    /// A ring of the last tokens.
    recent: Vec<u32>,
    next: usize,
    /// The same tokens, sorted.
    counted: Vec<u32>,
}

impl Sampler {
    /// Creates a sampler for a vocabulary of `vocab_size` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for options out of range, [`Error::OutOfMemory`].
    pub fn new(options: SamplerOptions, vocab_size: usize) -> Result<Sampler> {
        options.check()?;
        let window = options.penalty_window.min(MAX_PENALTY_WINDOW) as u64;
        Ok(Sampler {
            rng: SplitMix64::new(options.seed),
            candidates: reserved(vocab_size as u64, "the sampler")?,
            weights: reserved(vocab_size as u64, "the sampler")?,
            isa: Isa::detect(),
            recent: reserved(window, "the sampler")?,
            counted: reserved(window, "the sampler")?,
            next: 0,
            options,
        })
    }

    /// The options.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Adds a token to the recent ones. Call it for the prompt's tokens and for each chosen token.
    pub fn accept(&mut self, token: u32) {
        let window = self.options.penalty_window.min(self.recent.capacity());
        if self.recent.len() < window {
            self.recent.push(token);
        } else if let Some(place) = self.recent.get_mut(self.next) {
            *place = token;
            self.next = (self.next + 1) % window;
        }
    }

    /// Adds a token that was chosen elsewhere, as if this sampler had chosen it: the next draw is the one that would come after it.
    pub fn replay(&mut self, token: u32) {
        if self.options.temperature != 0.0 {
            self.rng.next();
        }
        self.accept(token);
    }

    /// Chooses a token.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if there are no logits, or one of them is NaN or positive infinity.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        self.take(logits.iter().enumerate().map(|(i, &logit)| (i as u32, logit)), true)
    }

    /// Chooses an allowed token.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn sample_among(&mut self, logits: &[f32], allowed: impl Fn(u32) -> bool) -> Result<u32> {
        let candidates = logits.iter().enumerate().map(|(i, &logit)| (i as u32, logit));
        self.take(candidates.filter(|&(token, _)| allowed(token)), true)
    }

    /// Chooses a token from the logits of the most likely tokens, at least [`SamplerOptions::needed`] of
    /// them. The result is the same as that of [`Sampler::sample`] with all logits.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn sample_of(&mut self, tokens: &[u32], logits: &[f32]) -> Result<u32> {
        self.take(tokens.iter().copied().zip(logits.iter().copied()), false)
    }

    /// Chooses a token from tokens and logits, `ordered` by token or not.
    fn take(&mut self, logits: impl Iterator<Item = (u32, f32)>, ordered: bool) -> Result<u32> {
        let _floats = DefaultFloats::set();
        self.candidates.clear();
        self.candidates.extend(logits.map(|(token, logit)| Candidate::new(token, logit)));
        check_logits(self.candidates.iter().map(|c| c.logit()))
            .map_err(|got| Error::NotFinite { what: "logits", got })?;
        self.add_bias(ordered);
        if self.options.penalises() {
            self.penalise(ordered);
        }
        let temperature = self.options.temperature;
        if temperature == 0.0 {
            let better = |b: Candidate, c: Candidate| if c.logit() > b.logit() { c } else { b };
            return Ok(self.candidates.iter().copied().reduce(better).map_or(0, Candidate::token));
        }
        self.keep_top_k();
        if self.options.top_p < 1.0 || self.options.min_p > 0.0 {
            self.weigh(1.0);
            self.keep_top_p_and_min_p();
        }
        // The temperature applies after the filters, as in llama.cpp's default order.
        self.weigh(temperature);
        Ok(self.draw())
    }

    fn add_bias(&mut self, ordered: bool) {
        for &(token, bias) in &self.options.logit_bias {
            if let Some(c) = find(&mut self.candidates, token, ordered) {
                *c = Candidate::new(token, c.logit() + bias);
            }
        }
    }

    /// Applies the penalties, in time proportional to the number of recent tokens.
    fn penalise(&mut self, ordered: bool) {
        let o = &self.options;
        self.counted.clear();
        self.counted.extend_from_slice(&self.recent);
        self.counted.sort_unstable();
        for same in self.counted.chunk_by(|a, b| a == b) {
            let Some(c) = find(&mut self.candidates, same[0], ordered) else { continue };
            let logit = c.logit();
            let logit = if logit > 0.0 { logit / o.repeat_penalty } else { logit * o.repeat_penalty };
            let less = same.len() as f32 * o.frequency_penalty + o.presence_penalty;
            *c = Candidate::new(same[0], logit - less);
        }
    }

    /// Keeps the `top_k` most likely candidates, most likely first; without a `top_k`, all as they are.
    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if k == 0 {
            return;
        }
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable(k - 1);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable();
    }

    /// Weighs all candidates; the most likely one has the weight 1.
    fn weigh(&mut self, temperature: f32) {
        let max = self.candidates.iter().fold(f32::NEG_INFINITY, |max, c| max.max(c.logit()));
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|c| (c.logit() - max) / temperature));
        self.isa.run(Exp { x: &mut self.weights });
    }

    /// Applies both filters to weighed candidates.
    fn keep_top_p_and_min_p(&mut self) {
        let total = sum(&self.weights);
        let enough = total * f64::from(self.options.top_p);
        // All candidates below an equal share of what `top_p` leaves out are together less than that, so it leaves out these. Few
        // are left to sort.
        let least = ((total - enough) / self.weights.len() as f64) as f32;
        let least = least.next_down().max(self.options.min_p);
        let mut kept = 0;
        for i in 0..self.weights.len() {
            if self.weights[i] >= least {
                self.candidates[kept] = self.candidates[i];
                kept += 1;
            }
        }
        self.candidates.truncate(kept);
        if self.options.top_p < 1.0 {
            self.candidates.sort_unstable();
            self.weigh(1.0);
            let mut so_far = 0.0;
            let last = self.weights.iter().position(|weight| {
                so_far += f64::from(*weight);
                so_far >= enough
            });
            self.candidates.truncate(last.map_or(kept, |last| last + 1));
        }
    }

    /// Draws one of the weighed candidates.
    fn draw(&mut self) -> u32 {
        // Sums of runs are found in lanes; only the run with the chosen candidate is added up one by one.
        const RUN: usize = 512;
        let total: f64 = self.weights.chunks(RUN).map(sum).sum();
        let mut left = f64::from(self.rng.unit()) * total;
        for (candidates, weights) in self.candidates.chunks(RUN).zip(self.weights.chunks(RUN)) {
            let here = sum(weights);
            if left >= here {
                left -= here;
                continue;
            }
            for (candidate, weight) in candidates.iter().zip(weights) {
                left -= f64::from(*weight);
                if left < 0.0 {
                    return candidate.token();
                }
            }
        }
        // Where rounding leaves something over: the last one that is possible.
        let possible = self.candidates.iter().zip(&self.weights).rfind(|(_, weight)| **weight > 0.0);
        possible.map_or(0, |(candidate, _)| candidate.token())
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
    fn a_bias_changes_the_choice() {
        let mut s = sampler(SamplerOptions::default().logit_bias(vec![(1, -9.0), (3, 2.5), (99, 5.0)]));
        assert_eq!(s.sample(&[0.0, 3.0, 2.0, 1.0]).unwrap(), 3);
        assert_eq!(s.sample_of(&[2, 1], &[2.0, 3.0]).unwrap(), 2);
        assert!(Sampler::new(SamplerOptions::default().logit_bias(vec![(0, f32::NAN)]), 8).is_err());
    }

    #[test]
    fn a_replayed_choice_draws_as_the_choice_did() {
        let options = SamplerOptions { temperature: 1.0, seed: 5, repeat_penalty: 1.3, ..Default::default() };
        let logits = [1.0, 1.1, 0.9, 1.0];
        let mut whole = sampler(options.clone());
        let mut choose = || {
            let token = whole.sample(&logits).unwrap();
            whole.accept(token);
            token
        };
        let tokens: Vec<u32> = (0..32).map(|_| choose()).collect();
        let mut rest = sampler(options);
        tokens[..20].iter().for_each(|&token| rest.replay(token));
        for &want in &tokens[20..] {
            assert_eq!(rest.sample(&logits).unwrap(), want);
            rest.accept(want);
        }
    }

    #[test]
    fn logprobs_are_of_all_tokens() {
        let got = Logprobs::of(&[0.0, 2f32.ln(), f32::NEG_INFINITY, 5f32.ln()], 0, 2);
        assert!((got.logprob - 0.125f32.ln()).abs() < 1e-6, "{got:?}");
        assert_eq!(got.top.iter().map(|top| top.0).collect::<Vec<_>>(), [3, 1]);
        assert!((got.top[0].1 - 0.625f32.ln()).abs() < 1e-6, "{got:?}");
        assert_eq!(Logprobs::of(&[0.5; 40], 7, 100).top.len(), 40);
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

    /// The filters keep what their definitions say, and the choice is one of these; a run of weights has 512.
    #[test]
    fn filters_keep_what_they_should() {
        let mut rng = SplitMix64::new(11);
        let mut kept_some = 0;
        for case in 0..300u64 {
            let n = [3, 40, 2000][case as usize % 3];
            let spread = [1.0, 5.0, 30.0][case as usize / 3 % 3];
            let (top_p, min_p) =
                ([1.0, 0.9, 0.3, 0.0][case as usize % 4], [0.0, 0.02][case as usize / 4 % 2]);
            let top_k = [0, 50][case as usize / 8 % 2];
            let options =
                SamplerOptions { temperature: 0.8, top_k, top_p, min_p, seed: case, ..Default::default() };
            let mut s = Sampler::new(options, n).unwrap();
            let logits: Vec<f32> = (0..n).map(|_| rng.unit() * spread).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            order.truncate(if top_k > 0 { top_k } else { n });
            let weight = |i: usize| f64::from(logits[i] - logits[order[0]]).exp();
            let total: f64 = order.iter().map(|&i| weight(i)).sum();
            let mut before = 0.0;
            // Where rounding decides, both are right.
            let (mut surely, mut maybe) = (Vec::new(), Vec::new());
            for &i in &order {
                let keeps = |off: f64| {
                    (before == 0.0 || before < f64::from(top_p) * total * (1.0 + off))
                        && weight(i) >= f64::from(min_p) * (1.0 - off)
                };
                let (strict, lenient) = (keeps(-1e-5), keeps(1e-5));
                if strict {
                    surely.push(i as u32);
                }
                if lenient {
                    maybe.push(i as u32);
                }
                before += weight(i);
            }
            let chosen = s.sample(&logits).unwrap();
            let kept: Vec<u32> = s.candidates.iter().map(|c| c.token()).collect();
            assert!(surely.iter().all(|token| kept.contains(token)), "case {case}");
            assert!(kept.iter().all(|token| maybe.contains(token)) && kept.contains(&chosen), "case {case}");
            kept_some += usize::from(kept.len() > 1 && kept.len() < n);
        }
        assert!(kept_some > 100, "{kept_some}");
    }

    /// Of many candidates, each run of weights is drawn as often as its weights say.
    #[test]
    fn draws_reach_all_of_a_large_vocabulary() {
        let options =
            SamplerOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
        let mut s = Sampler::new(options, 3000).unwrap();
        // The last tenth is impossible; the rest has two levels.
        let logits: Vec<f32> = (0..3000)
            .map(|i| match i {
                2700.. => f32::NEG_INFINITY,
                _ if i % 2 == 0 => 3f32.ln(),
                _ => 0.0,
            })
            .collect();
        let drawn: Vec<u32> = (0..20_000).map(|_| s.sample(&logits).unwrap()).collect();
        assert!(drawn.iter().all(|&token| token < 2700));
        let share =
            |of: &dyn Fn(u32) -> bool| drawn.iter().filter(|&&token| of(token)).count() as f64 / 20_000.0;
        assert!((share(&|token| token % 2 == 0) - 0.75).abs() < 0.02);
        for third in 0..3 {
            assert!((share(&|token| token / 900 == third) - 1.0 / 3.0).abs() < 0.02);
        }
    }

    #[test]
    fn candidates_hold_any_logit() {
        let logits = [f32::NEG_INFINITY, -1.5, -0.0, 0.0, 1e-40, 2.5, f32::MAX];
        let all: Vec<Candidate> = logits.iter().rev().map(|&logit| Candidate::new(7, logit)).collect();
        assert!(all.is_sorted() && Candidate::new(6, 1.0) < Candidate::new(7, 1.0));
        let back: Vec<u32> = all.iter().rev().map(|c| c.logit().to_bits()).collect();
        assert_eq!(back, logits.map(f32::to_bits));
        assert!(Candidate::new(u32::MAX, f32::NAN).logit().is_nan() && all[0].token() == 7);
    }

    /// What is chosen by the most likely tokens alone is what is chosen by all; NaN is seen there, too.
    #[test]
    fn the_most_likely_are_enough() {
        let mut rng = SplitMix64::new(3);
        for (top_k, seed) in (1..=40).zip(0..) {
            let options = SamplerOptions { temperature: 1.3, top_k, seed, ..Default::default() };
            assert_eq!(options.needed(), Some(top_k));
            let (mut whole, mut part) = (sampler(options.clone()), sampler(options));
            for _ in 0..20 {
                // Few different values: there are ties, also between the zeros.
                let logits: Vec<f32> = (0..500).map(|_| (rng.unit() * 9.0 - 5.0).round()).collect();
                let (mut ids, mut values) = ([0; 64], [0.0; 64]);
                halite_kernels::rows::largest(&logits, &mut ids, &mut values);
                let ids = ids.map(|id| id as u32);
                assert_eq!(whole.sample(&logits).unwrap(), part.sample_of(&ids, &values).unwrap());
            }
        }
        let (mut ids, mut values) = ([0; 2], [0.0; 2]);
        halite_kernels::rows::largest(&[1.0, -f32::NAN, f32::INFINITY], &mut ids, &mut values);
        assert_eq!(ids, [1, 2]);
        assert!(sampler(SamplerOptions::default()).sample_of(&[1, 2], &values).is_err());
        assert_eq!(SamplerOptions { repeat_penalty: 1.1, ..Default::default() }.needed(), None);
        assert_eq!(SamplerOptions { temperature: 1.0, top_k: 0, ..Default::default() }.needed(), None);
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

    /// The same choice by all logits, by those of allowed tokens, and by the most likely ones in their order.
    #[test]
    fn penalties_find_tokens_in_any_order() {
        let mut rng = SplitMix64::new(5);
        let options = SamplerOptions {
            repeat_penalty: 1.3,
            frequency_penalty: 0.1,
            presence_penalty: 0.2,
            penalty_window: 20,
            ..Default::default()
        };
        let mut s = Sampler::new(options, 50).unwrap();
        for _ in 0..200 {
            let logits: Vec<f32> = (0..50).map(|_| rng.unit() * 4.0 - 2.0).collect();
            let (mut ids, mut values) = ([0; 50], [0.0; 50]);
            halite_kernels::rows::largest(&logits, &mut ids, &mut values);
            let want = (0..50u32).map(|token| {
                let n = s.recent.iter().filter(|t| **t == token).count() as f32;
                let x = logits[token as usize];
                let x =
                    if n == 0.0 { x } else { (if x > 0.0 { x / 1.3 } else { x * 1.3 }) - (n * 0.1 + 0.2) };
                (token, x)
            });
            let want = want.reduce(|a, b| if b.1 > a.1 { b } else { a }).unwrap().0;
            assert_eq!(s.sample(&logits).unwrap(), want);
            assert_eq!(s.sample_of(&ids.map(|id| id as u32), &values).unwrap(), want);
            s.accept(want);
        }
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
        let hot = SamplerOptions { temperature: 1.0, ..Default::default() };
        for options in [SamplerOptions::default(), hot] {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let error = sampler(options.clone()).sample(&[1.0, bad, 1.0]).unwrap_err();
                assert!(matches!(error, Error::NotFinite { .. }), "{error}");
            }
            assert!(sampler(options.clone()).sample(&[f32::NEG_INFINITY; 3]).is_err());
            // A token may be impossible.
            assert_eq!(sampler(options).sample(&[f32::NEG_INFINITY, 1.0]).unwrap(), 1);
        }
    }
}
