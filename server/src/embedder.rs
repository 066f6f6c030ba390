//! An encoder on one or more devices: each has a thread that embeds texts. When a device fails, its texts go to another one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use halite::embed::{EmbedOptions, Embedder, footprint};
use halite::model::{Pooling, ProgramOptions};
use halite::{Backend, Error, Model, Tokenizer};
use tokio::sync::oneshot;

use crate::engine::Refused;
use crate::ledger::{Part, Prices, Receipt};
use crate::memory::{Memory, Share};
use crate::model::{Bill, micros};
use crate::replica::{Device, Health, Status};
use crate::trace::{Course, Phase};

/// The vectors of texts.
pub type Vectors = Result<Vec<Vec<f32>>, Error>;

/// The tokens of texts.
type Texts = Arc<Vec<Vec<u32>>>;

struct Job {
    texts: Texts,
    /// Gets the vectors, and when work on them began.
    answer: oneshot::Sender<(Vectors, Instant)>,
}

/// Texts that a worker has in its queue.
pub(crate) struct Handed {
    worker: usize,
    texts: Texts,
    answer: oneshot::Receiver<(Vectors, Instant)>,
}

/// An encoder, which embeds texts on a thread for each of its devices. The threads end once it is dropped and its requests are done.
#[derive(Debug)]
pub struct Encoder {
    name: String,
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    max_text_tokens: u32,
    dimension: usize,
    is_reranker: bool,
    queue: usize,
    prices: Option<Prices>,
    /// In the order of the configuration.
    workers: Vec<Worker>,
}

/// An encoder on a device.
#[derive(Debug)]
struct Worker {
    device: String,
    jobs: SyncSender<Job>,
    shared: Arc<Shared>,
    /// The thread has the other end.
    alive: Weak<()>,
    health: Mutex<Health>,
}

/// What a worker and its thread know of each other.
#[derive(Debug, Default)]
struct Shared {
    /// Requests that wait or run.
    load: AtomicUsize,
    /// Whether the device failed: it is opened anew.
    is_failed: AtomicBool,
}

/// What a worker's thread opens its embedder with, at first and after a failure.
struct Opening {
    model: Arc<Model>,
    device: Device,
    options: EmbedOptions,
    /// The budget, if there is one.
    memory: Option<Arc<Memory>>,
}

impl Opening {
    fn open(&self) -> Result<(Embedder, Option<Share>), Error> {
        let backend = (self.device.open)()?;
        let share = match &self.memory {
            None => None,
            Some(memory) => {
                let needed = footprint(&self.model, &*backend, &self.options)?;
                let share = memory.take(crate::replica::bytes(&needed));
                Some(share.map_err(|refused| Error::Model(refused.to_string()))?)
            }
        };
        Ok((Embedder::new(&self.model, &backend, &self.options)?, share))
    }

    /// Embeds texts until nobody can send any more. After a failure the device is opened anew.
    fn work(&self, first: Option<(Embedder, Option<Share>)>, jobs: &Receiver<Job>, shared: &Shared) {
        let mut opened = first;
        for Job { texts, answer } in jobs {
            // A client that went away meanwhile needs no vectors.
            let vectors = (!answer.is_closed()).then(|| {
                let began = Instant::now();
                let mut embed = || {
                    if shared.is_failed.swap(false, Relaxed) {
                        opened = None;
                    }
                    if opened.is_none() {
                        opened = Some(self.open()?);
                    }
                    let embedder = opened.as_mut().map(|(embedder, _)| embedder);
                    embedder.map_or(Ok(Vec::new()), |embedder| embedder.embed_tokens(&texts))
                };
                let vectors = catch_unwind(AssertUnwindSafe(&mut embed)).unwrap_or_else(|_| {
                    let message = "it failed inside".into();
                    Err(Error::Backend { backend: self.device.name.clone(), message })
                });
                (vectors, began)
            });
            // Before the answer: the client's next request finds the device free.
            shared.load.fetch_sub(1, Relaxed);
            if let Some(vectors) = vectors {
                let _ = answer.send(vectors);
            }
        }
    }
}

