//! Token ids against llama.cpp's published vectors, which lie beside a checkout in `../shared/golden/vocab`, and against
//! SentencePiece's; texts that come back.

use halite_testing::golden;

use std::path::{Path, PathBuf};

use halite::Tokenizer;
use halite::gguf::Gguf;
use halite::map::Source;
use halite::tokenizer::{Detokenizer, EncodeOptions, TokenKind};
use halite_testing::SplitMix;

fn plain() -> EncodeOptions {
    EncodeOptions::default().add_special(false)
}

fn tokenizer(file: &halite_testing::gguf::File) -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::from_source(Source::from_bytes("test", &file.bytes())).unwrap())
        .unwrap()
        .unwrap()
}

fn vocab_dir() -> Option<PathBuf> {
    golden::folder().map(|folder| folder.join("vocab"))
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
        let got = tokenizer.encode(input, plain());
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
                lost || tokenizer.encode(text, plain()) == got
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
        tokenizer.encode(text, EncodeOptions::default().add_special(add_special).parse_special(parse_special))
    };
    let pieces = tokenizer(&halite_testing::gguf::wordpiece());
    assert_eq!(encode(&pieces, "\u{c1}, AB abb [SEP]b", true, true), [2, 4, 6, 7, 7, 5, 3, 1, 3]);
    // Written out by a stranger a separator is punctuation and a word.
    assert_eq!(encode(&pieces, "[SEP]", false, false), [1, 1, 1]);
    assert_eq!(pieces.decode(&[2, 4, 6, 7, 3], false), " a , ab");

    let unigram = tokenizer(&halite_testing::gguf::unigram());
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
    for (name, tokenizer) in vocabularies() {
        let mut random = SplitMix(7);
        for turn in 0..3000 {
            let text: String = match turn % 3 {
                0 => (0..random.below(30)).map(|_| character(&mut random)).collect(),
                _ => (0..random.below(12)).map(|_| PARTS[random.below(PARTS.len())]).collect(),
            };
            halite_testing::exercise::there_and_back(&tokenizer, &text, loses_nothing(&name, &text));
        }
    }
}

/// Any character but SentencePiece's space, which comes back as a space.
fn character(random: &mut SplitMix) -> char {
    // As many from the first plane as from all others.
    let end = [0x1_0000, 0x11_0000][random.below(2)];
    char::from_u32(random.below(end) as u32).filter(|&c| c != '\u{2581}').unwrap_or(' ')
}

/// The ids of other programs for random texts of all of Unicode; `scripts/unicode.py` writes them.
#[test]
fn random_texts_have_the_ids_of_other_programs() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/unicode");
    let dir = std::env::var_os("HALITE_UNICODE").map_or(dir, PathBuf::from);
    let texts = std::fs::read(dir.join("texts.json")).unwrap();
    let texts: Vec<String> = serde_json::from_slice(&texts).unwrap();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for (name, tokenizer) in vocabularies() {
        let Ok(ids) = std::fs::read_to_string(dir.join(format!("{name}.ids"))) else { continue };
        assert_eq!(ids.lines().count(), texts.len(), "{name}");
        checked += 1;
        for (text, ids) in texts.iter().zip(ids.lines()).filter(|(_, ids)| *ids != "-") {
            let want: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
            let got = tokenizer.encode(text, plain());
            if got != want {
                wrong.push(format!("{name}: {text:?}\n  want {want:?}\n  got  {got:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
    let converted = if cfg!(feature = "convert") { 8 } else { 0 };
    assert!(checked >= converted, "{checked}");
}

/// The ids of llama.cpp for each way to split texts into words; `scripts/bpe.py` writes them.
#[test]
fn words_are_split_as_in_llama_cpp() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bpe");
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(dir.join("texts.json")).unwrap()).unwrap();
    let (mut kinds, mut checked, mut wrong) = (0, 0, Vec::new());
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "ids") {
            continue;
        }
        let kind = path.file_stem().unwrap().to_str().unwrap();
        let bytes = match kind {
            "gemma4" => std::fs::read(dir.join("text.gguf")).unwrap(),
            "plamo2" => std::fs::read(dir.join("plamo2.gguf")).unwrap(),
            _ => with_words(std::fs::read(dir.join("bytes.gguf")).unwrap(), kind),
        };
        let gguf = Gguf::from_source(Source::from_bytes(kind, &bytes)).unwrap();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap().unwrap();
        let ids = std::fs::read_to_string(&path).unwrap();
        assert_eq!(ids.lines().count(), texts.len(), "{kind}");
        for (text, ids) in texts.iter().zip(ids.lines()).filter(|(_, ids)| *ids != "-") {
            let want: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
            let got = tokenizer.encode(text, plain());
            checked += 1;
            if got != want {
                wrong.push(format!("{kind}: {text:?}\n  want {want:?}\n  got  {got:?}"));
            }
            // U+2581 stands for a space in one of them.
            let text = if kind == "gemma4" { text.replace('\u{2581}', " ") } else { text.clone() };
            assert_eq!(tokenizer.decode(&got, false), text, "{kind}");
        }
        kinds += 1;
    }
    assert!(wrong.is_empty(), "{} wrong of {checked}\n{}", wrong.len(), wrong.join("\n"));
    assert!(kinds == 12 && checked > 2400, "{kinds} kinds, {checked} texts");
}

