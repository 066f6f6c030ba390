//! A model on a device: a thread that runs a [`Batch`], and what other threads hold of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use halite::Error;
use halite::backend::Cancel;
use halite::backend::energy::Energy;
use halite::batch::{Batch, Event, Request, RequestId};
use halite::generate::{Generation, Used};
use halite::sampler::Logprobs;
use tokio::sync::{mpsc as channel, watch};

use crate::memory::Share;

/// What a request is told.
#[derive(Debug)]
#[non_exhaustive]
pub enum Update {
    /// It no longer waits.
    Began,
    /// Tokens were chosen. The text is what is complete by now, in whole characters; it may be empty.
    Tokens {
        /// The tokens.
        tokens: Vec<u32>,
        /// How likely each was, if the options ask for it.
        logprobs: Vec<Logprobs>,
        /// The text.
        text: String,
    },
    /// The request is done, or was cancelled.
    Done(Box<Generation>),
    /// The request failed.
    Failed(Error),
}

/// Why a request is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// As many requests wait as may.
    #[error("{0} requests wait already; try again later")]
    Full(usize),
    /// No replica of the model works.
    #[error("no device can run the model now: {0}")]
    Down(String),
    /// What requests take cannot be recorded.
    #[error("the ledger cannot be written; try again later")]
    Ledger,
    /// The models in use leave too little memory for another one.
    #[error(
        "the model needs {need_bytes} bytes of memory, and those in use leave {free_bytes}; try again later"
    )]
    Memory {
        /// Bytes that the model needs.
        need_bytes: u64,
        /// Bytes that could be had.
        free_bytes: u64,
    },
}

/// What the steps of a request took on an engine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Took {
    pub device: Duration,
    pub energy: Option<Energy>,
    pub used: Used,
    /// Drafted tokens, and accepted ones.
    pub drafted: (u32, u32),
    pub reused_tokens: u32,
}

impl Took {
    pub fn of(generation: &Generation) -> Took {
        let Generation { device, energy, used, drafted, reused_tokens, .. } = *generation;
        Took { device: device.0 + device.1, energy, used, drafted, reused_tokens }
    }
}

/// A request that runs on an engine. Dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct Ticket {
    took: Arc<Mutex<Took>>,
    updates: channel::UnboundedReceiver<Update>,
    lost: watch::Receiver<Option<String>>,
    state: Arc<State>,
    is_cancelled: Arc<AtomicBool>,
    is_done: bool,
}

impl Ticket {
    /// Waits for the next update. An error says why the engine was lost.
    pub async fn next(&mut self) -> Result<Update, String> {
        let why = tokio::select! {
            biased;
            update = self.updates.recv() => match update {
                Some(update) => {
                    self.is_done |= matches!(update, Update::Done(_) | Update::Failed(_));
                    return Ok(update);
                }
                None => None,
            },
            lost = self.lost.wait_for(Option::is_some) => lost.ok().and_then(|why| why.clone()),
        };
        self.is_done = true;
        let why = why.or_else(|| self.lost.borrow().clone());
        Err(why.unwrap_or_else(|| "its thread ended".into()))
    }

    /// What its steps took so far, without the one that runs, hangs or failed.
    pub fn took(&self) -> Took {
        *self.took.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the request early. [`Update::Done`] follows if it runs.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Relaxed);
        // Nobody else waits for this step.
        if self.state.load.load(Relaxed) == 1 {
            self.state.cancel.interrupt();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.is_done {
            self.cancel();
        }
    }
}

/// What the thread and the others know of each other.
#[derive(Debug)]
struct State {
    /// Requests that are not done.
    load: AtomicUsize,
    /// Those of them that run.
    running: AtomicUsize,
    /// When the step that runs began, in milliseconds since `origin`, plus one; 0 between steps.
    step_ms: AtomicU64,
    origin: Instant,
    /// Stops a step.
    cancel: Cancel,
    /// Why the engine no longer works.
    lost: watch::Sender<Option<String>>,
}

