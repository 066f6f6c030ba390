//! A model under a name, on one or more devices. A request goes to one of them, and continues on another if the first one fails.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use halite::backend::Contract;
use halite::batch::{Request, STEP_TIME};
use halite::chat::Template;
use halite::constrain::{Guide, Rule, Vocabulary};
use halite::generate::{Constraint, Finish, GenerateOptions, Generation};
use halite::sampler::Logprobs;
use halite::{Error, Model, SessionOptions, Tokenizer};
use tokio::sync::{Semaphore, mpsc as channel, watch};

use crate::Host;
use crate::access::{Admission, Filtered, OutputFilter};
use crate::basics::chance;
use crate::engine::{Engine, Place, Refused, Ticket, Took, Update};
use crate::journal::{Conflict, Entry};
use crate::ledger::{Part, Prices, Receipt};
use crate::replica::{Device, Loaded, Replica, Status};
use crate::trace::{Course, Phase, Trace, counted};

/// How a request finds its replica among those that work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Policy {
    /// The first one that has a free slot, in the order of the configuration; if none has, the one with the least load.
    #[default]
    Order,
    /// The one with the fewest requests per slot.
    Load,
    /// The one whose tokens take the least time, times its load.
    Latency,
    /// By chance, in proportion to the weights.
    Weight,
}

/// Guessed tokens that a step may verify for each text.
const LOOKUP: u32 = 8;

/// What a model needs to be served.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelOptions {
    /// The session. Its `outputs` and `sequences` are how many requests run at once.
    pub session: SessionOptions,
    /// Requests that may wait; more are refused.
    pub queue: usize,
    /// Tokens of a text that a step may guess; see [`halite::batch::Batch::lookup`].
    pub lookup: u32,
    /// How long a step may take in which prompts run beside text; see [`halite::batch::Batch::step_time`].
    pub step_time: Duration,
    /// A Jinja chat template instead of the model's.
    pub template: Option<String>,
    /// How requests are shared among the devices.
    pub policy: Policy,
    /// A device whose step takes longer is given up.
    pub step_timeout: Duration,
    /// What requests cost.
    pub prices: Option<Prices>,
    /// The SHA-256 of the model's file, for receipts.
    pub sha256: Option<String>,
}

impl ModelOptions {
    /// A session for `slots` requests at once, and a queue of 16 for each.
    pub fn new(session: SessionOptions, slots: u32) -> ModelOptions {
        let session = session.outputs(slots).sequences(slots);
        let (template, policy, prices, sha256) = Default::default();
        let step_timeout = Duration::from_secs(60);
        let (queue, lookup, step_time) = (16 * slots as usize, LOOKUP, STEP_TIME);
        ModelOptions { session, queue, lookup, step_time, template, policy, step_timeout, prices, sha256 }
    }
}

/// What all replicas of a model share.
#[derive(Debug)]
pub(crate) struct Opened {
    pub model: Arc<Model>,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<Template>,
    pub session: SessionOptions,
    pub queue: usize,
    pub lookup: u32,
    pub step_time: Duration,
    /// The vocabularies of rules, by the control tokens that they may ask for.
    vocabularies: Mutex<Vec<(Control, Vocabulary)>>,
    /// The tokens of the health probe on devices that are exact, and the engines that gave them.
    probe: Mutex<(Vec<u32>, Vec<Weak<Engine>>)>,
}

impl Opened {
    fn new(model: &Arc<Model>, options: &ModelOptions) -> Result<Opened, Error> {
        let tokenizer = Tokenizer::from_gguf(model.gguf())?;
        let tokenizer = tokenizer.ok_or_else(|| Error::Tokenizer("the model has no vocabulary".into()))?;
        let template = match &options.template {
            Some(source) => Some(Template::new(source, &tokenizer)?),
            None => Template::from_gguf(model.gguf(), &tokenizer)?,
        };
        Ok(Opened {
            model: model.clone(),
            tokenizer: Arc::new(tokenizer),
            template,
            session: options.session.clone(),
            queue: options.queue,
            lookup: options.lookup,
            step_time: options.step_time,
            vocabularies: Mutex::default(),
            probe: Mutex::default(),
        })
    }

