//! Many requests in one session: each step runs a token of every text that is being generated, and parts of new prompts beside them
//! (continuous batching). A request's text does not depend on its neighbours.
//!
//! Requests of one tenant share what is equal at the start of their prompts: the KV pages of running and of finished requests are reused.

pub mod schedule;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Instant;
use crate::cost::{self, Extent};
use crate::error::{Error, Result};
use crate::generate::{Constraint, Decoding, Finish, GenerateOptions, Generation, Stream};
use crate::sampler::Logprobs;
use crate::session::{MAX_RUNS, OutputKind, Run, SequenceId, Session};
use crate::speculate::{Drafted, Drafter, Pace, PromptLookup};
use crate::tokenizer::Tokenizer;
use schedule::{Allowance, Entry, Limits, Memory, Part};

/// Tokens of a prompt for which a request waits until another one has computed them.
const WORTH_WAITING: usize = 8;
/// How long a step with prompts may take, unless [`Batch::step_time`] says otherwise.
pub const STEP_TIME: Duration = Duration::from_millis(100);

/// A number for a request of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// A text to generate.
#[non_exhaustive]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Options of the generation.
    pub options: GenerateOptions,
    /// Constrains the tokens. It has accepted those of `resumed`.
    pub constraint: Option<Box<dyn Constraint + Send>>,
    /// Tokens that another session already generated for this request, with the same prompt and options. The text goes on after
    /// them as it would have gone on there; their events come again.
    pub resumed: Vec<u32>,
    /// Requests of different tenants do not share KV pages, so that none can find out another's prompts by the time that its own take.
    pub tenant: u64,
    /// Requests of a larger priority go first.
    pub priority: i32,
    /// Of a tenant's requests of the same priority, those with the earliest deadline go first. Who sets it must
    /// [cancel](Batch::cancel) the request when it has passed.
    pub deadline: Option<Instant>,
}

impl Request {
    /// A request with default options.
    pub fn new(prompt: Vec<u32>) -> Request {
        let (options, resumed) = Default::default();
        Request { prompt, options, constraint: None, resumed, tenant: 0, priority: 0, deadline: None }
    }
}

crate::setters!(Request {
    options: GenerateOptions,
    constraint: impl Into<Option<Box<dyn Constraint + Send>>>,
    resumed: Vec<u32>,
    tenant: u64,
    priority: i32,
    deadline: Option<Instant>,
});

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Request { prompt, tenant, priority, .. } = self;
        let mut debug = f.debug_struct("Request");
        debug.field("prompt_tokens", &prompt.len()).field("tenant", tenant).field("priority", priority);
        debug.finish_non_exhaustive()
    }
}

/// What happens to a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// It was given a sequence, and no longer waits.
    Began,
    /// Tokens were chosen.
    Tokens {
        /// The tokens: one, or more with a draft; none if this is the rest of the text.
        tokens: &'a [u32],
        /// How likely each was, if the options ask for it.
        logprobs: &'a [Logprobs],
        /// The text that is complete by now, in whole characters. It may be empty.
        text: &'a str,
    },
    /// The request is done.
    Done(Generation),
    /// The request failed. Others go on.
    Failed(Error),
}

/// Requests in one session.
pub struct Batch {
    session: Session,
    tokenizer: Arc<Tokenizer>,
    allowance: Allowance,
    /// Sequences that may exist at once.
    slots: usize,
    /// Tokens that a step may draft for a request.
    lookup: u32,
    /// Bytes of weights that a step of a token reads.
    weight_bytes: u64,
    /// When the last step ended: what is held is held since then.
    since: Instant,
    last_id: u64,
    waiting: VecDeque<(RequestId, Request)>,
    running: Vec<Running>,
    /// Sequences of finished requests, the one that was used longest ago first.
    kept: VecDeque<Kept>,
}

struct Running {
    id: RequestId,
    tenant: u64,
    priority: i32,
    stream: Stream,
    constraint: Option<Box<dyn Constraint + Send>>,
    pace: Pace,
    /// Guessed tokens of the next step.
    draft: Vec<u32>,
}

struct Kept {
    sequence: SequenceId,
    tenant: u64,
}

/// A sequence that a prompt may begin with.
#[derive(Clone, Copy)]
enum Held {
    /// An index of those that are kept.
    Kept(usize),
    Running(SequenceId),
}

