//! Models of this process over HTTP, with OpenAI's interface.
//!
//! A [`Server`] has models by name. A model runs on one or more devices: `replica` is a model on a device, `engine` the thread that runs
//! it, `model` chooses the replica of a request and moves the request on if that one fails. `registry` makes models of a [`Config`],
//! `memory` is what all that is loaded may take. [`access`] has clients and their limits, [`ledger`] what requests took, [`integrity`] checks
//! models. `listen` takes connections, `tls` has their certificates, `api` reads HTTP requests and writes the answers, `trace` has what
//! happens to requests, and when.
#![deny(unsafe_code)]

pub mod access;
mod api;
mod basics;
mod books;
mod config;
mod embedder;
mod engine;
pub mod integrity;
mod journal;
pub mod ledger;
mod listen;
mod memory;
mod metrics;
mod model;
mod registry;
mod replica;
mod tls;
mod trace;

use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use halite::{Error, Model};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

pub use config::{
    AdapterConfig, ClientCertificate, Config, ConfigError, ConnectionsConfig, ModelConfig, ReplicaConfig,
    RouteConfig, TargetConfig, TelemetryConfig, TlsConfig,
};
pub use embedder::{Encoder, Vectors};
pub use engine::{Refused, Update};
pub use model::{Hosted, ModelOptions, Policy};
pub use registry::Machine;
pub use replica::{Device, OpenDevice};

use access::Access;
use books::Books;
use journal::Journal;
use ledger::{Ledger, Prices, Receipt, Writer};
use listen::Border;
use memory::Memory;
use metrics::Metrics;
use model::Bill;
use registry::Registry;
use trace::{Course, Telemetry};

/// How long the last receipts may take.
const MOST_STOPPING: Duration = Duration::from_secs(5);
/// How long the last spans may take.
const MOST_FLUSHING: Duration = Duration::from_secs(3);
/// How often steps are looked at.
const WATCH: Duration = Duration::from_millis(100);

/// Models by the names under which clients know them.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

/// What all requests see.
struct Shared {
    registry: RwLock<Arc<Registry>>,
    host: Arc<Host>,
    machine: Option<Arc<dyn Machine>>,
    drain: Duration,
    probe: Duration,
    access: Access,
    border: Arc<Border>,
    policy: Arc<access::Policy>,
    journal: Option<Arc<Journal>>,
    /// The ledger's file, to be read.
    ledger: Option<PathBuf>,
    /// One reload at a time; the configuration at the start.
    reloading: Mutex<Config>,
    /// It takes no more requests.
    is_draining: AtomicBool,
}

/// What all models share.
#[derive(Debug)]
struct Host {
    memory: Arc<Memory>,
    metrics: Metrics,
    books: Books,
    runs: Runs,
    telemetry: Arc<Telemetry>,
}

impl Host {
    /// Ends a request's receipt: what it costs, the client's limits, the log, the trace, the ledger and the counters. Returns whether the
    /// ledger has it, if there is one.
    async fn settle(
        &self,
        bill: &Bill,
        prices: Option<&Prices>,
        receipt: &mut Receipt,
        course: Course,
    ) -> bool {
        if let Some(prices) = prices {
            receipt.currency = prices.currency.clone();
            match prices.cost(receipt) {
                Ok(cost) => receipt.cost_nano = cost,
                Err(error) => tracing::error!(%error, "the cost of a request"),
            }
        }
        bill.admission.charge(receipt);
        // Without texts: they are nobody's business here.
        tracing::info!(
            request = receipt.request,
            trace = %bill.trace.id(),
            client = receipt.client,
            model = receipt.model,
            outcome = receipt.outcome,
            prompt_tokens = receipt.prompt_tokens,
            completion_tokens = receipt.completion_tokens,
            queue_us = receipt.queue_us,
            prefill_us = receipt.prefill_us,
            decode_us = receipt.decode_us,
            moves = receipt.parts.len().saturating_sub(1),
            "request"
        );
        bill.trace.text(receipt, course);
        let is_recorded = self.books.receipt(receipt).await;
        self.metrics.ended(receipt);
        is_recorded
    }
}

