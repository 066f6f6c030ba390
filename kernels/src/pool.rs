//! Threads for kernels: a persistent pool, or those of the host through [`Executor`].
//!
//! A call hands out numbered tasks to the caller and the workers; which thread runs a task never shows in its
//! result. Each thread has an equal share of consecutive tasks, so that it reads memory in order. It takes half
//! of what is left of its share, again and again, and then half of another thread's rest: threads end together
//! even if one of them is slow or was interrupted.
//!
//! Tasks run in the default floating-point environment, whatever the caller's is. Workers look for work for
//! some microseconds after a job, because the next op of a step follows at once, and then sleep: an idle pool
//! uses no CPU.

use std::any::Any;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::float::DefaultFloats;
use crate::panel::PanelMut;

/// Polls of a worker for a job before it sleeps; about 30 microseconds.
const SPINS: u32 = 1500;

/// Maximum threads of a [`Pool`]: far beyond this, starting one ends the process, because memory maps run out.
pub const MOST_THREADS: usize = 4096;

/// Threads that run the work of kernels.
///
/// A host that has threads of its own implements this, instead of letting Halite start some. A step calls it once for each
/// op, some hundred times, with microseconds of work each: threads should start fast.
///
/// Threads of the standard library, started for each op (a pool does better):
///
/// ```
/// struct Scoped(usize);
///
/// impl halite_kernels::pool::Executor for Scoped {
///     fn threads(&self) -> usize {
///         self.0
///     }
///     fn broadcast(&self, work: &(dyn Fn(usize) + Sync)) {
///         std::thread::scope(|scope| (0..self.0).for_each(|i| drop(scope.spawn(move || work(i)))));
///     }
/// }
/// ```
///
/// With rayon's pool, `broadcast` is `self.0.broadcast(|context| work(context.index()))`.
pub trait Executor: Send + Sync {
    /// The most calls of `work` that are useful; at least 1. It never changes.
    fn threads(&self) -> usize;

    /// Calls `work(i)` once for each `i` below [`Executor::threads`], at the same time as far as there are threads, and
    /// returns when all calls have returned. `work` does not panic.
    ///
    /// Calls share what is to be done: one that finds nothing left returns at once, and if some are left out, the others do
    /// more.
    fn broadcast(&self, work: &(dyn Fn(usize) + Sync));
}

/// What cuts work into tasks for an [`Executor`]. Dropping it ends the threads that it started.
pub struct Pool {
    executor: Arc<dyn Executor>,
    threads: usize,
    /// Each thread's share of the job, the caller's first.
    shares: Box<[Share]>,
    /// One job at a time, so that several plans can use one pool.
    entry: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// The threads of a pool without another executor.
#[derive(Debug)]
struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Counts calls, so that a worker sees a new one.
    epoch: AtomicU32,
    /// The current call; valid while `open`.
    call: AtomicPtr<Call<'static>>,
    open: AtomicBool,
    /// Workers that are looking at the call.
    inside: AtomicUsize,
    stop: AtomicBool,
    sleeping: Mutex<usize>,
    wake: Condvar,
}

/// What workers call, behind a thin pointer.
struct Call<'a>(&'a (dyn Fn(usize) + Sync));

/// A range of tasks that are not yet taken: the first one in the low half, the end in the high half. Alone in
/// its cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, range: Range<u32>) {
        self.0.store(u64::from(range.start) | (u64::from(range.end) << 32), Ordering::Relaxed);
    }

    /// Takes half of the range, at least one task, from the front or from the back.
    fn take_half(&self, front: bool) -> Option<Range<usize>> {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = (now as u32, (now >> 32) as u32);
            let half = end.checked_sub(start).filter(|&len| len > 0)?.div_ceil(2);
            let (taken, left) = if front {
                (start..start + half, start + half..end)
            } else {
                (end - half..end, start..end - half)
            };
            let next = u64::from(left.start) | (u64::from(left.end) << 32);
            match self.0.compare_exchange_weak(now, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken.start as usize..taken.end as usize),
                Err(other) => now = other,
            }
        }
    }
}

struct Job<'a> {
    run: &'a (dyn Fn(Range<usize>) + Sync),
    shares: &'a [Share],
    /// The payload of the first panic.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