impl Running {
    fn decoding(constraint: &mut Option<Box<dyn Constraint + Send>>) -> Decoding<'_> {
        match constraint {
            Some(constraint) => Decoding::default().constraint(&mut **constraint),
            None => Decoding::default(),
        }
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Batch");
        debug.field("session", &self.session).field("waiting", &self.waiting.len());
        debug.field("running", &self.running.len()).field("kept", &self.kept.len()).finish_non_exhaustive()
    }
}

/// The KV cache of a session, with the sequences that may be evicted.
struct Cache<'a> {
    session: &'a mut Session,
    kept: &'a mut VecDeque<Kept>,
    sequences: Vec<SequenceId>,
    /// What this step has reserved.
    reserved: Vec<(SequenceId, u32)>,
    failed: Result<()>,
}

impl Cache<'_> {
    /// Reserves room for more tokens of an entry, if nothing need be evicted for it.
    fn reserve_free(&mut self, entry: usize, tokens: u32) -> bool {
        self.reserved.push((self.sequences[entry], tokens));
        let has_room = self.session.has_room(&self.reserved).unwrap_or(false);
        if !has_room {
            self.reserved.pop();
        }
        has_room
    }
}

impl Memory for Cache<'_> {
    fn fits(&mut self, entry: usize, tokens: u32) -> bool {
        let reserved = self.reserved.len();
        let fits = self.reserve(entry, tokens);
        self.reserved.truncate(reserved);
        fits
    }

    fn reserve(&mut self, entry: usize, tokens: u32) -> bool {
        let sequence = self.sequences[entry];
        // A text that is too long ends in this step, without a run.
        if self.session.len(sequence).is_ok_and(|len| len + tokens > self.session.positions()) {
            return true;
        }
        self.reserved.push((sequence, tokens));
        loop {
            match self.session.has_room(&self.reserved) {
                Ok(true) => return true,
                Ok(false) => {}
                Err(error) => self.failed = Err(error),
            }
            let Some(oldest) = self.kept.pop_front() else {
                self.reserved.pop();
                return false;
            };
            if let Err(error) = self.session.remove(oldest.sequence) {
                self.failed = Err(error);
                return false;
            }
        }
    }

    fn preempt(&mut self, entry: usize) {
        if let Err(error) = self.session.truncate(self.sequences[entry], 0) {
            self.failed = Err(error);
        }
    }
}

impl Batch {
    /// Takes a session without sequences. As many requests run at once as the session has outputs and
    /// [`SessionOptions::sequences`](crate::SessionOptions::sequences), and steps have runs ([`MAX_RUNS`]).
    pub fn new(session: Session, tokenizer: Arc<Tokenizer>) -> Batch {
        let slots = (session.outputs() as usize).min(session.sequences() as usize).clamp(1, MAX_RUNS);
        let one = Extent { start: 0, tokens: 1, outputs: 1 };
        let weight_bytes = cost::step(session.program(), &[one]).weight_bytes;
        Batch {
            session,
            tokenizer,
            allowance: Allowance::new(STEP_TIME.as_secs_f64()),
            slots,
            lookup: 0,
            weight_bytes,
            since: Instant::now(),
            last_id: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
            kept: VecDeque::new(),
        }
    }

    /// Sets how long a step may take in which prompts run beside text that is being generated; by default a tenth of a second. That bounds
    /// the time between two tokens, as far as the device allows. Steps of text alone take what they take.
    #[must_use]
    pub fn step_time(mut self, time: Duration) -> Batch {
        self.allowance = Allowance::new(time.as_secs_f64());
        self
    }

    /// Guesses up to so many tokens of each text by [`PromptLookup`], as far as a step has outputs that no request needs; by default none.
    /// Guesses become longer while they are right, and rest while they are wrong. Texts stay the same; see [`crate::speculate`].
    #[must_use]
    pub fn lookup(mut self, tokens: u32) -> Batch {
        self.lookup = tokens;
        self
    }

    /// Returns the session. Requests that are not done are gone; their sequences stay.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The number of requests that wait, and that run.
    pub fn counts(&self) -> (usize, usize) {
        (self.waiting.len(), self.running.len())
    }

