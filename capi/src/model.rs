//! Models: files, bytes in memory, the built-in one; their metadata and adapters.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex};

use halite::Model;
use halite::gguf::Gguf;
use halite::map::Source;

use crate::border::{Caller, Failure, Fallible, HALITE_BUSY, HALITE_NOT_FOUND, HaliteResult, call};
use crate::handle::{self, Object};
use crate::log;

/// A model file. Opening it reads the header alone; weights are mapped.
pub struct HaliteModel;

/// The sizes of a model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteModelInfo {
    pub struct_bytes: u32,
    /// Positions that the model was made for.
    pub context_length: u32,
    pub embedding_length: u32,
    pub block_count: u32,
    pub vocab_size: u32,
    /// 0 in a model without experts.
    pub expert_count: u32,
    pub expert_used_count: u32,
    pub tensor_count: u32,
    /// Adapters that were added.
    pub adapter_count: u32,
    pub reserved: u32,
    /// Bytes of its files, with those of adapters.
    pub file_bytes: u64,
}

sized! {
    HaliteModelInfo {
        struct_bytes: u32, context_length: u32, embedding_length: u32, block_count: u32, vocab_size: u32,
        expert_count: u32, expert_used_count: u32, tensor_count: u32, adapter_count: u32, reserved: u32,
        file_bytes: u64,
    }
}

pub(crate) struct ModelObject(Mutex<State>);

struct State {
    model: Arc<Model>,
    adapters: u32,
}

impl Object for ModelObject {
    type Handle = HaliteModel;
    const KIND: &'static str = "model";
}

impl ModelObject {
    pub(crate) fn new(model: Model) -> ModelObject {
        model.warnings().iter().for_each(|warning| log::say(log::HALITE_LOG_WARNING, warning));
        ModelObject(Mutex::new(State { model: Arc::new(model), adapters: 0 }))
    }

    pub fn model(&self) -> Fallible<Arc<Model>> {
        Ok(handle::brief(Self::KIND, &self.0)?.model.clone())
    }
}

/// The model of a handle.
pub(crate) fn of(handle: *const HaliteModel) -> Fallible<Arc<Model>> {
    handle::get::<ModelObject>(handle)?.model()
}

/// Opens a GGUF file, the first one of a split model. The path is bytes on Unix and UTF-8 elsewhere. Threads:
/// any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_open(
    path: *const c_char,
    model: *mut *mut HaliteModel,
) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, model, || Ok(ModelObject::new(Model::open(c.path(path)?)?)))) }
}

/// Opens a GGUF file without a map, as halite_model_open. Sessions read weights from the file: into memory, or in
/// each step if they do not fit the memory_bytes of their options. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_open_unmapped(
    path: *const c_char,
    model: *mut *mut HaliteModel,
) -> HaliteResult {
    let make = |c: &Caller| Ok(ModelObject::new(Model::open_unmapped(c.path(path)?)?));
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, model, || make(c))) }
}

/// Opens a GGUF file in memory, which is copied. The name appears in messages. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_open_memory(
    name: *const c_char,
    bytes: *const c_void,
    byte_count: usize,
    model: *mut *mut HaliteModel,
) -> HaliteResult {
    let make = |c: &Caller| {
        let bytes = c.array("bytes", bytes.cast::<u8>(), byte_count)?;
        let source = Source::from_bytes(c.text("name", name)?, bytes);
        Ok(ModelObject::new(Model::from_source(source)?))
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, model, || make(c))) }
}

/// Opens the built-in model, a small one that continues English prose. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_open_builtin(model: *mut *mut HaliteModel) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, model, builtin)) }
}

#[cfg(feature = "builtin-model")]
fn builtin() -> Fallible<ModelObject> {
    let source = Source::from_static("the built-in model", halite_models::AUSTEN);
    Ok(ModelObject::new(Model::from_source(source)?))
}

#[cfg(not(feature = "builtin-model"))]
fn builtin() -> Fallible<ModelObject> {
    Err(Failure::not_built("builtin-model"))
}

/// Closes a model. What was made from it keeps what it needs. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_close(model: *mut HaliteModel) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<ModelObject>(model)) }
}