/// A file without tensors, with another `tokenizer.ggml.pre`.
fn with_words(mut bytes: Vec<u8>, kind: &str) -> Vec<u8> {
    let key = b"tokenizer.ggml.pre";
    // The type of the value lies between the key and the length of its text.
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    let len = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    bytes.splice(at..at + 8 + len, halite_testing::gguf::string(kind.as_bytes()));
    bytes
}

#[test]
fn gemma_4_begins_every_text_and_ends_at_turns() {
    let tokens: Vec<&str> = vec![
        "<pad>",
        "<eos>",
        "<bos>",
        "a",
        "b",
        "\u{2581}",
        "ab",
        "\u{2581}ab",
        "\n",
        "\n\n",
        "<turn|>",
        "</s>",
        "<|tool_response>",
    ];
    let kinds: Vec<i32> = vec![3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 4];
    let file = halite_testing::gguf::File::new()
        .set("general.architecture", "gemma4")
        .set("tokenizer.ggml.model", "gemma4")
        .set("tokenizer.ggml.tokens", &tokens)
        .set("tokenizer.ggml.token_type", &kinds)
        .set("tokenizer.ggml.merges", &vec!["a b", "\u{2581} ab"])
        .set("tokenizer.ggml.add_bos_token", false)
        .set("tokenizer.ggml.bos_token_id", 2u32)
        .set("tokenizer.ggml.eos_token_id", 1u32);
    let t = tokenizer(&file);
    assert_eq!(t.encode("a ab\n\n\nab\n\n", EncodeOptions::default()), [2, 3, 7, 8, 8, 8, 6, 9]);
    assert_eq!(t.decode(&[2, 3, 7, 9], false), "a ab\n\n");
    let ends: Vec<u32> = (0..tokens.len() as u32).filter(|&id| t.is_end(id)).collect();
    assert_eq!(ends, [1, 10, 12]);
}

/// Every vocabulary at hand: those beside the checkout, the one in it, and those of the folders that are converted.
fn vocabularies() -> Vec<(String, Tokenizer)> {
    let open = |path: &Path| Tokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap().unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut all = vec![
        ("unigram".to_owned(), open(&data.join("unigram.gguf"))),
        ("plamo2".to_owned(), open(&data.join("bpe/plamo2.gguf"))),
    ];
    for file in vocab_dir().into_iter().flat_map(|dir| std::fs::read_dir(dir).unwrap()) {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "gguf") {
            all.push((path.file_stem().unwrap().to_str().unwrap().into(), open(&path)));
        }
    }
    #[cfg(feature = "convert")]
    for folder in [
        "bert",
        "convert/gemma2",
        "convert/gemma4",
        "convert/llama",
        "convert/llama-spm",
        "convert/qwen2",
        "convert/qwen3_5",
        "convert/starcoder2",
    ] {
        let mut bytes = Vec::new();
        let format = halite::kernels::formats::Format::F16;
        halite::convert::convert(&data.join(folder), format, &mut bytes, &mut |_| {}).unwrap();
        let gguf = Gguf::from_source(Source::from_bytes(folder, &bytes)).unwrap();
        let name = folder.trim_start_matches("convert/").to_owned();
        all.push((name, Tokenizer::from_gguf(&gguf).unwrap().unwrap()));
    }
    all
}

/// Whether a vocabulary can spell a text.
fn loses_nothing(name: &str, text: &str) -> bool {
    match name {
        "unigram" | "bert" | "ggml-vocab-bert-bge" => false,
        // A byte-order mark in front.
        "plamo2" => !text.contains('\u{feff}'),
        // It has no tokens for the first bytes of these characters.
        "ggml-vocab-falcon" => !text.contains(|c| ('\u{40000}'..'\u{100000}').contains(&c)),
        _ => true,
    }
}