    /// Compiles a rule, which takes up to seconds.
    fn guide(&self, rule: &Rule, control: Control) -> Result<Guide, Error> {
        let mut known = self.vocabularies.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.iter().find(|(of, _)| *of == control).map(|(_, vocabulary)| vocabulary.clone());
        let vocabulary = match found {
            Some(vocabulary) => vocabulary,
            None => {
                let read = Vocabulary::with_control(&self.tokenizer, control)?;
                known.push((control, read.clone()));
                read
            }
        };
        drop(known);
        Guide::of(&vocabulary, rule)
    }

    /// Compares the health probes of devices that must agree.
    pub fn agree(&self, contract: Contract, probe: &[u32]) -> Result<(), Error> {
        if contract != Contract::Exact {
            return Ok(());
        }
        let mut known = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
        let (known, engines) = &mut *known;
        // Those that were taken out bind nobody.
        engines.retain(|engine| engine.upgrade().is_some_and(|engine| engine.lost().is_none()));
        if engines.is_empty() {
            *known = probe.to_vec();
        }
        if known == probe {
            return Ok(());
        }
        Err(Error::Argument {
            what: "tokens of the health probe",
            expected: format!("{known:?}, as on other devices"),
            got: format!("{probe:?}"),
        })
    }

    /// Notes an engine that is exact.
    pub fn agreed(&self, engine: &Arc<Engine>) {
        self.probe.lock().unwrap_or_else(PoisonError::into_inner).1.push(Arc::downgrade(engine));
    }
}

/// The texts of control tokens.
pub(crate) type Control = &'static [&'static str];

/// A text to generate.
#[derive(Debug)]
pub(crate) struct Job {
    pub prompt: Arc<[u32]>,
    pub options: GenerateOptions,
    /// What the text is held to, and the control tokens that are a part of it.
    pub rule: Option<(Rule, Control)>,
    /// Those of different tenants share no KV pages.
    pub tenant: u64,
    pub priority: i32,
    /// When the text ends, whatever it has by then.
    pub deadline: Option<Instant>,
    pub bill: Bill,
    /// What the journal has of it, if it has an idempotency key.
    pub entry: Option<Entry>,
    /// The rules on answers.
    pub filter: OutputFilter,
}

/// Whose a text is.
#[derive(Debug, Clone)]
pub(crate) struct Bill {
    /// The trace of the HTTP request.
    pub trace: Arc<Trace>,
    /// The SHA-256 of its idempotency key.
    pub idempotency_sha256: Option<String>,
    pub endpoint: &'static str,
    /// Counts against the client's limits. Texts of one request share it.
    pub admission: Arc<Admission>,
    /// Further texts after the same prompt do not pay for it.
    pub has_prompt: bool,
}

impl Bill {
    /// A receipt of a model, without what it took.
    pub fn receipt(&self, model: &str) -> Receipt {
        Receipt {
            request: self.trace.request().to_owned(),
            idempotency_sha256: self.idempotency_sha256.clone(),
            client: self.admission.client().name().to_owned(),
            model: model.to_owned(),
            endpoint: self.endpoint.to_owned(),
            started_unix_ms: self.trace.started_unix_ms(),
            ..Receipt::default()
        }
    }
}

/// How a request ended, and what it took.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub generation: Box<Generation>,
    /// Whether every device gives the bits of every other.
    pub is_exact: bool,
    pub receipt: Receipt,
    /// Whether the ledger has the receipt, if there is one.
    pub is_recorded: bool,
    /// Why the server ended the text, if it did.
    pub early: Option<Early>,
}

/// Why a text ended before the model ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Early {
    /// A rule on answers denied it.
    Denied,
    /// Its deadline passed.
    Late,
}

impl Early {
    /// Its name in receipts.
    fn name(self) -> &'static str {
        match self {
            Early::Denied => "content_filter",
            Early::Late => "deadline",
        }
    }
}

/// What the client of a request is told.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Text that is complete, and how likely its tokens were if that was asked for.
    Text { text: String, logprobs: Vec<Logprobs> },
    /// The request is done.
    Done(Box<Outcome>),
    /// The request failed.
    Failed(Failed),
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error(transparent)]
    Conflict(#[from] Conflict),
    #[error(transparent)]
    Error(#[from] Error),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("the deadline passed before the text began")]
    Late,
}

/// A request under way. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Running {
    progress: channel::UnboundedReceiver<Progress>,
}

