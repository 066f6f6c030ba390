//! A chip that serves: requests wait for a sequence, run in shared steps, and end.

use std::collections::VecDeque;

use halite::batch::schedule::{self, Allowance, Entry, Limits, Part};
use halite::error::{Error, Result};
use halite::rng::SplitMix64;

use super::memory::{Cache, Room, Sequence};
use super::requests::{Prefix, Request};
use super::steps::{Step, Steps};
use super::{Served, Serving, Totals};

/// Tokens of a prompt for which a request waits until another one has computed them, as in the server.
const WORTH_WAITING: u32 = 8;

/// What a chip has to do for a request.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// The index of its request.
    pub request: usize,
    pub arrival_s: f64,
    pub prompt: u32,
    /// Tokens of the answer, and how many of them exist already.
    pub generate: u32,
    pub generated: u32,
    /// Tokens whose keys and values come with it.
    pub ready: u32,
    /// When its last token was chosen.
    pub last_s: f64,
    pub prefix: Option<Prefix>,
}

impl Job {
    /// All of a request.
    pub fn new(request: usize, of: &Request) -> Job {
        let Request { arrival_s, prompt, generate, prefix } = *of;
        Job { request, arrival_s, prompt, generate, generated: 0, ready: 0, last_s: arrival_s, prefix }
    }
}

impl Served {
    /// A request to which nothing has happened.
    pub(super) fn waiting(request: &Request) -> Served {
        let never = f64::NAN;
        let (began_s, first_s, end_s) = (never, never, never);
        Served { request: *request, began_s, first_s, end_s, reused: 0, preemptions: 0 }
    }
}

/// A job that has a sequence.
struct Running {
    job: Job,
    sequence: Sequence,
    /// Guesses of the next step.
    drafted: u32,
}

impl AsMut<Sequence> for Running {
    fn as_mut(&mut self) -> &mut Sequence {
        &mut self.sequence
    }
}

impl Running {
    /// Tokens to run before the next one can be chosen.
    fn pending(&self) -> u32 {
        self.job.prompt + self.job.generated - self.sequence.len
    }
}

/// A chip with all weights.
pub struct Replica {
    serving: Serving,
    random: SplitMix64,
    allowance: Allowance,
    cache: Cache,
    waiting: VecDeque<Job>,
    running: Vec<Running>,
    entries: Vec<Entry>,
    now: f64,
}

impl Replica {
    pub fn new(serving: Serving, seed: u64, cache: Cache) -> Replica {
        Replica {
            serving,
            random: SplitMix64::new(seed),
            allowance: Allowance::new(serving.step_s),
            cache,
            waiting: VecDeque::new(),
            running: Vec::new(),
            entries: Vec::new(),
            now: 0.0,
        }
    }

