//! The border: results, messages, text, arrays and structs that cross it, and the one place where panics end.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::log;

/// What a call returns. Numbers that this header does not name may come with later versions.
pub type HaliteResult = u32;
pub const HALITE_OK: HaliteResult = 0;
/// Something else failed; the message says what.
pub const HALITE_ERROR: HaliteResult = 1;
pub const HALITE_OUT_OF_MEMORY: HaliteResult = 2;
/// An argument is wrong: a null pointer, a number out of range, a struct_bytes that no version has.
pub const HALITE_ARGUMENT: HaliteResult = 3;
/// Another thread cancelled the work.
pub const HALITE_CANCELLED: HaliteResult = 4;
/// The library has an error in its code, and caught it. Close the handles of the call.
pub const HALITE_INTERNAL: HaliteResult = 16;
/// A handle is null, closed, or of another kind.
pub const HALITE_HANDLE: HaliteResult = 17;
/// Another call uses the handle.
pub const HALITE_BUSY: HaliteResult = 18;
/// The buffer is too small. The needed length was written, and nothing else.
pub const HALITE_TOO_SMALL: HaliteResult = 19;
/// This build of the library lacks the feature.
pub const HALITE_NOT_BUILT: HaliteResult = 20;
/// A file cannot be read or written.
pub const HALITE_IO: HaliteResult = 21;
/// A file, a template, a grammar or saved bytes are malformed, or do not fit the model.
pub const HALITE_MALFORMED: HaliteResult = 22;
/// The model, or an op of it on this backend, is not supported.
pub const HALITE_UNSUPPORTED: HaliteResult = 23;
/// The sequences do not fit in the session's memory.
pub const HALITE_CONTEXT_FULL: HaliteResult = 24;
/// The deadline passed.
pub const HALITE_DEADLINE: HaliteResult = 25;
/// A text is not UTF-8.
pub const HALITE_UTF8: HaliteResult = 26;
/// What was asked for is not there.
pub const HALITE_NOT_FOUND: HaliteResult = 27;
/// The model computed NaN or infinity.
pub const HALITE_NOT_FINITE: HaliteResult = 28;
/// The generation is complete: no more text comes.
pub const HALITE_END: HaliteResult = 29;

/// In place of a token: there is none.
pub const HALITE_NO_TOKEN: u32 = u32::MAX;

/// In place of the bytes of a text that ends with a zero.
pub const HALITE_ZERO_TERMINATED: usize = usize::MAX;

/// Why a call fails.
#[derive(Debug)]
pub(crate) struct Failure {
    pub code: HaliteResult,
    pub message: String,
}

pub(crate) type Fallible<T> = Result<T, Failure>;

impl Failure {
    pub fn new(code: HaliteResult, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into() }
    }

    pub fn argument(what: &str, expected: &str, got: impl std::fmt::Display) -> Failure {
        Failure::new(HALITE_ARGUMENT, format!("{what}: expected {expected}, got {got}"))
    }

    /// The error of a feature that was not built.
    #[allow(dead_code, reason = "a build with all features has no use for it")]
    pub fn not_built(feature: &str) -> Failure {
        let message = format!("this build lacks it: build halite-capi with the feature `{feature}`");
        Failure::new(HALITE_NOT_BUILT, message)
    }
}

impl From<halite::Error> for Failure {
    fn from(error: halite::Error) -> Failure {
        use halite::Error as E;
        let code = match &error {
            E::Io { .. } | E::Output { .. } | E::FileChanged { .. } => HALITE_IO,
            E::Gguf { .. } | E::Model(_) | E::Tokenizer(_) | E::Template(_) | E::Constraint(_) => {
                HALITE_MALFORMED
            }
            E::Program(_) | E::Profile { .. } | E::Saved { .. } => HALITE_MALFORMED,
            E::Architecture { .. } | E::Unsupported { .. } => HALITE_UNSUPPORTED,
            E::Argument { .. } => HALITE_ARGUMENT,
            E::OutOfMemory { .. } => HALITE_OUT_OF_MEMORY,
            E::ContextFull { .. } | E::WindowsFull { .. } | E::StatesFull { .. } => HALITE_CONTEXT_FULL,
            E::NotFinite { .. } => HALITE_NOT_FINITE,
            E::Cancelled => HALITE_CANCELLED,
            _ => HALITE_ERROR,
        };
        Failure::new(code, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
    static PANICS: Cell<bool> = const { Cell::new(false) };
    /// The calls that this thread is in, one within the callback of another; `None` before its first call.
    static DEPTH: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Calls in progress, on all threads.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Makes the next call on this thread panic, for tests.
#[doc(hidden)]
pub fn panic_in_next_call() {
    PANICS.set(true);
}

/// Keeps the message for [`halite_last_error`].
fn keep(message: &str) {
    let text = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
    // A thread that ends may have dropped it already.
    let _ = LAST.try_with(|last| last.replace(text));
}

/// Sends messages of panics within calls to the log rather than to the standard error. A thread that made no
/// call works for the calls in progress.
fn quieten() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            match DEPTH.get().map_or(CALLS.load(Ordering::Relaxed) > 0, |depth| depth > 0) {
                true => log::say(log::HALITE_LOG_ERROR, &info.to_string()),
                false => others(info),
            }
        }));
    });
}