impl Running {
    /// Waits for what comes next; `None` after the end.
    pub async fn next(&mut self) -> Option<Progress> {
        self.progress.recv().await
    }

    /// As [`Running::next`], for streams.
    pub fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<Progress>> {
        self.progress.poll_recv(context)
    }
}

/// A model under a name.
#[derive(Debug)]
pub struct Hosted {
    name: String,
    opened: Arc<Opened>,
    replicas: Vec<Arc<Replica>>,
    policy: Policy,
    prices: Option<Prices>,
    sha256: Option<String>,
    host: Arc<Host>,
}

/// Rules that are compiled at once.
static COMPILING: Semaphore = Semaphore::const_new(2);

/// How often a request may move.
const MOST_MOVES: usize = 8;
/// How long a request waits for a device that works.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(250);
/// Devices on which a request may give numbers that are not finite. After that the model or the prompt is at fault.
const MOST_NOT_FINITE: usize = 2;

impl Hosted {
    pub(crate) fn new(
        name: &str,
        model: &Arc<Model>,
        devices: Vec<Device>,
        options: &ModelOptions,
        host: &Arc<Host>,
    ) -> Result<Hosted, Error> {
        if devices.is_empty() {
            return Err(Error::Argument {
                what: "devices",
                expected: "at least one".into(),
                got: "none".into(),
            });
        }
        let replicas: Vec<_> = devices
            .into_iter()
            .map(|device| Arc::new(Replica::new(device, name, options.step_timeout)))
            .collect();
        replicas.iter().for_each(|replica| host.memory.share_with(replica));
        Ok(Hosted {
            name: name.to_owned(),
            opened: Arc::new(Opened::new(model, options)?),
            replicas,
            policy: options.policy,
            prices: options.prices.clone(),
            sha256: options.sha256.clone(),
            host: host.clone(),
        })
    }

