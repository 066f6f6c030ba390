//! Backends in shared libraries, for chips whose driver is in C, in another language, or not public.
//!
//! A plug-in exports the function `halite_backend` of `include/halite_backend.h`. [`PluginBackend::load`] opens one,
//! and [`DRIVER`] gives it to the command as `plugin:FILE[:OPTIONS]`. `examples/chip-c` is a plug-in of one C file.
//!
//! A plug-in runs in this process, with all its rights: load only plug-ins that you trust as you trust a driver. What
//! it answers is checked: sizes, numbers, pointers that must not be null, and texts.

pub mod abi;
mod encode;
mod library;
mod probe;

use std::ffi::{CString, c_void};
use std::ops::Range;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use halite::backend::driver::{Argument, Driver};
use halite::backend::energy::{Energy, EnergySource};
use halite::backend::{
    Backend, Bindings, Buffer, Cancel, Caps, Clock, Contract, Fusions, Gap, Limits, OpSig, Plan, Step,
    Support, Ticket, Timing, Usage, check_step, check_support,
};
use halite::kernels::float::DefaultFloats;
use halite::map::Region;
use halite::program::Program;
use halite::{Error, Result};

use abi::*;
use encode::{Encoded, NotInAbi, size};
use library::Library;

/// The driver `plugin:FILE[:OPTIONS]`.
pub const DRIVER: Driver = Driver::new("plugin", |argument, _| {
    let (file, options) = split(argument);
    Ok(Arc::new(PluginBackend::load(file, options)?))
})
.argument(Some(Argument::required("FILE[:OPTIONS]").is_file(true)))
.help("a shared library; see docs/bring-your-chip.md");

/// Splits `FILE[:OPTIONS]` behind the first prefix that is a file, for paths with colons.
fn split(argument: &str) -> (&Path, &str) {
    let whole = (argument.len(), "");
    let colons = argument.match_indices(':').map(|(at, _)| (at, &argument[at + 1..]));
    let found = colons.chain([whole]).find(|&(end, _)| Path::new(&argument[..end]).is_file());
    let (end, options) = found.unwrap_or(whole);
    (Path::new(&argument[..end]), options)
}

/// Bytes of a message, the final zero included.
const MESSAGE_BYTES: usize = 1024;
/// The most that the host copies at a time.
const STAGING_BYTES: u64 = 1 << 20;
/// Longest description of a device.
const DEVICE_BYTES: usize = 256;

/// A device of a plug-in.
pub struct PluginBackend {
    device: Arc<Device>,
    caps: Caps,
}

/// An open device, which is closed when its backend, buffers and plans are dropped.
struct Device {
    calls: HaliteBackend,
    name: String,
    raw: NonNull<HaliteDevice>,
    /// Held during each call.
    one_call: Mutex<()>,
    library: Library,
}

// SAFETY: the interface promises that calls may come from any thread, and `one_call` makes them one at a time.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Drop for Device {
    fn drop(&mut self) {
        let _one_call = self.lock();
        if let Some(close) = self.calls.close {
            // SAFETY: the plug-in returned this device, and nothing uses it any more.
            unsafe { close(self.raw.as_ptr()) }
        }
    }
}

/// A text that a plug-in writes.
struct Message([u8; MESSAGE_BYTES]);

impl Message {
    fn text(&self) -> String {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(MESSAGE_BYTES);
        String::from_utf8_lossy(&self.0[..end]).trim().into()
    }
}

/// The status and the message of a call that did not succeed.
struct Refusal {
    status: HaliteStatus,
    message: String,
}

/// Makes a call with memory for a message.
fn call(f: impl FnOnce(*mut HaliteMessage) -> HaliteStatus) -> Result<(), Refusal> {
    let mut text = Message([0; MESSAGE_BYTES]);
    let mut message = HaliteMessage {
        struct_bytes: size::<HaliteMessage>(),
        capacity_bytes: MESSAGE_BYTES as u32,
        text: text.0.as_mut_ptr().cast(),
    };
    match f(&mut message) {
        HALITE_OK => Ok(()),
        status => match text.text() {
            message if message.is_empty() => Err(Refusal { status, message: "no message".into() }),
            message => Err(Refusal { status, message }),
        },
    }
}

