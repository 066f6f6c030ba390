//! The table of handles. A handle is a number in the form of a pointer, which nobody reads: numbers are never
//! used twice, so a closed handle stays closed.

use std::any::Any;
use std::collections::HashMap;
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use crate::border::{
    Caller, Failure, Fallible, HALITE_BUSY, HALITE_HANDLE, HALITE_INTERNAL, HALITE_OUT_OF_MEMORY,
};

/// What a handle stands for.
pub(crate) trait Object: Any + Send + Sync {
    /// The type of its handles in C.
    type Handle;
    /// Its name in messages.
    const KIND: &'static str;
}

#[derive(Default)]
struct Table {
    last: usize,
    objects: HashMap<usize, Arc<dyn Any + Send + Sync>>,
}

static TABLE: LazyLock<RwLock<Table>> = LazyLock::new(RwLock::default);

/// Makes an object, and writes its handle; writes null first, so that a failed call leaves null.
pub(crate) fn open<T: Object>(
    caller: &Caller,
    out: *mut *mut T::Handle,
    make: impl FnOnce() -> Fallible<T>,
) -> Fallible<()> {
    caller.put(T::KIND, out, ptr::null_mut())?;
    let object = Arc::new(make()?);
    let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
    let full = || Failure::new(HALITE_OUT_OF_MEMORY, "there are no more handles");
    let number = table.last.checked_add(1).ok_or_else(full)?;
    table.last = number;
    table.objects.insert(number, object);
    caller.put(T::KIND, out, ptr::without_provenance_mut(number))
}

/// Returns the object of a handle, which stays alive while it is held.
pub(crate) fn get<T: Object>(handle: *const T::Handle) -> Fallible<Arc<T>> {
    let table = TABLE.read().unwrap_or_else(PoisonError::into_inner);
    let object = table.objects.get(&handle.addr()).cloned();
    let is_closed = object.is_none() && (1..=table.last).contains(&handle.addr());
    drop(table);
    let kind = T::KIND;
    let wrong = |got| Failure::new(HALITE_HANDLE, format!("{kind}: expected an open handle, got {got}"));
    match object {
        Some(object) => object.downcast().map_err(|_| wrong("a handle of another kind")),
        None if handle.is_null() => Err(wrong("null")),
        None if is_closed => Err(wrong("a closed one")),
        None => Err(wrong("something else")),
    }
}

/// As [`get`], or `None` for null.
pub(crate) fn get_optional<T: Object>(handle: *const T::Handle) -> Fallible<Option<Arc<T>>> {
    if handle.is_null() { Ok(None) } else { get(handle).map(Some) }
}

/// Closes a handle. Its object is dropped when no call and no other object uses it.
pub(crate) fn close<T: Object>(handle: *const T::Handle) -> Fallible<()> {
    get::<T>(handle)?;
    let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
    let object = table.objects.remove(&handle.addr());
    drop(table);
    // Another thread may have closed it meanwhile.
    object.map(drop).ok_or_else(|| Failure::new(HALITE_HANDLE, format!("{}: closed twice", T::KIND)))
}

/// Locks what calls use so briefly that others may wait.
pub(crate) fn brief<'a, T>(kind: &str, mutex: &'a Mutex<T>) -> Fallible<MutexGuard<'a, T>> {
    mutex.lock().map_err(|_| failed(kind))
}

fn failed(kind: &str) -> Failure {
    Failure::new(HALITE_INTERNAL, format!("{kind}: an earlier call failed inside; close it"))
}

/// Locks what one call at a time may use.
pub(crate) fn lock<'a, T>(kind: &str, mutex: &'a Mutex<T>) -> Fallible<MutexGuard<'a, T>> {
    mutex.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Failure::new(HALITE_BUSY, format!("{kind}: another call uses it")),
        TryLockError::Poisoned(_) => failed(kind),
    })
}
