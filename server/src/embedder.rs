//! An encoder on one backend: a thread that embeds texts, and what other threads hold of it.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Instant;

use halite::embed::{EmbedOptions, Embedder};
use halite::model::{Pooling, ProgramOptions};
use halite::{Backend, Error, Model, Tokenizer};
use tokio::sync::oneshot;

use crate::engine::Refused;
use crate::ledger::{Part, Prices, Receipt};
use crate::memory::Share;
use crate::model::{Bill, micros};
use crate::trace::{Course, Phase};

/// The vectors of texts.
pub type Vectors = Result<Vec<Vec<f32>>, Error>;

struct Job {
    texts: Vec<Vec<u32>>,
    /// Gets the vectors, and when work on them began.
    answer: oneshot::Sender<(Vectors, Instant)>,
}

/// An encoder on a backend, which embeds texts on a thread of its own. The thread ends once it is dropped and its requests are done.
#[derive(Debug)]
pub struct Encoder {
    name: String,
    jobs: SyncSender<Job>,
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    max_text_tokens: u32,
    dimension: usize,
    is_reranker: bool,
    queue: usize,
    device: String,
    prices: Option<Prices>,
    /// The thread has the other end.
    alive: Weak<()>,
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
    /// As [`Embedder::new`]; [`Error::Tokenizer`] for a model without a vocabulary, [`Error::Model`] for one whose pooling gives more
    /// than one vector for a text.
    pub fn new(
        name: &str,
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        options: &EmbedOptions,
        queue: usize,
    ) -> Result<Encoder, Error> {
        Encoder::sharing(name, model, backend, options, queue, None)
    }

    /// As [`Encoder::new`]. The thread keeps the share of the memory until it ends.
    pub(crate) fn sharing(
        name: &str,
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        options: &EmbedOptions,
        queue: usize,
        share: Option<Share>,
    ) -> Result<Encoder, Error> {
        let tokenizer = Tokenizer::from_gguf(model.gguf())?;
        let tokenizer =
            Arc::new(tokenizer.ok_or_else(|| Error::Tokenizer("the model has no vocabulary".into()))?);
        let embedder = Embedder::new(model, backend, options)?;
        if embedder.pooling() == Pooling::None {
            return Err(Error::Model("expected a pooling that gives one vector for a text, got none".into()));
        }
        let (max_text_tokens, dimension) = (embedder.max_text_tokens(), embedder.dimension());
        let is_reranker = embedder.pooling() == Pooling::Rank;
        let (jobs, arriving) = sync_channel(queue.max(1));
        let is_alive = Arc::new(());
        let alive = Arc::downgrade(&is_alive);
        let no_thread = |source| Error::Io { path: "a thread for the model".into(), source };
        std::thread::Builder::new()
            .name("encoder".into())
            .spawn(move || {
                work(embedder, &arriving);
                drop((share, is_alive));
            })
            .map_err(no_thread)?;
        let (model, queue) = (model.clone(), queue.max(1));
        Ok(Encoder {
            name: name.to_owned(),
            jobs,
            model,
            tokenizer,
            max_text_tokens,
            dimension,
            is_reranker,
            queue,
            device: backend.caps().name.clone(),
            prices: None,
            alive,
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
        self.alive.strong_count() > 0
    }

    /// Notes when work on a request began.
    pub(crate) fn began(&self, course: &mut Course, at: Instant) {
        course.entered(Phase::Embed, &self.device, at);
    }

    /// The receipt of a request.
    pub(crate) fn receipt(&self, bill: &Bill, tokens: usize, course: &Course, is_done: bool) -> Receipt {
        let [queue_us, us, _] = course.times().map(micros);
        Receipt {
            outcome: if is_done { "end" } else { "failed" }.into(),
            prompt_tokens: tokens as u64,
            queue_us,
            prefill_us: us,
            parts: vec![Part { replica: self.device.clone(), tokens: 0, device_us: us }],
            ..bill.receipt(&self.name)
        }
    }

    /// What requests cost.
    pub(crate) fn prices(&self) -> Option<&Prices> {
        self.prices.as_ref()
    }

    /// Hands over texts as tokens, the special ones included. The answer also says when work on them began. Dropping the receiver cancels a request that waits.
    ///
    /// # Errors
    /// [`Refused`] if the queue is full or the thread ended.
    pub fn submit(&self, texts: Vec<Vec<u32>>) -> Result<oneshot::Receiver<(Vectors, Instant)>, Refused> {
        let (answer, receiver) = oneshot::channel();
        match self.jobs.try_send(Job { texts, answer }) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => Err(Refused::Full(self.queue)),
            Err(TrySendError::Disconnected(_)) => Err(Refused::Down("its thread ended".into())),
        }
    }
}

/// Embeds texts until nobody can send any more.
fn work(mut embedder: Embedder, jobs: &Receiver<Job>) {
    for Job { texts, answer } in jobs {
        if !answer.is_closed() {
            let began = Instant::now();
            // A client that went away meanwhile needs no answer.
            let _ = answer.send((embedder.embed_tokens(&texts), began));
        }
    }
}