impl Device {
    /// Waits for other threads' calls. A call cannot panic, so the lock is never poisoned by one.
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.one_call.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::Backend { backend: self.name.clone(), message: message.into() }
    }

    /// Makes a call of the device, and turns its refusal into an error. `bytes` is what it needs, if it allocates.
    fn call(
        &self,
        what: &str,
        bytes: u64,
        f: impl FnOnce(*mut HaliteDevice, *mut HaliteMessage) -> HaliteStatus,
    ) -> Result<()> {
        let _one_call = self.lock();
        call(|message| f(self.raw.as_ptr(), message)).map_err(|refusal| match refusal.status {
            HALITE_OUT_OF_MEMORY => Error::OutOfMemory {
                what: format!("{what} on `{}` ({})", self.name, refusal.message),
                need_bytes: bytes,
                have_bytes: 0,
            },
            HALITE_CANCELLED => Error::Cancelled,
            HALITE_ERROR | HALITE_ARGUMENT | HALITE_NOT_YET | HALITE_NEVER => {
                self.error(format!("{what}: {}", refusal.message))
            }
            unknown => self.error(format!(
                "{what}: returned the status {unknown}, which does not exist; {}",
                refusal.message
            )),
        })
    }
}

impl PluginBackend {
    /// Loads a plug-in and opens a device. `options` is a text for the plug-in.
    ///
    /// On Unix, a child process loads the plug-in first. If that crashes it or takes more than ten seconds, loading is
    /// an error here. The library stays loaded until the process ends.
    ///
    /// # Errors
    /// [`Error::Backend`] if the file is no plug-in, is of another version, crashes, answers something impossible, or
    /// cannot open its device.
    pub fn load(file: impl AsRef<Path>, options: &str) -> Result<PluginBackend> {
        let file = file.as_ref();
        let failed =
            |message: String| Error::Backend { backend: format!("plugin:{}", file.display()), message };
        probe::try_in_a_child(file).map_err(failed)?;
        let library = Library::load(file).map_err(failed)?;
        let calls = library.calls;
        let open = calls.open.ok_or_else(|| failed("has no `open`".into()))?;
        let options = CString::new(options).map_err(|_| failed("options with a zero byte".into()))?;
        let mut raw = ptr::null_mut();
        // SAFETY: the arguments are as the interface says.
        call(|message| unsafe { open(options.as_ptr(), &mut raw, message) })
            .map_err(|refusal| failed(format!("open: {}", refusal.message)))?;
        let raw = NonNull::new(raw).ok_or_else(|| failed("open: succeeded without a device".into()))?;
        let device = Device { calls, name: library.name.clone(), raw, one_call: Mutex::new(()), library };
        let caps = caps(&device)?;
        Ok(PluginBackend { device: Arc::new(device), caps })
    }

    /// Allocates through `allocate`, which sets a pointer to the buffer.
    fn buffer(
        &self,
        what: &str,
        bytes: u64,
        pages: Option<Region>,
        allocate: impl FnOnce(*mut HaliteDevice, *mut *mut HaliteBuffer, *mut HaliteMessage) -> HaliteStatus,
    ) -> Result<Option<Buffer>> {
        let mut raw = ptr::null_mut();
        self.device.call(what, bytes, |device, message| allocate(device, &mut raw, message))?;
        let wrap = |raw| Memory { device: self.device.clone(), raw, _pages: pages };
        Ok(NonNull::new(raw).map(|raw| Buffer::new(bytes, wrap(raw))))
    }

    /// Checks that a range is inside a buffer of this device.
    fn checked(&self, buffer: &Buffer, range: &Range<u64>) -> Result<NonNull<HaliteBuffer>> {
        if range.start > range.end || range.end > buffer.bytes() {
            let expected = format!("inside 0..{}", buffer.bytes());
            return Err(Error::argument("range of a buffer", expected, format!("{range:?}")));
        }
        memory(&self.device, buffer)
    }
}

