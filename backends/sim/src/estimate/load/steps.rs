//! The time of steps by interpolation, so that millions of them need few closed forms.
//!
//! All ops but attention depend on the number of tokens and of outputs alone. Their time is exact: it is calculated once for each number.
//! The time of attention is calculated at knots, when a step first needs them, and interpolated linearly between them.
//! Times are pairs: seconds of computation, and seconds in which chips exchange.

use halite::error::Result;
use halite::program::Program;

use crate::Joules;
use crate::estimate::system::Layout;
use crate::estimate::workload::System;

/// What the time of a step depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Step {
    /// Sequences that generate text.
    pub texts: u32,
    /// Tokens of these, drafts included.
    pub text_tokens: u32,
    /// Mean number of positions before them.
    pub context: f64,
    /// Prompts that have a part in the step.
    pub prompts: u32,
    /// Tokens of prompts.
    pub prompt_tokens: u32,
    /// Positions before these. Of several prompts, the one number that gives the same number of products of queries and keys.
    pub start: f64,
}

impl Step {
    /// The step of sequences with so many positions before their tokens, as in spans: those of one token generate text.
    pub fn of(spans: &[(u32, u32)]) -> Step {
        let mut step = Step::default();
        let (mut context, mut products) = (0.0, 0.0);
        for &(start, tokens) in spans {
            let (start, count) = (f64::from(start), f64::from(tokens));
            if tokens == 1 {
                step.texts += 1;
                context += start;
            } else {
                step.prompts += 1;
                step.prompt_tokens += tokens;
                products += count * (start + count / 2.0);
            }
        }
        step.text_tokens = step.texts;
        step.context = context / f64::from(step.texts.max(1));
        step.start = Step::start_of(products, step.prompt_tokens);
        step
    }

    /// Returns [`Step::start`] from the products of queries and keys, where a causal mask leaves half of the prompts' own.
    pub(super) fn start_of(products: f64, tokens: u32) -> f64 {
        let tokens = f64::from(tokens.max(1));
        (products / tokens - tokens / 2.0).max(0.0)
    }

    /// Returns one of two parts as equal as possible, the larger one: none if there is nothing to divide.
    fn half(&self) -> Option<Step> {
        let tokens = f64::from(self.prompt_tokens);
        let products = tokens * (self.start + tokens / 2.0);
        let prompt_tokens = self.prompt_tokens.div_ceil(2);
        let half = Step {
            texts: self.texts.div_ceil(2),
            text_tokens: self.text_tokens.div_ceil(2),
            prompts: self.prompts.div_ceil(2),
            prompt_tokens,
            start: Step::start_of(products / 2.0, prompt_tokens),
            ..*self
        };
        (half != *self).then_some(half)
    }
}

/// Adds up times with their shares.
fn add(sum: &mut [f64; 2], share: f64, of: [f64; 2]) {
    sum.iter_mut().zip(of).for_each(|(sum, of)| *sum += share * of);
}

/// Knots of an axis, in ascending order.
struct Axis(Vec<u32>);

impl Axis {
    /// Zero and one, then powers of two with a knot in the middle, up to a limit; and some more.
    fn new(most: u32, more: &[u32]) -> Axis {
        let powers = (0..31).map(|bit| 1u32 << bit);
        let mut knots: Vec<u32> = powers.flat_map(|power| [power, power + power / 2]).collect();
        knots.extend(more.iter().chain(&[0, most]));
        knots.retain(|knot| *knot <= most);
        knots.sort_unstable();
        knots.dedup();
        Axis(knots)
    }