    /// The name by which clients ask for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.opened.model
    }

    /// Its vocabulary.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.opened.tokenizer
    }

    /// Its chat template.
    pub fn template(&self) -> Option<&Template> {
        self.opened.template.as_ref()
    }

    /// Tokens that a request may have, its prompt included.
    pub fn positions(&self) -> u32 {
        self.opened.session.positions(&self.opened.model)
    }

    /// Requests that may run and wait at once.
    pub fn most(&self) -> usize {
        let slots = self.opened.session.outputs.min(self.opened.session.sequences);
        (slots as usize).saturating_add(self.opened.queue)
    }

    /// The SHA-256 of its file, if it is known.
    pub fn sha256(&self) -> Option<&str> {
        self.sha256.as_deref()
    }

    pub(crate) fn status(&self) -> Vec<Status> {
        self.replicas.iter().map(|replica| replica.status()).collect()
    }

    /// Loads a replica, so that the first request need not wait for it.
    ///
    /// # Errors
    /// Why none could be loaded.
    pub async fn load(&self) -> Result<(), Refused> {
        self.find(&[]).await.map(drop)
    }

    /// Loads all replicas, as far as memory allows.
    ///
    /// # Errors
    /// Why the first one that could not be loaded was not; the others are loaded all the same.
    pub(crate) async fn load_all(&self) -> Result<(), Refused> {
        let mut loaded = Ok(());
        for replica in &self.replicas {
            let one = replica.engine(&self.opened, &self.host.memory).await;
            loaded = loaded.and(one.map(drop));
        }
        loaded
    }

    /// Unloads the replicas that are idle.
    pub(crate) async fn unload(&self) {
        let unloaded: Vec<Loaded> = self.replicas.iter().filter_map(|replica| replica.unload()).collect();
        let finish = move || unloaded.iter().for_each(|loaded| loaded.engine.finish());
        // A panic there is an engine's, whose requests were told.
        let _ = tokio::task::spawn_blocking(finish).await;
    }

    /// Takes out replicas whose health probe fails, and tries those that have rested.
    pub(crate) async fn check_health(&self) {
        for replica in &self.replicas {
            match replica.loaded() {
                Some(loaded) => {
                    if let Err(why) = replica.probe(&loaded).await {
                        replica.fail(&loaded.engine, &why);
                    }
                }
                None => {
                    let has_rested = replica.failures() > 0 && replica.may_run().is_ok();
                    // Its failure is noted there.
                    if has_rested && let Ok(loaded) = replica.engine(&self.opened, &self.host.memory).await {
                        replica.succeeded(&loaded.engine);
                    }
                }
            }
        }
    }

    /// Whether a request could run now, or after loading.
    pub(crate) fn is_ready(&self) -> bool {
        self.replicas.iter().any(|replica| replica.may_run().is_ok())
    }

    /// The replicas that may run a request, best first.
    fn ranked(&self, without: &[Arc<Replica>]) -> Vec<Arc<Replica>> {
        let candidates = self.replicas.iter().filter(|replica| {
            replica.may_run().is_ok() && !without.iter().any(|other| Arc::ptr_eq(other, replica))
        });
        let rank = |replica: &Replica| match self.policy {
            Policy::Order => {
                let load = replica.load();
                if load < 1.0 { 0.0 } else { load }
            }
            Policy::Load => replica.load(),
            Policy::Latency => replica.token_us() as f64 * (1.0 + replica.load()),
            // The smallest of exponential variates, with the weights as rates, is each one's by its weight.
            Policy::Weight => -chance().ln() / replica.device.weight.max(f64::MIN_POSITIVE),
        };
        // One that failed and is not loaded again yet is the last resort: it may fail again, or hang.
        let is_doubtful = |replica: &Replica| replica.failures() > 0 && replica.loaded().is_none();
        let rank = |replica: &Replica| (is_doubtful(replica), rank(replica));
        let mut ranked: Vec<_> = candidates.map(|replica| (rank(replica), replica.clone())).collect();
        ranked.sort_by(|(a, _), (b, _)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        ranked.into_iter().map(|(_, replica)| replica).collect()
    }

    /// Finds a replica that works, and loads it if need be.
    async fn find(&self, without: &[Arc<Replica>]) -> Result<(Arc<Replica>, Loaded), Refused> {
        let mut without = without.to_vec();
        let mut refused = None;
        while let Some(best) = self.ranked(&without).into_iter().next() {
            if let Some(loaded) = best.ready() {
                return Ok((best, loaded));
            }
            // While it loads, others take its places: the best one may then be another.
            if let Err(error) = best.engine(&self.opened, &self.host.memory).await {
                refused = Some(error);
                without.push(best);
            }
        }
        let why = || self.replicas.iter().find_map(|replica| replica.may_run().err());
        Err(refused.unwrap_or_else(|| Refused::Down(why().unwrap_or_default())))
    }

    /// Takes a place on a replica that works.
    async fn place(&self, without: &[Arc<Replica>]) -> Result<(Arc<Replica>, Loaded, Place), Refused> {
        let mut tried = without.to_vec();
        loop {
            let (replica, loaded) = self.find(&tried).await?;
            match loaded.engine.reserve() {
                Ok(place) => return Ok((replica, loaded, place)),
                // Another one may have room.
                Err(refused) if self.ranked(&tried).len() <= 1 => return Err(refused),
                Err(_) => tried.push(replica),
            }
        }
    }

    /// Begins a request. It has a place when this returns.
    ///
    /// # Errors
    /// [`Failed::Refused`] if there is none; [`Failed::Error`] if its rule is wrong.
    pub(crate) async fn submit(self: &Arc<Self>, job: Job) -> Result<Running, Failed> {
        let submitted = self.try_submit(job).await;
        if matches!(submitted, Err(Failed::Refused(_))) {
            self.host.metrics.refused(&self.name);
        }
        submitted
    }

    async fn try_submit(self: &Arc<Self>, mut job: Job) -> Result<Running, Failed> {
        let course = Course::new();
        self.host.books.check().await.map_err(|_| Refused::Ledger)?;
        let (replica, loaded, place) = tokio::select! {
            place = self.place(&[]) => place?,
            () = due(job.deadline) => return Err(Failed::Late),
        };
        // What the journal has comes again, for a client that lost it.
        let had = job.entry.as_ref().map(|entry| entry.tokens.clone()).unwrap_or_default();
        if job.entry.as_ref().is_some_and(|entry| entry.finish.is_some()) && !had.is_empty() {
            // It is complete: no step runs.
            job.options.max_tokens = had.len() as u32;
        }
        let request = self.request(&job, had).await?;
        let ticket = loaded.engine.submit(place, request);
        let (sender, progress) = channel::unbounded_channel();
        let run = Run { hosted: self.clone(), job, sender, course };
        tokio::spawn(run.run(replica, loaded, ticket));
        Ok(Running { progress })
    }

    /// The request of a job that has some tokens already.
    async fn request(&self, job: &Job, tokens: Vec<u32>) -> Result<Request, Error> {
        let request = Request::new(job.prompt.to_vec()).options(job.options.clone()).resumed(tokens);
        let request = request.tenant(job.tenant).priority(job.priority).deadline(job.deadline);
        let Some((rule, control)) = job.rule.clone() else { return Ok(request) };
        let opened = self.opened.clone();
        let had = request.resumed.clone();
        let compile = move || {
            let mut guide = opened.guide(&rule, control)?;
            had.iter().try_for_each(|&token| guide.accept(token))?;
            Ok(guide)
        };
        // A rule has a limit of time: many at once would not keep it.
        let permit = COMPILING.acquire().await;
        let guide = tokio::task::spawn_blocking(compile).await;
        drop(permit);
        let guide = guide.unwrap_or_else(|_| Err(Error::Constraint("compiling it failed inside".into())))?;
        Ok(request.constraint(Some(Box::new(guide) as _)))
    }
}