/// Reads and checks a device's properties.
fn caps(device: &Device) -> Result<Caps> {
    let Some(get) = device.calls.caps else { return Err(device.error("has no `caps`")) };
    let mut raw = HaliteCaps {
        struct_bytes: size::<HaliteCaps>(),
        contract: 0,
        fusions: 0,
        reserved: 0,
        memory_bytes: 0,
        device: ptr::null(),
    };
    // SAFETY: the arguments are as the interface says.
    device.call("caps", 0, |device, message| unsafe { get(device, &mut raw, message) })?;
    let contract = match raw.contract {
        HALITE_CONTRACT_EXACT => Contract::Exact,
        HALITE_CONTRACT_CLOSE => Contract::Close,
        HALITE_CONTRACT_NATIVE => Contract::Native,
        other => return Err(device.error(format!("caps: contract {other} does not exist"))),
    };
    let known = [
        HALITE_FUSE_SHARED_INPUT,
        HALITE_FUSE_ADD_NORM,
        HALITE_FUSE_GLU,
        HALITE_FUSE_RESIDUAL,
        HALITE_FUSE_ROPE_KV,
    ];
    let unknown = known.iter().fold(raw.fusions, |rest, bit| rest & !bit);
    if unknown != 0 {
        return Err(device.error(format!("caps: fusions {unknown:#x} do not exist")));
    }
    let asks = |bit| raw.fusions & bit != 0;
    let fusions = Fusions::default()
        .shared_input(asks(HALITE_FUSE_SHARED_INPUT))
        .add_norm(asks(HALITE_FUSE_ADD_NORM))
        .glu(asks(HALITE_FUSE_GLU))
        .residual(asks(HALITE_FUSE_RESIDUAL))
        .rope_kv(asks(HALITE_FUSE_ROPE_KV));
    // SAFETY: the interface promises a text that ends in a zero.
    let described = unsafe { library::text(raw.device, DEVICE_BYTES) };
    let described = described.map_err(|why| device.error(format!("caps: the description {why}")))?;
    let memory_bytes = if raw.memory_bytes == 0 { u64::MAX } else { raw.memory_bytes };
    let described = format!("{described}; plug-in {} {}", device.name, device.library.version);
    Ok(Caps::new(&device.name, described).memory_bytes(memory_bytes).fusions(fusions).contract(contract))
}

/// Memory of a device.
struct Memory {
    device: Arc<Device>,
    raw: NonNull<HaliteBuffer>,
    /// The pages that an imported buffer reads.
    _pages: Option<Region>,
}

// SAFETY: `Device` makes all calls one at a time; nothing else uses the pointer.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        let _one_call = self.device.lock();
        if let Some(release) = self.device.calls.release {
            // SAFETY: the plug-in returned this buffer, and nothing uses it any more.
            unsafe { release(self.device.raw.as_ptr(), self.raw.as_ptr()) }
        }
    }
}

/// Returns a buffer's memory on this device.
fn memory(device: &Arc<Device>, buffer: &Buffer) -> Result<NonNull<HaliteBuffer>> {
    let found = buffer.memory::<Memory>().filter(|memory| Arc::ptr_eq(&memory.device, device));
    found.map(|memory| memory.raw).ok_or_else(|| device.error("a buffer of another device was passed"))
}

fn not_in_abi(NotInAbi(what): NotInAbi) -> String {
    format!("{what} is not in version {HALITE_ABI_VERSION} of the plug-in interface")
}

/// Limits for C.
fn raw_limits(limits: Limits) -> HaliteLimits {
    HaliteLimits { struct_bytes: size::<HaliteLimits>(), tokens: limits.tokens, outputs: limits.outputs }
}

/// A required call, which loading has checked.
macro_rules! required {
    ($device:expr, $name:ident) => {
        $device.calls.$name.ok_or_else(|| $device.error(concat!("has no `", stringify!($name), "`")))?
    };
}

