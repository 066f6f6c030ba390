//! Sessions: a model on a backend, its sequences, and steps of them.

use std::collections::HashMap;
use std::ffi::c_char;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use halite::backend::Cancel;
use halite::kernels::kv;
use halite::model::ProgramOptions;
use halite::session::{OutputKind, OutputTokens, Run, SequenceId, Session, SessionOptions, footprint};

use crate::backend::{self, HaliteOpenBackend};
use crate::border::{Caller, Failure, Fallible, HALITE_DEADLINE, HALITE_HANDLE, HaliteResult, call};
use crate::handle::{self, Object};
use crate::log;
use crate::model::{self, HaliteModel};
use crate::stop;

/// A model on a backend, with its sequences and their KV cache. Opening it reserves all its memory.
pub struct HaliteSession;

/// A sequence of a session: the number that halite_session_add wrote. No number is used twice.
pub type HaliteSequence = u64;

/// The sizes of a session. A field that is 0 has its default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteSessionOptions {
    pub struct_bytes: u32,
    /// Positions of the KV cache, which all sequences share. Default: the model's, at most 4096.
    pub context: u32,
    /// Most tokens of a step. Default: 512.
    pub batch: u32,
    /// Most outputs of a step. Default: 1.
    pub outputs: u32,
    /// Sequences for which sliding-window layers reserve memory. Default: 1.
    pub sequences: u32,
    /// Positions that halite_session_truncate can always undo in sliding-window layers. Default: 64.
    pub rewind: u32,
    /// Maximum bytes of the whole process. Weights that do not fit are read from the file in each step, and steps
    /// may get smaller. Default: no limit, weights are mapped.
    pub memory_bytes: u64,
    /// Format of the KV cache, such as "q8_0". Default: "f16".
    pub kv_format: *const c_char,
    /// A folder on a drive for a KV cache that takes much of memory_bytes. Default: such a cache is an error.
    pub spill_folder: *const c_char,
}

sized! {
    HaliteSessionOptions {
        struct_bytes: u32, context: u32, batch: u32, outputs: u32, sequences: u32, rewind: u32,
        memory_bytes: u64, kv_format: *const c_char, spill_folder: *const c_char,
    }
}

/// The memory that a session needs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteMemoryPlan {
    pub struct_bytes: u32,
    /// Positions of the KV cache.
    pub context: u32,
    /// Weights. A backend in host memory uses the mapped file.
    pub weight_bytes: u64,
    pub kv_bytes: u64,
    /// Intermediate results.
    pub scratch_bytes: u64,
    /// Inputs and outputs of steps.
    pub io_bytes: u64,
    /// Weights that stay in the file, within memory_bytes of the options: a step reads those that it needs.
    pub streamed_bytes: u64,
    /// Memory for what is read of them ahead.
    pub stream_bytes: u64,
    /// The part of the KV cache that is kept in a file.
    pub spilled_bytes: u64,
}

/// The sizes of an open session.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteSessionInfo {
    pub struct_bytes: u32,
    pub context: u32,
    pub batch: u32,
    pub outputs: u32,
    /// Elements of a row of logits.
    pub vocab_size: u32,
    /// Tokens of each output of HALITE_OUTPUT_TOP_K.
    pub top_k: u32,
}

sized! {
    HaliteMemoryPlan {
        struct_bytes: u32, context: u32, weight_bytes: u64, kv_bytes: u64, scratch_bytes: u64, io_bytes: u64,
        streamed_bytes: u64, stream_bytes: u64, spilled_bytes: u64,
    }
    HaliteSessionInfo {
        struct_bytes: u32, context: u32, batch: u32, outputs: u32, vocab_size: u32, top_k: u32,
    }
}

/// What a step computes for its outputs.
pub type HaliteOutputKind = u32;
/// Rows of logits; see halite_session_logits.
pub const HALITE_OUTPUT_LOGITS: HaliteOutputKind = 0;
/// The most likely tokens; see halite_session_arg_max.
pub const HALITE_OUTPUT_ARG_MAX: HaliteOutputKind = 1;
/// The most likely tokens and their logits; see halite_session_top_k.
pub const HALITE_OUTPUT_TOP_K: HaliteOutputKind = 2;

