//! What goes through the C interface has the results of the Rust library.

use std::ffi::CString;
use std::ptr;

use halite::kernels::formats::Format;
use halite_capi::backend::*;
use halite_capi::border::*;
use halite_capi::embed::*;
use halite_capi::model::*;
use halite_capi::session::*;
use halite_capi::tokenizer::*;
use halite_testing::gguf::llama;
use halite_testing::{bert, lora};

/// Opens one thing.
fn opened<T>(open: impl FnOnce(*mut *mut T) -> HaliteResult) -> *mut T {
    let mut handle = ptr::null_mut();
    assert_eq!(open(&mut handle), HALITE_OK);
    handle
}

fn in_memory(bytes: &[u8]) -> *mut HaliteModel {
    // SAFETY: all pointers are valid.
    opened(|out| unsafe {
        halite_model_open_memory(c"model".as_ptr(), bytes.as_ptr().cast(), bytes.len(), out)
    })
}

fn cpu() -> *mut HaliteOpenBackend {
    // SAFETY: all pointers are valid.
    opened(|out| unsafe { halite_backend_open(c"cpu".as_ptr(), c"threads=2".as_ptr(), out) })
}

#[test]
fn an_adapter_gives_the_same_logits() {
    let folder = tempfile::tempdir().unwrap();
    let base = lora::randomised(llama());
    let adapter = lora::adapter(&base, "llama", 2, 11);
    let path = folder.path().join("adapter.gguf");
    std::fs::write(&path, adapter.bytes()).unwrap();
    let mut expected = lora::open(&base);
    expected.apply_lora(lora::gguf(&adapter), 0.25).unwrap();
    let expected = lora::logits(expected, bert::cpu());

    let path = CString::new(path.to_str().unwrap()).unwrap();
    let model = in_memory(&base.bytes());
    let n = lora::TOKENS.len();
    let options = HaliteSessionOptions {
        struct_bytes: size_of::<HaliteSessionOptions>() as u32,
        context: 16,
        batch: n as u32,
        outputs: n as u32,
        sequences: 0,
        rewind: 0,
        memory_bytes: 0,
        kv_format: c"f32".as_ptr(),
        spill_folder: std::ptr::null(),
    };
    let mut logits = vec![0.0; expected.len()];
    // SAFETY: all pointers are valid.
    unsafe {
        assert_eq!(halite_model_add_adapter(model, path.as_ptr(), 0.25), HALITE_OK);
        let session = opened(|out| halite_session_open(model, cpu(), &options, out));
        let mut sequence = 0;
        assert_eq!(halite_session_add(session, &mut sequence), HALITE_OK);
        let run = HaliteRun {
            struct_bytes: size_of::<HaliteRun>() as u32,
            outputs: HALITE_OUTPUT_ALL,
            sequence,
            tokens: lora::TOKENS.as_ptr(),
            token_count: n,
        };
        assert_eq!(halite_session_step(session, &run, 1, HALITE_OUTPUT_LOGITS, 0), HALITE_OK);
        let mut length = 0;
        let read = halite_session_logits(session, logits.as_mut_ptr(), logits.len(), &mut length);
        assert_eq!((read, length), (HALITE_OK, expected.len()));
        // A session keeps the model as it is.
        assert_eq!(halite_model_add_adapter(model, path.as_ptr(), 0.25), HALITE_BUSY);
        assert_eq!(halite_session_close(session), HALITE_OK);
        assert_eq!(halite_model_add_adapter(model, path.as_ptr(), 0.25), HALITE_OK);
    }
    assert!(logits == expected);
}

#[test]
fn embeddings_are_the_same() {
    let mut bytes = Vec::new();
    halite::convert::convert(&bert::folder(), Format::F32, &mut bytes, &mut |_| {}).unwrap();
    let model = in_memory(&bytes);
    let texts: Vec<CString> = bert::texts().into_iter().map(|text| CString::new(text).unwrap()).collect();
    let texts: Vec<_> = texts.iter().map(|text| text.as_ptr()).collect();
    // SAFETY: all pointers are valid.
    unsafe {
        let tokenizer = opened(|out| halite_tokenizer_open(model, out));
        let options = HaliteEmbedOptions {
            struct_bytes: size_of::<HaliteEmbedOptions>() as u32,
            batch: 0,
            pooling: HALITE_POOLING_DEFAULT,
            no_normalize: 0,
            truncate: 1,
            reserved: 0,
        };
        let embedder = opened(|out| halite_embedder_open(model, cpu(), &options, out));
        let mut length = 0;
        let embed = |out: *mut f32, capacity: usize, length: &mut usize| {
            halite_embedder_embed(embedder, tokenizer, texts.as_ptr(), texts.len(), 0, out, capacity, length)
        };
        assert_eq!(embed(ptr::null_mut(), 0, &mut length), HALITE_OK);
        let mut vectors = vec![0.0; length];
        assert_eq!(embed(vectors.as_mut_ptr(), length, &mut length), HALITE_OK);
        let vectors: Vec<Vec<f32>> = vectors.chunks(length / texts.len()).map(<[f32]>::to_vec).collect();
        assert!(bert::largest_difference(&vectors) < 1e-5);
    }
}

#[test]
fn scores_are_the_same() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/rank/encoder.gguf");
    let bytes = std::fs::read(file).unwrap();
    let documents = ["You may use the Work.", "", "the names of others"];
    let source = halite::map::Source::from_bytes("reranker", &bytes);
    let reranker = std::sync::Arc::new(halite::Model::from_source(source).unwrap());
    let tokenizer = halite::Tokenizer::from_gguf(reranker.gguf()).unwrap().unwrap();
    let mut embedder =
        halite::Embedder::new(&reranker, &bert::cpu(), &halite::EmbedOptions::default()).unwrap();
    let want = embedder.rank(&tokenizer, "Who may use it?", &documents).unwrap();

    let model = in_memory(&bytes);
    let documents = documents.map(|document| CString::new(document).unwrap());
    let documents = documents.each_ref().map(|document| document.as_ptr());
    // SAFETY: all pointers are valid.
    unsafe {
        let tokenizer = opened(|out| halite_tokenizer_open(model, out));
        let embedder = opened(|out| halite_embedder_open(model, cpu(), ptr::null(), out));
        let (mut scores, mut length) = ([0.0; 3], 0);
        let query = c"Who may use it?".as_ptr();
        let (at, out) = (documents.as_ptr(), scores.as_mut_ptr());
        assert_eq!(
            halite_embedder_rank(embedder, tokenizer, query, at, 3, 0, out, 3, &mut length),
            HALITE_OK
        );
        assert_eq!((length, &scores[..]), (3, &want[..]));
        let short = halite_embedder_rank(embedder, tokenizer, query, at, 3, 0, out, 2, &mut length);
        assert_eq!(short, HALITE_TOO_SMALL);
    }
}
