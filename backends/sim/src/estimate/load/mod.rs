//! Predicts serving under load: requests arrive over time, and replicas of a chip run them in shared steps.
//!
//! The events are the steps. Which tokens run in a step is decided by [`halite::batch::schedule`], as in the server; how long it takes is
//! [`steps`]'s closed form; what the KV cache holds is counted in pages. Nothing is computed.

mod memory;
pub mod requests;
mod serve;
pub mod steps;
pub mod summary;

use halite::error::{Error, Result};
use halite::program::Program;
use halite_profiles::profile::Profile;

use super::collective::Fabric;
use super::system::stages;
use super::workload::{Choices, System, usd_per_s};
use crate::Joules;
use memory::{Cache, Pages};
use requests::Request;
use serve::{Job, Replica};
use steps::Steps;
use summary::Histogram;

/// Guesses of a draft model, checked by the model in one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draft {
    /// Tokens that are guessed for each text in a step.
    pub tokens: u32,
    /// Probability that a guess is right if those before it are.
    pub accept: f64,
    /// Time of one guess for all texts, as a share of the time of a step that generates a token of each.
    pub cost: f64,
}

/// How requests are served.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Serving {
    /// Requests that a chip runs at once, at most.
    pub sequences: u32,
    /// Tokens of a step, at most.
    pub chunk: u32,
    /// Seconds that a step may take in which prompts run beside text.
    pub step_s: f64,
    /// Chips that serve, each with all weights. A request goes to the one with the fewest requests.
    pub replicas: u32,
    /// Chips that only run prompts: they send the KV cache to the replicas, which only generate. 0: replicas do both.
    pub prefill: u32,
    /// Guesses, if there are any.
    pub draft: Option<Draft>,
    /// The seed of which guesses are right.
    pub seed: u64,
}

impl Default for Serving {
    /// One chip with the limits of a session.
    fn default() -> Serving {
        let step_s = halite::batch::STEP_TIME.as_secs_f64();
        let sequences = halite::session::MAX_RUNS as u32;
        Serving { sequences, chunk: 512, step_s, replicas: 1, prefill: 0, draft: None, seed: 0 }
    }
}

halite::setters!(const Serving {
    sequences: u32,
    chunk: u32,
    step_s: f64,
    replicas: u32,
    prefill: u32,
    draft: Option<Draft>,
    seed: u64,
});

impl Serving {
    fn check(&self) -> Result<()> {
        for (what, value) in
            [("sequences", self.sequences), ("chunk", self.chunk), ("replicas", self.replicas)]
        {
            if value == 0 {
                return Err(Error::argument(what, "at least 1", 0));
            }
        }
        if self.step_s.is_nan() || self.step_s <= 0.0 {
            return Err(Error::argument("time of a step", "above 0 s", self.step_s));
        }
        match self.draft {
            Some(draft) if !(0.0..=1.0).contains(&draft.accept) => {
                Err(Error::argument("share of right guesses", "0 to 1", draft.accept))
            }
            Some(draft) if !(draft.cost >= 0.0 && draft.cost.is_finite()) => {
                Err(Error::argument("cost of a guess", "0 steps or more", draft.cost))
            }
            _ => Ok(()),
        }
    }
}

/// What happened to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Served {
    /// The request.
    pub request: Request,
    /// When it was given a sequence, in seconds from the start of the load.
    pub began_s: f64,
    /// When it had its first token.
    pub first_s: f64,
    /// When it had its last token.
    pub end_s: f64,
    /// Tokens of its prompt that were held already.
    pub reused: u32,
    /// Times that it lost its memory to others.
    pub preemptions: u32,
}

impl Served {
    /// Seconds from its arrival to its first token.
    pub fn first_token_s(&self) -> f64 {
        self.first_s - self.request.arrival_s
    }

    /// Mean seconds between its tokens; 0 if there is only one.
    pub fn per_token_s(&self) -> f64 {
        (self.end_s - self.first_s) / f64::from(self.request.generate.saturating_sub(1).max(1))
    }

    /// Seconds from its arrival to its end.
    pub fn total_s(&self) -> f64 {
        self.end_s - self.request.arrival_s
    }
}

