//! Work that stops at a deadline.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use halite::clock::Instant;

use halite::backend::Cancel;

use crate::border::{Failure, Fallible, HALITE_ERROR};

/// When to stop; `None`: never.
pub(crate) type Deadline = Option<Instant>;

/// The deadline in so many milliseconds from now; 0: none.
pub(crate) fn deadline(ms: u32) -> Deadline {
    if ms == 0 { None } else { Instant::now().checked_add(Duration::from_millis(ms.into())) }
}

/// Does work, and interrupts it at the deadline. Returns its result, and whether the deadline passed.
pub(crate) fn within<T>(
    cancel: &Cancel,
    deadline: Deadline,
    work: impl FnOnce() -> T,
) -> Fallible<(T, bool)> {
    let Some(deadline) = deadline else { return Ok((work(), false)) };
    let left = deadline.saturating_duration_since(Instant::now());
    let (result, passed) = if left.is_zero() {
        cancel.interrupt();
        (work(), true)
    } else {
        watched(cancel, left, work)?
    };
    cancel.resume();
    Ok((result, passed))
}

/// Does work while a thread waits for its end, or so long.
fn watched<T>(cancel: &Cancel, left: Duration, work: impl FnOnce() -> T) -> Fallible<(T, bool)> {
    let (done, wait) = channel::<()>();
    let result = std::thread::scope(|scope| {
        let watch = move || {
            let passed = wait.recv_timeout(left) == Err(RecvTimeoutError::Timeout);
            if passed {
                cancel.interrupt();
            }
            passed
        };
        let thread = std::thread::Builder::new().name("deadline".into()).spawn_scoped(scope, watch)?;
        let result = work();
        drop(done);
        Ok((result, thread.join().unwrap_or(false)))
    });
    result.map_err(|error: std::io::Error| {
        Failure::new(HALITE_ERROR, format!("no thread to watch the deadline: {error}"))
    })
}