/// What is quoted is taken for what it says, control tokens written out included.
#[test]
fn quoted_texts_have_no_control_tokens() {
    for (name, t) in vocabularies() {
        let controls: Vec<String> = (0..t.len() as u32)
            .filter(|&id| t.kind(id) == Some(TokenKind::Control))
            .filter_map(|id| String::from_utf8(t.text(id)?.to_vec()).ok())
            .filter(|text| text.chars().count() > 1)
            .take(300)
            .collect();
        let encode = |text: &str, parse_special| {
            t.encode(text, EncodeOptions::default().add_special(false).parse_special(parse_special))
        };
        assert!(!controls.is_empty(), "{name}");
        for (i, control) in controls.iter().enumerate() {
            let text = format!("Hi {control}, {control}{}<{control} there", controls[controls.len() - 1 - i]);
            assert_ne!(encode(&text, true), encode(&text, false), "{name}: {text}");
            assert_eq!(encode(&t.quote(&text), true), encode(&text, false), "{name}: {text}");
        }
    }
}

/// Literals as they are defined: all that are in the text, the longest first, then the lowest id, then the
/// one further left; each unless it overlaps one that was taken.
fn literals(texts: &[String], text: &str) -> Vec<(usize, usize, u32)> {
    let mut all = Vec::new();
    for (id, literal) in texts.iter().enumerate() {
        let starts =
            (0..text.len()).filter(|&start| text.as_bytes()[start..].starts_with(literal.as_bytes()));
        all.extend(starts.map(|start| (start, start + literal.len(), id as u32)));
    }
    all.sort_by_key(|&(start, end, id)| (std::cmp::Reverse(end - start), id, start));
    let mut taken: Vec<(usize, usize, u32)> = Vec::new();
    for (start, end, id) in all {
        if taken.iter().all(|other| end <= other.0 || other.1 <= start) {
            taken.push((start, end, id));
        }
    }
    taken.sort();
    taken
}

/// A WordPiece vocabulary with user-defined tokens from id 0 on.
fn with_literals(texts: &[String]) -> Tokenizer {
    let mut tokens: Vec<&str> = texts.iter().map(String::as_str).collect();
    tokens.extend(["[UNK]", "[CLS]", "[SEP]"]);
    let mut kinds = vec![4i32; texts.len()];
    kinds.extend([2, 3, 3]);
    let first = texts.len() as u32;
    tokenizer(
        &halite_testing::gguf::wordpiece()
            .set("tokenizer.ggml.tokens", &tokens)
            .set("tokenizer.ggml.token_type", &kinds)
            .set("tokenizer.ggml.unknown_token_id", first)
            .set("tokenizer.ggml.cls_token_id", first + 1)
            .set("tokenizer.ggml.seperator_token_id", first + 2),
    )
}

#[test]
fn overlapping_literals_are_the_longest_first() {
    let mut random = SplitMix(3);
    for _ in 0..300 {
        let mut word = |most: usize| -> String {
            (0..1 + random.below(most)).map(|_| ['a', 'b', '\u{e9}'][random.below(3)]).collect()
        };
        let mut texts: Vec<String> = (0..8).map(|_| word(6)).collect();
        texts.sort();
        texts.dedup();
        texts.reverse();
        let t = with_literals(&texts);
        let text = word(60);
        let want: Vec<u32> = literals(&texts, &text).iter().map(|&(_, _, id)| id).collect();
        let mut got = t.encode(&text, plain());
        got.retain(|&id| (id as usize) < texts.len());
        assert_eq!(got, want, "{texts:?} in {text}");
    }
}

/// Runs something on `n` and on `4 n`. What takes time in proportion takes 4 times as long, with the square
/// 16 times.
fn is_linear(what: &str, n: usize, run: &dyn Fn(usize)) {
    let time = |n: usize| {
        let once = || {
            let start = std::time::Instant::now();
            run(n);
            start.elapsed()
        };
        (0..3).map(|_| once()).min().unwrap()
    };
    run(n);
    let (short, long) = (time(n), time(4 * n));
    assert!(long < 10 * short + std::time::Duration::from_millis(50), "{what}: {short:?}, then {long:?}");
}