/// A request that runs, on one replica after another.
struct Run {
    hosted: Arc<Hosted>,
    job: Job,
    sender: channel::UnboundedSender<Progress>,
    course: Course,
}

/// How a request left a replica.
enum Left {
    Done(Box<Generation>),
    /// The request is at fault.
    Failed(Error),
    /// The replica is at fault.
    Lost(String),
    /// One of them is: its numbers are not finite.
    NotFinite(Error),
}

/// What a request has so far.
#[derive(Default)]
struct SoFar {
    tokens: Vec<u32>,
    parts: Vec<Part>,
    /// What each part took.
    took: Vec<Took>,
    contracts: Vec<Contract>,
    early: Option<Early>,
}

impl Run {
    async fn run(mut self, mut replica: Arc<Replica>, mut loaded: Loaded, mut ticket: Ticket) {
        // Until the receipt is written.
        let _running = self.hosted.host.runs.stopping.subscribe();
        let mut so_far = SoFar::default();
        let mut tried = Vec::new();
        let mut not_finite = 0;
        let last = loop {
            let had = so_far.tokens.len();
            so_far.contracts.push(loaded.contract);
            let left = self.follow(&mut ticket, &mut so_far, &replica.device.name).await;
            let tokens = (so_far.tokens.len() - had) as u32;
            if self.course.is_in(Phase::Decode) {
                self.course.note(counted("halite.tokens", tokens.into()));
            }
            let took = match &left {
                Left::Done(generation) => Took::of(generation),
                _ => ticket.took(),
            };
            let device_us = micros(took.device);
            so_far.parts.push(Part {
                replica: replica.device.name.clone(),
                tokens: tokens.into(),
                device_us,
            });
            so_far.took.push(took);
            let why = match left {
                Left::Done(mut generation) => {
                    if let Some(entry) = &self.job.entry {
                        generation.finish =
                            entry.finish.as_deref().and_then(Finish::named).unwrap_or(generation.finish);
                        if generation.finish != Finish::Cancelled {
                            entry.ended(generation.finish.name());
                        }
                    }
                    if self.course.is_in(Phase::Decode) {
                        self.course.note(counted("halite.cached_tokens", generation.reused_tokens.into()));
                    }
                    replica.succeeded(&loaded.engine);
                    break Ok(generation);
                }
                Left::Failed(error) => {
                    break Err(match so_far.early {
                        Some(Early::Late) => Failed::Late,
                        _ => error.into(),
                    });
                }
                Left::Lost(why) => {
                    replica.fail(&loaded.engine, &why);
                    why
                }
                Left::NotFinite(error) => {
                    not_finite += 1;
                    if not_finite == MOST_NOT_FINITE {
                        break Err(error.into());
                    }
                    if let Err(why) = replica.probe(&loaded).await {
                        replica.fail(&loaded.engine, &why);
                    }
                    error.to_string()
                }
            };
            tried.push(replica.clone());
            // Nobody waits for the rest.
            if so_far.early.is_some() || self.sender.is_closed() {
                break Err(Error::Cancelled.into());
            }
            if tried.len() == MOST_MOVES {
                break Err(Refused::Down(why).into());
            }
            self.course.failed(&replica.device.name, &why);
            match self.resume(&tried, &so_far.tokens).await {
                Ok(next) => (replica, loaded, ticket) = next,
                Err(failed) => break Err(failed),
            }
            self.course.moved(&replica.device.name);
            let (request, model) = (self.job.bill.trace.request(), &self.hosted.name);
            let from = tried.last().map(|replica| &replica.device.name);
            tracing::warn!(request, model, from, to = replica.device.name, why, "request moved");
        };
        // Once the end is told, the replica may be unloaded.
        drop(loaded);
        self.course.finish();
        let mut receipt = self.receipt(&so_far, &last);
        if let Ok(generation) = &last {
            replica.took(generation.decode, generation.decode_tokens);
        }
        let has_run = self.course.has_run();
        let Run { hosted, mut job, sender, course } = self;
        let is_recorded = hosted.host.settle(&job.bill, hosted.prices.as_ref(), &mut receipt, course).await;
        // From here on its key is free again.
        if let Some(entry) = job.entry.take()
            && has_run
        {
            entry.billed(so_far.tokens.len().max(entry.billed.unwrap_or(0)));
        }
        let is_exact = so_far.parts.len() == 1 || so_far.contracts.iter().all(|c| *c == Contract::Exact);
        // The trace may end with the answer.
        drop(job);
        // Whoever has left needs no answer.
        let _ = sender.send(match last {
            Ok(generation) => Progress::Done(Box::new(Outcome {
                generation,
                is_exact,
                receipt,
                is_recorded,
                early: so_far.early,
            })),
            Err(failed) => Progress::Failed(failed),
        });
    }