/// Which tokens of a run have outputs.
pub type HaliteOutputTokens = u32;
pub const HALITE_OUTPUT_LAST: HaliteOutputTokens = 0;
pub const HALITE_OUTPUT_NONE: HaliteOutputTokens = 1;
pub const HALITE_OUTPUT_ALL: HaliteOutputTokens = 2;

/// Tokens that continue a sequence in a step.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRun {
    pub struct_bytes: u32,
    pub outputs: HaliteOutputTokens,
    pub sequence: HaliteSequence,
    pub tokens: *const u32,
    pub token_count: usize,
}

sized! {
    HaliteRun {
        struct_bytes: u32, outputs: HaliteOutputTokens, sequence: HaliteSequence, tokens: *const u32,
        token_count: usize,
    }
}

pub(crate) struct SessionObject {
    pub cancel: Cancel,
    pub state: Mutex<State>,
}

pub(crate) struct State {
    pub session: Session,
    sequences: HashMap<HaliteSequence, SequenceId>,
    /// What the last step computed, if it was the caller's and did not fail.
    pub outputs: Option<OutputKind>,
}

impl Object for SessionObject {
    type Handle = HaliteSession;
    const KIND: &'static str = "session";
}

impl State {
    /// The session's id of a sequence.
    pub fn sequence(&self, sequence: HaliteSequence) -> Fallible<SequenceId> {
        let missing = || {
            let message = format!("sequence: expected one of this session, got {sequence}");
            Failure::new(HALITE_HANDLE, message)
        };
        self.sequences.get(&sequence).copied().ok_or_else(missing)
    }

    /// Gives a sequence a number that no other one of this process had.
    pub fn number(&mut self, id: SequenceId) -> HaliteSequence {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        self.sequences.insert(number, id);
        number
    }

    /// Checks that the last step computed what a caller wants to read.
    fn computed(&self, kind: OutputKind) -> Fallible<()> {
        if self.outputs == Some(kind) {
            return Ok(());
        }
        let got = self.outputs.map_or("none".into(), |kind| format!("a step with {kind:?}"));
        Err(Failure::argument("outputs", &format!("those of a step with {kind:?}"), got))
    }
}

/// Locks a session for one call.
pub(crate) fn with<T>(
    handle: *const HaliteSession,
    work: impl FnOnce(&SessionObject, &mut State) -> Fallible<T>,
) -> Fallible<T> {
    let object: Arc<SessionObject> = handle::get(handle)?;
    let mut state = handle::lock(SessionObject::KIND, &object.state)?;
    work(&object, &mut state)
}

fn options(c: &Caller, given: *const HaliteSessionOptions) -> Fallible<SessionOptions> {
    let given = c.options("options", given)?;
    let default = SessionOptions::default();
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    let mut program = ProgramOptions::default();
    if let Some(name) = c.optional_text("kv_format", given.kv_format)? {
        let found = kv::formats().find(|format| format.name().eq_ignore_ascii_case(name));
        let names =
            || kv::formats().map(|format| format.name().to_lowercase()).collect::<Vec<_>>().join(", ");
        let unknown = || Failure::argument("kv_format", &names(), halite::error::escaped(name));
        program = program.kv_format(found.ok_or_else(unknown)?);
    }
    let spill = match given.spill_folder.is_null() {
        true => None,
        false => Some(c.path(given.spill_folder)?),
    };
    Ok(SessionOptions::default()
        .memory((given.memory_bytes > 0).then_some(given.memory_bytes))
        .spill(spill.map(std::path::Path::to_owned))
        .context((given.context > 0).then_some(given.context))
        .batch(or(given.batch, default.batch))
        .outputs(or(given.outputs, default.outputs))
        .sequences(or(given.sequences, default.sequences))
        .rewind(or(given.rewind, default.rewind))
        .program(program))
}

fn kind(kind: HaliteOutputKind) -> Fallible<OutputKind> {
    match kind {
        HALITE_OUTPUT_LOGITS => Ok(OutputKind::Logits),
        HALITE_OUTPUT_ARG_MAX => Ok(OutputKind::ArgMax),
        HALITE_OUTPUT_TOP_K => Ok(OutputKind::TopK),
        other => Err(Failure::argument("kind", "0 to 2", other)),
    }
}