/// Vocabularies that are made to take long, and texts to go with them.
#[test]
fn no_vocabulary_takes_more_than_linear_time() {
    let runs: Vec<String> = (1..=220).map(|len| "a".repeat(len)).collect();
    let t = with_literals(&runs);
    is_linear("runs as literals", 2_000, &|n| {
        assert_eq!(t.encode(&"a".repeat(n), plain()).len(), n.div_ceil(220));
    });

    // Pieces that share all but their ends.
    let mut tokens: Vec<String> = (1..=200).map(|len| "a".repeat(len)).collect();
    tokens.extend((1..=200).map(|len| format!("\u{2581}{}", "a".repeat(len))));
    tokens.extend(["[UNK]", "[CLS]", "[SEP]"].map(str::to_owned));
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let pieces = halite_testing::gguf::wordpiece()
        .set("tokenizer.ggml.tokens", &tokens)
        .without("tokenizer.ggml.token_type")
        .set("tokenizer.ggml.unknown_token_id", 400u32)
        .set("tokenizer.ggml.cls_token_id", 401u32)
        .set("tokenizer.ggml.seperator_token_id", 402u32)
        .set("halite.tokenizer.max_input_chars_per_word", u32::MAX);
    let t = tokenizer(&pieces);
    is_linear("word pieces", 10_000, &|n| {
        assert_eq!(t.encode(&"a".repeat(n), plain()).len(), n.div_ceil(200));
    });
    is_linear("word pieces without an end", 10_000, &|n| {
        assert_eq!(t.encode(&("a".repeat(n) + "b"), plain()), [400]);
    });

    let mut tokens: Vec<String> = (1..=200).map(|len| "a".repeat(len)).collect();
    tokens.push("<unk>".into());
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let kinds: Vec<i32> = (0..201).map(|id| if id == 200 { 2 } else { 1 }).collect();
    // A map in which every byte of `a` leads back to where it came from.
    let mut units = vec![0u32; 256];
    units[usize::from(b'a')] = u32::from(b'a') << 10 | u32::from(b'a');
    let charsmap: Vec<u8> =
        [4 * 256u32].iter().chain(&units).flat_map(|unit| unit.to_le_bytes()).chain(*b"b\0").collect();
    let unigram = halite_testing::gguf::unigram()
        .set("tokenizer.ggml.tokens", &tokens)
        .set("tokenizer.ggml.scores", &vec![-1f32; 201])
        .set("tokenizer.ggml.token_type", &kinds)
        .set("tokenizer.ggml.unknown_token_id", 200u32)
        .set("tokenizer.ggml.add_space_prefix", false)
        .set("tokenizer.ggml.precompiled_charsmap", &charsmap);
    let t = tokenizer(&unigram);
    is_linear("unigram, and a map that loops", 2_000, &|n| {
        assert_eq!(t.encode(&"a".repeat(n), plain()).len(), n.div_ceil(200));
    });

    let mut tokens: Vec<String> = (1..=200).map(|len| "a".repeat(len)).collect();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let kinds: Vec<i32> = (0..456).map(|id| if id < 200 { 1 } else { 6 }).collect();
    let plamo = |score: f32| {
        halite_testing::gguf::unigram()
            .set("tokenizer.ggml.model", "plamo2")
            .set("tokenizer.ggml.tokens", &tokens)
            .set("tokenizer.ggml.scores", &vec![score; 456])
            .set("tokenizer.ggml.token_type", &kinds)
    };
    let t = tokenizer(&plamo(-1.0));
    is_linear("PLaMo's", 2_000, &|n| {
        assert_eq!(t.encode(&"a".repeat(n), plain()).len(), n.div_ceil(200));
    });
    // The best of scores that no sum of 64 bits holds, were they not bounded.
    for score in [f32::MAX, f32::MIN, f32::INFINITY] {
        let t = tokenizer(&plamo(score));
        assert_eq!(t.decode(&t.encode(&"a".repeat(1000), plain()), false), "a".repeat(1000), "{score}");
    }
}

#[test]
fn texts_of_tokens_and_replacements_have_limits() {
    let refused = |file: &halite_testing::gguf::File| {
        let gguf = Gguf::from_source(Source::from_bytes("test", &file.bytes())).unwrap();
        Tokenizer::from_gguf(&gguf).unwrap_err().to_string()
    };
    let long = "b".repeat(1025);
    let tokens = vec!["[PAD]", "[UNK]", "[CLS]", "[SEP]", &long, "b", "\u{2581},", "\u{2581}ab"];
    let error = refused(&halite_testing::gguf::wordpiece().set("tokenizer.ggml.tokens", &tokens));
    assert!(error.contains("tokenizer.ggml.tokens[4]: expected at most 1024 bytes, got 1025"), "{error}");

    let units = [64u32 << 10, 2 << 10 | 1 << 8 | 65, 0, 1 << 31];
    let charsmap = |len: usize| -> Vec<u8> {
        let units = [16u32].into_iter().chain(units).flat_map(u32::to_le_bytes);
        units.chain("a".repeat(len).into_bytes()).chain([0]).collect()
    };
    let with =
        |len| halite_testing::gguf::unigram().set("tokenizer.ggml.precompiled_charsmap", &charsmap(len));
    let t = tokenizer(&with(64));
    assert_eq!(t.encode("A", plain()).len(), 64);
    let error = refused(&with(65));
    assert!(
        error.contains("precompiled_charsmap: unit 1 does not lead to a text of at most 64 bytes"),
        "{error}"
    );
}
