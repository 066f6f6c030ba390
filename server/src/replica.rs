//! A model on one device: opened when it is needed, taken out when the device fails, tried again later.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use halite::backend::Contract;
use halite::batch::{Batch, Event, Request};
use halite::generate::GenerateOptions;
use halite::session::{Footprint, footprint};
use halite::{Backend, Error, Session};

use crate::engine::{Engine, Refused};
use crate::memory::Memory;
use crate::model::Opened;

/// Opens a device.
pub type OpenDevice = Arc<dyn Fn() -> Result<Arc<dyn Backend>, Error> + Send + Sync>;

/// How long a replica that failed rests before it is tried again: twice as long after each failure.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(120);

/// How long a request waits for a replica that is being loaded, and how long loading may take.
const MOST_LOADING: Duration = Duration::from_secs(600);

/// Tokens of a health probe.
const PROBE_TOKENS: u32 = 4;

/// A device on which a model runs.
#[derive(Clone)]
pub struct Device {
    /// Its name, as operators know it.
    pub name: String,
    /// Opens it.
    pub open: OpenDevice,
    /// Its share of requests, among the replicas of a model whose policy is by weight.
    pub weight: f64,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name)
            .field("weight", &self.weight)
            .finish_non_exhaustive()
    }
}

/// A model on a device.
#[derive(Debug)]
pub(crate) struct Replica {
    pub device: Device,
    /// The model's name.
    model: String,
    state: Mutex<State>,
    /// A step that takes longer is taken to hang.
    step_timeout: Duration,
    /// One load at a time.
    loading: Arc<tokio::sync::Mutex<()>>,
    /// When it was last used, in milliseconds since `origin`.
    used_ms: AtomicU64,
    /// The smoothed time of a token, in microseconds; 0 before the first.
    token_us: AtomicU64,
    origin: Instant,
}

#[derive(Debug, Default)]
struct State {
    loaded: Option<Loaded>,
    health: Health,
}

/// Whether a device works, and when one that failed may be tried again.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Failures since it last worked.
    pub failures: u32,
    /// Failures since the model was made.
    pub failures_in_all: u64,
    /// After a failure, when it may be tried again, and what the failure was.
    resting: Option<(Instant, String)>,
}

/// An engine and what it takes.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    pub engine: Arc<Engine>,
    pub contract: Contract,
    /// The tokens of a health probe.
    probe: Arc<[u32]>,
}

/// A replica as operators see it.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Status {
    pub device: String,
    /// `ready`, `unloaded`, or `resting` after a failure.
    pub state: &'static str,
    pub running: usize,
    pub waiting: usize,
    pub slots: usize,
    /// Why it rests.
    pub failure: Option<String>,
    /// Failures since it last worked.
    pub failures: u32,
    /// Failures since the model was made.
    pub failures_in_all: u64,
    pub token_us: u64,
}

impl Replica {
    pub fn new(device: Device, model: &str, step_timeout: Duration) -> Replica {
        let (state, loading, used_ms, token_us) = Default::default();
        let model = model.to_owned();
        Replica { device, model, state, step_timeout, loading, used_ms, token_us, origin: Instant::now() }
    }

    /// Takes it out if its step hangs.
    pub fn check_step(&self) {
        if let Some(loaded) = self.loaded()
            && loaded.engine.in_step() > self.step_timeout
        {
            let why = format!("a step takes longer than {} s", self.step_timeout.as_secs_f64());
            self.fail(&loaded.engine, &why);
        }
    }