/// Writes the memory that a session would need, and reads no weights. The options may be null. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_plan(
    model: *const HaliteModel,
    backend: *const HaliteOpenBackend,
    options: *const HaliteSessionOptions,
    plan: *mut HaliteMemoryPlan,
) -> HaliteResult {
    let work = |c: &Caller| {
        let (model, backend) = (model::of(model)?, backend::of(backend)?);
        let options = self::options(c, options)?;
        let need = footprint(&model, &*backend, &options)?;
        let value = HaliteMemoryPlan {
            struct_bytes: 0,
            context: options.positions(&model),
            weight_bytes: need.weight_bytes,
            kv_bytes: need.kv_bytes,
            scratch_bytes: need.scratch_bytes,
            io_bytes: need.io_bytes,
            streamed_bytes: need.streamed_bytes,
            stream_bytes: need.stream_bytes,
            spilled_bytes: need.spilled_bytes,
        };
        c.put_sized("plan", plan, value)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Opens a session: loads the weights and reserves all memory. The options may be null. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_open(
    model: *const HaliteModel,
    backend: *const HaliteOpenBackend,
    options: *const HaliteSessionOptions,
    session: *mut *mut HaliteSession,
) -> HaliteResult {
    let make = |c: &Caller| {
        let (model, backend) = (model::of(model)?, backend::of(backend)?);
        let options = self::options(c, options)?;
        let need = footprint(&model, &*backend, &options)?;
        let mut progress = log::Progress::of(need.weight_bytes);
        let session =
            Session::with_progress(&model, &backend, &options, &mut |bytes| progress.loaded(bytes))?;
        let cancel = session.cancel_handle();
        let state = State { session, sequences: HashMap::new(), outputs: None };
        Ok(SessionObject { cancel, state: Mutex::new(state) })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, session, || make(c))) }
}

/// Closes a session. Its memory is freed once no call and no generation uses it. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_close(session: *mut HaliteSession) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<SessionObject>(session)) }
}

/// Writes the sizes of a session. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_info(
    session: *const HaliteSession,
    info: *mut HaliteSessionInfo,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            let session = &state.session;
            let vocab_size = session.model().hparams().vocab_size;
            let value = HaliteSessionInfo {
                struct_bytes: 0,
                context: session.positions(),
                batch: session.batch(),
                outputs: session.outputs(),
                vocab_size,
                top_k: vocab_size.min(halite::model::TOP_K),
            };
            c.put_sized("info", info, value)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Stops the session's work within one op: steps return HALITE_CANCELLED, generations end. It holds for later
