//! Text generation: the loop over a session, a tokenizer and a sampler.

use std::ops::ControlFlow;
use std::time::Duration;

use crate::backend::Timing;
use crate::backend::energy::Energy;
use crate::clock::Instant;
use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::model::TOP_K;
use crate::sampler::{Logprobs, Sampler, SamplerOptions};
use crate::session::{OutputKind, OutputTokens, Run, SequenceId, Session};
use crate::speculate::Drafter;
use crate::tokenizer::{Detokenizer, EncodeOptions, Tokenizer};

/// Maximum alternatives of a token of which the probability is told.
pub const MAX_TOP_LOGPROBS: u32 = 20;

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
    /// Tell how likely each token was, and so many most likely ones, at most [`MAX_TOP_LOGPROBS`].
    pub logprobs: Option<u32>,
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
            logprobs: None,
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
    logprobs: impl Into<Option<u32>>,
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
    /// The one of a name.
    pub fn named(name: &str) -> Option<Finish> {
        use Finish::{Callback, Cancelled, ContextFull, End, Length, Stop};
        [End, Length, Stop, ContextFull, Callback, Cancelled].into_iter().find(|finish| finish.name() == name)
    }

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
    /// How likely they were, under [`GenerateOptions::logprobs`].
    pub logprobs: Vec<Logprobs>,
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
    /// Energy of the steps, if the device tells it. Requests that share a step share its energy by their tokens.
    pub energy: Option<Energy>,
    /// What the steps took besides, in a [`Batch`](crate::batch::Batch).
    pub used: Used,
}

/// What a generation used of a device.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Used {
    /// The KV cache in bytes, times the seconds for which it was held.
    pub kv_byte_seconds: f64,
    /// Bytes of weights and KV cache that its steps read. Runs that share a step share its weights.
    pub read_bytes: u64,
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
        mut decoding: Decoding<'_>,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut stream = Stream::new(self, sequence, prompt, options)?;
        while stream.advance(self, tokenizer, &mut decoding, &mut on_text)? {}
        Ok(stream.into_generation())
    }
}

/// A generation that runs step by step: for callers that pull its text, with [`Stream::advance`], or that run
/// several streams in the same steps, with [`Stream::run`] and [`Stream::accept`]. [`Session::generate_in`] runs
/// one as a whole.
#[derive(Debug)]
pub struct Stream {
    sequence: SequenceId,
    options: GenerateOptions,
    sampler: Sampler,
    out: Output,
    /// The prompt and the generated tokens.
    text: Vec<u32>,
    /// The tokens of the step that runs: pending ones, and a draft after the last.
    fed: Vec<u32>,
    /// How many of them have outputs: none, the last one, or with a draft all.
    outputs: usize,
    generation: Generation,
    start: Instant,
    step_start: Instant,
    is_done: bool,
}

