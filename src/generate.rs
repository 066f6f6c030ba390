//! Text generation: the loop over a session, a tokenizer and a sampler.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::model::TOP_K;
use crate::sampler::{Sampler, SamplerOptions};
use crate::session::{OutputKind, OutputTokens, Run, SequenceId, Session};
use crate::speculate::Drafter;
use crate::tokenizer::{Detokenizer, EncodeOptions, Tokenizer};

/// Options of a generation.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// Maximum number of tokens to generate.
    pub max_tokens: u32,
    /// Options of the sampler.
    pub sampler: SamplerOptions,
    /// Texts that end the generation; the result does not include them.
    pub stop: Vec<String>,
    /// Options of encoding the prompt.
    pub encode: EncodeOptions,
    /// Ignore end-of-text tokens.
    pub ignore_end: bool,
    /// Include control tokens in the text.
    pub special: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_tokens: 128,
            sampler: SamplerOptions::default(),
            stop: Vec::new(),
            encode: EncodeOptions::default(),
            ignore_end: false,
            special: false,
        }
    }
}

crate::setters!(GenerateOptions {
    max_tokens: u32,
    sampler: SamplerOptions,
    stop: Vec<String>,
    encode: EncodeOptions,
    ignore_end: bool,
    special: bool,
});

/// Optional speculative and constrained decoding of a generation.
#[derive(Default)]
#[non_exhaustive]
pub struct Decoding<'a> {
    /// Proposes tokens, which one step verifies. A step takes at most [`Session::outputs`] tokens: the last
    /// chosen token and its draft.
    pub drafter: Option<&'a mut dyn Drafter>,
    /// Constrains the tokens. End-of-text tokens then always end the text.
    pub constraint: Option<&'a mut dyn Constraint>,
}

impl<'a> Decoding<'a> {
    /// Sets `drafter`.
    #[must_use]
    pub fn drafter(mut self, drafter: &'a mut dyn Drafter) -> Self {
        self.drafter = Some(drafter);
        self
    }

    /// Sets `constraint`.
    #[must_use]
    pub fn constraint(mut self, constraint: &'a mut dyn Constraint) -> Self {
        self.constraint = Some(constraint);
        self
    }
}

impl std::fmt::Debug for Decoding<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (drafter, constraint) = (self.drafter.is_some(), self.constraint.is_some());
        f.debug_struct("Decoding").field("drafter", &drafter).field("constraint", &constraint).finish()
    }
}

/// A constraint on generated tokens.
pub trait Constraint {
    /// Returns the tokens allowed next.
    ///
    /// # Errors
    /// [`Error::Constraint`] if they cannot be computed. It ends the generation.
    fn allowed(&mut self) -> Result<Allowed<'_>>;

    /// Advances by an allowed token.
    ///
    /// # Errors
    /// As [`Constraint::allowed`].
    fn accept(&mut self, token: u32) -> Result<()>;
}

/// The tokens allowed next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed<'a> {
    /// Token t is allowed if bit t % 32 of word t / 32 is set.
    pub tokens: &'a [u32],
    /// Whether the text may end here. It ends if no token is allowed.
    pub end: bool,
}

impl Allowed<'_> {
    /// Whether a token is allowed.
    pub fn token(&self, token: u32) -> bool {
        self.tokens.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The model ended the text.
    End,
    /// The maximum number of tokens was reached.
    Length,
    /// A stop text appeared.
    Stop,
    /// The context is full.
    ContextFull,
    /// The callback returned `Break`.
    Callback,
    /// The session was cancelled.
    Cancelled,
}

impl Finish {
    /// Name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Finish::End => "end",
            Finish::Length => "length",
            Finish::Stop => "stop",
            Finish::ContextFull => "context_full",
            Finish::Callback => "callback",
            Finish::Cancelled => "cancelled",
        }
    }
}