/// The requests that run.
#[derive(Debug)]
struct Runs {
    /// Tells them to stop; each has a receiver.
    stopping: watch::Sender<bool>,
}

impl Default for Runs {
    fn default() -> Runs {
        Runs { stopping: watch::Sender::new(false) }
    }
}

impl Runs {
    /// Ends all requests, and waits until their receipts are written, or time is up.
    async fn stop(&self, most: Duration) {
        self.stopping.send_replace(true);
        // Those that end drop their receivers.
        let _ = tokio::time::timeout(most, self.stopping.closed()).await;
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("registry", &self.shared.registry()).finish_non_exhaustive()
    }
}

impl Shared {
    fn registry(&self) -> Arc<Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn reload(&self) -> Result<(), ConfigError> {
        let Some(machine) = &self.machine else {
            return Err(ConfigError::value("configuration", "a server that was made of one", "another"));
        };
        let started = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let config = machine.config()?;
        let registry = Registry::of(&config, machine, &self.host, &self.registry())?;
        let tls = self.border.read_tls(&config)?;
        let clients = config.clients()?;
        registry.check_clients(&clients)?;
        self.access.reload(clients, config.jwt.as_ref())?;
        if let Some(ledger) = &self.ledger {
            self.access.recover(&Ledger::open_read_only(ledger)?, config.currency())?;
        }
        self.border.renew(tls);
        self.set_registry(registry);
        let keys = config.needing_restart(&started).join(", ");
        if !keys.is_empty() {
            tracing::warn!(
                keys,
                "changed in the configuration; this needs a restart, until which the old values hold"
            );
        }
        Ok(())
    }

    fn set_registry(&self, registry: Registry) {
        let mut current = self.registry.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, Arc::new(registry));
        // What is dropped with it holds up nobody.
        drop(current);
        drop(old);
    }
}

impl Server {
    /// Without models.
    ///
    /// # Errors
    /// As [`Server::new`].
    pub fn empty() -> Result<Server, ConfigError> {
        Server::with(&Config::default(), None)
    }

    fn with(config: &Config, machine: Option<Arc<dyn Machine>>) -> Result<Server, ConfigError> {
        let memory = Memory::new(config.memory_mb.map(|mb| mb.saturating_mul(1_000_000)));
        let access = Access::new(config.clients()?, config.jwt.as_ref())?;
        let ledger = match &config.ledger {
            Some(ledger) => {
                let file = Ledger::open(&ledger.file, ledger.durability)?;
                access.recover(&file, config.currency())?;
                Some(Writer::new(file)?)
            }
            None => None,
        };
        let metrics = Metrics::default();
        let telemetry = config.telemetry.clone().unwrap_or_default();
        let telemetry = Arc::new(Telemetry::new(&telemetry, metrics.exported.clone())?);
        let shared = Shared {
            registry: RwLock::default(),
            host: Arc::new(Host {
                memory,
                metrics,
                books: Books::new(ledger),
                runs: Runs::default(),
                telemetry,
            }),
            machine,
            drain: config::seconds("drain_s", config.drain_s, 30.0)?,
            probe: config::seconds("probe_s", config.probe_s, 30.0)?,
            access,
            border: Arc::new(Border::new(config)?),
            policy: Arc::new(access::Policy::new(&config.policy.clone().unwrap_or_default())?),
            journal: match &config.journal {
                Some(file) => Some(Arc::new(Journal::open(file, basics::now_ms())?)),
                None => None,
            },
            ledger: config.ledger.as_ref().map(|ledger| ledger.file.clone()),
            reloading: Mutex::new(config.clone()),
            is_draining: AtomicBool::new(false),
        };
        Ok(Server { shared: Arc::new(shared) })
    }

