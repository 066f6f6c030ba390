//! Backends by name.

use std::ffi::c_char;
use std::sync::Arc;

use halite::Backend;
use halite::backend::Contract;
use halite::backend::driver::{self, Driver, Options};
use halite::backend::hybrid::Hybrid;

use crate::border::{Caller, Failure, Fallible, HaliteResult, call};
use crate::handle::{self, Object};

/// All backends of this build.
const DRIVERS: &[Driver] = &[
    halite::backend::cpu::DRIVER,
    halite::backend::reference::DRIVER,
    #[cfg(feature = "gpu")]
    halite_gpu::DRIVER,
    #[cfg(feature = "plugin")]
    halite_plugin::DRIVER,
    #[cfg(feature = "sim")]
    halite_sim::DRIVER,
];

/// An open backend: a device that runs models.
pub struct HaliteOpenBackend;

/// What a backend promises about its results.
pub type HalitePromise = u32;
/// The same bits as the reference.
pub const HALITE_PROMISE_EXACT: HalitePromise = 0;
/// Close to the reference.
pub const HALITE_PROMISE_CLOSE: HalitePromise = 1;
/// Computed in the device's own number formats.
pub const HALITE_PROMISE_NATIVE: HalitePromise = 2;

/// Facts about a backend.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteBackendInfo {
    pub struct_bytes: u32,
    pub promise: HalitePromise,
    /// Bytes of memory for weights and caches; UINT64_MAX: no limit.
    pub memory_bytes: u64,
}

sized! { HaliteBackendInfo { struct_bytes: u32, promise: HalitePromise, memory_bytes: u64 } }

pub(crate) struct BackendObject(pub Arc<dyn Backend>);

impl Object for BackendObject {
    type Handle = HaliteOpenBackend;
    const KIND: &'static str = "backend";
}

/// The backend of a handle.
pub(crate) fn of(handle: *const HaliteOpenBackend) -> Fallible<Arc<dyn Backend>> {
    Ok(handle::get::<BackendObject>(handle)?.0.clone())
}

/// Opens a backend by a name as in `cpu`, `cpu:threads=2` or `plugin:FILE`.
fn open_named(name: &str, options: &str) -> Fallible<Arc<dyn Backend>> {
    let (name, in_name) = driver::split_options(DRIVERS, name);
    let mut all = Options::default();
    all.set_list(in_name);
    all.set_list(options);
    Ok(driver::open(DRIVERS, name, &all)?)
}

/// Writes the number of backends of this build. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_count(count: *mut usize) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| c.put("count", count, DRIVERS.len())) }
}

/// Writes how the name of a backend is spelled, as in `cpu` and `plugin:FILE[:OPTIONS]`; `index` is below
/// halite_backend_count. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_spelling(
    index: usize,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let missing = || Failure::argument("index", &format!("below {}", DRIVERS.len()), index);
        let driver = DRIVERS.get(index).ok_or_else(missing)?;
        c.put_text(&driver.spelling(), out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Opens a backend by its name: "cpu", "reference", "gpu:1", "plugin:FILE", and so on. Options are separated
/// by commas, as in "threads=2", or null. They may follow the name of a backend that has no argument:
/// "cpu:threads=2". Several sessions may use one backend. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_open(
    name: *const c_char,
    options: *const c_char,
    backend: *mut *mut HaliteOpenBackend,
) -> HaliteResult {
    let make = |c: &Caller| {
        let options = c.optional_text("options", options)?.unwrap_or_default();
        Ok(BackendObject(open_named(c.text("name", name)?, options)?))
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, backend, || make(c))) }
}

/// Makes one backend of two: what the first one lacks runs on the second one. Both may be closed after it.
/// For bringing up a new device. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_join(
    first: *const HaliteOpenBackend,
    second: *const HaliteOpenBackend,
    backend: *mut *mut HaliteOpenBackend,
) -> HaliteResult {
    let make = || Ok(BackendObject(Arc::new(Hybrid::new(of(first)?, of(second)?))));
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, backend, make)) }
}

/// Closes a backend. Sessions that use it keep it. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_close(backend: *mut HaliteOpenBackend) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<BackendObject>(backend)) }
}

/// Writes facts about a backend. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_info(
    backend: *const HaliteOpenBackend,
    info: *mut HaliteBackendInfo,
) -> HaliteResult {
    let work = |c: &Caller| {
        let backend = of(backend)?;
        let caps = backend.caps();
        let promise = match caps.contract {
            Contract::Exact => HALITE_PROMISE_EXACT,
            Contract::Native => HALITE_PROMISE_NATIVE,
            _ => HALITE_PROMISE_CLOSE,
        };
        c.put_sized(
            "info",
            info,
            HaliteBackendInfo { struct_bytes: 0, promise, memory_bytes: caps.memory_bytes },
        )
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the description of a backend's device, for people. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_backend_device(
    backend: *const HaliteOpenBackend,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| c.put_text(&of(backend)?.caps().device, out, capacity, length).map(drop)) }
}