impl State {
    fn now_ms(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64 + 1
    }

    fn lose(&self, why: String) {
        self.lost.send_if_modified(|lost| {
            let is_first = lost.is_none();
            lost.get_or_insert(why);
            is_first
        });
    }
}

/// A place among the requests that an engine takes. It is free again once it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<State>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Relaxed);
    }
}

struct Client {
    request: Request,
    updates: channel::UnboundedSender<Update>,
    is_cancelled: Arc<AtomicBool>,
    took: Arc<Mutex<Took>>,
    place: Place,
}

/// A session that runs requests on a thread of its own. The thread ends once it is dropped and its requests are done.
#[derive(Debug)]
pub(crate) struct Engine {
    /// `None` once it no longer takes any.
    clients: Mutex<Option<mpsc::Sender<Client>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    state: Arc<State>,
    slots: usize,
    queue: usize,
}

impl Engine {
    /// Starts the thread, which keeps the share of the memory until it ends. More than `queue` waiting requests are refused.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no thread.
    pub fn new(batch: Batch, queue: usize, share: Share) -> Result<Engine, Error> {
        let session = batch.session();
        let slots = session.outputs().min(session.sequences()) as usize;
        let state = Arc::new(State {
            load: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            step_ms: AtomicU64::new(0),
            origin: Instant::now(),
            cancel: session.cancel_handle(),
            lost: watch::Sender::new(None),
        });
        let (clients, arriving) = mpsc::channel();
        let shared = state.clone();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                work(batch, &arriving, &shared);
                drop(share);
            })
            .map_err(|source| Error::Io { path: "a thread for the model".into(), source })?;
        Ok(Engine {
            clients: Mutex::new(Some(clients)),
            thread: Mutex::new(Some(thread)),
            state,
            slots,
            queue,
        })
    }

    fn clients(&self) -> MutexGuard<'_, Option<mpsc::Sender<Client>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that it runs at once.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Requests that run and wait.
    pub fn load(&self) -> usize {
        self.state.load.load(Relaxed)
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.state.running.load(Relaxed)
    }

    /// Why it no longer works.
    pub fn lost(&self) -> Option<String> {
        self.state.lost.borrow().clone()
    }

    /// How long its current step has run.
    pub fn in_step(&self) -> Duration {
        match self.state.step_ms.load(Relaxed) {
            0 => Duration::ZERO,
            began => Duration::from_millis(self.state.now_ms().saturating_sub(began)),
        }
    }

    /// Gives it up: its requests are told, and nobody waits for its thread.
    pub fn give_up(&self, why: String) {
        self.state.lose(why);
        self.state.cancel.cancel();
        *self.clients() = None;
    }

    /// Takes a place for a request.
    ///
    /// # Errors
    /// [`Refused`] if as many requests wait as may, or the engine no longer works.
    pub fn reserve(&self) -> Result<Place, Refused> {
        if let Some(why) = self.lost() {
            return Err(Refused::Down(why));
        }
        let most = self.slots.saturating_add(self.queue);
        let taken = self.state.load.fetch_update(Relaxed, Relaxed, |load| (load < most).then_some(load + 1));
        taken.map_err(|_| Refused::Full(self.queue))?;
        Ok(Place(self.state.clone()))
    }

    /// Hands over a request. An engine that no longer works says so to the ticket.
    pub fn submit(&self, place: Place, request: Request) -> Ticket {
        let (updates, receiver) = channel::unbounded_channel();
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let took = Arc::default();
        let client =
            Client { request, updates, is_cancelled: is_cancelled.clone(), took: Arc::clone(&took), place };
        if let Some(clients) = &*self.clients() {
            // Without a thread, the ticket's channel closes.
            let _ = clients.send(client);
        }
        Ticket {
            took,
            updates: receiver,
            lost: self.state.lost.subscribe(),
            state: self.state.clone(),
            is_cancelled,
            is_done: false,
        }
    }
}

