//! Any template ends in a text or an error, soon and in bounded memory.
#![no_main]

use std::sync::LazyLock;

use halite::chat::{Message, Template};
use halite::gguf::Gguf;
use halite::map::Source;
use halite::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let gguf = Gguf::from_source(Source::from_bytes("llama", include_bytes!("../seeds/llama.gguf"))).unwrap();
    Tokenizer::from_gguf(&gguf).unwrap().unwrap()
});

fuzz_target!(|text: &str| {
    let messages =
        [Message::new("system", "Be brief."), Message::new("user", "Hi\n 'é'"), Message::new("assistant", "")];
    if let Ok(template) = Template::new(text, &TOKENIZER) {
        let _ = template.render(&messages, true);
    }
});