thread_local! {
    /// Whether this thread is running a task of some pool.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

impl Job<'_> {
    /// Takes tasks for a thread.
    fn claim(&self, thread: usize) -> Option<Range<usize>> {
        let (before, own) = self.shares.split_at_checked(thread)?;
        let (own, after) = own.split_first()?;
        let others = || after.iter().chain(before).find_map(|share| share.take_half(false));
        own.take_half(true).or_else(others)
    }

    /// Runs tasks until none is left. After a panic no thread starts another one.
    fn work(&self, thread: usize) {
        let _floats = DefaultFloats::set();
        IN_TASK.set(true);
        let tasks = || {
            while let Some(tasks) = self.claim(thread) {
                (self.run)(tasks);
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(tasks)) {
            self.shares.iter().for_each(|share| share.set(0..0));
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        IN_TASK.set(false);
    }
}

impl Pool {
    /// Starts threads so that there are `threads`, the caller's included; at least one.
    ///
    /// # Errors
    /// More than [`MOST_THREADS`]; the operating system's error if it cannot start a thread.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        if threads > MOST_THREADS {
            return Err(std::io::Error::other(format!("expected at most {MOST_THREADS}")));
        }
        Ok(Pool::with_executor(Arc::new(Workers::start(threads)?)))
    }

    /// Uses the threads of an executor.
    pub fn with_executor(executor: Arc<dyn Executor>) -> Pool {
        let threads = executor.threads().max(1);
        let shares = (0..threads).map(|_| Share::default()).collect();
        Pool { executor, threads, shares, entry: Mutex::new(()) }
    }

    /// Returns the number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs tasks `0..tasks`, in any order and on any thread, and returns when all are done. A task may call
    /// this itself: the inner tasks then run on its own thread.
    ///
    /// # Panics
    /// If a task panics, with what it panicked with, once no task runs any more. The pool can be used again.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.ranges(tasks, &|tasks| tasks.for_each(task));
    }

    /// As [`Pool::run`]; `task` gets several tasks at a time.
    fn ranges(&self, tasks: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
        // (More tasks than 32 bits count have no memory for their results.)
        let alone = tasks <= 1 || self.threads == 1 || IN_TASK.get();
        let Some(count) = u32::try_from(tasks).ok().filter(|_| !alone) else {
            let _floats = DefaultFloats::set();
            if tasks > 0 {
                task(0..tasks);
            }
            return;
        };
        let _one_at_a_time = self.entry.lock().unwrap_or_else(PoisonError::into_inner);
        let threads = self.threads as u64;
        let end = |thread: usize| (u64::from(count) * thread as u64 / threads) as u32;
        for (thread, share) in self.shares.iter().enumerate() {
            share.set(end(thread)..end(thread + 1));
        }
        let job = Job { run: task, shares: &self.shares, panic: Mutex::new(None) };
        self.executor.broadcast(&|thread| job.work(thread));
        // What an executor has left undone.
        job.work(0);
        if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }

    /// Cuts every panel of `outs` into runs of columns, whole multiples of `grain` except at an edge, and calls
    /// `task(panel index, first column, columns)` for each.
    pub fn panels(
        &self,
        outs: &mut [PanelMut<'_>],
        grain: usize,
        task: &(dyn Fn(usize, usize, PanelMut<'_>) + Sync),
    ) {
        let grain = grain.max(1);
        // SAFETY of sharing: only `block` is called on the panels, and each task takes columns of its own.
        let shared = SharedPanels(&*outs);
        let grains = |panel: &PanelMut<'_>| panel.cols().div_ceil(grain);
        self.ranges(shared.get().iter().map(grains).sum(), &|range| {
            let mut before = 0;
            for (i, panel) in shared.get().iter().enumerate() {
                let (first, end) = (range.start.max(before), range.end.min(before + grains(panel)));
                if first < end {
                    let (first, end) = (first - before, end - before);
                    // SAFETY: these grains of panel `i` are this task's alone.
                    let columns =
                        unsafe { panel.block(0..panel.rows(), first * grain, (end - first) * grain) };
                    task(i, first * grain, columns);
                }
                before += grains(panel);
            }
        });
    }

    /// Cuts panels of equal shape into the same blocks, and calls `task(band, first column, blocks)` for each.
    /// A band of rows ends at each of `ends`, which must be sorted: otherwise nothing runs. A band is cut into
    /// runs of columns, whole multiples of `grain` except at the edge.
    pub fn blocks<const N: usize>(
        &self,
        panels: [PanelMut<'_>; N],
        ends: &[usize],
        grain: usize,
        task: &(dyn Fn(usize, usize, [PanelMut<'_>; N]) + Sync),
    ) {
        let grain = grain.max(1);
        let grains = panels.iter().map(PanelMut::cols).min().unwrap_or(0).div_ceil(grain);
        if grains == 0 || !ends.is_sorted() {
            return;
        }
        // SAFETY of sharing: as in `panels`.
        let shared = SharedPanels(&panels);
        self.ranges(grains * ends.len(), &|mut range| {
            while !range.is_empty() {
                let (band, run) = (range.start / grains, range.start % grains);
                let len = range.len().min(grains - run);
                let rows = band.checked_sub(1).map_or(0, |before| ends[before])..ends[band];
                // SAFETY: bands do not overlap, and these grains of the band are this task's alone.
                let block =
                    |panel: &PanelMut<'_>| unsafe { panel.block(rows.clone(), run * grain, len * grain) };
                task(band, run * grain, std::array::from_fn(|i| block(&shared.get()[i])));
                range.start += len;
            }
        });
    }

    /// Cuts each panel into as many runs of columns, of `widths` columns in each panel, and calls `task(run, columns)`
    /// for several runs at a time, the first of which is `run`. The last run of a panel may be narrower.
    pub fn columns<const N: usize>(
        &self,
        panels: [PanelMut<'_>; N],
        widths: [usize; N],
        task: &(dyn Fn(usize, [PanelMut<'_>; N]) + Sync),
    ) {
        let runs = panels.iter().zip(widths).map(|(panel, width)| panel.cols().div_ceil(width.max(1)));
        // SAFETY of sharing: as in `panels`.
        let shared = SharedPanels(&panels);
        self.ranges(runs.min().unwrap_or(0), &|range| {
            // SAFETY: these runs of each panel are this task's alone.
            let columns = |i: usize| unsafe {
                let panel = &shared.get()[i];
                panel.block(0..panel.rows(), range.start * widths[i], range.len() * widths[i])
            };
            task(range.start, std::array::from_fn(columns));
        });
    }

    /// Cuts a matrix of rows of `cols` elements into runs of `grain` rows and calls `task(first row, rows)`
    /// for each.
    pub fn rows<T: Send>(
        &self,
        matrix: &mut [T],
        cols: usize,
        grain: usize,
        task: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let matrix = Rows::new(matrix, cols, grain);
        self.run(matrix.runs(), &|n| {
            // SAFETY: run `n` is this task's alone.
            task(n * matrix.grain, unsafe { matrix.run(n) });
        });
    }

    /// As [`Pool::rows`] for three matrices of as many rows.
    pub fn rows3<A: Send, B: Send, C: Send>(
        &self,
        (a, a_cols): (&mut [A], usize),
        (b, b_cols): (&mut [B], usize),
        (c, c_cols): (&mut [C], usize),
        grain: usize,
        task: &Task3<'_, A, B, C>,
    ) {
        let (a, b, c) =
            (Rows::new(a, a_cols, grain), Rows::new(b, b_cols, grain), Rows::new(c, c_cols, grain));
        self.run(a.runs().min(b.runs()).min(c.runs()), &|n| {
            // SAFETY: run `n` of each is this task's alone.
            let (a_run, b_run, c_run) = unsafe { (a.run(n), b.run(n), c.run(n)) };
            task(n * a.grain, a_run, b_run, c_run);
        });
    }
}

/// A matrix to be cut into runs of rows.
struct Rows<'a, T> {
    start: *mut T,
    rows: usize,
    cols: usize,
    grain: usize,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: shared access gives out disjoint runs only; see `Rows::run`.
unsafe impl<T: Send> Sync for Rows<'_, T> {}

impl<'a, T> Rows<'a, T> {
    fn new(matrix: &'a mut [T], cols: usize, grain: usize) -> Self {
        let rows = matrix.len().checked_div(cols).unwrap_or(0);
        Rows { start: matrix.as_mut_ptr(), rows, cols, grain: grain.max(1), matrix: PhantomData }
    }

    fn runs(&self) -> usize {
        self.rows.div_ceil(self.grain)
    }

    /// # Safety
    /// Run `n` is below `runs()` and is asked for once while its result is in use.
    #[allow(clippy::mut_from_ref, reason = "runs are disjoint")]
    unsafe fn run(&self, n: usize) -> &mut [T] {
        let first = n * self.grain;
        let rows = self.grain.min(self.rows - first);
        // SAFETY: rows `first..first + rows` lie inside the matrix.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first * self.cols), rows * self.cols) }
    }
}

/// A task on runs of three matrices: the first row's number, and the rows.
type Task3<'a, A, B, C> = dyn Fn(usize, &mut [A], &mut [B], &mut [C]) + Sync + 'a;

struct SharedPanels<'a, 'b>(&'a [PanelMut<'b>]);

// SAFETY: see `Pool::panels`: shared access only copies the panels' extents and cuts disjoint blocks.
unsafe impl Sync for SharedPanels<'_, '_> {}

impl<'a, 'b> SharedPanels<'a, 'b> {
    fn get(&self) -> &'a [PanelMut<'b>] {
        self.0
    }
}

impl Workers {
    fn start(threads: usize) -> std::io::Result<Workers> {
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            call: AtomicPtr::new(std::ptr::null_mut()),
            open: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            sleeping: Mutex::new(0),
            wake: Condvar::new(),
        });
        let mut workers = Workers { shared, threads: Vec::new() };
        for i in 1..threads {
            let shared = workers.shared.clone();
            let name = format!("halite-{i}");
            let worker = std::thread::Builder::new().name(name).spawn(move || shared.serve(i))?;
            workers.threads.push(worker);
        }
        Ok(workers)
    }
}

impl Executor for Workers {
    fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Only one thread at a time calls this: see [`Pool::entry`].
    fn broadcast(&self, work: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let call = Call(work);
        shared.call.store((&raw const call).cast_mut().cast(), Ordering::Release);
        shared.open.store(true, Ordering::SeqCst);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if *shared.sleeping.lock().unwrap_or_else(PoisonError::into_inner) > 0 {
            shared.wake.notify_all();
        }
        // The call always outlives every worker that reads it.
        let _close = Close(shared);
        work(0);
    }
}

/// Closes the call and waits for the workers inside it.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.open.store(false, Ordering::SeqCst);
        let mut spins = 0u32;
        while self.0.inside.load(Ordering::SeqCst) > 0 {
            spins += 1;
            if spins.is_multiple_of(256) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// Counts a worker inside the call.
struct Inside<'a>(&'a Shared);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.next_epoch(seen) {
            seen = epoch;
            self.inside.fetch_add(1, Ordering::SeqCst);
            let _inside = Inside(self);
            if self.open.load(Ordering::SeqCst) {
                let call = self.call.load(Ordering::Acquire);
                // SAFETY: `inside` was raised before `open` was seen, and the caller takes the call away only
                // after it has closed it and seen `inside` at zero; so the call is alive until `_inside` is
                // dropped.
                unsafe { ((*call).0)(thread) };
            }
        }
    }

    /// Waits for a call after `seen`; `None` when the pool ends.
    fn next_epoch(&self, seen: u32) -> Option<u32> {
        for _ in 0..SPINS {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch != seen {
                return (!self.stop.load(Ordering::SeqCst)).then_some(epoch);
            }
            std::hint::spin_loop();
        }
        let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        *sleeping += 1;
        let mut epoch = self.epoch.load(Ordering::SeqCst);
        while epoch == seen {
            sleeping = self.wake.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
            epoch = self.epoch.load(Ordering::SeqCst);
        }
        *sleeping -= 1;
        (!self.stop.load(Ordering::SeqCst)).then_some(epoch)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        drop(self.shared.sleeping.lock());
        self.shared.wake.notify_all();
        for worker in self.threads.drain(..) {
            // A worker that unwound has already said so on its own thread.
            let _ = worker.join();
        }
    }
}
