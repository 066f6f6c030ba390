//! Any text there and back, with a vocabulary that SentencePiece's BPE and one that byte-level BPE made.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/common/exercise.rs"]
mod exercise;

use std::path::Path;
use std::sync::LazyLock;

use halite::Tokenizer;
use halite::convert::convert;
use halite::gguf::Gguf;
use halite::kernels::formats::Format;
use halite::map::Source;

static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let open = |name: &&str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/convert").join(name);
        let mut bytes = Vec::new();
        convert(&folder, Format::F16, &mut bytes, &mut |_| {}).unwrap();
        let gguf = Gguf::from_source(Source::from_bytes(name, &bytes)).unwrap();
        Tokenizer::from_gguf(&gguf).unwrap().unwrap()
    };
    ["gemma2", "llama", "llama-spm", "qwen2", "starcoder2"].iter().map(open).collect()
});

libfuzzer_sys::fuzz_target!(|text: &str| {
    // SentencePiece's space comes back as a space.
    if !text.contains('\u{2581}') {
        for tokenizer in TOKENIZERS.iter() {
            // What follows a user-defined token begins with a space again, as in llama.cpp.
            let spaced = tokenizer.adds_space_prefix() && text.contains("<tool>");
            exercise::there_and_back(tokenizer, text, !spaced);
        }
    }
});
