//! What the library has to say, which it never prints.

use std::ffi::{CString, c_char, c_void};
use std::sync::{PoisonError, RwLock};

use crate::border::{HaliteResult, call};

/// How much a message matters: the higher, the less.
pub type HaliteLogLevel = u32;
/// An error in the library's code, which its call also reports.
pub const HALITE_LOG_ERROR: HaliteLogLevel = 1;
/// Something in a model file that may surprise.
pub const HALITE_LOG_WARNING: HaliteLogLevel = 2;
/// What happened, such as progress of loading.
pub const HALITE_LOG_INFO: HaliteLogLevel = 3;

/// Receives messages, in UTF-8, valid during the call. It may be called from any thread, and must not call
/// this library.
pub type HaliteLog =
    Option<unsafe extern "C" fn(level: HaliteLogLevel, message: *const c_char, user: *mut c_void)>;

struct Log {
    to: HaliteLog,
    level: HaliteLogLevel,
    user: *mut c_void,
}

// SAFETY: the caller promises that the callback may be called from any thread, with this pointer.
unsafe impl Send for Log {}
// SAFETY: as above.
unsafe impl Sync for Log {}

static LOG: RwLock<Log> = RwLock::new(Log { to: None, level: 0, user: std::ptr::null_mut() });

/// Passes on a message.
pub(crate) fn say(level: HaliteLogLevel, message: &str) {
    let log = LOG.read().unwrap_or_else(PoisonError::into_inner);
    let Some(to) = log.to.filter(|_| level <= log.level) else { return };
    let message = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
    // SAFETY: the caller of `halite_set_log` promised that the callback may be called until it is replaced.
    unsafe { to(level, message.as_ptr(), log.user) };
}

/// Says what share of the weights is loaded, in steps of a tenth.
pub(crate) struct Progress {
    total_bytes: u64,
    said: u64,
}

impl Progress {
    pub fn of(total_bytes: u64) -> Progress {
        Progress { total_bytes: total_bytes.max(1), said: 0 }
    }

    pub fn loaded(&mut self, bytes: u64) {
        let tenths = (u128::from(bytes) * 10 / u128::from(self.total_bytes)).min(10) as u64;
        if tenths > self.said {
            self.said = tenths;
            say(HALITE_LOG_INFO, &format!("loaded {}0 % of {} bytes of weights", tenths, self.total_bytes));
        }
    }
}

/// Sets the receiver of messages up to a level; null for none, as at the start. It replaces the one before,
/// which is not called any more once this returns. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_set_log(
    log: HaliteLog,
    level: HaliteLogLevel,
    user: *mut c_void,
) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe {
        call(|_| {
            *LOG.write().unwrap_or_else(PoisonError::into_inner) = Log { to: log, level, user };
            Ok(())
        })
    }
}