impl Engine {
    /// Takes no more requests, and waits until those that it has are done and its memory is free.
    pub fn finish(&self) {
        *self.clients() = None;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It reports its errors to clients, and has nothing to return.
        let _ = thread.map(JoinHandle::join);
    }
}

/// A request on the thread.
struct Open {
    updates: channel::UnboundedSender<Update>,
    is_cancelled: Arc<AtomicBool>,
    took: Arc<Mutex<Took>>,
    is_running: bool,
    place: Place,
}

/// Says that the thread ended, however it ends.
struct Ending<'a>(&'a State);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lose("its thread ended".into());
    }
}

/// Runs requests until nobody can send any more, or the device fails.
fn work(mut batch: Batch, arriving: &mpsc::Receiver<Client>, state: &State) {
    let _ending = Ending(state);
    let mut open: HashMap<RequestId, Open> = HashMap::new();
    loop {
        // With nothing to do, wait for a request; else take those that are there.
        if open.is_empty() {
            let Ok(client) = arriving.recv() else { return };
            accept(client, &mut batch, &mut open);
        }
        loop {
            match arriving.try_recv() {
                Ok(client) => accept(client, &mut batch, &mut open),
                Err(mpsc::TryRecvError::Empty) => break,
                // Those that it has are still served.
                Err(mpsc::TryRecvError::Disconnected) if !open.is_empty() => break,
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
        // A request to stop came from somebody who is about to leave.
        state.cancel.resume();
        let gone = open.extract_if(|_, client| client.is_cancelled.load(Relaxed));
        for (id, Open { updates, place, .. }) in gone {
            let so_far =
                batch.cancel(id).map_or(Update::Failed(Error::Cancelled), |it| Update::Done(Box::new(it)));
            drop(place);
            // Whoever has left needs no answer.
            let _ = updates.send(so_far);
        }
        state.step_ms.store(state.now_ms(), Relaxed);
        let stepped = batch.step(&mut |id, event| {
            // The device has done its part: what follows on the host is not its fault.
            state.step_ms.store(state.now_ms(), Relaxed);
            let Some(client) = open.get_mut(&id) else { return };
            let (update, is_last) = match event {
                Event::Began => {
                    client.is_running = true;
                    (Update::Began, false)
                }
                Event::Tokens { tokens, logprobs, text } => {
                    let (tokens, logprobs) = (tokens.to_vec(), logprobs.to_vec());
                    (Update::Tokens { tokens, logprobs, text: text.to_owned() }, false)
                }
                Event::Done(generation) => (Update::Done(Box::new(generation)), true),
                Event::Failed(error) => (Update::Failed(error), true),
                _ => return,
            };
            let updates = client.updates.clone();
            // Its place is free before it is told.
            if is_last {
                open.remove(&id);
            }
            // A client that left meanwhile is noticed before the next step.
            let _ = updates.send(update);
        });
        state.step_ms.store(0, Relaxed);
        // The next step may never end: what came before it is noted now.
        for (id, client) in &open {
            if let Some(generation) = batch.generation(*id) {
                *client.took.lock().unwrap_or_else(PoisonError::into_inner) = Took::of(generation);
            }
        }
        state.running.store(open.values().filter(|client| client.is_running).count(), Relaxed);
        match stepped {
            Ok(_) | Err(Error::Cancelled) if state.lost.borrow().is_none() => {}
            Ok(_) => return,
            Err(error) => return state.lose(error.to_string()),
        }
    }
}

fn accept(client: Client, batch: &mut Batch, open: &mut HashMap<RequestId, Open>) {
    let Client { request, updates, is_cancelled, took, place } = client;
    match batch.add(request) {
        Ok(id) => _ = open.insert(id, Open { updates, is_cancelled, took, is_running: false, place }),
        // A client that left needs no answer.
        Err(error) => _ = updates.send(Update::Failed(error)),
    }
}
