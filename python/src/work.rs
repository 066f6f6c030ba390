//! Work without Python's lock, that signals and other threads can stop, and in which panics end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use halite::backend::Cancel;
use pyo3::prelude::*;

use crate::error::{Failure, Fallible, Kind};

/// Time between two looks for signals.
const TICK: Duration = Duration::from_millis(20);

/// As much as the main thread of a program has.
const STACK: usize = 8 << 20;

/// Does work on another thread, while this one waits without Python's lock. A signal whose handler raises, as
/// that of Ctrl-C does, stops the work and raises.
pub fn work<T: Send>(
    py: Python<'_>,
    cancel: Option<&Cancel>,
    f: impl FnOnce() -> Fallible<T> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let result = py.detach(|| {
        std::thread::scope(|scope| {
            let (done, wait) = channel::<()>();
            let run = move || {
                let _done = done;
                f()
            };
            let thread =
                std::thread::Builder::new().name("halite".into()).stack_size(STACK).spawn_scoped(scope, run);
            let thread =
                thread.map_err(|e| Failure::new(Kind::Other, format!("no thread to work on: {e}")))?;
            while wait.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                // Python is gone when the program ends during the work.
                let looked = Python::try_attach(|py| py.check_signals());
                if let Some(Err(error)) = looked
                    && raised.is_none()
                {
                    raised = Some(error);
                    cancel.into_iter().for_each(Cancel::interrupt);
                }
            }
            thread.join().unwrap_or_else(|payload| Err(Failure::panic(&*payload)))
        })
    });
    match raised {
        None => Ok(result?),
        Some(error) => {
            cancel.into_iter().for_each(Cancel::resume);
            Err(error)
        }
    }
}

/// Does brief work at once.
pub fn brief<T>(f: impl FnOnce() -> Fallible<T>) -> Fallible<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| Err(Failure::panic(&*payload)))
}

/// Locks an object without waiting: who waits with Python's lock would stop who holds the object.
pub fn lock<'a, T>(what: &str, mutex: &'a Mutex<T>) -> Fallible<MutexGuard<'a, T>> {
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            Err(Failure::new(Kind::Busy, format!("{what}: another thread uses it; use one for each thread")))
        }
    }
}

/// The error of an object that was closed.
pub fn closed(what: &str) -> Failure {
    Failure::new(Kind::Closed, format!("{what}: it is closed"))
}

/// Panics, for the test of what becomes of a panic.
#[pyfunction]
pub fn _panic(py: Python<'_>, briefly: bool) -> PyResult<()> {
    let f = || -> Fallible<()> { panic!("as asked") };
    if briefly { Ok(brief(f)?) } else { work(py, None, f) }
}