/// The sums over all steps.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Totals {
    /// Steps.
    pub steps: u64,
    /// Seconds of all steps, of all chips.
    pub busy_s: f64,
    /// Steps that generated text.
    pub text_steps: u64,
    /// Sequences that generated text, over all steps.
    pub texts: u64,
    /// Positions before these.
    pub positions: f64,
    /// Tokens of prompts that ran, also those that ran again.
    pub prompt_tokens: u64,
    /// Products of queries and keys of prompts.
    pub products: f64,
    /// Tokens that were generated.
    pub generated: u64,
    /// Guesses, and those that were right.
    pub drafted: (u64, u64),
    /// The most requests that waited at once for a sequence.
    pub queue: usize,
    /// Seconds between two tokens of a request. Tokens of one step have equal parts of the time since the one before.
    pub gaps: Histogram,
}

/// What happened under a load.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outcome {
    /// The requests, in the order of arrival.
    pub served: Vec<Served>,
    /// Sums over all steps of all chips.
    pub totals: Totals,
    /// The most bytes of KV cache that a chip had in use.
    pub kv_peak_bytes: u64,
    /// The bytes that it could have.
    pub kv_bytes: u64,
    /// Work and idle power in joules, if the profile has the numbers.
    pub joules: Option<Joules>,
    /// Price, if the profile has the numbers.
    pub usd: Option<f64>,
    /// Replicas, and those that only run prompts.
    pub servers: u32,
    /// The chips of all of these.
    pub chips: u32,
}

impl Outcome {
    /// Seconds from the first arrival to the last token.
    pub fn seconds(&self) -> f64 {
        let first = self.served.first().map_or(0.0, |served| served.request.arrival_s);
        self.served.iter().map(|served| served.end_s).fold(first, f64::max) - first
    }
}

/// A model on the chips of a profile, ready for loads.
#[derive(Debug)]
pub struct Server<'a> {
    profile: &'a Profile,
    serving: Serving,
    steps: Steps<'a>,
    pages: Pages,
    kv_bytes: u64,
    context: u32,
}

