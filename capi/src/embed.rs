//! Embeddings and scores: texts to vectors, documents to how well they answer a query.

use std::ffi::c_char;
use std::sync::{Arc, Mutex};

use halite::backend::Cancel;
use halite::model::Pooling;
use halite::{EmbedOptions, Embedder, Tokenizer};

use crate::backend::{self, HaliteOpenBackend};
use crate::border::{Caller, Failure, Fallible, HALITE_DEADLINE, HaliteResult, call, reserved};
use crate::handle::{self, Object};
use crate::model::{self, HaliteModel};
use crate::stop;
use crate::tokenizer::HaliteTokenizer;

/// An encoder on a backend. Opening it reserves all memory of the device.
pub struct HaliteEmbedder;

/// How the vectors of tokens become one.
pub type HalitePooling = u32;
/// As the model says.
pub const HALITE_POOLING_DEFAULT: HalitePooling = 0;
/// The mean of all tokens.
pub const HALITE_POOLING_MEAN: HalitePooling = 1;
/// The first token.
pub const HALITE_POOLING_FIRST: HalitePooling = 2;
/// The last token.
pub const HALITE_POOLING_LAST: HalitePooling = 3;

/// Options of an embedder. A field that is 0 has its default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteEmbedOptions {
    pub struct_bytes: u32,
    /// Most tokens of a step, and so of a text. Default: 512.
    pub batch: u32,
    pub pooling: HalitePooling,
    /// Leave vectors as they are, rather than scale them to length 1: 0 or 1.
    pub no_normalize: u32,
    /// Truncate texts that are too long, which are errors otherwise: 0 or 1.
    pub truncate: u32,
    pub reserved: u32,
}

/// The sizes of an embedder.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteEmbedderInfo {
    pub struct_bytes: u32,
    /// Elements of a vector.
    pub dimension: u32,
    pub max_text_tokens: u32,
    pub reserved: u32,
}

sized! {
    HaliteEmbedOptions {
        struct_bytes: u32, batch: u32, pooling: HalitePooling, no_normalize: u32, truncate: u32, reserved: u32,
    }
    HaliteEmbedderInfo { struct_bytes: u32, dimension: u32, max_text_tokens: u32, reserved: u32 }
}

struct EmbedderObject {
    cancel: Cancel,
    embedder: Mutex<Embedder>,
}

impl Object for EmbedderObject {
    type Handle = HaliteEmbedder;
    const KIND: &'static str = "embedder";
}

fn options(given: &HaliteEmbedOptions) -> Fallible<EmbedOptions> {
    reserved(given.reserved)?;
    let pooling = match given.pooling {
        HALITE_POOLING_DEFAULT => None,
        HALITE_POOLING_MEAN => Some(Pooling::Mean),
        HALITE_POOLING_FIRST => Some(Pooling::Cls),
        HALITE_POOLING_LAST => Some(Pooling::Last),
        other => return Err(Failure::argument("pooling", "0 to 3", other)),
    };
    let options = EmbedOptions::default();
    let batch = if given.batch == 0 { options.batch } else { given.batch };
    Ok(options.batch(batch).pooling(pooling).normalize(given.no_normalize == 0).truncate(given.truncate != 0))
}

/// Opens an embedder: loads the weights and reserves memory. The options may be null. HALITE_MALFORMED for a
/// model that is no encoder. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_embedder_open(
    model: *const HaliteModel,
    backend: *const HaliteOpenBackend,
    options: *const HaliteEmbedOptions,
    embedder: *mut *mut HaliteEmbedder,
) -> HaliteResult {
    let make = |c: &Caller| {
        let (model, backend) = (model::of(model)?, backend::of(backend)?);
        let options = self::options(&c.options("options", options)?)?;
        let embedder = Embedder::new(&model, &backend, &options)?;
        if embedder.pooling() == Pooling::None {
            return Err(Failure::argument(
                "pooling",
                "one, since the model has none",
                "HALITE_POOLING_DEFAULT",
            ));
        }
        let cancel = embedder.cancel_handle();
        Ok(EmbedderObject { cancel, embedder: Mutex::new(embedder) })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, embedder, || make(c))) }
}

/// Closes an embedder. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_embedder_close(embedder: *mut HaliteEmbedder) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<EmbedderObject>(embedder)) }
}

/// Writes the sizes of an embedder. Threads: one at a time per embedder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_embedder_info(
    embedder: *const HaliteEmbedder,
    info: *mut HaliteEmbedderInfo,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<EmbedderObject>(embedder)?;
        let embedder = handle::lock(EmbedderObject::KIND, &object.embedder)?;
        let value = HaliteEmbedderInfo {
            struct_bytes: 0,
            dimension: embedder.dimension() as u32,
            max_text_tokens: embedder.max_text_tokens(),
            reserved: 0,
        };
        c.put_sized("info", info, value)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes a vector for each text, one after the other: `text_count` times HaliteEmbedderInfo::dimension. A