/// The result of a generation, with its times.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generation {
    /// The text after the prompt.
    pub text: String,
    /// The prompt's tokens.
    pub prompt_tokens: Vec<u32>,
    /// Prompt tokens that the sequence already had.
    pub reused_tokens: u32,
    /// Prompt tokens that ran: all others, unless the session was cancelled.
    pub prefill_tokens: u32,
    /// The generated tokens, without the end-of-text token.
    pub tokens: Vec<u32>,
    /// Why the generation ended.
    pub finish: Finish,
    /// Time from the first prompt token to the first logits.
    pub prefill: Duration,
    /// Time from the call to the first token.
    pub first_token: Duration,
    /// Tokens chosen after the first one, the end-of-text token included.
    pub decode_tokens: u32,
    /// Steps after the prefill: one per token, or fewer with a drafter.
    pub decode_steps: u32,
    /// Drafted tokens, and accepted ones.
    pub drafted: (u32, u32),
    /// Time of the decode steps, sampling included.
    pub decode: Duration,
    /// Time of the prefill and of the decode steps on the device, by its clock.
    pub device: (Duration, Duration),
}

impl Session {
    /// Runs tokens of a sequence in steps of at most [`Session::batch`] tokens, and computes the last token's
    /// output.
    ///
    /// # Errors
    /// [`Error::ContextFull`] before the first step, if not all tokens fit. As [`Session::step`]; steps
    /// before the failed one stay in the sequence.
    pub fn prefill(&mut self, sequence: SequenceId, tokens: &[u32], kind: OutputKind) -> Result<()> {
        let need = u64::from(self.len(sequence)?) + tokens.len() as u64;
        if need > self.positions().into() {
            return Err(Error::ContextFull { need, have: self.positions().into() });
        }
        let batch = self.batch() as usize;
        let chunks = tokens.len().div_ceil(batch);
        for (i, tokens) in tokens.chunks(batch).enumerate() {
            let outputs = if i + 1 == chunks { OutputTokens::Last } else { OutputTokens::None };
            self.step(&[Run::new(sequence, tokens).outputs(outputs)], kind)?;
        }
        Ok(())
    }

    /// Generates text in a new sequence; see [`Session::generate_in`].
    ///
    /// # Errors
    /// As [`Session::generate_in`].
    pub fn generate(
        &mut self,
        tokenizer: &Tokenizer,
        prompt: &str,
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let sequence = self.add_sequence();
        let prompt = tokenizer.encode(prompt, options.encode);
        let result = self.generate_in(sequence, tokenizer, &prompt, options, Decoding::default(), on_text);
        self.remove(sequence)?;
        result
    }

    /// Sets a sequence to a prompt and generates text after it. Keeps the common prefix of the sequence and
    /// the prompt, and computes only the rest. `on_text` receives the text as it appears, in whole
    /// characters, and may end the generation.
    ///
    /// # Errors
    /// As [`Session::step`]; [`Error::Argument`] for an empty prompt or options out of range. A cancelled
    /// session or a full context is not an error: it ends the generation, which returns the text so far.
    pub fn generate_in(
        &mut self,
        sequence: SequenceId,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        options: &GenerateOptions,
        decoding: Decoding<'_>,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        self.continue_in(sequence, tokenizer, prompt, options, decoding, &mut on_text)
    }