    /// Requests that it has.
    pub fn load(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    pub fn kv_peak_bytes(&self) -> u64 {
        self.cache.peak_bytes()
    }

    /// Adds a job that arrives now or, while a step runs, before its end.
    pub fn add(&mut self, job: Job, totals: &mut Totals) {
        if self.load() == 0 {
            self.now = self.now.max(job.arrival_s);
        }
        self.waiting.push_back(job);
        totals.queue = totals.queue.max(self.waiting.len());
    }

    /// Runs steps as long as they begin before a time and there is something to do.
    pub fn advance(
        &mut self,
        until_s: f64,
        steps: &mut Steps<'_>,
        served: &mut [Served],
        totals: &mut Totals,
    ) -> Result<()> {
        while self.now < until_s && self.load() > 0 {
            self.admit(served);
            let parts = self.plan();
            if parts.is_empty() {
                let what = "memory of the KV cache";
                return Err(Error::argument(what, "room for one request and its prefix", "too little"));
            }
            self.step(&parts, steps, served, totals)?;
            #[cfg(test)]
            self.cache.check(self.running.iter().map(|running| running.sequence));
        }
        Ok(())
    }

    /// Gives waiting jobs sequences in the order of arrival, as long as there are some.
    fn admit(&mut self, served: &mut [Served]) {
        while self.running.len() < self.serving.sequences as usize {
            let first = self.waiting.iter().position(|job| !self.is_begun(job));
            let Some(job) = first.and_then(|first| self.waiting.remove(first)) else { return };
            let mut sequence = Sequence { prefix: job.prefix, ..Sequence::default() };
            if job.ready == 0 {
                self.cache.begin(&mut sequence, job.prompt);
                let served = &mut served[job.request];
                (served.began_s, served.reused) = (self.now, sequence.len);
            } else if !self.cache.load(&mut sequence, job.ready) {
                // It waits until others end. Alone it has room.
                self.waiting.push_front(job);
                return;
            }
            self.running.push(Running { job, sequence, drafted: 0 });
        }
    }

    /// Whether a prompt that runs begins like this one, and more of it will be held once it has run: then it pays to wait.
    fn is_begun(&self, job: &Job) -> bool {
        let Some(prefix) = job.prefix else { return false };
        let is_coming = |running: &Running| {
            let of_group = running.job.prefix.filter(|other| other.group == prefix.group);
            of_group.filter(|_| running.pending() > 1).map(|other| other.tokens.min(prefix.tokens))
        };
        let there = self.cache.prefix_tokens(prefix.group).min(prefix.tokens);
        self.running
            .iter()
            .filter_map(is_coming)
            .max()
            .is_some_and(|coming| coming >= WORTH_WAITING && coming >= there + WORTH_WAITING)
    }

    fn plan(&mut self) -> Vec<Part> {
        self.entries.clear();
        self.entries.extend(self.running.iter_mut().map(|running| {
            running.drafted = 0;
            let (arrival, held) = (running.job.request as u64, running.sequence.len);
            Entry { priority: 0, arrival, pending: running.pending(), held }
        }));
        let most = self.serving.chunk;
        let limits = Limits {
            tokens: most,
            runs: self.serving.sequences,
            prefill: self.allowance.tokens(most, self.running.len() as u32),
        };
        let mut room = Room { cache: &mut self.cache, running: &mut self.running, reserved_bytes: 0 };
        let mut parts = schedule::plan(limits, &self.entries, &mut room);
        if let Some(draft) = self.serving.draft {
            let mut left = most.saturating_sub(parts.iter().map(|part| part.tokens).sum());
            for part in &mut parts {
                let Running { job, .. } = &room.running[part.entry];
                if self.entries[part.entry].pending != 1 || job.generated == 0 {
                    continue;
                }
                // The step itself gives a token.
                let count = draft.tokens.min(job.generate - job.generated - 1).min(left);
                if count > 0 && room.reserve_free(part.entry, part.tokens, count) {
                    room.running[part.entry].drafted = count;
                    part.tokens += count;
                    left -= count;
                }
            }
        }
        parts
    }

    /// Runs a step: its time passes, and its tokens are there.
    fn step(
        &mut self,
        parts: &[Part],
        steps: &mut Steps<'_>,
        served: &mut [Served],
        totals: &mut Totals,
    ) -> Result<()> {
        let mut step = Step::default();
        let (mut positions, mut products) = (0u64, 0.0);
        for part in parts {
            let running = &self.running[part.entry];
            let len = running.sequence.len;
            if part.tokens == 1 + running.drafted {
                step.texts += 1;
                step.text_tokens += part.tokens;
                positions += u64::from(len);
            } else {
                step.prompts += 1;
                step.prompt_tokens += part.tokens;
                products += f64::from(part.tokens) * (f64::from(len) + f64::from(part.tokens) / 2.0);
            }
        }
        step.context = positions as f64 / f64::from(step.texts.max(1));
        step.start = Step::start_of(products, step.prompt_tokens);
        let mut seconds = steps.seconds(&step)?;
        if let Some(draft) = self.serving.draft
            && step.text_tokens > step.texts
        {
            let alone =
                Step { texts: step.texts, text_tokens: step.texts, context: step.context, ..Step::default() };
            seconds += f64::from(draft.tokens) * draft.cost * steps.seconds(&alone)?;
        }
        if step.prompts > 0 {
            self.allowance.measured((step.text_tokens + step.prompt_tokens) as usize, seconds);
        }
        let before = self.now;
        self.now += seconds;
        totals.steps += 1;
        totals.busy_s += seconds;
        totals.text_steps += u64::from(step.texts > 0);
        totals.texts += u64::from(step.texts);
        totals.positions += positions as f64;
        totals.prompt_tokens += u64::from(step.prompt_tokens);
        totals.products += products;
        // Texts that also had a token in the step before.
        let mut went_on = 0;
        let mut has_ended = false;
        for part in parts {
            let Running { job, sequence, drafted } = &mut self.running[part.entry];
            let is_last = part.tokens == job.prompt + job.generated + *drafted - sequence.len;
            let right = match self.serving.draft {
                Some(draft) if *drafted > 0 => {
                    let is_right = |_: &u32| f64::from(self.random.unit()) < draft.accept;
                    (0..*drafted).take_while(is_right).count() as u32
                }
                _ => 0,
            };
            totals.drafted.0 += u64::from(*drafted);
            totals.drafted.1 += u64::from(right);
            self.cache.push(sequence, part.tokens - *drafted + right);
            if !is_last {
                continue;
            }
            let count = 1 + right;
            if job.generated == 0 {
                served[job.request].first_s = self.now;
            } else if count == 1 && job.last_s == before {
                went_on += 1;
            } else {
                let gap = (self.now - job.last_s) / f64::from(count);
                totals.gaps.add(gap, count.into());
            }
            job.last_s = self.now;
            job.generated += count;
            totals.generated += u64::from(count);
            has_ended |= job.generated == job.generate;
        }
        totals.gaps.add(seconds, went_on);
        // Once all have their pages, as what is shared may take more.
        for part in parts {
            self.cache.share(&mut self.running[part.entry].sequence);
        }
        if has_ended {
            self.end(served);
        }
        Ok(())
    }

    /// Ends the jobs that have all their tokens.
    fn end(&mut self, served: &mut [Served]) {
        let cache = &mut self.cache;
        self.running.retain_mut(|Running { job, sequence, .. }| {
            let goes_on = job.generated < job.generate;
            if !goes_on {
                cache.release(sequence);
                let served = &mut served[job.request];
                served.end_s = job.last_s;
                served.preemptions += sequence.preemptions;
            }
            goes_on
        });
    }
}