/// Runs the body of a function of the interface. No panic gets past it.
///
/// # Safety
/// The caller of the interface promises that its pointers are as the head of the header says.
pub(crate) unsafe fn call(work: impl FnOnce(&Caller) -> Fallible<()>) -> HaliteResult {
    quieten();
    CALLS.fetch_add(1, Ordering::Relaxed);
    let depth = DEPTH.get().unwrap_or(0);
    DEPTH.set(Some(depth + 1));
    let result = panic::catch_unwind(AssertUnwindSafe(|| {
        assert!(!PANICS.take(), "a test asked for a panic");
        work(&Caller(()))
    }));
    DEPTH.set(Some(depth));
    CALLS.fetch_sub(1, Ordering::Relaxed);
    let failure = match result {
        Ok(Ok(())) => return HALITE_OK,
        Ok(Err(failure)) => failure,
        Err(payload) => Failure::new(HALITE_INTERNAL, format!("panic: {}", describe(payload))),
    };
    keep(&failure.message);
    failure.code
}

fn describe(payload: Box<dyn Any + Send>) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
    // Dropping an unknown payload may panic.
    std::mem::forget(payload);
    text
}

/// The promise of a caller that its pointers are valid, which only [`call`] hands out. Its methods check what
/// can be checked.
pub(crate) struct Caller(());

impl Caller {
    /// A text that ends with a zero.
    pub fn text(&self, what: &str, text: *const c_char) -> Fallible<&str> {
        utf8(what, self.bytes_of_text(what, text)?)
    }

    /// A text that ends with a zero, or `None` for null.
    pub fn optional_text(&self, what: &str, text: *const c_char) -> Fallible<Option<&str>> {
        if text.is_null() { Ok(None) } else { self.text(what, text).map(Some) }
    }

    /// A text of `bytes` bytes.
    pub fn sized_text(&self, what: &str, text: *const c_char, bytes: usize) -> Fallible<&str> {
        match bytes {
            HALITE_ZERO_TERMINATED => self.text(what, text),
            _ => utf8(what, self.array(what, text.cast::<u8>(), bytes)?),
        }
    }