impl Worker {
    /// Starts its thread.
    fn start(
        opening: Opening,
        first: Option<(Embedder, Option<Share>)>,
        queue: usize,
    ) -> Result<Worker, Error> {
        let (jobs, arriving) = sync_channel(queue);
        let (is_alive, shared) = (Arc::new(()), Arc::new(Shared::default()));
        let (alive, of_thread) = (Arc::downgrade(&is_alive), shared.clone());
        let device = opening.device.name.clone();
        let no_thread = |source| Error::Io { path: "a thread for the model".into(), source };
        std::thread::Builder::new()
            .name("encoder".into())
            .spawn(move || {
                opening.work(first, &arriving, &of_thread);
                drop(is_alive);
            })
            .map_err(no_thread)?;
        Ok(Worker { device, jobs, shared, alive, health: Mutex::default() })
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, model: &str, why: &str) {
        tracing::warn!(model, device = self.device, why, "encoder taken out");
        self.health().failed(why);
        self.shared.is_failed.store(true, Relaxed);
    }
}

impl Encoder {
    /// Whether a model is an encoder.
    ///
    /// # Errors
    /// As [`Model::program`].
    pub fn is_for(model: &Model) -> Result<bool, Error> {
        let program = model.program(ProgramOptions::default(), model.hparams().context_length)?;
        Ok(program.outputs.hidden.is_some())
    }

    /// Loads the encoder, and starts the thread. At most `queue` requests wait.
    ///
    /// # Errors
    /// As [`Encoder::on`].
    pub fn new(
        name: &str,
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        options: &EmbedOptions,
        queue: usize,
    ) -> Result<Encoder, Error> {
        let (backend, label) = (backend.clone(), backend.caps().name.clone());
        let device = Device { name: label, open: Arc::new(move || Ok(backend.clone())), weight: 1.0 };
        Encoder::on(name, model, vec![device], options, queue)
    }

    /// Loads the encoder on several devices. Texts go to the one that has the fewest requests, and to another one if it fails. At most
    /// `queue` requests wait for each. A device that cannot be opened now is tried again later, if there is another one.
    ///
    /// # Errors
    /// As [`Embedder::new`], if no device works; [`Error::Tokenizer`] for a model without a vocabulary, [`Error::Model`] for one whose
    /// pooling gives more than one vector for a text, [`Error::Argument`] without a device.
    pub fn on(
        name: &str,
        model: &Arc<Model>,
        devices: Vec<Device>,
        options: &EmbedOptions,
        queue: usize,
    ) -> Result<Encoder, Error> {
        Encoder::within(name, model, devices, options, queue, None)
    }

    /// As [`Encoder::on`]. The threads keep their shares of the memory until they end.
    pub(crate) fn within(
        name: &str,
        model: &Arc<Model>,
        devices: Vec<Device>,
        options: &EmbedOptions,
        queue: usize,
        memory: Option<&Arc<Memory>>,
    ) -> Result<Encoder, Error> {
        let tokenizer = Tokenizer::from_gguf(model.gguf())?;
        let tokenizer =
            Arc::new(tokenizer.ok_or_else(|| Error::Tokenizer("the model has no vocabulary".into()))?);
        let queue = queue.max(1);
        let (mut known, mut fault, mut workers) = (None, None, Vec::new());
        for device in devices {
            let (model, memory) = (model.clone(), memory.cloned());
            let opening = Opening { model, device, options: *options, memory };
            let first = opening.open();
            if let Ok((embedder, _)) = &first {
                known.get_or_insert((embedder.pooling(), embedder.max_text_tokens(), embedder.dimension()));
            }
            let (first, why) = match first {
                Ok(first) => (Some(first), None),
                Err(error) => (None, Some(error)),
            };
            let worker = Worker::start(opening, first, queue)?;
            if let Some(why) = why {
                worker.failed(name, &why.to_string());
                fault.get_or_insert(why);
            }
            workers.push(worker);
        }
        let Some((pooling, max_text_tokens, dimension)) = known else {
            return Err(fault.unwrap_or_else(|| Error::argument("devices", "at least one", "none")));
        };
        if pooling == Pooling::None {
            return Err(Error::Model("expected a pooling that gives one vector for a text, got none".into()));
        }
        Ok(Encoder {
            name: name.to_owned(),
            model: model.clone(),
            tokenizer,
            max_text_tokens,
            dimension,
            is_reranker: pooling == Pooling::Rank,
            queue,
            prices: None,
            workers,
        })
    }

    /// With prices.
    pub(crate) fn with(mut self, prices: Option<Prices>) -> Encoder {
        self.prices = prices;
        self
    }

    /// The name by which clients ask for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Its vocabulary.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Maximum tokens of a text.
    pub fn max_text_tokens(&self) -> u32 {
        self.max_text_tokens
    }

    /// Dimension of the vectors.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Whether its vectors are scores of a query and a document.
    pub fn is_reranker(&self) -> bool {
        self.is_reranker
    }