    /// Adds a request.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty prompt or a token beyond the vocabulary, [`Error::ContextFull`] for a prompt that leaves no
    /// room for a token.
    pub fn add(&mut self, request: Request) -> Result<RequestId> {
        if request.prompt.is_empty() {
            return Err(Error::argument("prompt", "text of at least one token", "none"));
        }
        let vocab = self.session.model().hparams().vocab_size;
        if let Some(&bad) = request.prompt.iter().find(|&&token| token >= vocab) {
            return Err(Error::argument("token id", format!("below {vocab}"), bad));
        }
        let (need, have) = (request.prompt.len() as u64 + 1, self.session.positions().into());
        if need > have {
            return Err(Error::ContextFull { need, have });
        }
        self.last_id += 1;
        let id = RequestId(self.last_id);
        self.waiting.push_back((id, request));
        Ok(id)
    }

    /// What a request has so far, if it runs; its text is complete only in [`Event::Done`].
    pub fn generation(&self, id: RequestId) -> Option<&Generation> {
        self.running.iter().find(|running| running.id == id).map(|running| running.stream.generation())
    }

    /// Ends a request without a further event. Returns what it has so far, if it runs.
    pub fn cancel(&mut self, id: RequestId) -> Option<Generation> {
        self.waiting.retain(|(waiting, _)| *waiting != id);
        let place = self.running.iter().position(|running| running.id == id)?;
        let running = self.running.remove(place);
        self.keep(&running.stream, running.tenant);
        Some(Generation { finish: Finish::Cancelled, ..running.stream.into_generation() })
    }