    /// What the request took.
    fn receipt(&self, so_far: &SoFar, last: &Result<Box<Generation>, Failed>) -> Receipt {
        let Job { prompt, bill, entry, .. } = &self.job;
        // An earlier receipt has the prompt and these tokens.
        let billed = entry.as_ref().and_then(|entry| entry.billed);
        let [queue_us, prefill_us, decode_us] = self.course.times().map(micros);
        let mut receipt = Receipt {
            model_sha256: self.hosted.sha256.clone(),
            completion_tokens: so_far.tokens.len().saturating_sub(billed.unwrap_or(0)) as u64,
            queue_us,
            prefill_us,
            decode_us,
            parts: so_far.parts.clone(),
            ..bill.receipt(&self.hosted.name)
        };
        if bill.has_prompt && billed.is_none() && self.course.has_run() {
            receipt.prompt_tokens = prompt.len() as u64;
        }
        for took in &so_far.took {
            let (drafted, accepted) = took.drafted;
            receipt.drafted_tokens += u64::from(drafted);
            receipt.accepted_tokens += u64::from(accepted);
            receipt.kv_byte_seconds =
                receipt.kv_byte_seconds.saturating_add(took.used.kv_byte_seconds as u64);
            receipt.read_bytes = receipt.read_bytes.saturating_add(took.used.read_bytes);
            took.energy.inspect(|energy| receipt.used(*energy));
        }
        // The last one computed the prompt for the answer that the client has.
        let reused_tokens = so_far.took.last().map_or(0, |took| took.reused_tokens);
        receipt.cached_tokens = receipt.prompt_tokens.min(reused_tokens.into());
        receipt.outcome = match last {
            Ok(generation) => so_far.early.map_or(generation.finish.name(), Early::name),
            Err(Failed::Error(Error::Cancelled)) => "cancelled",
            Err(Failed::Late) => Early::Late.name(),
            Err(_) => "failed",
        }
        .into();
        receipt
    }