impl Backend for PluginBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        let encoded = match Encoded::op(sig.program, sig.op) {
            Ok(encoded) => encoded,
            Err(unknown) => return Support::Unsupported(Gap::NotYet(not_in_abi(unknown))),
        };
        let Some(supports) = self.device.calls.supports else {
            return Support::Unsupported(Gap::NotYet("the plug-in has no `supports`".into()));
        };
        let _one_call = self.device.lock();
        let raw = self.device.raw.as_ptr();
        // SAFETY: the arguments are as the interface says, and live until the call returns.
        let answer = call(|message| unsafe { supports(raw, encoded.as_ptr(), encoded.first_op(), message) });
        match answer {
            Ok(()) => Support::Native,
            Err(Refusal { status: HALITE_NEVER, message }) => Support::Unsupported(Gap::Never(message)),
            Err(Refusal { status: HALITE_NOT_YET, message }) => Support::Unsupported(Gap::NotYet(message)),
            Err(Refusal { status, message }) => Support::Unsupported(Gap::NotYet(format!(
                "`supports` returned the status {status}; {}",
                message
            ))),
        }
    }

    fn explain(&self, sig: &OpSig<'_>, tokens: u32) -> String {
        let Some(explain) = self.device.calls.explain else { return String::new() };
        let Ok(encoded) = Encoded::op(sig.program, sig.op) else { return String::new() };
        let _one_call = self.device.lock();
        let raw = self.device.raw.as_ptr();
        let mut text = Message([0; MESSAGE_BYTES]);
        let mut message = HaliteMessage {
            struct_bytes: size::<HaliteMessage>(),
            capacity_bytes: MESSAGE_BYTES as u32,
            text: text.0.as_mut_ptr().cast(),
        };
        // SAFETY: the arguments are as the interface says, and live until the call returns.
        unsafe { explain(raw, encoded.as_ptr(), encoded.first_op(), tokens, &mut message) };
        text.text()
    }

    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer> {
        let alloc = required!(self.device, alloc);
        let usage = match usage {
            Usage::Weight => HALITE_USAGE_WEIGHT,
            Usage::Io => HALITE_USAGE_IO,
            _ => HALITE_USAGE_STATE,
        };
        // SAFETY: the arguments are as the interface says.
        let buffer = self.buffer("a buffer", bytes, None, |device, buffer, message| unsafe {
            alloc(device, bytes, usage, buffer, message)
        })?;
        buffer.ok_or_else(|| self.device.error("alloc: succeeded without a buffer"))
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        let Some(import) = self.device.calls.import_pages else { return Ok(None) };
        let Some(pages) = region.mapped() else { return Ok(None) };
        let bytes = pages.len() as u64;
        // SAFETY: the buffer keeps the region, so the pages are valid until `release`.
        self.buffer("mapped pages", bytes, Some(region.clone()), |device, buffer, message| unsafe {
            import(device, pages.as_ptr(), bytes, buffer, message)
        })
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let raw = self.checked(dst, &range)?;
        let copy = required!(self.device, write);
        let mut staging = vec![0; STAGING_BYTES.min(range.end - range.start) as usize];
        let mut at = range.start;
        while at < range.end {
            let piece = &mut staging[..STAGING_BYTES.min(range.end - at) as usize];
            write(piece);
            let count = piece.len() as u64;
            // SAFETY: the bytes are inside the buffer, and live until the call returns.
            self.device.call("write", 0, |device, message| unsafe {
                copy(device, raw.as_ptr(), at, piece.as_ptr(), count, message)
            })?;
            at += count;
        }
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let count = dst.len() as u64;
        let raw = self.checked(src, &(offset..offset.saturating_add(count)))?;
        let read = required!(self.device, read);
        // SAFETY: as in `fill`.
        self.device.call("read", 0, |device, message| unsafe {
            read(device, raw.as_ptr(), offset, dst.as_mut_ptr(), count, message)
        })
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        // The interface promises that no refused op gets there.
        check_support(self, program)?;
        let encoded = Encoded::program(program).map_err(|what| self.device.error(not_in_abi(what)))?;
        let prepare = required!(self.device, prepare);
        let need = self.scratch_bytes(program, limits);
        let mut raw = ptr::null_mut();
        // SAFETY: the plan keeps the encoded program, so it is valid until `free_plan`.
        self.device.call("prepare", need, |device, message| unsafe {
            prepare(device, encoded.as_ptr(), &raw_limits(limits), &mut raw, message)
        })?;
        let raw = NonNull::new(raw).ok_or_else(|| self.device.error("prepare: succeeded without a plan"))?;
        Ok(Box::new(PluginPlan {
            device: self.device.clone(),
            raw,
            program: program.clone(),
            _encoded: encoded,
            limits,
            submitted: 0,
            lists: StepLists::default(),
        }))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        let (Some(scratch_bytes), Ok(encoded)) = (self.device.calls.scratch_bytes, Encoded::program(program))
        else {
            return 0;
        };
        let _one_call = self.device.lock();
        // SAFETY: the arguments are as the interface says, and live until the call returns.
        unsafe { scratch_bytes(self.device.raw.as_ptr(), encoded.as_ptr(), &raw_limits(limits)) }
    }
}

