//! Reads weights from their files while ops run, through a fixed number of slots of memory.
//!
//! A user requests ranges of files in the order in which it will use them. Threads read ahead, as far as there
//! are free slots, and the user takes the chunks in the same order. A chunk that may be used again, such as
//! an expert's, stays in its slot until the slot is needed; those that were used least go first.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::map::{PAGE_BYTES, Region, Source, read_file};
use crate::memory::{reserved, zeroed};

/// Threads that read: enough to keep a drive's queue filled, and few, since they take a core from the kernels.
const READERS: usize = 2;

/// Minimum slots: two that an op uses at a time, and one for each reader.
pub const MIN_SLOTS: u64 = 2 + READERS as u64;

/// Name of memory in errors.
const SLOTS: &str = "memory for weights that are streamed";

/// Reads ranges of files ahead of their use.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    chunk_bytes: u64,
    slots: Vec<RwLock<Slot>>,
    state: Mutex<State>,
    /// Tells readers of requests and of free slots.
    work: Condvar,
    /// Tells the user of chunks.
    done: Condvar,
    read_bytes: AtomicU64,
}

/// Memory of a chunk.
#[derive(Debug)]
struct Slot {
    memory: Vec<u8>,
    /// The first byte at a multiple of a page.
    start: usize,
}

#[derive(Debug, Default)]
struct State {
    requests: VecDeque<Request>,
    /// What readers took, in the order of the requests.
    taken: VecDeque<Taken>,
    /// What each slot holds.
    holds: Vec<Held>,
    /// The number of requests that readers have taken, and that the user has.
    first_ticket: u64,
    stop: bool,
    /// Files that are open for direct reads.
    direct: Vec<(Arc<Source>, Option<Arc<File>>)>,
}

/// A range of a file to read.
#[derive(Debug)]
struct Request {
    source: Arc<Source>,
    range: Range<u64>,
    /// Whether it may be used again soon.
    keep: bool,
}

/// A request that a reader took.
#[derive(Debug)]
struct Taken {
    slot: usize,
    range: Range<u64>,
    state: Progress,
}

#[derive(Debug)]
enum Progress {
    Reading,
    Ready,
    Failed(Error),
}

#[derive(Debug, Default)]
struct Held {
    /// The file and the range, if they may be used again.
    chunk: Option<(Arc<Source>, Range<u64>)>,
    uses: u32,
    /// Readers and users of the slot.
    pins: u32,
}

impl Held {
    fn is(&self, request: &Request) -> bool {
        let same = |(source, range): &(Arc<Source>, Range<u64>)| {
            Arc::ptr_eq(source, &request.source) && *range == request.range
        };
        self.chunk.as_ref().is_some_and(same)
    }
}

/// The bytes of a requested range.
pub struct Chunk<'a> {
    shared: &'a Shared,
    slot: usize,
    memory: RwLockReadGuard<'a, Slot>,
    /// Its place behind the first page of the slot.
    bytes: Range<usize>,
}

impl Chunk<'_> {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        let start = self.memory.start;
        self.memory.memory.get(start + self.bytes.start..start + self.bytes.end).unwrap_or(&[])
    }
}

impl Drop for Chunk<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        unpin(&mut state, self.slot);
        self.shared.work.notify_all();
    }
}

fn unpin(state: &mut State, slot: usize) {
    if let Some(held) = state.holds.get_mut(slot) {
        held.pins = held.pins.saturating_sub(1);
    }
}

/// The page that begins at or before a byte.
fn page_of(offset: u64) -> u64 {
    offset / PAGE_BYTES * PAGE_BYTES
}

/// Returns the memory of a slot for chunks of a size: they may begin and end in the middle of a page.
fn slot_bytes(chunk_bytes: u64) -> u64 {
    chunk_bytes.next_multiple_of(PAGE_BYTES) + 2 * PAGE_BYTES
}