    /// Runs a step, and tells what happened to its requests. Returns whether there is more to do.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if the session's [`Session::cancel_handle`] stopped the step: nothing changed, and the next step does its work.
    /// Errors of the backend, after which every running request has failed.
    pub fn step(&mut self, on_event: &mut dyn FnMut(RequestId, Event<'_>)) -> Result<bool> {
        if self.running.is_empty() {
            self.since = Instant::now();
        }
        self.admit(on_event);
        let ran = self.try_step(on_event);
        if let Err(error) = &ran
            && !matches!(error, Error::Cancelled)
        {
            for running in self.running.drain(..) {
                // The error that counts is told; a session that lost this sequence has no pages of it.
                let _ = self.session.remove(running.stream.sequence());
                on_event(running.id, Event::Failed(copy_of(error, &self.session.backend().caps().name)));
            }
        }
        ran.map(|()| !self.waiting.is_empty() || !self.running.is_empty())
    }

    fn try_step(&mut self, on_event: &mut dyn FnMut(RequestId, Event<'_>)) -> Result<()> {
        let parts = self.plan()?;
        // Nobody can run: the first one must end, or nothing ever happens.
        if let (true, Some(first)) = (parts.is_empty(), self.running.first()) {
            let need = u64::from(self.session.len(first.stream.sequence())?) + 1;
            let full = Error::ContextFull { need, have: self.session.positions().into() };
            return self.accept(vec![Some(Err(full))], OutputKind::ArgMax, 0, on_event);
        }
        self.run(&parts, on_event)
    }

    /// Gives waiting requests sequences, as long as there are some: to those of a larger priority first, then to tenants with fewer
    /// running ones, then to those with the earliest deadline, then in the order of arrival.
    fn admit(&mut self, on_event: &mut dyn FnMut(RequestId, Event<'_>)) {
        while self.running.len() < self.slots {
            let of = |tenant: u64| self.running.iter().filter(|running| running.tenant == tenant).count();
            let rank = |&i: &usize| {
                let request = &self.waiting[i].1;
                let deadline = (request.deadline.is_none(), request.deadline);
                (-i64::from(request.priority), of(request.tenant), deadline, i)
            };
            let mut order: Vec<usize> = (0..self.waiting.len()).collect();
            order.sort_by_cached_key(rank);
            let Some(first) = order.into_iter().find(|&i| !self.is_begun(&self.waiting[i].1)) else { return };
            let Some((id, request)) = self.waiting.remove(first) else { return };
            match self.start(id, request, on_event) {
                Ok(None) => {}
                Ok(Some(generation)) => on_event(id, Event::Done(generation)),
                Err(error) => on_event(id, Event::Failed(error)),
            }
        }
    }

    /// Whether a prompt that runs begins like this one, and more of it will be there once it has run: then it pays to wait.
    fn is_begun(&self, request: &Request) -> bool {
        let of_tenant = self.running.iter().filter(|running| running.tenant == request.tenant);
        let under_way = of_tenant
            .filter(|running| running.stream.pending(&self.session).is_ok_and(|pending| pending > 1));
        let common = |running: &Running| {
            let (have, want) = (running.stream.prompt(), &request.prompt);
            have.iter().zip(want).take_while(|(a, b)| a == b).count()
        };
        let Some(coming) = under_way.map(common).max().filter(|coming| *coming >= WORTH_WAITING) else {
            return false;
        };
        let there = self.best(&request.prompt, request.tenant).map_or(0, |(common, _)| common);
        coming >= there + WORTH_WAITING
    }

    /// Starts a request. Returns its result if it is complete already.
    fn start(
        &mut self,
        id: RequestId,
        request: Request,
        on_event: &mut dyn FnMut(RequestId, Event<'_>),
    ) -> Result<Option<Generation>> {
        let Request { prompt, options, constraint, resumed, tenant, priority, deadline: _ } = request;
        let sequence = self.sequence_for(&prompt, tenant)?;
        let started = Stream::new(&mut self.session, sequence, &prompt, &options);
        let mut stream = started.inspect_err(|_| _ = self.session.remove(sequence))?;
        on_event(id, Event::Began);
        let mut goes_on = Ok(true);
        for token in resumed {
            if !matches!(goes_on, Ok(true)) {
                break;
            }
            let mut text = String::new();
            goes_on = stream.replay(token, &self.tokenizer, &mut |piece| {
                text.push_str(piece);
                ControlFlow::Continue(())
            });
            on_event(id, Event::Tokens { tokens: &[token], logprobs: &[], text: &text });
        }
        match goes_on {
            Ok(true) => {
                let (pace, draft) = (Pace::new(), Vec::new());
                self.running.push(Running { id, tenant, priority, stream, constraint, pace, draft });
                Ok(None)
            }
            ended => {
                self.keep(&stream, tenant);
                ended.map(|_| Some(stream.into_generation()))
            }
        }
    }

    /// The sequence that has most of a prompt, and how much.
    fn best(&self, prompt: &[u32], tenant: u64) -> Option<(usize, Held)> {
        let common = |of: SequenceId| self.session.reusable(of, prompt).unwrap_or(0);
        let kept = self.kept.iter().enumerate().filter(|(_, kept)| kept.tenant == tenant);
        let kept = kept.map(|(i, kept)| (common(kept.sequence), Held::Kept(i)));
        let running = self.running.iter().filter(|running| running.tenant == tenant);
        let running = running.map(|running| running.stream.sequence());
        let running = running.map(|sequence| (common(sequence), Held::Running(sequence)));
        // Of equals the one that is kept: it may be taken whole.
        running.chain(kept).filter(|(common, _)| *common > 0).max_by_key(|(common, _)| *common)
    }

    /// Returns a sequence that has as much of the prompt as possible.
    fn sequence_for(&mut self, prompt: &[u32], tenant: u64) -> Result<SequenceId> {
        let needs_slot = self.running.len() + self.kept.len() >= self.slots;
        let best = self.best(prompt, tenant);
        if let Some((common, Held::Kept(i))) = best
            && let Some(kept) = self.kept.remove(i)
        {
            // One that goes on where it ends, as chats do, or the only one that can go.
            if common == self.session.tokens(kept.sequence)?.len() || (needs_slot && self.kept.is_empty()) {
                return Ok(kept.sequence);
            }
            // Used now, so the last to go.
            self.kept.push_back(kept);
        }
        let of = best.map(|(_, held)| match held {
            Held::Kept(_) => self.kept.back().map(|kept| kept.sequence),
            Held::Running(sequence) => Some(sequence),
        });
        if needs_slot && let Some(oldest) = self.kept.pop_front() {
            self.session.remove(oldest.sequence)?;
        }
        match of.flatten() {
            Some(of) => self.session.fork(of),
            None => Ok(self.session.add_sequence()),
        }
    }

    fn plan(&mut self) -> Result<Vec<Part>> {
        let session = &self.session;
        let entry = |running: &Running| {
            Ok(Entry {
                priority: running.priority,
                arrival: running.id.0,
                pending: running.stream.pending(session)?,
                held: session.len(running.stream.sequence())?,
            })
        };
        let entries = self.running.iter().map(entry).collect::<Result<Vec<_>>>()?;
        let sequences = self.running.iter().map(|running| running.stream.sequence()).collect();
        let limits = Limits {
            tokens: self.session.batch(),
            runs: self.session.outputs().min(MAX_RUNS as u32),
            prefill: self.allowance.tokens(self.session.batch(), self.running.len() as u32),
        };
        let (session, kept) = (&mut self.session, &mut self.kept);
        let mut cache = Cache { session, kept, sequences, reserved: Vec::new(), failed: Ok(()) };
        let mut parts = schedule::plan(limits, &entries, &mut cache);
        draft(self.lookup, limits, &mut self.running, &mut parts, &mut cache);
        cache.failed?;
        Ok(parts)
    }

    /// Runs a step.
    fn run(&mut self, parts: &[Part], on_event: &mut dyn FnMut(RequestId, Event<'_>)) -> Result<()> {
        let mut tokens = vec![0; self.running.len()];
        parts.iter().for_each(|part| tokens[part.entry] = part.tokens);
        let mut kind = OutputKind::ArgMax;
        for (running, _) in self.running.iter_mut().zip(&tokens).filter(|(_, tokens)| **tokens > 0) {
            kind = widest(kind, running.stream.kind(&Running::decoding(&mut running.constraint)));
        }
        let mut runs: Vec<Run<'_>> = Vec::with_capacity(parts.len());
        // What each request has of the step: nothing, a run, or an error before it.
        let mut outcomes: Vec<Option<Result<()>>> = Vec::with_capacity(self.running.len());
        for (running, &tokens) in self.running.iter_mut().zip(&tokens) {
            if tokens == 0 {
                outcomes.push(None);
                continue;
            }
            let mut drafted = Drafted(&running.draft);
            let mut decoding = Running::decoding(&mut running.constraint).drafter(&mut drafted);
            outcomes.push(Some(
                running.stream.run(&self.session, &mut decoding, tokens).map(|run| runs.push(run)),
            ));
        }
        let began = Instant::now();
        let stepped = if runs.is_empty() { Ok(()) } else { self.session.step(&runs, kind) };
        let (count, fed) = (runs.len(), runs.iter().map(|run| run.tokens.len()).sum::<usize>());
        drop(runs);
        let guessed: usize = self.running.iter().map(|running| running.draft.len()).sum();
        if fed > count + guessed && stepped.is_ok() {
            self.allowance.measured(fed, began.elapsed().as_secs_f64());
        }
        match stepped {
            Ok(()) => {}
            // One request's numbers must not end the others: each runs alone.
            Err(Error::NotFinite { .. }) if count > 1 => return self.run_apart(parts, on_event),
            Err(error @ Error::NotFinite { .. }) => {
                if let Some(only) = outcomes.iter_mut().flatten().find(|outcome| outcome.is_ok()) {
                    *only = Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        self.accept(outcomes, kind, count, on_event)
    }

    /// Runs each part of a step in a step of its own.
    fn run_apart(&mut self, parts: &[Part], on_event: &mut dyn FnMut(RequestId, Event<'_>)) -> Result<()> {
        let ids: Vec<RequestId> = parts.iter().map(|part| self.running[part.entry].id).collect();
        for (part, id) in parts.iter().zip(ids) {
            // Places change as requests end.
            if let Some(entry) = self.running.iter().position(|running| running.id == id) {
                self.run(&[Part { entry, ..*part }], on_event)?;
            }
        }
        Ok(())
    }

    /// Chooses tokens from the outputs of a step, and ends requests. `outcomes` has what the step was for the first requests that
    /// run; the others had no part in it.
    fn accept(
        &mut self,
        outcomes: Vec<Option<Result<()>>>,
        kind: OutputKind,
        runs: usize,
        on_event: &mut dyn FnMut(RequestId, Event<'_>),
    ) -> Result<()> {
        let timing = self.session.last_timing();
        // Each has its part of the step, by its tokens.
        let took_part =
            self.running.iter().zip(&outcomes).filter(|(_, outcome)| matches!(outcome, Some(Ok(()))));
        let all = took_part.map(|(running, _)| running.stream.fed().len()).sum::<usize>().max(1);
        let weight_bytes = self.weight_bytes / runs.max(1) as u64;
        let (before, now) = (self.since, Instant::now());
        self.since = now;
        let mut output = 0;
        let mut ended: Vec<(usize, Option<Error>)> = Vec::new();
        let mut text = String::new();
        for (place, (running, outcome)) in self.running.iter_mut().zip(outcomes).enumerate() {
            let id = running.id;
            let held_bytes = self.session.held_bytes(running.stream.sequence())?;
            let ran = matches!(outcome, Some(Ok(())));
            let read_bytes = if ran { weight_bytes.saturating_add(held_bytes) } else { 0 };
            running.stream.used(read_bytes, held_bytes, now.saturating_duration_since(before));
            text.clear();
            let mut on_text = |piece: &str| {
                text.push_str(piece);
                ControlFlow::Continue(())
            };
            let had = running.stream.generation().tokens.len();
            let drafted = running.stream.generation().drafted;
            let goes_on = match outcome {
                None => Ok(true),
                Some(Ok(())) => {
                    self.session.trim(running.stream.sequence())?;
                    let part =
                        timing.map(|timing| timing.part(running.stream.fed().len() as f64 / all as f64));
                    running.stream.took(&self.session, part)?;
                    let first = output;
                    output += running.stream.outputs();
                    let mut decoding = Running::decoding(&mut running.constraint);
                    match running.stream.outputs() {
                        0 => Ok(true),
                        _ => running.stream.accept(
                            &mut self.session,
                            &self.tokenizer,
                            &mut decoding,
                            kind,
                            first,
                            &mut on_text,
                        ),
                    }
                }
                Some(Err(error)) => running.stream.fail(error, &mut on_text).map(|()| false),
            };
            let generation = running.stream.generation();
            match generation.drafted.0 - drafted.0 {
                0 => running.pace.passed(),
                count => running.pace.verified(count, generation.drafted.1 - drafted.1),
            }
            let tokens = generation.tokens.get(had..).unwrap_or_default();
            let logprobs = generation.logprobs.len().saturating_sub(tokens.len());
            let logprobs = generation.logprobs.get(logprobs..).unwrap_or_default();
            if !tokens.is_empty() || !text.is_empty() {
                on_event(id, Event::Tokens { tokens, logprobs, text: &text });
            }
            match goes_on {
                Ok(true) => {}
                Ok(false) => ended.push((place, None)),
                Err(error) => ended.push((place, Some(error))),
            }
        }
        for (place, error) in ended.into_iter().rev() {
            let running = self.running.remove(place);
            self.keep(&running.stream, running.tenant);
            on_event(
                running.id,
                error.map_or_else(|| Event::Done(running.stream.into_generation()), Event::Failed),
            );
        }
        Ok(())
    }

    /// Keeps the sequence of a request that ended, for those that begin alike.
    fn keep(&mut self, stream: &Stream, tenant: u64) {
        self.kept.push_back(Kept { sequence: stream.sequence(), tenant });
    }
}

/// Adds guessed tokens to the parts of texts that are being generated, as far as the step has room and outputs for them.
fn draft(most: u32, limits: Limits, running: &mut [Running], parts: &mut [Part], cache: &mut Cache<'_>) {
    running.iter_mut().for_each(|running| running.draft.clear());
    let is_text = |part: &Part, running: &[Running]| {
        part.tokens == 1 && !running[part.entry].stream.generation().tokens.is_empty()
    };
    // Each part may have an output; texts have one.
    let mut outputs = cache.session.outputs().saturating_sub(parts.len() as u32);
    let mut tokens = limits.tokens.saturating_sub(parts.iter().map(|part| part.tokens).sum());
    for part in parts {
        if !is_text(part, running) {
            continue;
        }
        let Running { stream, pace, draft, .. } = &mut running[part.entry];
        let count = pace.most().min(most).min(outputs).min(tokens);
        // It has no errors of its own.
        if count == 0
            || PromptLookup::new(count as usize).draft(stream.tokens(), count as usize, draft).is_err()
        {
            continue;
        }
        let count = draft.len() as u32;
        if count > 0 && cache.reserve_free(part.entry, 1 + count) {
            part.tokens += count;
            (outputs, tokens) = (outputs - count, tokens - count);
        } else {
            draft.clear();
        }
    }
}

/// The same error for another request.
fn copy_of(error: &Error, backend: &str) -> Error {
    match error {
        Error::Io { path, source } => Error::Io { path: path.clone(), source: source.kind().into() },
        Error::FileChanged { path, detail } => {
            Error::FileChanged { path: path.clone(), detail: detail.clone() }
        }
        error => Error::Backend { backend: backend.into(), message: error.to_string() },
    }
}

/// The kind of output that serves both.
fn widest(a: OutputKind, b: OutputKind) -> OutputKind {
    let rank = |kind| match kind {
        OutputKind::ArgMax => 0,
        OutputKind::TopK => 1,
        OutputKind::Logits => 2,
    };
    if rank(a) < rank(b) { b } else { a }
}