/// work, too, until halite_session_reset. Threads: any, also while another call uses the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_cancel(session: *const HaliteSession) -> HaliteResult {
    let work = |_: &Caller| {
        handle::get::<SessionObject>(session)?.cancel.cancel();
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Takes back halite_session_cancel. Threads: any, also while another call uses the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_reset(session: *const HaliteSession) -> HaliteResult {
    let work = |_: &Caller| {
        handle::get::<SessionObject>(session)?.cancel.reset();
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Adds an empty sequence. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_add(
    session: *mut HaliteSession,
    sequence: *mut HaliteSequence,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            c.put("sequence", sequence, 0)?;
            let id = state.session.add_sequence();
            c.put("sequence", sequence, state.number(id))
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Copies a sequence. The two share memory until one of them goes on. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_fork(
    session: *mut HaliteSession,
    from: HaliteSequence,
    sequence: *mut HaliteSequence,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            c.put("sequence", sequence, 0)?;
            let id = state.session.fork(state.sequence(from)?)?;
            c.put("sequence", sequence, state.number(id))
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Truncates a sequence to `length` tokens; a longer length changes nothing. Threads: one at a time per
/// session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_truncate(
    session: *mut HaliteSession,
    sequence: HaliteSequence,
    length: u32,
) -> HaliteResult {
    let work = |_: &Caller| {
        with(session, |_, state| Ok(state.session.truncate(state.sequence(sequence)?, length)?))
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Removes a sequence, and frees its memory for others. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_remove(
    session: *mut HaliteSession,
    sequence: HaliteSequence,
) -> HaliteResult {
    let work = |_: &Caller| {
        with(session, |_, state| {
            state.session.remove(state.sequence(sequence)?)?;
            state.sequences.remove(&sequence);
            Ok(())
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the tokens of a sequence. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_tokens(
    session: *const HaliteSession,
    sequence: HaliteSequence,
    out: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            let tokens = state.session.tokens(state.sequence(sequence)?)?;
            c.put_array(tokens, out, capacity, length).map(drop)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Runs a step: each run continues its sequence, at most one per sequence, and one step may mix prompts with
/// single tokens. On an error no sequence changes. After `deadline_ms` milliseconds the step stops within one
/// op with HALITE_DEADLINE; 0: no deadline. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_step(
    session: *mut HaliteSession,
    runs: *const HaliteRun,
    run_count: usize,
    kind: HaliteOutputKind,
    deadline_ms: u32,
) -> HaliteResult {
    let work = |c: &Caller| {
        let kind = self::kind(kind)?;
        with(session, |object, state| {
            let given = c.sized_array("runs", runs, run_count)?;
            let runs = given.iter().map(|run| {
                let outputs = match run.outputs {
                    HALITE_OUTPUT_LAST => OutputTokens::Last,
                    HALITE_OUTPUT_NONE => OutputTokens::None,
                    HALITE_OUTPUT_ALL => OutputTokens::All,
                    other => return Err(Failure::argument("outputs of a run", "0 to 2", other)),
                };
                let tokens = c.array("tokens", run.tokens, run.token_count)?;
                Ok(Run::new(state.sequence(run.sequence)?, tokens).outputs(outputs))
            });
            let runs: Vec<Run<'_>> = runs.collect::<Fallible<_>>()?;
            stepped(object, state, kind, deadline_ms, |session| session.step(&runs, kind))
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Continues a sequence with tokens, in as many steps as they need, and computes the output of the last
/// token. Steps before one that fails stay in the sequence. The deadline is that of all steps, as in
/// halite_session_step. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_prefill(
    session: *mut HaliteSession,
    sequence: HaliteSequence,
    tokens: *const u32,
    token_count: usize,
    kind: HaliteOutputKind,
    deadline_ms: u32,
) -> HaliteResult {
    let work = |c: &Caller| {
        let kind = self::kind(kind)?;
        with(session, |object, state| {
            let tokens = c.array("tokens", tokens, token_count)?;
            if tokens.is_empty() {
                return Err(Failure::argument("tokens", "at least one", "none"));
            }
            let id = state.sequence(sequence)?;
            stepped(object, state, kind, deadline_ms, |session| session.prefill(id, tokens, kind))
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Runs steps within a deadline, and notes what they computed.
fn stepped(
    object: &SessionObject,
    state: &mut State,
    kind: OutputKind,
    deadline_ms: u32,
    work: impl FnOnce(&mut Session) -> halite::Result<()>,
) -> Fallible<()> {
    state.outputs = None;
    let deadline = stop::deadline(deadline_ms);
    let (result, passed) = stop::within(&object.cancel, deadline, || work(&mut state.session))?;
    match result {
        Err(halite::Error::Cancelled) if passed => {
            Err(Failure::new(HALITE_DEADLINE, format!("the deadline of {deadline_ms} ms passed")))
        }
        result => {
            result?;
            state.outputs = Some(kind);
            Ok(())
        }
    }
}

/// Writes the logits of the last step's outputs, row by row, in the order of its tokens. Threads: one at a
/// time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_logits(
    session: *const HaliteSession,
    out: *mut f32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            state.computed(OutputKind::Logits)?;
            c.put_array(state.session.logits(), out, capacity, length).map(drop)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the most likely token of each of the last step's outputs. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_arg_max(
    session: *const HaliteSession,
    out: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            state.computed(OutputKind::ArgMax)?;
            c.put_array(state.session.arg_max(), out, capacity, length).map(drop)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the most likely tokens of each of the last step's outputs, most likely first, and their logits: for
/// each output HaliteSessionInfo::top_k of them. `capacity` is that of each buffer. Threads: one at a time
/// per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_top_k(
    session: *const HaliteSession,
    tokens: *mut u32,
    logits: *mut f32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            state.computed(OutputKind::TopK)?;
            let (best, values) = state.session.top_k();
            if tokens.is_null() != logits.is_null() {
                return Err(Failure::argument("buffers", "both or none", "one"));
            }
            c.put_array(best, tokens, capacity, length)?;
            c.put_array(values, logits, capacity, length).map(drop)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}