    /// Failures since it last worked.
    pub fn failures(&self) -> u32 {
        self.state().health.failures
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is loaded.
    pub fn loaded(&self) -> Option<Loaded> {
        self.state().loaded.clone()
    }

    /// Whether a request may go there: it is ready, or may be loaded now.
    pub fn may_run(&self) -> Result<(), String> {
        self.state().health.may_run()
    }

    /// Requests per slot.
    pub fn load(&self) -> f64 {
        self.loaded().map_or(0.0, |loaded| loaded.engine.load() as f64 / loaded.engine.slots().max(1) as f64)
    }

    /// The smoothed time of a token; 0 before the first.
    pub fn token_us(&self) -> u64 {
        self.token_us.load(Relaxed)
    }

    /// Notes how long the tokens of a request took.
    pub fn took(&self, decode: Duration, tokens: u32) {
        if tokens == 0 {
            return;
        }
        let us = decode.as_micros() as u64 / u64::from(tokens);
        let before = self.token_us();
        self.token_us.store(if before == 0 { us } else { (7 * before + us) / 8 }.max(1), Relaxed);
    }

    /// What is loaded, for a request.
    pub fn ready(&self) -> Option<Loaded> {
        let loaded = self.loaded()?;
        self.used_ms.store(self.origin.elapsed().as_millis() as u64, Relaxed);
        Some(loaded)
    }

    /// How long it has not been used.
    pub fn idle(&self) -> Duration {
        self.origin.elapsed().saturating_sub(Duration::from_millis(self.used_ms.load(Relaxed)))
    }

    pub fn status(&self) -> Status {
        let state = self.state();
        let engine = state.loaded.as_ref().map(|loaded| &loaded.engine);
        let running = engine.map_or(0, |engine| engine.running());
        Status {
            device: self.device.name.clone(),
            state: match (&state.health.resting, engine) {
                (_, Some(_)) => "ready",
                (Some(_), None) => "resting",
                (None, None) => "unloaded",
            },
            running,
            waiting: engine.map_or(0, |engine| engine.load().saturating_sub(running)),
            slots: engine.map_or(0, |engine| engine.slots()),
            failure: state.health.resting.as_ref().map(|(_, why)| why.clone()),
            failures: state.health.failures,
            failures_in_all: state.health.failures_in_all,
            token_us: self.token_us(),
        }
    }

    /// Takes it out: what is loaded is given up, and tried again after a rest.
    pub fn fail(&self, engine: &Arc<Engine>, why: &str) {
        let mut state = self.state();
        // Others may have noticed the same before.
        if !state.loaded.as_ref().is_some_and(|loaded| Arc::ptr_eq(&loaded.engine, engine)) {
            return;
        }
        state.loaded = None;
        state.health.failed(why);
        drop(state);
        tracing::warn!(model = self.model, device = self.device.name, why, "replica taken out");
        engine.give_up(why.to_owned());
    }

    /// It answered a request: failures before are forgotten.
    pub fn succeeded(&self, engine: &Arc<Engine>) {
        let mut state = self.state();
        // A late answer of one that was taken out proves nothing.
        if state.loaded.as_ref().is_some_and(|loaded| Arc::ptr_eq(&loaded.engine, engine)) {
            state.health.works();
        }
    }

    /// Unloads it, if it has no requests. Returns the engine, whose end takes a step.
    pub fn unload(&self) -> Option<Loaded> {
        let mut state = self.state();
        let is_idle = state.loaded.as_ref().is_some_and(|loaded| loaded.engine.load() == 0);
        if is_idle { state.loaded.take() } else { None }
    }

    /// Returns the engine, which is loaded first if it is not.
    ///
    /// # Errors
    /// Why it cannot be used now.
    pub async fn engine(
        self: &Arc<Self>,
        opened: &Arc<Opened>,
        memory: &Arc<Memory>,
    ) -> Result<Loaded, Refused> {
        let hangs = || Refused::Down("loading it takes too long".into());
        let loading = self.loading.clone().lock_owned();
        // Nobody waits for ever for a device that hangs while somebody else loads it.
        let loading = tokio::time::timeout(MOST_LOADING, loading).await.map_err(|_| hangs())?;
        if let Some(loaded) = self.ready() {
            return Ok(loaded);
        }
        self.may_run().map_err(Refused::Down)?;
        let (replica, opened, memory) = (self.clone(), opened.clone(), memory.clone());
        let load = move || {
            // It loads to its end, even if the request that wanted it is gone.
            let _loading = loading;
            replica.load_now(&opened, &memory)
        };
        match tokio::time::timeout(MOST_LOADING, tokio::task::spawn_blocking(load)).await {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(_)) => Err(self.not_loaded("loading it failed inside".into())),
            Err(_) => Err(self.not_loaded("loading it takes too long".into())),
        }
    }

    /// Notes that it could not be loaded.
    fn not_loaded(&self, why: String) -> Refused {
        tracing::warn!(model = self.model, device = self.device.name, why, "replica not loaded");
        self.state().health.failed(&why);
        Refused::Down(why)
    }