    fn continue_in(
        &mut self,
        sequence: SequenceId,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        options: &GenerateOptions,
        mut decoding: Decoding<'_>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let start = Instant::now();
        let Some((_, all_but_last)) = prompt.split_last() else {
            return Err(Error::argument("prompt", "text of at least one token", "none"));
        };
        // The last token always runs, for its output.
        let reused = self.reuse(sequence, all_but_last)?;
        let vocab = self.model().hparams().vocab_size as usize;
        let mut sampler = Sampler::new(options.sampler.clone(), vocab)?;
        prompt.iter().for_each(|&t| sampler.accept(t));
        let kind = match options.sampler.needed() {
            _ if decoding.constraint.is_some() => OutputKind::Logits,
            Some(1) => OutputKind::ArgMax,
            Some(k) if k <= TOP_K as usize => OutputKind::TopK,
            _ => OutputKind::Logits,
        };
        let mut out = Output::new(options, tokenizer);
        let mut generation = Generation {
            text: String::new(),
            prompt_tokens: prompt.to_vec(),
            reused_tokens: reused as u32,
            prefill_tokens: 0,
            tokens: reserved(options.max_tokens.min(self.positions()).into(), "the generated tokens")?,
            finish: Finish::Length,
            prefill: Duration::ZERO,
            first_token: Duration::ZERO,
            decode_tokens: 0,
            decode_steps: 0,
            drafted: (0, 0),
            decode: Duration::ZERO,
            device: (Duration::ZERO, Duration::ZERO),
        };
        let before = self.device_time();
        let mut result = self.prefill(sequence, &prompt[reused..], kind);
        generation.prefill_tokens = self.len(sequence)? - reused as u32;
        generation.prefill = start.elapsed();
        generation.device.0 = self.device_time() - before;
        let mut decode_start = Instant::now();
        // The last token, and the draft after it.
        let mut fed: Vec<u32> = Vec::new();
        let mut text = prompt.to_vec();
        loop {
            match result {
                Ok(()) => {}
                Err(Error::Cancelled) => {
                    generation.finish = Finish::Cancelled;
                    break;
                }
                Err(Error::ContextFull { .. }) if !generation.tokens.is_empty() => {
                    generation.finish = Finish::ContextFull;
                    break;
                }
                Err(error) => return Err(error),
            }
            // Without tokens to generate, report the prompt's errors all the same.
            if generation.tokens.len() >= options.max_tokens as usize {
                break;
            }
            generation.decode_steps += u32::from(!fed.is_empty());
            let drafted = fed.get(1..).unwrap_or_default();
            let mut right = 0;
            let ended = loop {
                let token = match &mut decoding.constraint {
                    None => Some(self.choose(right, kind, &mut sampler)?),
                    Some(constraint) => self.choose_allowed(right, tokenizer, &mut sampler, *constraint)?,
                };
                if generation.tokens.is_empty() {
                    generation.first_token = start.elapsed();
                    decode_start = Instant::now();
                } else {
                    generation.decode_tokens += 1;
                }
                let goes_on = |id: &u32| {
                    !tokenizer.is_end(*id) || (options.ignore_end && decoding.constraint.is_none())
                };
                let Some(token) = token.filter(goes_on) else { break Some(Finish::End) };
                sampler.accept(token);
                if let Some(constraint) = &mut decoding.constraint {
                    constraint.accept(token)?;
                }
                generation.tokens.push(token);
                text.push(token);
                let is_right = drafted.get(right) == Some(&token);
                right += usize::from(is_right);
                let full = generation.tokens.len() == options.max_tokens as usize;
                let ended = out.push(token, on_text).or(full.then_some(Finish::Length));
                if ended.is_some() || !is_right {
                    break ended;
                }
            };
            generation.drafted.0 += drafted.len() as u32;
            generation.drafted.1 += right as u32;
            let wrong = (drafted.len() - right) as u32;
            self.truncate(sequence, self.len(sequence)? - wrong)?;
            if let Some(finish) = ended {
                generation.finish = finish;
                break;
            }
            fed.clear();
            fed.extend(text.last());
            if let Some(drafter) = &mut decoding.drafter {
                let left = options.max_tokens as usize - generation.tokens.len();
                let max_draft = self.max_run(sequence)?.min(left).saturating_sub(1);
                match drafter.draft(&text, max_draft, &mut fed) {
                    // A cancelled drafter is no error: the step after it notices the cancellation.
                    Err(Error::Cancelled) => {}
                    drafted => drafted?,
                }
                fed.truncate(max_draft + 1);
            }
            let outputs = if fed.len() > 1 { OutputTokens::All } else { OutputTokens::Last };
            result = self.step(&[Run::new(sequence, &fed).outputs(outputs)], kind);
        }
        generation.decode = decode_start.elapsed();
        generation.device.1 = self.device_time() - before - generation.device.0;
        if !matches!(generation.finish, Finish::Stop | Finish::Callback) {
            out.finish(on_text);
        }
        generation.text = out.text;
        Ok(generation)
    }
}

impl Session {
    /// Returns the maximum tokens that one step may add to a sequence with all their outputs.
    fn max_run(&self, sequence: SequenceId) -> Result<usize> {
        let left = self.positions() - self.len(sequence)?;
        Ok(self.outputs().min(self.batch()).min(left) as usize)
    }