    /// Hands the request to another replica; to one that was tried, if no other is left. Waits a while for one that works.
    async fn resume(
        &self,
        tried: &[Arc<Replica>],
        tokens: &[u32],
    ) -> Result<(Arc<Replica>, Loaded, Ticket), Failed> {
        let began = Instant::now();
        let (replica, loaded, place) = loop {
            let taken = match self.hosted.place(tried).await {
                Err(_) => self.hosted.place(&[]).await,
                taken => taken,
            };
            match taken {
                Ok(taken) => break taken,
                Err(_) if self.job.deadline.is_some_and(|deadline| Instant::now() > deadline) => {
                    return Err(Failed::Late);
                }
                Err(refused) if began.elapsed() > PATIENCE || self.sender.is_closed() => {
                    return Err(refused.into());
                }
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        };
        let request = self.hosted.request(&self.job, tokens.to_vec()).await?;
        let ticket = loaded.engine.submit(place, request);
        Ok((replica, loaded, ticket))
    }

    /// Passes on what a replica tells, until the request leaves it.
    async fn follow(&mut self, ticket: &mut Ticket, so_far: &mut SoFar, replica: &str) -> Left {
        // Tokens that the replica repeats.
        let mut repeated = so_far.tokens.len();
        let mut is_cancelled = false;
        let mut stopping = self.hosted.host.runs.stopping.subscribe();
        loop {
            let update = tokio::select! {
                biased;
                update = ticket.next() => update,
                () = due(self.job.deadline), if !is_cancelled => {
                    so_far.early.get_or_insert(Early::Late);
                    ticket.cancel();
                    is_cancelled = true;
                    continue;
                }
                () = gone(&self.sender, &mut stopping), if !is_cancelled => {
                    // What it took so far comes with the answer.
                    ticket.cancel();
                    is_cancelled = true;
                    continue;
                }
            };
            match update {
                Ok(Update::Began) => self.course.enter(Phase::Prefill, replica),
                Ok(Update::Tokens { tokens, .. }) if repeated > 0 => {
                    repeated = repeated.saturating_sub(tokens.len());
                }
                Ok(Update::Tokens { tokens, logprobs, text }) => {
                    if !tokens.is_empty() {
                        self.course.enter(Phase::Decode, replica);
                    }
                    if let Some(entry) = &self.job.entry {
                        let known = entry.tokens.len().saturating_sub(so_far.tokens.len()).min(tokens.len());
                        if known < tokens.len() {
                            entry.push(so_far.tokens.len() + known, &tokens[known..]);
                        }
                    }
                    so_far.tokens.extend(&tokens);
                    let Filtered { text, denied } = self.job.filter.push(&text);
                    // Whoever has left is noticed in the next round.
                    let _ = self.sender.send(Progress::Text { text, logprobs });
                    if denied.is_some() && so_far.early.replace(Early::Denied) != Some(Early::Denied) {
                        ticket.cancel();
                    }
                }
                Ok(Update::Done(generation)) => {
                    let Filtered { text, denied } = self.job.filter.finish();
                    so_far.early = denied.map_or(so_far.early, |_| Some(Early::Denied));
                    // As above.
                    let _ = self.sender.send(Progress::Text { text, logprobs: Vec::new() });
                    return Left::Done(generation);
                }
                Ok(Update::Failed(error @ Error::NotFinite { .. })) => return Left::NotFinite(error),
                Ok(Update::Failed(error)) if is_devices(&error) => return Left::Lost(error.to_string()),
                Ok(Update::Failed(error)) => return Left::Failed(error),
                Err(_) if is_cancelled => return Left::Failed(Error::Cancelled),
                Err(why) => return Left::Lost(why),
            }
        }
    }
}

/// Waits for a deadline; without one, for ever.
async fn due(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until the client has left, or the server stops.
async fn gone(client: &channel::UnboundedSender<Progress>, stopping: &mut watch::Receiver<bool>) {
    tokio::select! {
        () = client.closed() => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

pub(crate) fn micros(time: Duration) -> u64 {
    time.as_micros().min(u64::MAX.into()) as u64
}

/// Whether an error is the device's: another one may do what this one did not.
fn is_devices(error: &Error) -> bool {
    matches!(
        error,
        Error::Backend { .. } | Error::Io { .. } | Error::FileChanged { .. } | Error::OutOfMemory { .. }
    )
}