    /// A path: bytes on Unix, UTF-8 elsewhere.
    pub fn path(&self, path: *const c_char) -> Fallible<&Path> {
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStrExt;
            Ok(Path::new(std::ffi::OsStr::from_bytes(self.bytes_of_text("path", path)?)))
        }
        #[cfg(not(unix))]
        Ok(Path::new(self.text("path", path)?))
    }

    fn bytes_of_text(&self, what: &str, text: *const c_char) -> Fallible<&[u8]> {
        if text.is_null() {
            return Err(Failure::argument(what, "a text", "null"));
        }
        // SAFETY: the caller promises that a text that is not null ends with a zero.
        Ok(unsafe { CStr::from_ptr(text) }.to_bytes())
    }

    /// An array; null only if it is empty.
    pub fn array<T: Plain>(&self, what: &str, first: *const T, count: usize) -> Fallible<&[T]> {
        if count == 0 {
            return Ok(&[]);
        }
        if count > isize::MAX as usize / size_of::<T>() {
            return Err(Failure::argument(what, "an array that fits in memory", format!("{count} elements")));
        }
        if first.is_null() || !first.is_aligned() {
            return Err(Failure::argument(what, "an aligned array", "null or another address"));
        }
        // SAFETY: the caller promises `count` elements, of which any bytes are valid.
        Ok(unsafe { std::slice::from_raw_parts(first, count) })
    }

    /// Writes a result. Null is an error.
    pub fn put<T>(&self, what: &str, to: *mut T, value: T) -> Fallible<()> {
        if to.is_null() || !to.is_aligned() {
            return Err(Failure::argument(
                what,
                "an aligned place for the result",
                "null or another address",
            ));
        }
        // SAFETY: the caller promises that a place that is not null may be written.
        unsafe { to.write(value) };
        Ok(())
    }

    /// Writes a result, if the caller wants it.
    pub fn put_optional<T>(&self, what: &str, to: *mut T, value: T) -> Fallible<()> {
        if to.is_null() { Ok(()) } else { self.put(what, to, value) }
    }

    /// Writes an array to a caller's buffer, and its length. Without a buffer, writes the length alone.
    /// Returns whether the array was written.
    pub fn put_array<T: Plain>(
        &self,
        from: &[T],
        out: *mut T,
        capacity: usize,
        length: *mut usize,
    ) -> Fallible<bool> {
        self.put_parts(from, &[], out, capacity, length)
    }

    /// Writes a text and a zero to a caller's buffer, and the length of the text, as [`Caller::put_array`].
    pub fn put_text(
        &self,
        from: &str,
        out: *mut c_char,
        capacity: usize,
        length: *mut usize,
    ) -> Fallible<bool> {
        self.put_parts(from.as_bytes(), &[0], out.cast(), capacity, length)
    }

    fn put_parts<T: Plain>(
        &self,
        from: &[T],
        end: &[T],
        out: *mut T,
        capacity: usize,
        length: *mut usize,
    ) -> Fallible<bool> {
        self.put_optional("length", length, from.len())?;
        let need = from.len() + end.len();
        if out.is_null() {
            return match capacity {
                0 => Ok(false),
                _ => Err(Failure::argument("capacity", "0 without a buffer", capacity)),
            };
        }
        if !out.is_aligned() {
            return Err(Failure::argument("buffer", "an aligned address", "another"));
        }
        if capacity < need {
            let message = format!("buffer: expected a capacity of at least {need}, got {capacity}");
            return Err(Failure::new(HALITE_TOO_SMALL, message));
        }
        // SAFETY: the caller promises `capacity` elements, and these are not more.
        unsafe {
            ptr::copy_nonoverlapping(from.as_ptr(), out, from.len());
            ptr::copy_nonoverlapping(end.as_ptr(), out.add(from.len()), end.len());
        }
        Ok(true)
    }

    /// Reads a struct that begins with its size: what an older caller's struct lacks is 0, and so must be
    /// what this library does not know. Null stands for a struct of zeros.
    pub fn options<T: Sized0>(&self, what: &str, from: *const T) -> Fallible<T> {
        if from.is_null() { Ok(T::ZERO) } else { self.sized(what, from) }
    }

    /// As [`Caller::options`]; null is an error.
    pub fn sized<T: Sized0>(&self, what: &str, from: *const T) -> Fallible<T> {
        let bytes = self.struct_bytes(what, from)?;
        let mut value = T::ZERO;
        // SAFETY: the caller promises `bytes` bytes; any bytes up to the end of a field are valid in a `T`.
        let beyond = unsafe {
            ptr::copy_nonoverlapping(
                from.cast::<u8>(),
                (&raw mut value).cast::<u8>(),
                bytes.min(size_of::<T>()),
            );
            let known = bytes.min(size_of::<T>());
            std::slice::from_raw_parts(from.cast::<u8>().add(known), bytes - known)
        };
        if beyond.iter().any(|&byte| byte != 0) {
            let expected = format!("zeros behind the {} bytes that this version knows", size_of::<T>());
            return Err(Failure::argument(what, &expected, "fields of a later version"));
        }
        Ok(value)
    }

    /// The elements of an array of structs that begin with their size, which is also their distance.
    pub fn sized_array<T: Sized0>(&self, what: &str, first: *const T, count: usize) -> Fallible<Vec<T>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.struct_bytes(what, first)?;
        if count > isize::MAX as usize / bytes {
            return Err(Failure::argument(what, "an array that fits in memory", format!("{count} elements")));
        }
        let mut all = Vec::new();
        for n in 0..count {
            // SAFETY: the caller promises `count` structs of `bytes` bytes.
            let element = unsafe { first.byte_add(n * bytes) };
            if self.struct_bytes(what, element)? != bytes {
                return Err(Failure::argument(what, "the same struct_bytes in each element", "two sizes"));
            }
            all.push(self.sized(what, element)?);
        }
        Ok(all)
    }

    /// Writes a struct that begins with its size, as far as the caller knows it; the rest of the caller's is
    /// 0.
    pub fn put_sized<T: Sized0>(&self, what: &str, to: *mut T, value: T) -> Fallible<()> {
        let bytes = self.struct_bytes(what, to)?;
        let known = bytes.min(size_of::<T>());
        let head = size_of::<u32>();
        // SAFETY: the caller promises `bytes` bytes to write, and the value has `known`. The size stays.
        unsafe {
            let to = to.cast::<u8>();
            ptr::copy_nonoverlapping((&raw const value).cast::<u8>().add(head), to.add(head), known - head);
            ptr::write_bytes(to.add(known), 0, bytes - known);
        }
        Ok(())
    }

    /// Reads and checks the size of a struct.
    fn struct_bytes<T: Sized0>(&self, what: &str, from: *const T) -> Fallible<usize> {
        /// More than any version will have.
        const MOST: usize = 1 << 16;
        if from.is_null() || !from.is_aligned() {
            return Err(Failure::argument(what, "an aligned struct", "null or another address"));
        }
        // SAFETY: the caller promises a struct, and it begins with its size.
        let bytes = unsafe { from.cast::<u32>().read() } as usize;
        if (size_of::<T>()..=MOST).contains(&bytes) || (bytes > 0 && T::ENDS.contains(&bytes)) {
            return Ok(bytes);
        }
        Err(Failure::argument(what, "struct_bytes to be the size of the struct", bytes))
    }
}