impl Stream {
    /// Sets a sequence to the common prefix of it and a prompt. Runs no step.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty prompt, options out of range, or a sequence that is not there.
    pub fn new(
        session: &mut Session,
        sequence: SequenceId,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Stream> {
        let start = Instant::now();
        let Some((_, all_but_last)) = prompt.split_last() else {
            return Err(Error::argument("prompt", "text of at least one token", "none"));
        };
        if let Some(count) = options.logprobs.filter(|count| *count > MAX_TOP_LOGPROBS) {
            return Err(Error::argument("logprobs", format!("at most {MAX_TOP_LOGPROBS}"), count));
        }
        // The last token always runs, for its output.
        let reused = session.reuse(sequence, all_but_last)?;
        let vocab = session.model().hparams().vocab_size as usize;
        let mut sampler = Sampler::new(options.sampler.clone(), vocab)?;
        prompt.iter().for_each(|&t| sampler.accept(t));
        let tokens = reserved(options.max_tokens.min(session.positions()).into(), "the generated tokens")?;
        let generation = Generation {
            text: String::new(),
            prompt_tokens: prompt.to_vec(),
            reused_tokens: reused as u32,
            prefill_tokens: 0,
            tokens,
            logprobs: Vec::new(),
            finish: Finish::Length,
            prefill: Duration::ZERO,
            first_token: Duration::ZERO,
            decode_tokens: 0,
            decode_steps: 0,
            drafted: (0, 0),
            decode: Duration::ZERO,
            device: (Duration::ZERO, Duration::ZERO),
            energy: None,
            used: Used::default(),
        };
        Ok(Stream {
            sequence,
            options: options.clone(),
            sampler,
            out: Output { text: String::with_capacity(4096), ..Output::default() },
            text: prompt.to_vec(),
            fed: Vec::new(),
            outputs: 0,
            generation,
            start,
            step_start: start,
            is_done: false,
        })
    }

    /// Runs the prompt or one step, passes on the text that is then complete, and returns whether the
    /// generation goes on. The session, the tokenizer and the decoding must be the same in each call.
    ///
    /// # Errors
    /// As [`Session::generate_in`]. An error ends the generation.
    pub fn advance(
        &mut self,
        session: &mut Session,
        tokenizer: &Tokenizer,
        decoding: &mut Decoding<'_>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<bool> {
        let kind = self.kind(decoding);
        while !self.is_done {
            let ran = self.run(session, decoding, session.batch()).and_then(|run| session.step(&[run], kind));
            let timing = ran.is_ok().then(|| session.last_timing()).flatten();
            self.took(session, timing)?;
            match ran {
                Ok(()) if self.outputs == 0 => {}
                Ok(()) => return self.accept(session, tokenizer, decoding, kind, 0, on_text),
                Err(error) => self.fail(error, on_text)?,
            }
        }
        Ok(false)
    }

    /// Adds a token that the same generation chose elsewhere, for instance before a device was lost, as if it had been chosen here.
    /// Call it before the first step. Passes on the text that is then complete, and returns whether the generation goes on. A
    /// constraint must have accepted the token.
    ///
    /// # Errors
    /// [`Error::Argument`] for a token beyond the vocabulary.
    pub fn replay(
        &mut self,
        token: u32,
        tokenizer: &Tokenizer,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<bool> {
        tokenizer.check(&[token])?;
        self.sampler.replay(token);
        let ended = self.append(token, tokenizer, on_text);
        if let Some(finish) = ended {
            self.finish(finish, on_text);
        }
        Ok(ended.is_none())
    }

    /// Adds a token to the text.
    fn append(
        &mut self,
        token: u32,
        tokenizer: &Tokenizer,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Option<Finish> {
        self.generation.tokens.push(token);
        self.text.push(token);
        let is_full = self.generation.tokens.len() >= self.options.max_tokens as usize;
        let ended = self.out.push(token, tokenizer, &self.options, on_text);
        ended.or(is_full.then_some(Finish::Length))
    }

    /// The tokens, those of the prompt included.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.text
    }

    /// The prompt's tokens.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.generation.prompt_tokens
    }

    /// The sequence.
    pub fn sequence(&self) -> SequenceId {
        self.sequence
    }

    /// The outputs that its steps must compute. [`OutputKind::Logits`] serves every stream, and
    /// [`OutputKind::TopK`] also those that need [`OutputKind::ArgMax`].
    pub fn kind(&self, decoding: &Decoding<'_>) -> OutputKind {
        match self.options.sampler.needed() {
            _ if decoding.constraint.is_some() || self.options.logprobs.is_some() => OutputKind::Logits,
            Some(1) => OutputKind::ArgMax,
            Some(k) if k <= TOP_K as usize => OutputKind::TopK,
            _ => OutputKind::Logits,
        }
    }

    /// Returns the number of tokens that the sequence does not have yet: one while text is generated, more
    /// before the end of the prompt, or after the sequence was truncated.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sequence is not there.
    pub fn pending(&self, session: &Session) -> Result<u32> {
        Ok((self.text.len() as u32).saturating_sub(session.len(self.sequence)?))
    }

    /// Returns the stream's part of the next step: pending tokens, at least one and at most `most`. If they are
    /// all that is pending, the run has outputs, and [`Stream::accept`] must follow the step. A draft may come
    /// after them; then all tokens have outputs.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if the text does not fit the session; errors of the drafter.
    pub fn run(&mut self, session: &Session, decoding: &mut Decoding<'_>, most: u32) -> Result<Run<'_>> {
        self.step_start = Instant::now();
        self.outputs = 0;
        let (need, have) = (self.text.len() as u64, u64::from(session.positions()));
        if need > have {
            return Err(Error::ContextFull { need, have });
        }
        let pending = &self.text[self.text.len() - self.pending(session)? as usize..];
        let count = pending.len().min(most.max(1) as usize);
        let is_last = count == pending.len();
        self.fed.clear();
        self.fed.extend_from_slice(&pending[..count]);
        if !is_last {
            return Ok(Run::new(self.sequence, &self.fed).outputs(OutputTokens::None));
        }
        if count == 1 && !self.generation.tokens.is_empty() {
            self.draft(session, decoding, most)?;
        }
        let has_draft = self.fed.len() > count;
        self.outputs = if has_draft { self.fed.len() } else { 1 };
        let outputs = if has_draft { OutputTokens::All } else { OutputTokens::Last };
        Ok(Run::new(self.sequence, &self.fed).outputs(outputs))
    }

    /// The tokens of the last run.
    pub(crate) fn fed(&self) -> &[u32] {
        &self.fed
    }

    /// The number of outputs of the last run.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Notes what a step with the last run took on the device, or the stream's part of it; `None` for a step that failed.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sequence is not there.
    pub fn took(&mut self, session: &Session, timing: Option<Timing>) -> Result<()> {
        let device = timing.map_or(Duration::ZERO, |timing| timing.elapsed);
        let energy = timing.and_then(|timing| timing.energy);
        self.generation.energy = Energy::sum(self.generation.energy, energy);
        if self.generation.tokens.is_empty() {
            let ran = session.len(self.sequence)?.saturating_sub(self.generation.reused_tokens);
            self.generation.prefill_tokens = ran;
            self.generation.prefill = self.start.elapsed();
            self.generation.device.0 += device;
        } else {
            self.generation.device.1 += device;
        }
        Ok(())
    }

    /// Chooses tokens from the outputs of a step, of which those of the last run begin at `first`. Passes on the
    /// text that is then complete, and returns whether the generation goes on.
    ///
    /// # Errors
    /// As [`Session::generate_in`]. An error ends the generation.
    pub fn accept(
        &mut self,
        session: &mut Session,
        tokenizer: &Tokenizer,
        decoding: &mut Decoding<'_>,
        kind: OutputKind,
        first: usize,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<bool> {
        let is_first = self.generation.tokens.is_empty();
        let mut decode_start = if is_first { Instant::now() } else { self.step_start };
        let chosen = self.choose(session, tokenizer, decoding, (kind, first), &mut decode_start, on_text);
        self.generation.decode += decode_start.elapsed();
        match chosen {
            Ok(None) => Ok(true),
            Ok(Some(finish)) => {
                self.finish(finish, on_text);
                Ok(false)
            }
            Err(error) => self.fail(error, on_text).map(|()| false),
        }
    }

    /// Ends the generation by an error of a step: a cancelled session or a full context is a reason to finish.
    ///
    /// # Errors
    /// Every other error.
    pub fn fail(&mut self, error: Error, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) -> Result<()> {
        let finish = match error {
            Error::Cancelled => Finish::Cancelled,
            Error::ContextFull { .. } if !self.generation.tokens.is_empty() => Finish::ContextFull,
            error => {
                self.is_done = true;
                return Err(error);
            }
        };
        self.finish(finish, on_text);
        Ok(())
    }

    fn finish(&mut self, finish: Finish, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>) {
        self.is_done = true;
        self.generation.finish = finish;
        if !matches!(finish, Finish::Stop | Finish::Callback) {
            self.out.finish(on_text);
        }
    }

    /// Notes what a step used.
    pub(crate) fn used(&mut self, read_bytes: u64, held_bytes: u64, held: Duration) {
        let used = &mut self.generation.used;
        used.read_bytes = used.read_bytes.saturating_add(read_bytes);
        used.kv_byte_seconds += held_bytes as f64 * held.as_secs_f64();
    }

    /// The generation so far; its text is complete only in [`Stream::into_generation`].
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// Returns the generation.
    pub fn into_generation(self) -> Generation {
        Generation { text: self.out.text, ..self.generation }
    }

    /// Adds a draft to the tokens of the next step, which has at most `most`.
    fn draft(&mut self, session: &Session, decoding: &mut Decoding<'_>, most: u32) -> Result<()> {
        let Some(drafter) = &mut decoding.drafter else { return Ok(()) };
        let left = self.options.max_tokens as usize - self.generation.tokens.len();
        let run = session.max_run(self.sequence)?.min(most as usize);
        let max_draft = run.min(left).saturating_sub(1);
        match drafter.draft(&self.text, max_draft, &mut self.fed) {
            // A cancelled drafter is no error: the step after it notices the cancellation.
            Err(Error::Cancelled) => {}
            drafted => drafted?,
        }
        self.fed.truncate(max_draft + 1);
        Ok(())
    }

    /// Chooses tokens from the outputs of a step, as long as its draft is right.
    fn choose(
        &mut self,
        session: &mut Session,
        tokenizer: &Tokenizer,
        decoding: &mut Decoding<'_>,
        (kind, first): (OutputKind, usize),
        decode_start: &mut Instant,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Option<Finish>> {
        // Without tokens to generate, report the prompt's errors all the same.
        if self.generation.tokens.len() >= self.options.max_tokens as usize {
            return Ok(Some(Finish::Length));
        }
        self.generation.decode_steps += u32::from(!self.generation.tokens.is_empty());
        let drafted = self.outputs.saturating_sub(1);
        let mut right = 0;
        let ended = loop {
            let output = first + right;
            let token = match &mut decoding.constraint {
                None => Some(session.choose(output, kind, &mut self.sampler)?),
                Some(constraint) => {
                    session.choose_allowed(output, tokenizer, &mut self.sampler, *constraint)?
                }
            };
            if self.generation.tokens.is_empty() {
                self.generation.first_token = self.start.elapsed();
                *decode_start = Instant::now();
            } else {
                self.generation.decode_tokens += 1;
            }
            let ignores_end = self.options.ignore_end && decoding.constraint.is_none();
            let goes_on = |id: &u32| ignores_end || !tokenizer.is_end(*id);
            let Some(token) = token.filter(goes_on) else { break Some(Finish::End) };
            if let Some(count) = self.options.logprobs {
                let logits = session.logits_of(output);
                self.generation.logprobs.push(Logprobs::of(logits, token, count as usize));
            }
            self.sampler.accept(token);
            if let Some(constraint) = &mut decoding.constraint {
                constraint.accept(token)?;
            }
            let ended = self.append(token, tokenizer, on_text);
            let is_right = right < drafted && self.fed.get(right + 1) == Some(&token);
            right += usize::from(is_right);
            if ended.is_some() || !is_right {
                break ended;
            }
        };
        self.generation.drafted.0 += drafted as u32;
        self.generation.drafted.1 += right as u32;
        let wrong = (drafted - right) as u32;
        session.truncate(self.sequence, session.len(self.sequence)? - wrong)?;
        Ok(ended)
    }
}

impl Session {
    /// Returns the maximum tokens that one step may add to a sequence with all their outputs.
    fn max_run(&self, sequence: SequenceId) -> Result<usize> {
        let left = self.positions() - self.len(sequence)?;
        Ok(self.outputs().min(self.batch()).min(left) as usize)
    }

    /// The logits of one of the last step's outputs.
    fn logits_of(&self, output: usize) -> &[f32] {
        let vocab = self.model().hparams().vocab_size as usize;
        self.logits().get(output * vocab..(output + 1) * vocab).unwrap_or_default()
    }

    /// Chooses a token from one of the last step's outputs.
    fn choose(&self, output: usize, kind: OutputKind, sampler: &mut Sampler) -> Result<u32> {
        match kind {
            OutputKind::ArgMax => Ok(self.arg_max().get(output).copied().unwrap_or(0)),
            OutputKind::TopK => {
                let (ids, logits) = self.top_k();
                let k = TOP_K.min(self.model().hparams().vocab_size) as usize;
                let row = output * k..(output + 1) * k;
                sampler.sample_of(&ids[row.clone()], &logits[row])
            }
            OutputKind::Logits => sampler.sample(self.logits_of(output)),
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
        let logits = self.logits_of(output);
        let vocab = logits.len();
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
#[derive(Debug, Default)]
struct Output {
    detokenizer: Detokenizer,
    text: String,
    /// Bytes of the text that were passed on.
    given: usize,
}

impl Output {
    fn push(
        &mut self,
        token: u32,
        tokenizer: &Tokenizer,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Option<Finish> {
        self.detokenizer.push(tokenizer, token, options.special, &mut self.text);
        let fresh = &self.text[self.given..];
        let stop = options.stop.iter().filter(|s| !s.is_empty());
        if let Some(at) = stop.filter_map(|s| fresh.find(s.as_str())).min() {
            self.text.truncate(self.given + at);
            let _ = self.give(0, on_text);
            return Some(Finish::Stop);
        }
        let held = options.stop.iter().map(|stop| held_back(fresh, stop)).max().unwrap_or(0);
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