/// vector does not depend on the other texts. Without a buffer, nothing is computed. Threads: one at a time
/// per embedder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_embedder_embed(
    embedder: *mut HaliteEmbedder,
    tokenizer: *const HaliteTokenizer,
    texts: *const *const c_char,
    text_count: usize,
    deadline_ms: u32,
    out: *mut f32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let named = ("texts", "text");
    let numbers =
        Numbers { embedder, tokenizer, named, texts, text_count, deadline_ms, out, capacity, length };
    let each = Embedder::dimension;
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| numbers.make(c, each, |e, tokenizer, texts| Ok(e.embed(tokenizer, texts)?.concat()))) }
}

/// Writes the score of each document for a query, in order: higher is better. HALITE_MALFORMED for a model that is no reranker. Without a
/// buffer, nothing is computed. Threads: one at a time per embedder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_embedder_rank(
    embedder: *mut HaliteEmbedder,
    tokenizer: *const HaliteTokenizer,
    query: *const c_char,
    documents: *const *const c_char,
    document_count: usize,
    deadline_ms: u32,
    out: *mut f32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let (named, texts, text_count) = (("documents", "document"), documents, document_count);
    let numbers =
        Numbers { embedder, tokenizer, named, texts, text_count, deadline_ms, out, capacity, length };
    let work = |c: &Caller| {
        let query = c.text("query", query)?;
        numbers.make(c, |_| 1, |e, tokenizer, documents| e.rank(tokenizer, query, documents))
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Numbers of some texts: what a call asks for.
struct Numbers {
    embedder: *mut HaliteEmbedder,
    tokenizer: *const HaliteTokenizer,
    /// What errors call the texts, and one of them.
    named: (&'static str, &'static str),
    texts: *const *const c_char,
    text_count: usize,
    deadline_ms: u32,
    out: *mut f32,
    capacity: usize,
    length: *mut usize,
}

impl Numbers {
    /// Computes so many numbers of each text, and writes them.
    fn make(
        &self,
        c: &Caller,
        each: impl FnOnce(&Embedder) -> usize,
        compute: impl FnOnce(&mut Embedder, &Tokenizer, &[&str]) -> halite::error::Result<Vec<f32>>,
    ) -> Fallible<()> {
        let Numbers { out, capacity, length, deadline_ms, .. } = *self;
        let object = handle::get::<EmbedderObject>(self.embedder)?;
        let tokenizer: Arc<Tokenizer> = handle::get(self.tokenizer)?;
        let texts = c.array(self.named.0, self.texts, self.text_count)?;
        let texts: Vec<&str> =
            texts.iter().map(|&text| c.text(self.named.1, text)).collect::<Fallible<_>>()?;
        let mut embedder = handle::lock(EmbedderObject::KIND, &object.embedder)?;
        let need = texts.len().saturating_mul(each(&embedder));
        // The length is known before the work.
        if out.is_null() || capacity < need {
            c.put_optional("length", length, need)?;
            return match (out.is_null(), capacity) {
                (true, 0) => Ok(()),
                (true, _) => Err(Failure::argument("capacity", "0 without a buffer", capacity)),
                (false, _) => {
                    let message = format!("buffer: expected a capacity of at least {need}, got {capacity}");
                    Err(Failure::new(crate::border::HALITE_TOO_SMALL, message))
                }
            };
        }
        let deadline = stop::deadline(deadline_ms);
        let (numbers, passed) =
            stop::within(&object.cancel, deadline, || compute(&mut embedder, &tokenizer, &texts))?;
        match numbers {
            Err(halite::Error::Cancelled) if passed => {
                Err(Failure::new(HALITE_DEADLINE, format!("the deadline of {deadline_ms} ms passed")))
            }
            numbers => c.put_array(&numbers?, out, capacity, length).map(drop),
        }
    }
}

/// Stops the embedder's work within one op, and later work, too, until halite_embedder_reset. Threads: any,
/// also while another call uses the embedder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_embedder_cancel(embedder: *const HaliteEmbedder) -> HaliteResult {
    let work = |_: &Caller| {
        handle::get::<EmbedderObject>(embedder)?.cancel.cancel();
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Takes back halite_embedder_cancel. Threads: any, also while another call uses the embedder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_embedder_reset(embedder: *const HaliteEmbedder) -> HaliteResult {
    let work = |_: &Caller| {
        handle::get::<EmbedderObject>(embedder)?.cancel.reset();
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}
