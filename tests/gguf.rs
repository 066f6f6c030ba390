//! Model files, right and wrong: what is refused, with which message, and that nothing panics.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::exercise;
use common::gguf::*;
use halite::gguf::{Gguf, GgufError, parse};
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::{Error, Model, Tokenizer};

/// Something malformed: what is wrong with it, its bytes, the error's variant and its message.
type Row = (&'static str, Vec<u8>, &'static str, &'static str);

/// Reports every row whose outcome differs, all at once.
fn check<E: std::fmt::Debug + std::fmt::Display>(rows: &[Row], read: impl Fn(&[u8]) -> Result<(), E>) {
    let mut wrong = Vec::new();
    for (what, bytes, variant, message) in rows {
        let got = match read(bytes) {
            Ok(()) => ("none".to_owned(), "accepted".to_owned()),
            Err(e) => {
                let debug = format!("{e:?}");
                (debug.split([' ', '(', '{']).next().unwrap_or("").to_owned(), e.to_string())
            }
        };
        if (got.0.as_str(), got.1.as_str()) != (*variant, *message) {
            wrong.push(format!("{what}\n  want {variant}: {message}\n  got  {}: {}", got.0, got.1));
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows differ\n{}", wrong.len(), rows.len(), wrong.join("\n"));
}

/// A file with one tensor record as `change` makes it.
fn one_tensor(change: impl FnOnce(&mut Tensor)) -> Vec<u8> {
    File::new().tensor("t", &[32]).last(change).bytes()
}

/// A file with one entry.
fn one(key: impl AsRef<[u8]>, value: impl Into<Value>) -> Vec<u8> {
    File::new().entry(key, value).bytes()
}

/// Two F32 tensors of 32 elements, the second where `offset` says.
fn two_tensors(offset: u64) -> Vec<u8> {
    File::new().tensor("a", &[32]).tensor("b", &[32]).last(|t| t.offset = Some(offset)).bytes()
}

#[test]
fn malformed_headers() {
    let empty = File::new();
    let with = |change: fn(&mut File)| {
        let mut file = llama();
        change(&mut file);
        file.bytes()
    };
    let mut big_endian = empty.clone();
    big_endian.version = 3u32.swap_bytes();
    let version = |version| File { version, ..File::new() }.bytes();
    let id = |id| one_tensor(|t| t.id = id);
    let alignment = |v: u32| one("general.alignment", v);
    let claims = |id: u32, count: u64, bytes: &[u8]| one("k", array(id, count, bytes));
    let long_string = |len: u64| one("k", Value(8, [&len.to_le_bytes()[..], b"abc"].concat()));
    let rows: Vec<Row> = vec![
        // The first bytes.
        ("empty", vec![], "Magic", "not a GGUF file: expected magic 47 47 55 46, got []"),
        (
            "three bytes",
            b"GGU".to_vec(),
            "Magic",
            "not a GGUF file: expected magic 47 47 55 46, got [47, 47, 55]",
        ),
        (
            "magic",
            b"GGML\x03\0\0\0".to_vec(),
            "Magic",
            "not a GGUF file: expected magic 47 47 55 46, got [47, 47, 4d, 4c]",
        ),
        ("magic only", b"GGUF".to_vec(), "Truncated", "truncated at byte 4: version needs 4 bytes, 0 remain"),
        ("big-endian", big_endian.bytes(), "BigEndian", ""),
        ("version 0", version(0), "Version", "GGUF version: expected 2 or 3, got 0"),
        ("version 1", version(1), "Version", "GGUF version: expected 2 or 3, got 1"),
        ("version 4", version(4), "Version", "GGUF version: expected 2 or 3, got 4"),
        // Counts.
        ("tensors 2^63", with(|f| f.tensor_count = Some(1 << 63)), "TooLarge", ""),
        ("tensors max", with(|f| f.tensor_count = Some(u64::MAX)), "TooLarge", ""),
        ("tensors one too many", with(|f| f.tensor_count = Some(f.tensors.len() as u64 + 1)), "Invalid", ""),
        ("entries 2^63", with(|f| f.entry_count = Some(1 << 63)), "TooLarge", ""),
        ("entries max", with(|f| f.entry_count = Some(u64::MAX)), "TooLarge", ""),
        ("entries one too many", with(|f| f.entry_count = Some(f.entries.len() as u64 + 1)), "Invalid", ""),
        ("entries one too few", with(|f| f.entry_count = Some(f.entries.len() as u64 - 1)), "Invalid", ""),
        ("string 2^63", long_string(1 << 63), "Truncated", ""),
        ("string max", long_string(u64::MAX), "Truncated", ""),
        ("string one too long", long_string(4), "Truncated", ""),
        ("array 2^63", claims(4, 1 << 63, &[0; 8]), "TooLarge", ""),
        ("array max", claims(0, u64::MAX, &[0; 8]), "TooLarge", ""),
        ("array one too long", claims(4, 3, &[0; 8]), "TooLarge", ""),
        ("array wraps", claims(10, (1 << 61) + 1, &[0; 8]), "TooLarge", ""),
        ("strings max", claims(8, u64::MAX, &[0; 8]), "TooLarge", ""),
        ("strings one too many", claims(8, 2, &string(b"12345678")), "Truncated", ""),
        ("string in array max", claims(8, 1, &u64::MAX.to_le_bytes()), "Truncated", ""),
        // Keys and values.
        ("key too long", one(vec![b'k'; 65_536], 1u32), "TooLarge", ""),
        (
            "key length max",
            [&empty.bytes()[..16], &[1, 0, 0, 0, 0, 0, 0, 0], &[255; 16]].concat(),
            "TooLarge",
            "",
        ),
        ("key empty", one("", 1u32), "Invalid", ""),
        ("key not UTF-8", one(b"k\xff", 1u32), "Invalid", ""),
        ("key steers a terminal", one("k\x1b[2J", 1u32), "Invalid", ""),
        ("key twice", empty.clone().entry("k", 1u32).entry("k", 2u8).bytes(), "DuplicateKey", ""),
        ("value type 13", one("k", Value(13, vec![0; 8])), "Invalid", ""),
        ("value type max", one("k", Value(u32::MAX, vec![0; 8])), "Invalid", ""),
        ("element type 13", claims(13, 1, &[0; 8]), "Invalid", ""),
        ("nested arrays", claims(9, 1, &[0; 32]), "Invalid", ""),
        ("bool of 2", one("k", Value(7, vec![2])), "Invalid", ""),
        ("bool of 255 in an array", claims(7, 3, &[0, 1, 255]), "Invalid", ""),
        // Alignment.
        ("alignment 0", alignment(0), "Invalid", ""),
        ("alignment 3", alignment(3), "Invalid", ""),
        ("alignment 4", alignment(4), "Invalid", ""),
        ("alignment 12", alignment(12), "Invalid", ""),
        ("alignment 2^21", alignment(1 << 21), "Invalid", ""),
        ("alignment 2^31", alignment(1 << 31), "Invalid", ""),
        ("alignment of u64", one("general.alignment", 32u64), "ValueType", ""),
        ("alignment of an array", one("general.alignment", &vec![32u32]), "ValueType", ""),
        (
            "alignment beyond the file",
            empty.clone().entry("general.alignment", 4096u32).tensor("t", &[32]).bytes(),
            "Truncated",
            "",
        ),
        // Dimensions.
        ("no dimensions", one_tensor(|t| t.n_dims = Some(0)), "Invalid", ""),
        ("five dimensions", one_tensor(|t| t.dims = vec![1; 5]), "Invalid", ""),
        ("2^32 - 1 dimensions", one_tensor(|t| t.n_dims = Some(u32::MAX)), "Invalid", ""),
        ("dimension of 0", one_tensor(|t| t.dims = vec![32, 0]), "Invalid", ""),
        ("row of 0", one_tensor(|t| t.dims = vec![0]), "Invalid", ""),
        ("2^64 elements", one_tensor(|t| t.dims = vec![1 << 32, 1 << 32]), "TensorShape", ""),
        ("2^63 elements", one_tensor(|t| t.dims = vec![1 << 31, 1 << 31, 2]), "TensorShape", ""),
        ("product wraps to 32", one_tensor(|t| t.dims = vec![1 << 33, 1 << 33, 32]), "TensorShape", ""),
        ("2^64 bytes", one_tensor(|t| t.dims = vec![1 << 62]), "TensorShape", ""),
        ("half a block of Q8_0", one_tensor(|t| (t.id, t.dims) = (8, vec![16])), "TensorShape", ""),
        (
            "a block and a half of Q4_K",
            one_tensor(|t| (t.id, t.dims) = (12, vec![384, 2])),
            "TensorShape",
            "",
        ),
        // Types.
        ("type 4", id(4), "TensorType", ""),
        ("type 5", id(5), "TensorType", ""),
        ("type 31", id(31), "TensorType", ""),
        ("type 32", id(32), "TensorType", ""),
        ("type 33", id(33), "TensorType", ""),
        ("type 36", id(36), "TensorType", ""),
        ("type 37", id(37), "TensorType", ""),
        ("type 38", id(38), "TensorType", ""),
        ("type 133", id(133), "TensorType", ""),
        ("type 137", id(137), "TensorType", ""),
        ("type 144", id(144), "TensorType", ""),
        ("type 202", id(202), "TensorType", ""),
        ("type 999", id(999), "TensorType", ""),
        ("type max", id(u32::MAX), "TensorType", ""),
        // Names.
        ("name empty", one_tensor(|t| t.name.clear()), "Invalid", ""),
        ("name of 65 bytes", one_tensor(|t| t.name = vec![b't'; 65]), "TooLarge", ""),
        ("name not UTF-8", one_tensor(|t| t.name = b"\xc3(".to_vec()), "Invalid", ""),
        ("name with a NUL", one_tensor(|t| t.name = b"t\0".to_vec()), "Invalid", ""),
        ("name twice", empty.clone().tensor("t", &[8]).tensor("t", &[8]).bytes(), "DuplicateTensor", ""),
        // Places.
        ("offset not aligned", two_tensors(8), "Invalid", ""),
        ("offset past the end", two_tensors(1 << 20), "TensorRange", ""),
        ("offset max", two_tensors(u64::MAX), "Invalid", ""),
        ("offset wraps", two_tensors(u64::MAX - 31), "TensorRange", ""),
        ("partly the same bytes", two_tensors(96), "Overlap", ""),
        ("the same bytes", two_tensors(0), "Overlap", ""),
        (
            "one inside the other",
            empty
                .clone()
                .tensor("a", &[8])
                .last(|t| t.offset = Some(32))
                .tensor("b", &[32])
                .last(|t| t.offset = Some(0))
                .bytes(),
            "Overlap",
            "",
        ),
        ("data one byte short", one_tensor(|t| drop(t.data.pop())), "TensorRange", ""),
        ("no data", one_tensor(|t| t.data.clear()), "TensorRange", ""),
    ];
    check(&rows, |bytes| parse(bytes).map(drop));
}

/// Opens a file as an application would: vocabulary, hyper-parameters, program.
fn open(bytes: &[u8]) -> Result<(), Error> {
    let gguf = Gguf::from_source(Source::from_bytes("test", bytes))?;
    let model = Model::from_gguf(gguf)?;
    model.program(ProgramOptions::default())?;
    Tokenizer::from_gguf(model.gguf()).map(drop)
}

#[test]
fn models_that_do_not_make_sense() {
    let set = |key: &str, value: Value| llama().set(key, value).bytes();
    let shape = |name: &str, dims: &[u64]| llama().without(name).tensor(name, dims).bytes();
    let mixed = |key: &str, v: u32| mixture().set(key, v).bytes();
    let rows: Vec<Row> = vec![
        ("no architecture", llama().without("general.architecture").bytes(), "Gguf", ""),
        ("architecture of u32", set("general.architecture", 1u32.into()), "Gguf", ""),
        ("architecture not UTF-8", set("general.architecture", b"\xffllama"[..].into()), "Gguf", ""),
        ("unknown architecture", set("general.architecture", "mamba".into()), "Architecture", ""),
        ("block_count missing", llama().without("llama.block_count").bytes(), "Gguf", ""),
        ("block_count of string", set("llama.block_count", "1".into()), "Gguf", ""),
        ("block_count of f32", set("llama.block_count", 1f32.into()), "Gguf", ""),
        ("block_count of bool", set("llama.block_count", true.into()), "Gguf", ""),
        ("block_count negative", set("llama.block_count", (-1i32).into()), "Gguf", ""),
        ("block_count of array", set("llama.block_count", (&vec![1u32]).into()), "Gguf", ""),
        ("block_count 2^32", set("llama.block_count", (1u64 << 32).into()), "Gguf", ""),
        ("block_count 0", set("llama.block_count", 0u32.into()), "Model", ""),
        ("block_count 2000", set("llama.block_count", 2000u32.into()), "Model", ""),
        ("block_count max", set("llama.block_count", u32::MAX.into()), "Model", ""),
        ("block_count one too many", set("llama.block_count", 2u32.into()), "Model", ""),
        ("context_length 0", set("llama.context_length", 0u32.into()), "Model", ""),
        ("embedding_length 0", set("llama.embedding_length", 0u32.into()), "Model", ""),
        ("embedding_length max", set("llama.embedding_length", u32::MAX.into()), "Model", ""),
        ("feed_forward_length missing", llama().without("llama.feed_forward_length").bytes(), "Gguf", ""),
        (
            "feed_forward_length of two layers",
            set("llama.feed_forward_length", (&vec![16u32, 16]).into()),
            "Gguf",
            "",
        ),
        (
            "feed_forward_length negative",
            set("llama.feed_forward_length", (&vec![-16i32]).into()),
            "Gguf",
            "",
        ),
        (
            "feed_forward_length of strings",
            set("llama.feed_forward_length", (&vec!["16"]).into()),
            "Gguf",
            "",
        ),
        ("head_count 0", set("llama.attention.head_count", 0u32.into()), "Model", ""),
        ("head_count above the row", set("llama.attention.head_count", 16u32.into()), "Model", ""),
        ("head_count_kv 0", set("llama.attention.head_count_kv", 0u32.into()), "Model", ""),
        ("heads and KV heads", set("llama.attention.head_count_kv", 3u32.into()), "Model", ""),
        ("key_length too large", set("llama.attention.key_length", u32::MAX.into()), "Model", ""),
        (
            "heads wrap",
            llama()
                .set("llama.attention.head_count", 1u32 << 17)
                .set("llama.attention.head_count_kv", 1u32 << 17)
                .set("llama.attention.key_length", 1u32 << 15)
                .set("llama.attention.value_length", 4u32)
                .bytes(),
            "Model",
            "",
        ),
        ("epsilon missing", llama().without("llama.attention.layer_norm_rms_epsilon").bytes(), "Gguf", ""),
        ("epsilon NaN", set("llama.attention.layer_norm_rms_epsilon", f32::NAN.into()), "Gguf", ""),
        ("epsilon of f64", set("llama.attention.layer_norm_rms_epsilon", 1e-5f64.into()), "Gguf", ""),
        ("rope dimensions odd", set("llama.rope.dimension_count", 3u32.into()), "Model", ""),
        ("rope dimensions above a head", set("llama.rope.dimension_count", 6u32.into()), "Model", ""),
        ("rope base 0", set("llama.rope.freq_base", 0f32.into()), "Model", ""),
        ("rope base infinite", set("llama.rope.freq_base", f32::INFINITY.into()), "Gguf", ""),
        ("rope scaling unknown", set("llama.rope.scaling.type", "longer".into()), "Model", ""),
        ("rope scaling without factor", set("llama.rope.scaling.type", "linear".into()), "Gguf", ""),
        ("rope scaling negative", set("llama.rope.scaling.factor", (-2f32).into()), "Model", ""),
        ("experts used above experts", mixed("llama.expert_used_count", 5), "Model", ""),
        ("experts used 0", mixed("llama.expert_used_count", 0), "Model", ""),
        ("experts 2^20", mixed("llama.expert_count", 1 << 20), "Model", ""),
        ("experts one too many", mixed("llama.expert_count", 5), "Model", ""),
        ("vocab_size 0", set("llama.vocab_size", 0u32.into()), "Model", ""),
        ("vocab_size other than the table", set("llama.vocab_size", 13u32.into()), "Model", ""),
        ("tensor missing", llama().without("blk.0.attn_q.weight").bytes(), "Model", ""),
        ("table missing", llama().without("token_embd.weight").bytes(), "Model", ""),
        ("matrix transposed", shape("blk.0.ffn_up.weight", &[16, 8]), "Model", ""),
        ("norm too long", shape("output_norm.weight", &[16]), "Model", ""),
        ("matrix as a cube", shape("blk.0.attn_q.weight", &[8, 8, 2]), "Model", ""),
        ("bias too short", llama().tensor("blk.0.attn_q.bias", &[4]).bytes(), "Model", ""),
        (
            "norm of F16",
            llama()
                .without("output_norm.weight")
                .tensor_of("output_norm.weight", &[8], 1, vec![0; 16])
                .bytes(),
            "Program",
            "",
        ),
    ];
    check(&rows, open);
}

#[test]
fn vocabularies_that_do_not_make_sense() {
    // Straight from the metadata: the hyper-parameters look at the token list too.
    let vocabulary = |bytes: &[u8]| {
        let gguf = Gguf::from_source(Source::from_bytes("test", bytes))?;
        Tokenizer::from_gguf(&gguf).map(drop)
    };
    let set = |key: &str, value: Value| llama().set(&format!("tokenizer.ggml.{key}"), value).bytes();
    let set_bpe = |key: &str, value: Value| bpe().set(&format!("tokenizer.ggml.{key}"), value).bytes();
    let byte_token = |text: &'static str| {
        let texts = vec![text];
        let file = File::new().entry("tokenizer.ggml.model", "llama").entry("tokenizer.ggml.tokens", &texts);
        file.entry("tokenizer.ggml.token_type", &vec![6i32]).bytes()
    };
    let merge = |text: &'static str| set_bpe("merges", (&vec!["a b", text]).into());
    let mut scores = vec![0f32; 12];
    scores[3] = f32::NAN;
    let rows: Vec<Row> = vec![
        ("model of u32", set("model", 1u32.into()), "Gguf", ""),
        ("unknown model", set("model", "wordpiece\x1b[2J".into()), "Tokenizer", ""),
        ("tokens missing", llama().without("tokenizer.ggml.tokens").bytes(), "Tokenizer", ""),
        ("tokens empty", set("tokens", array(8, 0, &[])), "Tokenizer", ""),
        ("tokens of u32", set("tokens", (&vec![1u32]).into()), "Gguf", ""),
        ("more tokens than rows", set("tokens", (&vec!["a"; 13]).into()), "Tokenizer", ""),
        ("scores one short", set("scores", (&vec![0f32; 11]).into()), "Tokenizer", ""),
        ("scores one too many", set("scores", (&vec![0i32; 13]).into()), "Tokenizer", ""),
        ("scores of strings", set("scores", (&vec![""; 12]).into()), "Gguf", ""),
        ("scores NaN", set("scores", (&scores).into()), "Tokenizer", ""),
        ("types one short", set("token_type", (&vec![1i32; 11]).into()), "Tokenizer", ""),
        ("types of f32", set("token_type", (&vec![1f32; 12]).into()), "Gguf", ""),
        ("type 0", set("token_type", (&vec![0i32; 12]).into()), "Tokenizer", ""),
        ("type 7", set("token_type", (&vec![7i32; 12]).into()), "Tokenizer", ""),
        ("type negative", set("token_type", (&vec![-1i32; 12]).into()), "Tokenizer", ""),
        ("bos beyond the tokens", set("bos_token_id", 12u32.into()), "Tokenizer", ""),
        ("eos max", set("eos_token_id", u32::MAX.into()), "Tokenizer", ""),
        ("eos negative", set("eos_token_id", (-1i32).into()), "Gguf", ""),
        ("eot beyond the tokens", set("eot_token_id", 99u32.into()), "Tokenizer", ""),
        ("unknown beyond the tokens", set("unknown_token_id", 99u32.into()), "Tokenizer", ""),
        ("add_bos of u8", set("add_bos_token", 1u8.into()), "Gguf", ""),
        ("byte token -1", byte_token("<0x-1>"), "Tokenizer", ""),
        ("byte token +1", byte_token("<0x+1>"), "Tokenizer", ""),
        ("byte token of one digit", byte_token("<0x1>"), "Tokenizer", ""),
        ("byte token of three digits", byte_token("<0x100>"), "Tokenizer", ""),
        ("byte token empty", byte_token(""), "Tokenizer", ""),
        ("pre-tokenizer unknown", set_bpe("pre", "klingon".into()), "Tokenizer", ""),
        ("pre-tokenizer of u32", set_bpe("pre", 1u32.into()), "Gguf", ""),
        ("merges missing", bpe().without("tokenizer.ggml.merges").bytes(), "Tokenizer", ""),
        ("merges of u32", set_bpe("merges", (&vec![1u32]).into()), "Gguf", ""),
        ("merge of one part", merge("ab"), "Tokenizer", ""),
        ("merge empty", merge(""), "Tokenizer", ""),
        ("merge with nothing on the right", merge("a "), "Tokenizer", ""),
        ("merge of an unknown part", merge("a c"), "Tokenizer", ""),
        ("merge into an unknown token", merge("b a"), "Tokenizer", ""),
    ];
    check(&rows, vocabulary);
}