    /// Loads it, on a thread that may wait.
    fn load_now(&self, opened: &Opened, memory: &Arc<Memory>) -> Result<Loaded, Refused> {
        let failed = |error: Error| self.not_loaded(error.to_string());
        let backend = (self.device.open)().map_err(failed)?;
        let needed = footprint(&opened.model, &*backend, &opened.session).map_err(failed)?;
        let share = memory.take(bytes(&needed))?;
        let mut session = Session::new(&opened.model, &backend, &opened.session).map_err(failed)?;
        let probe;
        (session, probe) = probed(session, opened).map_err(failed)?;
        let contract = backend.caps().contract;
        opened.agree(contract, &probe).map_err(failed)?;
        let batch = Batch::new(session, opened.tokenizer.clone());
        let batch = batch.lookup(opened.lookup).step_time(opened.step_time);
        let engine = Engine::new(batch, opened.queue, share).map_err(failed)?;
        let engine = Arc::new(engine);
        if contract == Contract::Exact {
            opened.agreed(&engine);
        }
        tracing::info!(
            model = self.model,
            device = self.device.name,
            bytes = bytes(&needed),
            "replica loaded"
        );
        let loaded = Loaded { engine, contract, probe: probe.into() };
        self.state().loaded = Some(loaded.clone());
        Ok(loaded)
    }

    /// Whether it still computes what it computed when it was loaded, if it is idle.
    ///
    /// # Errors
    /// What it does instead.
    pub async fn probe(&self, loaded: &Loaded) -> Result<(), String> {
        if loaded.engine.load() > 0 {
            return Ok(());
        }
        let place = match loaded.engine.reserve() {
            Ok(place) => place,
            Err(Refused::Down(why)) => return Err(why),
            // It is at work.
            Err(_) => return Ok(()),
        };
        let mut ticket = loaded.engine.submit(place, probe_request());
        loop {
            match ticket.next().await? {
                crate::Update::Done(generation) if generation.tokens == *loaded.probe => return Ok(()),
                crate::Update::Done(_) => {
                    return Err("its health probe gives other tokens than before".into());
                }
                crate::Update::Failed(error) => return Err(error.to_string()),
                _ => {}
            }
        }
    }
}

impl Health {
    /// Whether the device may be tried now.
    pub fn may_run(&self) -> Result<(), String> {
        match &self.resting {
            Some((until, why)) if Instant::now() < *until => Err(why.clone()),
            _ => Ok(()),
        }
    }

    /// It failed: it rests, twice as long after each failure.
    pub fn failed(&mut self, why: &str) {
        let rest = FIRST_REST.saturating_mul(1 << self.failures.min(16)).min(LONGEST_REST);
        self.failures = self.failures.saturating_add(1);
        self.failures_in_all = self.failures_in_all.saturating_add(1);
        self.resting = Some((Instant::now() + rest, why.to_owned()));
    }

    /// It worked: failures before are forgotten.
    pub fn works(&mut self) {
        (self.failures, self.resting) = (0, None);
    }
}

/// All bytes of a session.
pub(crate) fn bytes(needed: &Footprint) -> u64 {
    needed
        .weight_bytes
        .saturating_sub(needed.streamed_bytes)
        .saturating_add(needed.stream_bytes)
        .saturating_add(needed.working_bytes().saturating_sub(needed.spilled_bytes))
}

/// A few tokens, the most likely ones, after the first token of the vocabulary.
fn probe_request() -> Request {
    let options = GenerateOptions::default().max_tokens(PROBE_TOKENS).ignore_end(true);
    // A tenant of its own, so that what is kept of it serves no client.
    Request::new(vec![0]).options(options).tenant(u64::MAX)
}

/// Runs a health probe in a session without sequences.
fn probed(session: Session, opened: &Opened) -> Result<(Session, Vec<u32>), Error> {
    let mut batch = Batch::new(session, opened.tokenizer.clone());
    batch.add(probe_request())?;
    let mut result = Ok(Vec::new());
    while batch.step(&mut |_, event| match event {
        Event::Done(generation) => result = Ok(generation.tokens),
        Event::Failed(error) => result = Err(error),
        _ => {}
    })? {}
    Ok((batch.into_session(), result?))
}