/// A program that a plug-in prepared.
struct PluginPlan {
    device: Arc<Device>,
    raw: NonNull<HalitePlan>,
    program: Arc<Program>,
    /// What the plan's pointers lead to.
    _encoded: Encoded,
    limits: Limits,
    submitted: u64,
    lists: StepLists,
}

// SAFETY: `Device` makes all calls one at a time; nothing else uses the pointer.
unsafe impl Send for PluginPlan {}

impl Drop for PluginPlan {
    fn drop(&mut self) {
        let _one_call = self.device.lock();
        if let Some(free_plan) = self.device.calls.free_plan {
            // SAFETY: the plug-in returned this plan, and nothing uses it any more.
            unsafe { free_plan(self.device.raw.as_ptr(), self.raw.as_ptr()) }
        }
    }
}

/// The lists of a submission, kept so that their memory serves the next one.
#[derive(Default)]
struct StepLists {
    tables: Vec<*const u32>,
    table_lengths: Vec<u32>,
    spans: Vec<HaliteSpan>,
    span_pointers: Vec<*const HaliteSpan>,
    buffers: [Vec<*mut HaliteBuffer>; 3],
}

impl StepLists {
    /// Fills the lists of spans and page tables.
    fn place(&mut self, step: &Step<'_>) {
        self.tables.clear();
        self.table_lengths.clear();
        self.spans.clear();
        self.span_pointers.clear();
        for table in step.spans.iter().flat_map(|span| span.tables) {
            self.tables.push(table.as_ptr());
            self.table_lengths.push(table.len() as u32);
        }
        let mut first = 0;
        for span in step.spans {
            self.spans.push(HaliteSpan {
                struct_bytes: size::<HaliteSpan>(),
                start: span.start,
                len: span.len,
                reserved: 0,
                tables: self.tables[first..].as_ptr(),
                table_lengths: self.table_lengths[first..].as_ptr(),
            });
            first += span.tables.len();
        }
        self.span_pointers.extend(self.spans.iter().map(ptr::from_ref));
    }
}

/// For [`HaliteStep::is_cancelled`]: `context` is a [`Cancel`].
unsafe extern "C" fn is_cancelled(context: *const c_void) -> u32 {
    // SAFETY: `submit` passes a reference that lives until the call returns.
    let cancel = unsafe { &*context.cast::<Cancel>() };
    cancel.is_cancelled().into()
}