    /// Returns the knot before a number, and how far the number is to the next one.
    fn locate(&self, at: f64) -> (usize, f64) {
        let after = self.0.partition_point(|knot| f64::from(*knot) <= at).min(self.0.len() - 1);
        let before = after.saturating_sub(1);
        let (low, high) = (f64::from(self.0[before]), f64::from(self.0[after]));
        (before, if high > low { ((at - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 })
    }
}

/// The times of a program's steps on a chip.
pub struct Steps<'a> {
    system: System<'a>,
    /// Sequences that generate text, positions before them, tokens of prompts, positions before those.
    axes: [Axis; 4],
    /// Seconds of attention at the knots; absent where they were not yet needed.
    attention_s: Vec<Option<[f64; 2]>>,
    /// Seconds of the other ops, by the tokens of one sequence.
    tokens_s: Vec<Option<[f64; 2]>>,
    /// The same by the number of sequences with a token each.
    outputs_s: Vec<Option<[f64; 2]>>,
}

impl std::fmt::Debug for Steps<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known = self.attention_s.iter().flatten().count();
        f.debug_struct("Steps").field("knots", &self.attention_s.len()).field("known", &known).finish()
    }
}

impl<'a> Steps<'a> {
    /// Steps of up to `texts` sequences that generate text and `tokens` tokens of prompts, of up to `positions` each.
    pub(super) fn new(system: System<'a>, texts: u32, tokens: u32, positions: u32) -> Steps<'a> {
        // The time has a corner where a window is full.
        let windows = system.stages.iter().flat_map(|stage| &stage.program.windows);
        let windows: Vec<u32> = windows.flatten().copied().collect();
        let axes = [
            Axis::new(texts, &[]),
            Axis::new(positions, &windows),
            Axis::new(tokens, &[]),
            Axis::new(positions, &windows),
        ];
        let knots = axes.iter().map(|axis| axis.0.len()).product();
        let (tokens_s, outputs_s) = (Vec::new(), Vec::new());
        Steps { system, axes, attention_s: vec![None; knots], tokens_s, outputs_s }
    }

    /// Returns the seconds of a step. Where exchanges overlap with computation, it is divided in two if that is quicker: then one part
    /// computes while the other one exchanges.
    ///
    /// # Errors
    /// Ops that do not fit the chip, and kernels that were not measured.
    pub fn seconds(&mut self, step: &Step) -> Result<f64> {
        let [computed, exchanged] = self.both(step)?;
        let whole = computed + exchanged;
        let Some(half) = step.half().filter(|_| self.layout().overlap && exchanged > 0.0) else {
            return Ok(whole);
        };
        let [computed, exchanged] = self.both(&half)?;
        // A part takes both one after the other; the two together, the longer one twice.
        Ok(whole.min((computed + exchanged).max(2.0 * computed.max(exchanged))))
    }

    /// Returns the seconds of computation and of exchanges of a step.
    fn both(&mut self, step: &Step) -> Result<[f64; 2]> {
        // Chips with different positions run all generated tokens, and a part of those of prompts.
        let tokens = step.text_tokens + step.prompt_tokens.div_ceil(self.context());
        if tokens == 0 {
            return Ok([0.0; 2]);
        }
        let mut sum = self.tokens(tokens)?;
        let outputs = step.text_tokens + step.prompts;
        // One sequence has one output.
        if outputs > 1 {
            add(&mut sum, 1.0, self.outputs(outputs)?);
            add(&mut sum, -1.0, self.tokens(outputs)?);
        }
        add(&mut sum, 1.0, self.attention(step)?);
        Ok(sum)
    }

    /// Chips that hold different positions of each sequence.
    fn context(&self) -> u32 {
        self.layout().context.max(1)
    }

    /// Seconds without attention of one sequence of so many tokens.
    fn tokens(&mut self, tokens: u32) -> Result<[f64; 2]> {
        let system = &self.system;
        known(&mut self.tokens_s, tokens as usize, || system.part_s(&[(0, tokens)], false))
    }

    /// Seconds without attention of so many sequences with a token each.
    fn outputs(&mut self, count: u32) -> Result<[f64; 2]> {
        let system = &self.system;
        let spans = || vec![(0, 1); count as usize];
        known(&mut self.outputs_s, count as usize, || system.part_s(&spans(), false))
    }

    /// Interpolates between the knots around a step.
    fn attention(&mut self, step: &Step) -> Result<[f64; 2]> {
        let at = [step.texts.into(), step.context, step.prompt_tokens.into(), step.start];
        let mut places = [(0, 0.0); 4];
        for ((place, axis), at) in places.iter_mut().zip(&self.axes).zip(at) {
            *place = axis.locate(at);
        }
        let mut seconds = [0.0; 2];
        for corner in 0..16 {
            let (mut index, mut share, mut knots) = (0, 1.0, [0; 4]);
            for (i, (&(before, fraction), axis)) in places.iter().zip(&self.axes).enumerate() {
                let is_after = corner >> i & 1;
                share *= if is_after == 1 { fraction } else { 1.0 - fraction };
                // The last knot has none behind it, and then no share either.
                let knot = (before + is_after).min(axis.0.len() - 1);
                knots[i] = axis.0[knot];
                index = index * axis.0.len() + knot;
            }
            if share > 0.0 {
                let system = &self.system;
                let [texts, context, tokens, start] = knots;
                let at = known(&mut self.attention_s, index, || {
                    let mut spans = vec![(context, 1); texts as usize];
                    spans.extend((tokens > 0).then_some((start, tokens)));
                    let spans = of_chip(system.layout, &spans);
                    if spans.is_empty() { Ok([0.0; 2]) } else { system.part_s(&spans, true) }
                })?;
                add(&mut seconds, share, at);
            }
        }
        Ok(seconds)
    }

    /// Returns the joules that a step's work takes, without those of idle hardware, if the profile has the numbers.
    pub(super) fn joules(&self, spans: &[(u32, u32)]) -> Result<Option<Joules>> {
        // Chips of a stage work alike.
        let chips = f64::from(self.system.layout.of_stage());
        let spans = of_chip(self.system.layout, spans);
        Ok(self.system.report(&spans)?.0.total().joules.map(|joules| chips * joules))
    }

    /// How the model is divided over chips.
    pub fn layout(&self) -> Layout {
        self.system.layout
    }

    /// What every chip does alike because it cannot be divided.
    pub(super) fn repeated(&self) -> &[String] {
        self.system.stages.first().map_or(&[], |stage| &stage.repeated)
    }

    /// The programs of the stages, fused for the chip.
    pub fn programs(&self) -> impl Iterator<Item = &Program> {
        self.system.stages.iter().map(|stage| &stage.program)
    }

    /// Returns the seconds of a step by the closed form itself, without overlap. Spans have the first position and number of tokens of each sequence.
    ///
    /// # Errors
    /// As [`Steps::seconds`].
    pub fn direct_s(&self, spans: &[(u32, u32)]) -> Result<f64> {
        let spans = of_chip(self.system.layout, spans);
        let both = [self.system.part_s(&spans, false)?, self.system.part_s(&spans, true)?];
        Ok(both.into_iter().flatten().sum())
    }
}

/// The spans of a step on one of the chips that share positions: of a generated token, its part of the positions; of a prompt, its part of
/// the tokens, which see as many positions on average as all.
fn of_chip(layout: Layout, spans: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let context = layout.context.max(1);
    let own = |&(start, tokens): &(u32, u32)| match tokens {
        0 | 1 => (start / context, tokens),
        _ => {
            let own = tokens.div_ceil(context);
            (start + (tokens - own) / 2, own)
        }
    };
    spans.iter().map(own).collect()
}

/// Returns what a table has at an index, calculated when it is first needed.
fn known(
    table: &mut Vec<Option<[f64; 2]>>,
    index: usize,
    calculate: impl FnOnce() -> Result<[f64; 2]>,
) -> Result<[f64; 2]> {
    if index >= table.len() {
        table.resize(index + 1, None);
    }
    if let Some(known) = table[index] {
        return Ok(known);
    }
    let seconds = calculate()?;
    table[index] = Some(seconds);
    Ok(seconds)
}
