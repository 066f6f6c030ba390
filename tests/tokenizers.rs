//! Token ids against llama.cpp's published vectors, which lie beside a checkout in `../shared/golden/vocab`.

use std::path::{Path, PathBuf};

use halite::Tokenizer;
use halite::gguf::Gguf;
use halite::tokenizer::{Detokenizer, EncodeOptions, TokenKind};

const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };

fn vocab_dir() -> Option<PathBuf> {
    let dir = std::env::var_os("HALITE_GOLDEN").map_or_else(|| "../shared/golden".into(), PathBuf::from);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir).join("vocab");
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!("skipped: {} is not there", dir.display());
    None
}

/// Ids of a vocabulary in every line, and that texts come back: as they were, or if `normalised` as texts of the same ids.
fn check(name: &str, normalised: bool) {
    let Some(dir) = vocab_dir() else { return };
    let path = dir.join(format!("ggml-vocab-{name}.gguf"));
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap().unwrap();
    let inputs = std::fs::read_to_string(path.with_extension("gguf.inp")).unwrap();
    let outputs = std::fs::read_to_string(path.with_extension("gguf.out")).unwrap();
    // Every text is followed by the separator.
    let mut inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    assert_eq!(inputs.pop(), Some(""));
    let outputs: Vec<&str> = outputs.lines().collect();
    assert!(
        inputs.len() >= 40 && inputs.len() == outputs.len(),
        "{} inputs, {} outputs",
        inputs.len(),
        outputs.len()
    );
    let mut wrong = Vec::new();
    for (input, output) in inputs.iter().zip(&outputs) {
        let want: Vec<u32> = output.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let got = tokenizer.encode(input, PLAIN);
        if got != want {
            wrong.push(format!("{input:?}\n  want {want:?}\n  got  {got:?}"));
        }
        // A stream of tokens gives the text back, character by character.
        let (mut stream, mut text) = (Detokenizer::default(), String::new());
        for &id in &got {
            stream.push(&tokenizer, id, &mut text);
        }
        stream.finish(&mut text);
        let text =
            if tokenizer.adds_space_prefix() { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
        let unknown = |&id: &u32| tokenizer.kind(id) != Some(TokenKind::Normal);
        let same = match normalised {
            false => text == *input,
            true => got.iter().any(unknown) || tokenizer.encode(text, PLAIN) == got,
        };
        if !same {
            wrong.push(format!("{input:?} comes back as {text:?}"));
        }
    }
    assert!(wrong.is_empty(), "{name}: {} wrong\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn llama_spm() {
    check("llama-spm", false);
}

#[test]
fn phi_3() {
    check("phi-3", false);
}

#[test]
fn llama_bpe() {
    check("llama-bpe", false);
}

#[test]
fn gpt_2() {
    check("gpt-2", false);
}

#[test]
fn qwen2() {
    check("qwen2", false);
}

#[test]
fn falcon() {
    check("falcon", false);
}

#[test]
fn deepseek_llm() {
    check("deepseek-llm", false);
}

#[test]
fn bert_bge() {
    check("bert-bge", true);
}
