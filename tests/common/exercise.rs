//! What must never panic, whatever the bytes: run by the tests and by the fuzz targets.

use std::ops::ControlFlow;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::generate::GenerateOptions;
use halite::gguf::{Gguf, parse};
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::session::{Session, SessionOptions};
use halite::tokenizer::{Detokenizer, EncodeOptions};
use halite::{Model, Tokenizer};

/// Parses a header and checks what it promises.
pub fn header(bytes: &[u8]) {
    let Ok(header) = parse(bytes) else { return };
    let mut ends_before = header.data_start;
    let mut tensors: Vec<_> = header.tensors.iter().collect();
    tensors.sort_by_key(|t| t.bytes.start);
    for tensor in tensors {
        assert!(tensor.bytes.start >= ends_before && tensor.bytes.start < tensor.bytes.end);
        assert!(tensor.bytes.end <= bytes.len());
        assert_eq!(tensor.bytes.start as u64 % header.alignment, header.data_start as u64 % header.alignment);
        assert!((1..=4).contains(&tensor.dims.len()));
        ends_before = tensor.bytes.end;
    }
    for (key, value) in &header.metadata {
        assert!(!key.is_empty() && value.bytes.end <= bytes.len());
    }
}

/// Takes a file as far as it goes without running it: metadata, vocabulary, a short text there and back, the program.
/// Returns whether there was a program.
pub fn model(bytes: &[u8]) -> bool {
    let Ok(gguf) = Gguf::from_source(Source::from_bytes("bytes", bytes)) else { return false };
    for (_, value) in gguf.metadata() {
        gguf.display_value(value);
    }
    for tensor in gguf.tensors() {
        assert_eq!(tensor.region().unwrap().mapped().unwrap().len(), tensor.record.bytes.len());
    }
    if let Ok(Some(tokenizer)) = Tokenizer::from_gguf(&gguf) {
        vocabulary(&tokenizer);
    }
    let Ok(model) = Model::from_gguf(gguf) else { return false };
    model.program(ProgramOptions::default(), model.hparams().context_length.min(256)).is_ok()
}

/// Runs a few steps of what [`model`] accepts, on every CPU backend. Returns whether there was anything to run.
pub fn run(bytes: &[u8]) -> bool {
    let Ok(model) = Model::from_source(Source::from_bytes("bytes", bytes)) else { return false };
    let Ok(Some(tokenizer)) = Tokenizer::from_gguf(model.gguf()) else { return false };
    let model = Arc::new(model);
    let backends: [Arc<dyn Backend>; 2] =
        [Arc::new(Cpu::with_threads(1).unwrap()), Arc::new(Reference::new())];
    let mut ran = false;
    for backend in &backends {
        let options = SessionOptions::default().context(8).batch(4);
        let Ok(mut session) = Session::new(&model, backend, &options) else { continue };
        let options = GenerateOptions::default().max_tokens(4);
        let result = session.generate(&tokenizer, "ab", &options, |_| ControlFlow::Continue(()));
        ran |= result.is_ok();
    }
    ran
}

/// Encodes a text and decodes its ids, at once and as a stream; what a vocabulary that loses nothing gives is the text.
pub fn there_and_back(tokenizer: &Tokenizer, text: &str, loses_nothing: bool) {
    let ids = tokenizer.encode(text, EncodeOptions::default().add_special(false));
    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.len()), "{text:?}: {ids:?}");
    let back = tokenizer.decode(&ids, false);
    let (mut stream, mut streamed) = (Detokenizer::default(), String::new());
    for &id in &ids {
        stream.push(tokenizer, id, false, &mut streamed);
    }
    stream.finish(&mut streamed);
    assert_eq!(streamed, back, "{text:?}: {ids:?}");
    if loses_nothing {
        let back =
            if tokenizer.adds_space_prefix() { back.strip_prefix(' ').unwrap_or(&back) } else { &back };
        assert_eq!(back, text, "{ids:?}");
    }
}

fn vocabulary(tokenizer: &Tokenizer) {
    const TEXT: &str = "Hello <s>world</s>\n\n  é \u{1f600}12345, aaaaaaaa b's";
    there_and_back(tokenizer, TEXT, false);
    let ids = tokenizer.encode(TEXT, EncodeOptions::default().parse_special(true));
    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.len()));
    tokenizer.decode(&ids, true);
    tokenizer.decode(&[0, tokenizer.len() as u32, u32::MAX], true);
}

/// Files of a folder of safetensors, in the order in which [`folder`] takes them.
pub const FOLDER: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "sentence_bert_config.json",
    "model.safetensors",
];

/// What no text has: the end of a file in what [`folder`] takes.
pub const END: u8 = 0xff;

/// Converts a folder of any files, each but the last up to [`END`], and opens what comes of it. Returns
/// whether anything did.
pub fn folder(at: &std::path::Path, bytes: &[u8]) -> bool {
    use halite::kernels::formats::Format;
    std::fs::create_dir_all(at).unwrap();
    let mut files = bytes.splitn(FOLDER.len(), |byte| *byte == END);
    for name in FOLDER {
        match files.next().filter(|file| !file.is_empty()) {
            Some(file) => std::fs::write(at.join(name), file).unwrap(),
            None => drop(std::fs::remove_file(at.join(name))),
        }
    }
    let mut out = Vec::new();
    let Ok(left_out) = halite::convert::convert(at, Format::F32, &mut out, &mut |_| {}) else { return false };
    assert!(!left_out.concat().chars().any(char::is_control), "{left_out:?}");
    // What is written can be opened.
    assert!(model(&out));
    true
}