/// Returns the memory of a stream.
pub fn memory_bytes(slots: u64, chunk_bytes: u64) -> u64 {
    slots.saturating_mul(slot_bytes(chunk_bytes))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes the next request, once there is one and a slot for it. `None`: stop.
    fn take(&self) -> Option<(u64, usize, Request)> {
        let mut state = self.state();
        loop {
            if state.stop {
                return None;
            }
            if let Some(request) = state.requests.front() {
                if let Some(slot) = state.holds.iter().position(|held| held.is(request)) {
                    let range = request.range.clone();
                    state.requests.pop_front();
                    let held = &mut state.holds[slot];
                    (held.pins, held.uses) = (held.pins + 1, held.uses.saturating_add(1));
                    state.taken.push_back(Taken { slot, range, state: Progress::Ready });
                    self.done.notify_all();
                    continue;
                }
                let free = state.holds.iter().enumerate().filter(|(_, held)| held.pins == 0);
                let slot =
                    free.min_by_key(|(_, held)| (held.chunk.is_some(), held.uses)).map(|(slot, _)| slot);
                if let (Some(slot), Some(request)) = (slot, slot.and_then(|_| state.requests.pop_front())) {
                    state.holds[slot] = Held { chunk: None, uses: 0, pins: 1 };
                    let ticket = state.first_ticket + state.taken.len() as u64;
                    let range = request.range.clone();
                    state.taken.push_back(Taken { slot, range, state: Progress::Reading });
                    return Some((ticket, slot, request));
                }
            }
            state = self.work.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Returns the file for direct reads, if it has them.
    fn direct(&self, source: &Arc<Source>) -> Option<Arc<File>> {
        let mut state = self.state();
        if let Some((_, file)) = state.direct.iter().find(|(of, _)| Arc::ptr_eq(of, source)) {
            return file.clone();
        }
        let file = source.open_direct().map(Arc::new);
        state.direct.push((source.clone(), file.clone()));
        file
    }

    fn read(&self, slot: usize, request: &Request) -> Result<()> {
        let Some(slot) = self.slots.get(slot) else { return Ok(()) };
        let mut slot = slot.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (first, start) = (page_of(request.range.start), slot.start);
        let end = request.range.end.next_multiple_of(PAGE_BYTES);
        let memory = slot.memory.get_mut(start..start + (end - first) as usize);
        let fits =
            || Error::argument("streamed chunk", format!("at most {} bytes", self.chunk_bytes), end - first);
        let memory = memory.ok_or_else(fits)?;
        self.read_bytes.fetch_add(request.range.end - request.range.start, Ordering::Relaxed);
        if let Some(file) = self.direct(&request.source) {
            // The last page of the file may be incomplete.
            let in_file = (request.source.len().min(end) - first) as usize;
            // Some file systems open files for direct reads, and then refuse them; a plain read also says what is
            // wrong with a file.
            if read_pages(&file, first, memory, in_file).is_ok() {
                return Ok(());
            }
        }
        let inside = (request.range.start - first) as usize..(request.range.end - first) as usize;
        request.source.read_at(request.range.start, &mut memory[inside])
    }

    fn finish(&self, ticket: u64, slot: usize, request: Request, result: Result<()>) {
        let mut state = self.state();
        if let Some(held) = state.holds.get_mut(slot)
            && request.keep
            && result.is_ok()
        {
            (held.chunk, held.uses) = (Some((request.source, request.range)), 1);
        }
        let at = ticket.checked_sub(state.first_ticket).map_or(usize::MAX, |at| at as usize);
        if let Some(taken) = state.taken.get_mut(at) {
            taken.state = result.map_or_else(Progress::Failed, |()| Progress::Ready);
        }
        self.done.notify_all();
    }
}

/// Reads whole pages, until `in_file` bytes are there.
fn read_pages(file: &File, first: u64, memory: &mut [u8], in_file: usize) -> std::io::Result<()> {
    match memory.len() == in_file {
        true => read_file(file, first, memory),
        // A read of whole pages that ends at the end of the file is short.
        false => match read_file(file, first, memory) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            other => other,
        },
    }
}

impl Stream {
    /// Starts the readers of a stream of `slots` chunks of at most `chunk_bytes`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Backend`] if a thread cannot be started.
    pub fn new(slots: u64, chunk_bytes: u64) -> Result<Arc<Stream>> {
        let mut memory = reserved(slots, SLOTS)?;
        let mut holds = reserved(slots, SLOTS)?;
        for _ in 0..slots.max(MIN_SLOTS) {
            // One page more, to begin at a multiple of a page.
            let slot: Vec<u8> = zeroed(slot_bytes(chunk_bytes), SLOTS)?;
            let start = slot.as_ptr().align_offset(PAGE_BYTES as usize).min(PAGE_BYTES as usize);
            memory.push(RwLock::new(Slot { memory: slot, start }));
            holds.push(Held::default());
        }
        let shared = Arc::new(Shared {
            chunk_bytes,
            slots: memory,
            state: Mutex::new(State { holds, ..State::default() }),
            work: Condvar::new(),
            done: Condvar::new(),
            read_bytes: AtomicU64::new(0),
        });
        let mut stream = Stream { shared, readers: Vec::new() };
        for _ in 0..READERS {
            let shared = stream.shared.clone();
            let reader = std::thread::Builder::new().name("halite-stream".into()).stack_size(256 << 10);
            let reader = reader.spawn(move || {
                while let Some((ticket, slot, request)) = shared.take() {
                    let result = shared.read(slot, &request);
                    shared.finish(ticket, slot, request, result);
                }
            });
            let failed = |e| Error::Backend {
                backend: "host".into(),
                message: format!("no thread to read files: {e}"),
            };
            stream.readers.push(reader.map_err(failed)?);
        }
        Ok(Arc::new(stream))
    }

    /// Maximum bytes of a chunk.
    pub fn chunk_bytes(&self) -> u64 {
        self.shared.chunk_bytes
    }

    /// Memory of all slots.
    pub fn memory_bytes(&self) -> u64 {
        memory_bytes(self.shared.slots.len() as u64, self.shared.chunk_bytes)
    }

    /// Bytes read from files so far.
    pub fn read_bytes(&self) -> u64 {
        self.shared.read_bytes.load(Ordering::Relaxed)
    }

    /// Requests the bytes of a region. A chunk to `keep` may be used again, and stays as long as there is room.
    pub fn request(&self, region: &Region, keep: bool) {
        let request = Request { source: region.source().clone(), range: region.range(), keep };
        self.shared.state().requests.push_back(request);
        self.shared.work.notify_one();
    }

    /// Waits for the next requested chunk.
    ///
    /// # Errors
    /// Errors of the file; [`Error::Program`] if nothing is requested.
    pub fn next(&self) -> Result<Chunk<'_>> {
        let shared = &*self.shared;
        let mut state = shared.state();
        loop {
            match state.taken.front() {
                Some(Taken { state: Progress::Reading, .. }) => {}
                Some(_) => break,
                None if state.requests.is_empty() => {
                    return Err(Error::Program("a weight was used that was not requested".into()));
                }
                None => {}
            }
            state = shared.done.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        let taken = state.taken.pop_front();
        state.first_ticket += 1;
        let Some(taken) = taken else { return Err(Error::Cancelled) };
        if let Progress::Failed(error) = taken.state {
            unpin(&mut state, taken.slot);
            return Err(error);
        }
        drop(state);
        let memory = shared.slots[taken.slot].read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let first = page_of(taken.range.start);
        let bytes = (taken.range.start - first) as usize..(taken.range.end - first) as usize;
        Ok(Chunk { shared, slot: taken.slot, memory, bytes })
    }

    /// Drops all requests that were not taken, such as those of a step that failed.
    pub fn reset(&self) {
        let shared = &*self.shared;
        let mut state = shared.state();
        state.requests.clear();
        while state.taken.iter().any(|taken| matches!(taken.state, Progress::Reading)) {
            state = shared.done.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        while let Some(taken) = state.taken.pop_front() {
            state.first_ticket += 1;
            unpin(&mut state, taken.slot);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.work.notify_all();
        for reader in self.readers.drain(..) {
            // A reader that panicked has nothing left to say.
            let _ = reader.join();
        }
    }
}
