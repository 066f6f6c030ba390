//! Token ids against llama.cpp's published vectors, which lie beside a checkout in `../shared/golden/vocab`, and against
//! SentencePiece's; texts that come back.

#[allow(dead_code, reason = "other tests use the rest")]
mod common;

use std::path::{Path, PathBuf};

use common::SplitMix;
use halite::Tokenizer;
use halite::gguf::Gguf;
use halite::map::Source;
use halite::tokenizer::{Detokenizer, EncodeOptions, TokenKind};

const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };

fn tokenizer(file: &common::gguf::File) -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::from_source(Source::from_bytes("test", &file.bytes())).unwrap())
        .unwrap()
        .unwrap()
}

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
    if let Some(dir) = vocab_dir() {
        check_file(&dir.join(format!("ggml-vocab-{name}.gguf")), normalised);
    }
}

fn check_file(path: &Path, normalised: bool) {
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap().unwrap();
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
            stream.push(&tokenizer, id, false, &mut text);
        }
        stream.finish(&mut text);
        let text =
            if tokenizer.adds_space_prefix() { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
        let unknown = |&id: &u32| tokenizer.kind(id) != Some(TokenKind::Normal);
        let same = match normalised {
            false => text == *input,
            // What stands for a space cannot come back as itself.
            true => {
                let lost = got.iter().any(unknown) || input.contains('\u{2581}');
                lost || tokenizer.encode(text, PLAIN) == got
            }
        };
        if !same {
            wrong.push(format!("{input:?} comes back as {text:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}: {} wrong\n{}", path.display(), wrong.len(), wrong.join("\n"));
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

/// What SentencePiece makes of the same texts; `scripts/unigram.py` writes the files.
#[test]
fn unigram() {
    check_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/unigram.gguf"), true);
    // More of them, with a published charsmap.
    if let Some(path) = std::env::var_os("HALITE_UNIGRAM") {
        check_file(Path::new(&path), true);
    }
}

#[test]
fn special_tokens_of_word_pieces_and_unigrams() {
    let encode = |tokenizer: &Tokenizer, text: &str, add_special, parse_special| {
        tokenizer.encode(text, EncodeOptions { add_special, parse_special })
    };
    let pieces = tokenizer(&common::gguf::wordpiece());
    assert_eq!(encode(&pieces, "\u{c1}, AB abb [SEP]b", true, true), [2, 4, 6, 7, 7, 5, 3, 1, 3]);
    // Written out by a stranger a separator is punctuation and a word.
    assert_eq!(encode(&pieces, "[SEP]", false, false), [1, 1, 1]);
    assert_eq!(pieces.decode(&[2, 4, 6, 7, 3], false), " a , ab");

    let unigram = tokenizer(&common::gguf::unigram());
    assert_eq!(encode(&unigram, " AB  a<tag>", true, false), [7, 2, 7, 8, 1]);
    assert_eq!(encode(&unigram, "ab</s>", false, true), [3, 6, 1]);
    assert_eq!(encode(&unigram, "xyz", false, false), [3, 2]);
    assert_eq!(encode(&unigram, "", true, false), [1]);
    assert_eq!(unigram.decode(&[7, 2, 7, 8, 1], false), " a a<tag>");
}

/// Random texts come back from every vocabulary that loses nothing.
#[test]
fn random_texts_come_back() {
    const PARTS: [&str; 40] = [
        "a",
        "the",
        "Hello",
        "I'm",
        "'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "1",
        "2024",
        "3.14",
        ".",
        "...",
        "!?",
        "-",
        "_x",
        "é",
        "e\u{301}",
        "ß",
        "Ǆ",
        "İ",
        "你",
        "好吗",
        "の",
        "한국",
        "ไทย",
        "ا",
        "😀",
        "👨\u{200d}👩",
        "\u{fe0f}",
        "\u{a0}",
        "\u{3000}",
        "\u{0}",
        "\u{7f}",
        "\u{fffd}",
        "½",
        "٣",
        "\u{10ffff}",
    ];
    let Some(dir) = vocab_dir() else { return };
    for name in ["llama-spm", "phi-3", "llama-bpe", "gpt-2", "qwen2", "falcon", "deepseek-llm"] {
        let gguf = Gguf::open(&dir.join(format!("ggml-vocab-{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap().unwrap();
        let mut random = SplitMix(7);
        for _ in 0..3000 {
            let parts = random.below(12);
            let text: String = (0..parts).map(|_| PARTS[random.below(PARTS.len())]).collect();
            let ids = tokenizer.encode(&text, PLAIN);
            let back = tokenizer.decode(&ids, false);
            let back =
                if tokenizer.adds_space_prefix() { back.strip_prefix(' ').unwrap_or(&back) } else { &back };
            assert_eq!(back, text, "{name}: {ids:?}");
        }
    }
}