fn utf8<'a>(what: &str, bytes: &'a [u8]) -> Fallible<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| Failure::new(HALITE_UTF8, format!("{what}: {error}")))
}

/// Checks a field that later versions may use.
pub(crate) fn reserved(field: u32) -> Fallible<()> {
    if field == 0 { Ok(()) } else { Err(Failure::argument("reserved", "0", field)) }
}

/// Types of which any bytes are valid.
///
/// # Safety
/// As it says.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: numbers and pointers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for *const c_char {}

/// Structs that begin with their size.
///
/// # Safety
/// `repr(C)`, without padding, of fields that are numbers or pointers, the first one a `u32`.
pub(crate) unsafe trait Sized0: Copy {
    /// All zeros: the default of every field.
    const ZERO: Self;
    /// Sizes of structs that end between two fields, as those of older versions do.
    const ENDS: &'static [usize];
}

/// Lists the fields of structs that begin with their size, and checks that there is no padding between them.
macro_rules! sized {
    ($($name:ident { $($field:ident: $type:ty),+ $(,)? })+) => {$(
        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())+);
        // SAFETY: the sizes of its fields, whose types the pattern checks, add up to its size.
        unsafe impl $crate::border::Sized0 for $name {
            // SAFETY: zeros are valid numbers and null pointers.
            const ZERO: $name = unsafe { std::mem::zeroed() };
            const ENDS: &'static [usize] = &[$({
                const fn is(_: fn(&$name) -> &$type) {}
                is(|it| &it.$field);
                std::mem::offset_of!($name, $field)
            }),+];
        }
    )+};
}

/// Returns the version of the library, as in "0.1.0". Threads: any.
#[unsafe(no_mangle)]
pub extern "C" fn halite_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Returns the message of the last call on this thread that failed, in UTF-8, never null. It stays valid
/// until the next call on this thread that fails, or until the thread ends. Calls that return HALITE_OK leave
/// it as it is. Threads: any; each has its own message.
#[unsafe(no_mangle)]
pub extern "C" fn halite_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Returns the name of a result, as in "HALITE_BUSY", never null. Threads: any.
#[unsafe(no_mangle)]
pub extern "C" fn halite_result_name(result: HaliteResult) -> *const c_char {
    let name = match result {
        HALITE_OK => c"HALITE_OK",
        HALITE_ERROR => c"HALITE_ERROR",
        HALITE_OUT_OF_MEMORY => c"HALITE_OUT_OF_MEMORY",
        HALITE_ARGUMENT => c"HALITE_ARGUMENT",
        HALITE_CANCELLED => c"HALITE_CANCELLED",
        HALITE_INTERNAL => c"HALITE_INTERNAL",
        HALITE_HANDLE => c"HALITE_HANDLE",
        HALITE_BUSY => c"HALITE_BUSY",
        HALITE_TOO_SMALL => c"HALITE_TOO_SMALL",
        HALITE_NOT_BUILT => c"HALITE_NOT_BUILT",
        HALITE_IO => c"HALITE_IO",
        HALITE_MALFORMED => c"HALITE_MALFORMED",
        HALITE_UNSUPPORTED => c"HALITE_UNSUPPORTED",
        HALITE_CONTEXT_FULL => c"HALITE_CONTEXT_FULL",
        HALITE_DEADLINE => c"HALITE_DEADLINE",
        HALITE_UTF8 => c"HALITE_UTF8",
        HALITE_NOT_FOUND => c"HALITE_NOT_FOUND",
        HALITE_NOT_FINITE => c"HALITE_NOT_FINITE",
        HALITE_END => c"HALITE_END",
        _ => c"unknown",
    };
    name.as_ptr()
}