impl Plan for PluginPlan {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        let submit = required!(self.device, submit);
        // The program that embeds Halite may round in another way.
        let _floats = DefaultFloats::set();
        check_step(step, &self.program, self.limits, bindings.states)?;
        let all = self.program.segments.len();
        if segments.start > segments.end || segments.end > all {
            return Err(Error::argument("segments", format!("within 0..{all}"), format!("{segments:?}")));
        }
        let slots = [
            ("weights", bindings.weights, self.program.weights.len()),
            ("states", bindings.states, self.program.states.len()),
            ("io", bindings.io, self.program.io.len()),
        ];
        for ((what, buffers, slots), list) in slots.into_iter().zip(&mut self.lists.buffers) {
            if buffers.len() < slots {
                let expected = format!("{slots} buffers of {what}");
                return Err(Error::argument("bindings", expected, buffers.len()));
            }
            list.clear();
            for buffer in buffers {
                list.push(memory(&self.device, buffer)?.as_ptr());
            }
        }
        self.check_sizes(step, bindings)?;
        self.lists.place(step);
        let [weights, states, io] = &self.lists.buffers;
        let bindings = HaliteBindings {
            struct_bytes: size::<HaliteBindings>(),
            weight_count: weights.len() as u32,
            state_count: states.len() as u32,
            io_count: io.len() as u32,
            weights: weights.as_ptr(),
            states: states.as_ptr(),
            io: io.as_ptr(),
        };
        let raw_step = HaliteStep {
            struct_bytes: size::<HaliteStep>(),
            token_count: step.tokens.len() as u32,
            span_count: step.spans.len() as u32,
            output_count: step.outputs.len() as u32,
            spans: self.lists.span_pointers.as_ptr(),
            tokens: step.tokens.as_ptr(),
            outputs: step.outputs.as_ptr(),
            is_cancelled: Some(is_cancelled),
            context: ptr::from_ref(step.cancel).cast(),
        };
        let (first, count) = (segments.start as u32, segments.len() as u32);
        let plan = self.raw.as_ptr();
        // SAFETY: the arguments are as the interface says, and live until the call returns.
        self.device.call("submit", 0, |device, message| unsafe {
            submit(device, plan, &raw_step, first, count, &bindings, message)
        })?;
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Timing> {
        if ticket.0 != self.submitted {
            return Err(Error::argument("ticket", self.submitted, ticket.0));
        }
        let wait = required!(self.device, wait);
        let mut raw =
            HaliteTiming { struct_bytes: size::<HaliteTiming>(), clock: 0, nanoseconds: 0, joules: f64::NAN };
        let plan = self.raw.as_ptr();
        // SAFETY: the arguments are as the interface says, and live until the call returns.
        self.device.call("wait", 0, |device, message| unsafe { wait(device, plan, &mut raw, message) })?;
        let clock = match raw.clock {
            HALITE_CLOCK_HOST => Clock::Host,
            HALITE_CLOCK_DEVICE => Clock::Device,
            HALITE_CLOCK_SIMULATED => Clock::Simulated,
            other => return Err(self.device.error(format!("wait: clock {other} does not exist"))),
        };
        let energy = (raw.joules >= 0.0).then(|| Energy::new(raw.joules, EnergySource::Device));
        Ok(Timing::new(Duration::from_nanos(raw.nanoseconds), clock).energy(energy))
    }
}

impl PluginPlan {
    /// Checks that each buffer holds its tensor for this step: plug-ins do not know the sizes of buffers.
    fn check_sizes(&self, step: &Step<'_>, bindings: &Bindings<'_>) -> Result<()> {
        let (tokens, outputs) = (step.tokens.len() as u32, step.outputs.len() as u32);
        let lists = [(&self.program.weights, bindings.weights), (&self.program.io, bindings.io)];
        for (ids, buffers) in lists {
            for (&id, buffer) in ids.iter().zip(buffers) {
                let t = self.program.tensor(id);
                let need = self
                    .program
                    .fixed_bytes(id)
                    .unwrap_or_else(|| 4 * halite::passes::rows(t.rows, tokens, outputs) * u64::from(t.cols));
                if buffer.bytes() < need {
                    let expected = format!("at least {need} bytes for `{}`", t.name);
                    return Err(Error::argument("buffer", expected, buffer.bytes()));
                }
            }
        }
        Ok(())
    }
}