    /// Whether it takes texts.
    pub(crate) fn is_ready(&self) -> bool {
        self.workers.iter().any(|worker| worker.alive.strong_count() > 0 && worker.health().may_run().is_ok())
    }

    /// Its devices, as operators see them.
    pub(crate) fn status(&self) -> Vec<Status> {
        let status = |worker: &Worker| {
            let load = worker.shared.load.load(Relaxed);
            let health = worker.health();
            let failure = health.may_run().err();
            Status {
                device: worker.device.clone(),
                state: if failure.is_some() { "resting" } else { "ready" },
                running: load.min(1),
                waiting: load.saturating_sub(1),
                slots: 1,
                failure,
                failures: health.failures,
                failures_in_all: health.failures_in_all,
                token_us: 0,
            }
        };
        self.workers.iter().map(status).collect()
    }

    /// The receipt of a request.
    pub(crate) fn receipt(
        &self,
        bill: &Bill,
        tokens: usize,
        course: &Course,
        parts: Vec<Part>,
        is_done: bool,
    ) -> Receipt {
        let [queue_us, us, _] = course.times().map(micros);
        Receipt {
            outcome: if is_done { "end" } else { "failed" }.into(),
            prompt_tokens: tokens as u64,
            queue_us,
            prefill_us: us,
            parts,
            ..bill.receipt(&self.name)
        }
    }

    /// What requests cost.
    pub(crate) fn prices(&self) -> Option<&Prices> {
        self.prices.as_ref()
    }

    /// Hands over texts as tokens, the special ones included, to the device that has the fewest requests.
    ///
    /// # Errors
    /// [`Refused`] if all queues are full or no device works.
    pub(crate) fn submit(&self, texts: Texts) -> Result<Handed, Refused> {
        self.submit_besides(texts, &[])
    }

    /// The same, but not to some of them.
    fn submit_besides(&self, texts: Texts, tried: &[usize]) -> Result<Handed, Refused> {
        let mut order: Vec<usize> = (0..self.workers.len()).filter(|index| !tried.contains(index)).collect();
        order.sort_by_key(|&index| self.workers[index].shared.load.load(Relaxed));
        let mut refused = Refused::Down("it has no device".into());
        for index in order {
            let worker = &self.workers[index];
            if let Err(why) = worker.health().may_run() {
                refused = Refused::Down(why);
                continue;
            }
            let (answer, receiver) = oneshot::channel();
            worker.shared.load.fetch_add(1, Relaxed);
            match worker.jobs.try_send(Job { texts: texts.clone(), answer }) {
                Ok(()) => return Ok(Handed { worker: index, texts, answer: receiver }),
                Err(TrySendError::Full(_)) => refused = Refused::Full(self.queue),
                Err(TrySendError::Disconnected(_)) => refused = Refused::Down("its thread ended".into()),
            }
            worker.shared.load.fetch_sub(1, Relaxed);
        }
        Err(refused)
    }

    /// The vectors of texts, by the device that has them or, if it fails, by others. Notes what each of them did.
    pub(crate) async fn vectors(&self, first: Handed, course: &mut Course, parts: &mut Vec<Part>) -> Vectors {
        let (mut handed, mut tried, mut suspects) = (first, Vec::new(), Vec::new());
        loop {
            let Handed { worker: index, texts, answer } = handed;
            let worker = &self.workers[index];
            let ended =
                || Error::Backend { backend: worker.device.clone(), message: "its thread ended".into() };
            let (vectors, began) = answer.await.unwrap_or_else(|_| (Err(ended()), Instant::now()));
            course.entered(Phase::Embed, &worker.device, began);
            let device_us = micros(began.elapsed());
            parts.push(Part { replica: worker.device.clone(), tokens: 0, device_us });
            tried.push(index);
            let fault = match vectors {
                Ok(vectors) => {
                    worker.health().works();
                    suspects.iter().for_each(|&(index, ref why): &(usize, String)| {
                        self.workers[index].failed(&self.name, why);
                    });
                    return Ok(vectors);
                }
                Err(fault @ (Error::Argument { .. } | Error::Cancelled)) => return Err(fault),
                Err(fault) => fault,
            };
            let why = fault.to_string();
            course.failed(&worker.device, &why);
            match fault {
                // If others have them too, the texts or the model are at fault.
                Error::NotFinite { .. } => suspects.push((index, why)),
                _ => worker.failed(&self.name, &why),
            }
            let Ok(next) = self.submit_besides(texts, &tried) else { return Err(fault) };
            course.moved(&self.workers[next.worker].device);
            handed = next;
        }
    }
}
