//! Many requests in one session: each step runs a token of every text that is being generated, and parts of new prompts beside them
//! (continuous batching). A request's text does not depend on its neighbours.
//!
//! Requests of one tenant share what is equal at the start of their prompts: the KV pages of running and of finished requests are reused.

pub mod schedule;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::generate::{Constraint, Decoding, GenerateOptions, Generation, Stream};
use crate::session::{MAX_RUNS, OutputKind, Run, SequenceId, Session};
use crate::tokenizer::Tokenizer;
use schedule::{Entry, Limits, Memory, Part};

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
    /// Constrains the tokens.
    pub constraint: Option<Box<dyn Constraint + Send>>,
    /// Requests of different tenants do not share KV pages, so that none can find out another's prompts by the time that its own take.
    pub tenant: u64,
    /// Requests of a larger priority go first.
    pub priority: i32,
}

impl Request {
    /// A request with default options.
    pub fn new(prompt: Vec<u32>) -> Request {
        Request { prompt, options: GenerateOptions::default(), constraint: None, tenant: 0, priority: 0 }
    }
}

crate::setters!(Request {
    options: GenerateOptions,
    constraint: impl Into<Option<Box<dyn Constraint + Send>>>,
    tenant: u64,
    priority: i32,
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
    /// Whole characters of the text, as they appear.
    Text(&'a str),
    /// The request is done.
    Done(Generation),
    /// The request failed. Others go on.
    Failed(Error),
}

/// Requests in one session.
pub struct Batch {
    session: Session,
    tokenizer: Arc<Tokenizer>,
    /// Prompt tokens of a step that also generates text.
    prefill: u32,
    /// Sequences that may exist at once.
    slots: usize,
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
}

struct Kept {
    sequence: SequenceId,
    tenant: u64,
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

impl Memory for Cache<'_> {
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
        let prefill = session.batch().div_ceil(4);
        Batch {
            session,
            tokenizer,
            prefill,
            slots,
            last_id: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
            kept: VecDeque::new(),
        }
    }

    /// Sets how many tokens of prompts a step has that also generates text; by default a quarter of a step.
    #[must_use]
    pub fn prefill(mut self, tokens: u32) -> Batch {
        self.prefill = tokens.max(1);
        self
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
    /// [`Error::Argument`] for an empty prompt or a token beyond the vocabulary, [`Error::ContextFull`] for a prompt that leaves no room for a token.
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

    /// Ends a request without a further event; nothing if it has ended.
    ///
    /// # Errors
    /// [`Error::Argument`] if the session lacks its sequence, which is a fault of this library.
    pub fn cancel(&mut self, id: RequestId) -> Result<()> {
        self.waiting.retain(|(waiting, _)| *waiting != id);
        let Some(place) = self.running.iter().position(|running| running.id == id) else { return Ok(()) };
        let running = self.running.remove(place);
        self.keep(&running.stream, running.tenant);
        Ok(())
    }

    /// Runs a step, and tells what happened to its requests. Returns whether there is more to do.
    ///
    /// # Errors
    /// Errors of the backend, after which every running request has failed.
    pub fn step(&mut self, on_event: &mut dyn FnMut(RequestId, Event<'_>)) -> Result<bool> {
        self.admit(on_event);
        let ran = self.try_step(on_event);
        if let Err(error) = &ran {
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

    /// Gives waiting requests sequences, as long as there are some.
    fn admit(&mut self, on_event: &mut dyn FnMut(RequestId, Event<'_>)) {
        while self.running.len() < self.slots {
            let first = (0..self.waiting.len()).min_by_key(|&i| (-i64::from(self.waiting[i].1.priority), i));
            let Some((id, request)) = first.and_then(|i| self.waiting.remove(i)) else { return };
            let Request { prompt, options, constraint, tenant, priority } = request;
            let started = self.sequence_for(&prompt, tenant).and_then(|sequence| {
                Stream::new(&mut self.session, sequence, &prompt, &options)
                    .inspect_err(|_| _ = self.session.remove(sequence))
            });
            match started {
                Ok(stream) => self.running.push(Running { id, tenant, priority, stream, constraint }),
                Err(error) => on_event(id, Event::Failed(error)),
            }
        }
    }

    /// Returns a sequence that has as much of the prompt as possible.
    fn sequence_for(&mut self, prompt: &[u32], tenant: u64) -> Result<SequenceId> {
        let common = |of: SequenceId| {
            let tokens = self.session.tokens(of).unwrap_or_default();
            tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count()
        };
        let kept = self.kept.iter().enumerate().filter(|(_, kept)| kept.tenant == tenant);
        let best_kept = kept.map(|(i, kept)| (common(kept.sequence), i)).max();
        let running = self.running.iter().filter(|running| running.tenant == tenant);
        let best = running
            .map(|running| (common(running.stream.sequence()), running.stream.sequence()))
            .max_by_key(|(n, _)| *n);
        let needs_slot = self.running.len() + self.kept.len() >= self.slots;
        if let Some((n, i)) = best_kept.filter(|(n, _)| *n > 0 && best.is_none_or(|(m, _)| *n >= m)) {
            let all = self.session.tokens(self.kept[i].sequence)?.len();
            // One that goes on where it ends, as chats do, or the last slot.
            if (n == all || needs_slot)
                && let Some(kept) = self.kept.remove(i)
            {
                return Ok(kept.sequence);
            }
            let sequence = self.session.fork(self.kept[i].sequence)?;
            // Used now, so the last to go.
            let used = self.kept.remove(i);
            self.kept.extend(used);
            return Ok(sequence);
        }
        if needs_slot && let Some(oldest) = self.kept.pop_front() {
            self.session.remove(oldest.sequence)?;
        }
        match best.filter(|(n, _)| *n > 0) {
            Some((_, of)) => self.session.fork(of),
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
            prefill: self.prefill,
        };
        let (session, kept) = (&mut self.session, &mut self.kept);
        let mut cache = Cache { session, kept, sequences, reserved: Vec::new(), failed: Ok(()) };
        let parts = schedule::plan(limits, &entries, &mut cache);
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
            let mut decoding = Running::decoding(&mut running.constraint);
            outcomes.push(Some(
                running.stream.run(&self.session, &mut decoding, tokens).map(|run| runs.push(run)),
            ));
        }
        let stepped = if runs.is_empty() { Ok(()) } else { self.session.step(&runs, kind) };
        let count = runs.len();
        drop(runs);
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
        let device = self.session.last_timing().map_or_else(Default::default, |timing| timing.elapsed);
        let device = device / runs.max(1) as u32;
        let mut output = 0;
        let mut ended: Vec<(usize, Option<Error>)> = Vec::new();
        for (place, (running, outcome)) in self.running.iter_mut().zip(outcomes).enumerate() {
            let id = running.id;
            let mut on_text = |text: &str| {
                on_event(id, Event::Text(text));
                ControlFlow::Continue(())
            };
            let goes_on = match outcome {
                None => Ok(true),
                Some(Ok(())) => {
                    self.session.trim(running.stream.sequence())?;
                    running.stream.took(&self.session, device)?;
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