/// Adds a low-rank adapter (LoRA), a GGUF file, with a scale; several add up. Sessions, embedders and
/// generations that are open keep the model from changing: add adapters first, else the result is
/// HALITE_BUSY. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_add_adapter(
    model: *mut HaliteModel,
    path: *const c_char,
    scale: f32,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<ModelObject>(model)?;
        let gguf = Gguf::open(c.path(path)?)?;
        let mut state = handle::brief(ModelObject::KIND, &object.0)?;
        let used = || Failure::new(HALITE_BUSY, "model: a session uses it; add adapters before");
        Arc::get_mut(&mut state.model).ok_or_else(used)?.apply_lora(gguf, scale)?;
        state.adapters += 1;
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the sizes of a model. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_info(
    model: *const HaliteModel,
    info: *mut HaliteModelInfo,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<ModelObject>(model)?;
        let state = handle::brief(ModelObject::KIND, &object.0)?;
        let h = state.model.hparams();
        let gguf = state.model.gguf();
        let value = HaliteModelInfo {
            struct_bytes: 0,
            context_length: h.context_length,
            embedding_length: h.embedding_length,
            block_count: h.block_count,
            vocab_size: h.vocab_size,
            expert_count: h.expert_count,
            expert_used_count: h.expert_used_count,
            tensor_count: gguf.tensors().count() as u32,
            adapter_count: state.adapters,
            reserved: 0,
            file_bytes: gguf.parts().map(|(source, _)| source.bytes().len() as u64).sum(),
        };
        c.put_sized("info", info, value)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the name of a model. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_name(
    model: *const HaliteModel,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| c.put_text(&of(model)?.name(), out, capacity, length).map(drop)) }
}

/// Writes the architecture of a model, such as "llama". Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_architecture(
    model: *const HaliteModel,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| c.put_text(&of(model)?.hparams().architecture, out, capacity, length).map(drop)) }
}

/// Writes the number of metadata keys of the file. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_metadata_count(
    model: *const HaliteModel,
    count: *mut usize,
) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| c.put("count", count, of(model)?.gguf().metadata().len())) }
}

/// Writes the name of a metadata key, below halite_model_metadata_count. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_metadata_key(
    model: *const HaliteModel,
    index: usize,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let model = of(model)?;
        let metadata = model.gguf().metadata();
        let expected = format!("below {}", metadata.len());
        let missing = || Failure::argument("index", &expected, index);
        let (key, _) = metadata.get(index).ok_or_else(missing)?;
        c.put_text(key, out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the value of a metadata key for people: any type; long texts and arrays are cut. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_metadata_describe(
    model: *const HaliteModel,
    key: *const c_char,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let model = of(model)?;
        let key = c.text("key", key)?;
        let found = model.gguf().metadata().iter().find(|(name, _)| name == key);
        let (_, value) = found.ok_or_else(|| no_key(key))?;
        c.put_text(&model.gguf().display_value(value), out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the value of a metadata key that is a text. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_metadata_text(
    model: *const HaliteModel,
    key: *const c_char,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let model = of(model)?;
        let key = c.text("key", key)?;
        let value = model.gguf().optional_str(key)?.ok_or_else(|| no_key(key))?;
        c.put_text(value, out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the value of a metadata key that is an integer and not negative. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_metadata_integer(
    model: *const HaliteModel,
    key: *const c_char,
    value: *mut u64,
) -> HaliteResult {
    let work = |c: &Caller| {
        let model = of(model)?;
        let key = c.text("key", key)?;
        c.put("value", value, model.gguf().optional_u64(key)?.ok_or_else(|| no_key(key))?)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the value of a metadata key that is a 32-bit floating-point number. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_model_metadata_float(
    model: *const HaliteModel,
    key: *const c_char,
    value: *mut f32,
) -> HaliteResult {
    let work = |c: &Caller| {
        let model = of(model)?;
        let key = c.text("key", key)?;
        c.put("value", value, model.gguf().optional_f32(key)?.ok_or_else(|| no_key(key))?)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

fn no_key(key: &str) -> Failure {
    Failure::new(
        HALITE_NOT_FOUND,
        format!("the model file has no metadata key `{}`", halite::error::escaped(key)),
    )
}