    /// The models of a machine's configuration. None is loaded yet.
    ///
    /// # Errors
    /// [`ConfigError`] for values that are wrong, and models that cannot be opened.
    pub fn new(machine: Arc<dyn Machine>) -> Result<Server, ConfigError> {
        let server = Server::with(&machine.config()?, Some(machine))?;
        server.reload()?;
        Ok(server)
    }

    /// Reads the configuration again, and takes its models. Those that have not changed stay loaded; requests of others go on. What is not about models stays as it is.
    ///
    /// # Errors
    /// As [`Server::new`]; the server then stays as it is.
    pub fn reload(&self) -> Result<(), ConfigError> {
        self.shared.reload()
    }

    /// Adds a model on some devices, instead of one of the same name.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a model without a vocabulary, [`Error::Template`] for a template that is malformed.
    pub fn model(
        self,
        name: &str,
        model: &Arc<Model>,
        devices: Vec<Device>,
        options: &ModelOptions,
    ) -> Result<Server, Error> {
        let hosted = Hosted::new(name, model, devices, options, &self.shared.host)?;
        let mut registry = Registry::clone(&self.shared.registry());
        registry.insert(hosted);
        self.shared.set_registry(registry);
        Ok(self)
    }

    /// Adds an encoder, instead of a model of the same name.
    #[must_use]
    pub fn encoder(self, encoder: Encoder) -> Server {
        let mut registry = Registry::clone(&self.shared.registry());
        registry.insert_encoder(encoder);
        self.shared.set_registry(registry);
        self
    }

    /// The names of its models.
    pub fn names(&self) -> Vec<String> {
        self.shared.registry().names().map(str::to_owned).collect()
    }

    /// How addresses of the server begin: `https` with certificates, else `http`.
    pub fn scheme(&self) -> &'static str {
        if self.shared.border.tls().is_some() { "https" } else { "http" }
    }

    /// Loads the models that are to be loaded at the start.
    ///
    /// # Errors
    /// The first model that could not be loaded, and why.
    pub async fn load(&self) -> Result<(), (String, Refused)> {
        for hosted in self.shared.registry().preloaded() {
            hosted.load().await.map_err(|refused| (hosted.name().to_owned(), refused))?;
        }
        Ok(())
    }

    /// The HTTP service. [`Server::watch`] must run beside it.
    pub fn router(&self) -> Router {
        api::router(&self.shared)
    }

    /// Watches over the replicas for ever: takes out those that hang or fail their health probe, and tries them again later. Begins to
    /// export traces.
    pub async fn watch(self) {
        self.shared.host.telemetry.start();
        let mut tick = interval(WATCH);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probed = Instant::now();
        loop {
            tick.tick().await;
            let registry = self.shared.registry();
            // Also of models that a new configuration no longer has, but that still have requests.
            self.shared.host.memory.replicas().iter().for_each(|replica| replica.check_step());
            if probed.elapsed() >= self.shared.probe {
                probed = Instant::now();
                // Beside this loop: a probe may hang.
                tokio::spawn(async move {
                    for hosted in registry.models() {
                        hosted.check_health().await;
                    }
                });
            }
        }
    }

    /// Answers requests on a socket until `stop`, and then until the answers that began are complete, or time is up.
    pub async fn run(self, listener: TcpListener, stop: impl Future<Output = ()>) {
        let watch = tokio::spawn(self.clone().watch());
        let draining = tokio::sync::Notify::new();
        let stop = async {
            stop.await;
            self.shared.is_draining.store(true, Relaxed);
            draining.notify_one();
        };
        let served = listen::serve(listener, &self.shared.border, self.router(), stop);
        let late = async {
            draining.notified().await;
            sleep(self.shared.drain).await;
        };
        tokio::select! {
            () = served => {}
            () = late => {}
        }
        watch.abort();
        // Receipts of those that were cut off, or whose clients had left.
        self.shared.host.runs.stop(MOST_STOPPING).await;
        self.shared.host.telemetry.flush(MOST_FLUSHING).await;
    }
}
