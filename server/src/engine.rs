//! One model on one backend: a thread that runs a [`Batch`], and what other threads hold of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use halite::batch::{Batch, Event, Request, RequestId};
use halite::chat::Template;
use halite::generate::Generation;
use halite::{Backend, Error, Model, Session, SessionOptions, Tokenizer};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Sizes of an engine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EngineOptions {
    /// The session. Its `outputs` and `sequences` are how many requests run at once.
    pub session: SessionOptions,
    /// Requests that may wait; more are refused.
    pub queue: usize,
    /// A Jinja chat template instead of the model's.
    pub template: Option<String>,
}

impl EngineOptions {
    /// A session for `slots` requests at once, and a queue of 16 for each.
    pub fn new(session: SessionOptions, slots: u32) -> EngineOptions {
        let session = session.outputs(slots).sequences(slots);
        EngineOptions { session, queue: 16 * slots as usize, template: None }
    }
}

/// What a client is told of its request.
#[derive(Debug)]
pub enum Update {
    /// Whole characters of the text.
    Text(String),
    /// The request is done.
    Done(Box<Generation>),
    /// The request failed.
    Failed(Error),
}

/// Why an engine takes no request.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// As many requests wait as may.
    #[error("{0} requests wait already; try again later")]
    Full(usize),
    /// The engine's thread ended.
    #[error("the model has stopped")]
    Stopped,
}

/// A request of a client. Dropping it cancels the request.
#[derive(Debug)]
pub struct Ticket {
    updates: UnboundedReceiver<Update>,
}

impl Ticket {
    /// Waits for the next update; `None` after the last.
    pub async fn next(&mut self) -> Option<Update> {
        self.updates.recv().await
    }

    /// As [`Ticket::next`], for streams.
    pub fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<Update>> {
        self.updates.poll_recv(context)
    }
}

struct Client {
    request: Request,
    updates: UnboundedSender<Update>,
}

/// A model on a backend, which runs requests on a thread of its own. Dropping it ends the thread after its current step.
#[derive(Debug)]
pub struct Engine {
    clients: Option<mpsc::Sender<Client>>,
    thread: Option<JoinHandle<()>>,
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    template: Option<Template>,
    positions: u32,
    queue: usize,
    /// Requests that are not done.
    load: Arc<AtomicUsize>,
    slots: usize,
}

impl Engine {
    /// Opens a session, and starts the thread.
    ///
    /// # Errors
    /// As [`Session::new`]; [`Error::Tokenizer`] for a model without a vocabulary, [`Error::Template`] for a template that is malformed.
    pub fn new(
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        options: &EngineOptions,
    ) -> Result<Engine, Error> {
        let tokenizer = Tokenizer::from_gguf(model.gguf())?;
        let tokenizer =
            Arc::new(tokenizer.ok_or_else(|| Error::Tokenizer("the model has no vocabulary".into()))?);
        let template = match &options.template {
            Some(source) => Some(Template::new(source, &tokenizer)?),
            None => Template::from_gguf(model.gguf(), &tokenizer)?,
        };
        let session = Session::new(model, backend, &options.session)?;
        let positions = session.positions();
        let slots = session.outputs().min(session.sequences()) as usize;
        let batch = Batch::new(session, tokenizer.clone());
        let (clients, arriving) = mpsc::channel();
        let load = Arc::new(AtomicUsize::new(0));
        let counted = load.clone();
        let no_thread = |source| Error::Io { path: "a thread for the model".into(), source };
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || work(batch, &arriving, &counted))
            .map_err(no_thread)?;
        Ok(Engine {
            clients: Some(clients),
            thread: Some(thread),
            model: model.clone(),
            tokenizer,
            template,
            positions,
            queue: options.queue,
            load,
            slots,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Its vocabulary.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Its chat template.
    pub fn template(&self) -> Option<&Template> {
        self.template.as_ref()
    }

    /// Tokens that a request may have, its prompt included.
    pub fn positions(&self) -> u32 {
        self.positions
    }

    /// Requests that may run and wait at once.
    pub fn most(&self) -> usize {
        self.slots.saturating_add(self.queue)
    }

    /// Hands over a request.
    ///
    /// # Errors
    /// [`Refused`] if the queue is full or the thread ended.
    pub fn submit(&self, request: Request) -> Result<Ticket, Refused> {
        let most = self.most();
        let taken = self
            .load
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |load| (load < most).then_some(load + 1));
        taken.map_err(|_| Refused::Full(self.queue))?;
        let (updates, receiver) = unbounded_channel();
        let client = Client { request, updates };
        let is_sent = self.clients.as_ref().is_some_and(|clients| clients.send(client).is_ok());
        if !is_sent {
            self.load.fetch_sub(1, Ordering::Relaxed);
            return Err(Refused::Stopped);
        }
        Ok(Ticket { updates: receiver })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.clients = None;
        if let Some(thread) = self.thread.take() {
            // It reports its errors to clients, and has nothing to return.
            let _ = thread.join();
        }
    }
}

/// Runs requests until nobody can send any more.
fn work(mut batch: Batch, arriving: &mpsc::Receiver<Client>, load: &AtomicUsize) {
    let mut open: Vec<(RequestId, UnboundedSender<Update>)> = Vec::new();
    loop {
        // With nothing to do, wait for a request; else take those that are there.
        if open.is_empty() {
            let Ok(client) = arriving.recv() else { return };
            accept(client, &mut batch, &mut open, load);
        }
        loop {
            match arriving.try_recv() {
                Ok(client) => accept(client, &mut batch, &mut open, load),
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
        // Clients that went away.
        open.retain(|(id, updates)| {
            let is_gone = updates.is_closed();
            if is_gone {
                load.fetch_sub(1, Ordering::Relaxed);
                // Only a session that lost a sequence fails here, and then every step does.
                let _ = batch.cancel(*id);
            }
            !is_gone
        });
        // Its error was told to every request that ran.
        let _ = batch.step(&mut |id, event| {
            let Some(place) = open.iter().position(|(open, _)| *open == id) else { return };
            let (update, is_last) = match event {
                Event::Text(text) => (Update::Text(text.to_owned()), false),
                Event::Done(generation) => (Update::Done(Box::new(generation)), true),
                Event::Failed(error) => (Update::Failed(error), true),
                _ => return,
            };
            // A client that went away meanwhile is noticed before the next step.
            let _ = open[place].1.send(update);
            if is_last {
                load.fetch_sub(1, Ordering::Relaxed);
                open.swap_remove(place);
            }
        });
    }
}

fn accept(
    client: Client,
    batch: &mut Batch,
    open: &mut Vec<(RequestId, UnboundedSender<Update>)>,
    load: &AtomicUsize,
) {
    let Client { request, updates } = client;
    match batch.add(request) {
        Ok(id) => open.push((id, updates)),
        Err(error) => {
            load.fetch_sub(1, Ordering::Relaxed);
            // A client that went away needs no answer.
            let _ = updates.send(Update::Failed(error));
        }
    }
}