    /// Chooses a token from one of the last step's outputs.
    fn choose(&self, output: usize, kind: OutputKind, sampler: &mut Sampler) -> Result<u32> {
        let vocab = self.model().hparams().vocab_size as usize;
        match kind {
            OutputKind::ArgMax => Ok(self.arg_max().get(output).copied().unwrap_or(0)),
            OutputKind::TopK => {
                let (ids, logits) = self.top_k();
                let k = vocab.min(TOP_K as usize);
                let row = output * k..(output + 1) * k;
                sampler.sample_of(&ids[row.clone()], &logits[row])
            }
            OutputKind::Logits => sampler.sample(&self.logits()[output * vocab..][..vocab]),
        }
    }

    /// Chooses an allowed token from one of the last step's outputs; `None` if the text is complete.
    fn choose_allowed(
        &self,
        output: usize,
        tokenizer: &Tokenizer,
        sampler: &mut Sampler,
        constraint: &mut dyn Constraint,
    ) -> Result<Option<u32>> {
        let vocab = self.model().hparams().vocab_size as usize;
        let logits = &self.logits()[output * vocab..][..vocab];
        let allowed = constraint.allowed()?;
        let may = |token: u32| if tokenizer.is_end(token) { allowed.end } else { allowed.token(token) };
        if (0..vocab as u32).all(|token| tokenizer.is_end(token) || !allowed.token(token)) {
            let stuck = || Error::Constraint("no token is allowed next".into());
            return if allowed.end { Ok(None) } else { Err(stuck()) };
        }
        sampler.sample_among(logits, may).map(Some)
    }
}

/// Buffers text until its characters are complete and cannot be the start of a stop text.
struct Output<'a> {
    tokenizer: &'a Tokenizer,
    detokenizer: Detokenizer,
    stop: &'a [String],
    special: bool,
    text: String,
    /// Bytes of the text that were passed on.
    given: usize,
}

impl<'a> Output<'a> {
    fn new(options: &'a GenerateOptions, tokenizer: &'a Tokenizer) -> Self {
        Output {
            tokenizer,
            detokenizer: Detokenizer::default(),
            stop: &options.stop,
            special: options.special,
            text: String::with_capacity(4096),
            given: 0,
        }
    }

    fn push(&mut self, token: u32, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) -> Option<Finish> {
        self.detokenizer.push(self.tokenizer, token, self.special, &mut self.text);
        let fresh = &self.text[self.given..];
        let stop = self.stop.iter().filter(|s| !s.is_empty()).filter_map(|s| fresh.find(s.as_str())).min();
        if let Some(at) = stop {
            self.text.truncate(self.given + at);
            let _ = self.give(0, on_text);
            return Some(Finish::Stop);
        }
        let held = self.stop.iter().map(|stop| held_back(fresh, stop)).max().unwrap_or(0);
        self.give(held, on_text).is_break().then_some(Finish::Callback)
    }

    fn give(&mut self, held: usize, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) -> ControlFlow<()> {
        let end = self.text.len() - held;
        let ready = &self.text[self.given..end];
        self.given = end;
        if ready.is_empty() { ControlFlow::Continue(()) } else { on_text(ready) }
    }

    fn finish(&mut self, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) {
        self.detokenizer.finish(&mut self.text);
        let _ = self.give(0, on_text);
    }
}

/// Returns the number of bytes at the end of `text` that may be the start of `stop`.
fn held_back(text: &str, stop: &str) -> usize {
    let max = stop.len().saturating_sub(1).min(text.len());
    (1..=max).rev().find(|&n| text.as_bytes()[text.len() - n..] == stop.as_bytes()[..n]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::held_back;

    #[test]
    fn the_start_of_a_stop_text_is_held_back() {
        assert_eq!(held_back("abc##", "###"), 2);
        assert_eq!(held_back("abc", "###"), 0);
        assert_eq!(held_back("#", "###"), 1);
        assert_eq!(held_back("", "###"), 0);
        // A whole stop text is found, not held.
        assert_eq!(held_back("\n\n", "\n\n"), 1);
    }
}