impl<'a> Server<'a> {
    /// Puts a program on the chips of a profile, for requests of up to `context` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for options out of range, and for weights that do not fit; errors of [`crate::Chip::new`].
    pub fn new(
        profile: &'a Profile,
        choices: Choices,
        program: &Program,
        context: u32,
        serving: Serving,
    ) -> Result<Server<'a>> {
        serving.check()?;
        let layout = choices.layout;
        let refused = layout.ways().into_iter().find(|(name, n)| ["pp", "dp"].contains(name) && *n != 1);
        if let Some((name, n)) = refused {
            let expected = "tp, ep and cp, and replicas instead of copies, under load";
            return Err(Error::argument("layout", expected, format!("{name} {n}")));
        }
        let stages = stages(program, layout)?;
        let program = &stages[0].program;
        let have = profile.holding_bytes();
        let weights = stages[0].weight_bytes(choices);
        let pages = Pages::new(program, layout.context, choices.cache_fraction(program));
        let Some(kv_bytes) = have.checked_sub(weights).filter(|bytes| *bytes >= pages.bytes(1, 0)) else {
            let got = format!("{weights} bytes of weights on {}", profile.name);
            return Err(Error::argument("memory", format!("room for a page within {have} bytes"), got));
        };
        // The cache may take all that weights leave.
        let amounts = vec![stages[0].amounts(choices, kv_bytes, serving.chunk, serving.sequences)];
        let system = System::new(profile, choices, stages, &amounts)?;
        let texts = serving.sequences.min(serving.chunk);
        let steps = Steps::new(system, texts, serving.chunk, context);
        Ok(Server { profile, serving, steps, pages, kv_bytes, context })
    }

    /// Returns what every chip does alike because it cannot be divided, one line each.
    pub fn repeated(&self) -> &[String] {
        self.steps.repeated()
    }

    /// The times of steps.
    pub fn steps(&mut self) -> &mut Steps<'a> {
        &mut self.steps
    }

    /// Serves requests, which are in the order of arrival.
    ///
    /// # Errors
    /// [`Error::Argument`] for requests that are out of order, too long, or too large for the memory; errors of steps' times; without a
    /// link, for prompts that run on other chips.
    pub fn serve(&mut self, requests: &[Request]) -> Result<Outcome> {
        self.check(requests)?;
        let mut totals = Totals::default();
        let mut served: Vec<Served> = requests.iter().map(Served::waiting).collect();
        let prefill = self.serving.prefill > 0;
        let mut jobs: Vec<Job> =
            requests.iter().enumerate().map(|(i, request)| Job::new(i, request)).collect();
        let mut kv_peak_bytes = 0;
        if prefill {
            jobs.iter_mut().for_each(|job| job.generate = 1);
            kv_peak_bytes = self.run(self.serving.prefill, &jobs, &mut served, &mut totals)?;
            jobs = self.sent(&served)?;
        }
        kv_peak_bytes = self.run(self.serving.replicas, &jobs, &mut served, &mut totals)?.max(kv_peak_bytes);
        let servers = self.serving.replicas + self.serving.prefill;
        let chips = servers * self.steps.layout().of_stage();
        let (kv_bytes, joules, usd) = (self.kv_bytes, None, None);
        let mut outcome = Outcome { served, totals, kv_peak_bytes, kv_bytes, joules, usd, servers, chips };
        let chip_s = outcome.seconds() * f64::from(chips);
        outcome.usd = usd_per_s(self.profile).map(|usd| usd * chip_s);
        let idle = self.profile.idle_joules(chip_s);
        outcome.joules = self.work_j(&outcome.totals)?.zip(idle).map(|(work, idle)| Joules { idle, ..work });
        Ok(outcome)
    }

    fn check(&self, requests: &[Request]) -> Result<()> {
        let mut before = 0.0;
        for (i, request) in requests.iter().enumerate() {
            let Request { arrival_s, prompt, generate, prefix } = *request;
            let wrong = |expected: String, got: String| {
                Err(Error::argument("requests", expected, format!("{got} in request {}", i + 1)))
            };
            if !(arrival_s >= before && arrival_s.is_finite()) {
                return wrong(format!("arrival from {before} s on"), format!("{arrival_s} s"));
            }
            before = arrival_s;
            if prompt == 0 || generate == 0 || prefix.is_some_and(|prefix| prefix.tokens > prompt) {
                let expected = "a prompt of at least one token that contains its prefix, and an answer";
                return wrong(expected.into(), format!("{prompt} and {generate} tokens"));
            }
            let tokens = u64::from(prompt) + u64::from(generate);
            if tokens > self.context.into() {
                return wrong(format!("at most {} tokens", self.context), tokens.to_string());
            }
            // The last token is never in the cache.
            let bytes = self.pages.bytes((tokens - 1) as u32, 0);
            if bytes > self.kv_bytes {
                let expected = format!("at most {} bytes of KV cache", self.kv_bytes);
                return wrong(expected, format!("{bytes} bytes for {tokens} tokens"));
            }
        }
        Ok(())
    }

    /// Runs jobs on so many chips. Returns the most bytes of KV cache that one had in use.
    fn run(&mut self, chips: u32, jobs: &[Job], served: &mut [Served], totals: &mut Totals) -> Result<u64> {
        let replica = |i: u32| {
            let cache = Cache::new(self.pages.clone(), self.kv_bytes);
            Replica::new(self.serving, self.serving.seed.wrapping_add(i.into()), cache)
        };
        let mut replicas: Vec<Replica> = (0..chips).map(replica).collect();
        for job in jobs {
            for replica in &mut replicas {
                replica.advance(job.arrival_s, &mut self.steps, served, totals)?;
            }
            if let Some(least) = replicas.iter_mut().min_by_key(|replica| replica.load()) {
                least.add(*job, totals);
            }
        }
        for replica in &mut replicas {
            replica.advance(f64::INFINITY, &mut self.steps, served, totals)?;
        }
        Ok(replicas.iter().map(Replica::kv_peak_bytes).max().unwrap_or(0))
    }

    /// Returns the jobs that are left once prompts have run, by when their KV cache arrives. Each has all links for itself.
    fn sent(&self, served: &[Served]) -> Result<Vec<Job>> {
        let fabric = Fabric::new(self.profile)?;
        // The chips of a stage each send their part to one further on.
        let apart = self.steps.layout().of_stage();
        let left = served.iter().enumerate().filter(|(_, served)| served.request.generate > 1);
        let mut jobs: Vec<Job> = left
            .map(|(i, served)| {
                let bytes = self.pages.bytes(served.request.prompt, 0);
                let arrival_s = served.first_s + fabric.send_s(bytes as f64, apart);
                let sent =
                    Job { arrival_s, generated: 1, last_s: served.first_s, ..Job::new(i, &served.request) };
                Job { prefix: None, ready: sent.prompt, ..sent }
            })
            .collect();
        jobs.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
        Ok(jobs)
    }

    /// Joules of all work, taken from a decode step and a prefill step of mean size.
    fn work_j(&self, totals: &Totals) -> Result<Option<Joules>> {
        // Steps with their energy take long to simulate.
        if self.profile.idle_joules(0.0).is_none() {
            return Ok(None);
        }
        let mut sum = Some(Joules::default());
        let mut add = |steps: f64, spans: &[(u32, u32)]| -> Result<()> {
            if steps > 0.0 {
                let joules = self.steps.joules(spans)?;
                sum = sum.zip(joules).map(|(sum, joules)| sum + steps * joules);
            }
            Ok(())
        };
        let mean = |sum: f64, count: u64| (sum / count.max(1) as f64).round() as u32;
        let texts = mean(totals.texts as f64, totals.text_steps).max(1);
        let context = mean(totals.positions, totals.texts);
        add(totals.texts as f64 / f64::from(texts), &vec![(context, 1); texts as usize])?;
        let chunk = self.serving.chunk.min(totals.prompt_tokens.min(u32::MAX.into()) as u32);
        let start = mean(totals.products, totals.prompt_tokens).saturating_sub(chunk / 2);
        add(totals.prompt_tokens as f64 / f64::from(chunk.max(1)), &[(start, chunk)])?;
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use halite::kernels::formats::Format;
    use halite::synth::{Formats, Synth, shape};
    use halite_profiles::profile::{Profile, SHIPPED};

    use super::requests::Draw;
    use super::summary::Summary;
    use super::{Choices, Draft, Server, Serving};
    use crate::estimate::system::Layout;

    /// Replicas check their cache after each step: pages in use are those of the requests that run and of the prefixes that are kept.
    #[test]
    fn pages_are_neither_lost_nor_used_twice() {
        let text = SHIPPED.iter().find(|(name, _)| *name == "maia-100").unwrap().1;
        let (mut preemptions, mut reused) = (0, 0.0);
        let model = Synth::new(shape("llama-1.1b").unwrap(), Formats::of(Format::Q4_0), 0).unwrap();
        let plain = model.model().unwrap().program(Default::default(), 2048).unwrap();
        let mut windowed = plain.clone();
        windowed.states.iter_mut().step_by(2).for_each(|state| state.window = Some(256));
        windowed.windows = vec![None, Some(256)];
        for (program, context) in [(plain, 1), (windowed.clone(), 1), (windowed, 2)] {
            for (seed, pages) in [32, 40, 80, 400].into_iter().enumerate() {
                let capacity = program.weight_bytes() + pages * program.kv_bytes(|_| 1);
                // Clusters keep next to nothing.
                let text = text.replace("15_000_000", "64").replace("64_000_000_000", &capacity.to_string());
                let profile = Profile::parse("maia", &text).unwrap();
                let draft = (seed % 2 == 1).then_some(Draft { tokens: 2, accept: 0.5, cost: 0.1 });
                let serving = Serving::default().sequences(16).draft(draft);
                let lengths = "lognormal:200,900/lognormal:30,200".parse().unwrap();
                let mut draw = Draw::new(300, seed as u64, lengths, 2048);
                (draw.prefix, draw.groups) = (150 + 100 * seed as u32, 6);
                let (requests, _) = draw.poisson(100.0).unwrap();
                let choices = Choices::default().layout(Layout::default().context(context));
                let mut server = Server::new(&profile, choices, &program, 2048, serving).unwrap();
                let summary = Summary::new(&server.serve(&requests).unwrap(), None);
                preemptions += summary.preemptions;
                reused += summary.reused;
            }
        }
        assert!(preemptions > 0 && reused > 0.0);
    }
}
