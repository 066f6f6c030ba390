//! Model files, right and wrong: what is refused, with which message, and that nothing panics.

use std::path::{Path, PathBuf};
use std::time::Duration;

use halite::gguf::{Gguf, GgufError, parse};
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::tokenizer::EncodeOptions;
use halite::{Error, Model, Tokenizer};
use halite_testing::gguf::*;
use halite_testing::{SplitMix, exercise};

/// Something malformed: what is wrong with it, its bytes, the error's variant and its message (its start, if it ends in `…`).
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
        let said = match message.strip_suffix('…') {
            Some(start) => got.1.starts_with(start),
            None => got.1 == *message,
        };
        if !said || got.0 != *variant {
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
    #[rustfmt::skip]
    let rows: Vec<Row> = vec![
        // The first bytes.
        ("empty", vec![], "Magic", "not a GGUF file: expected magic 47 47 55 46, got []"),
        ("three bytes", b"GGU".to_vec(), "Magic", "not a GGUF file: expected magic 47 47 55 46, got [47, 47, 55]"),
        ("magic", b"GGML\x03\0\0\0".to_vec(),
            "Magic", "not a GGUF file: expected magic 47 47 55 46, got [47, 47, 4d, 4c]"),
        ("magic only", b"GGUF".to_vec(), "Truncated", "truncated at byte 4: version needs 4 bytes, 0 remain"),
        ("big-endian", big_endian.bytes(),
            "BigEndian", "big-endian GGUF (version field 0x03000000): only little-endian files are supported; convert it"),
        ("version 0", version(0), "Version", "GGUF version: expected 2 or 3, got 0"),
        ("version 1", version(1), "Version", "GGUF version: expected 2 or 3, got 1"),
        ("version 4", version(4), "Version", "GGUF version: expected 2 or 3, got 4"),
        // Counts.
        ("tensors 2^63", with(|f| f.tensor_count = Some(1 << 63)),
            "TooLarge", "byte 8: tensor count: expected at most 132, got 9223372036854775808"),
        ("tensors max", with(|f| f.tensor_count = Some(u64::MAX)),
            "TooLarge", "byte 8: tensor count: expected at most 132, got 18446744073709551615"),
        ("tensors one too many", with(|f| f.tensor_count = Some(f.tensors.len() as u64 + 1)),
            "Invalid", "byte 1579: tensor name: expected at least one byte, got an empty string"),
        ("entries 2^63", with(|f| f.entry_count = Some(1 << 63)),
            "TooLarge", "byte 16: metadata count: expected at most 311, got 9223372036854775808"),
        ("entries max", with(|f| f.entry_count = Some(u64::MAX)),
            "TooLarge", "byte 16: metadata count: expected at most 311, got 18446744073709551615"),
        ("entries one too many", with(|f| f.entry_count = Some(f.entries.len() as u64 + 1)),
            "TooLarge", "byte 974: length of tensor name: expected at most 64, got 3377699720527872"),
        ("entries one too few", with(|f| f.entry_count = Some(f.entries.len() as u64 - 1)),
            "TensorType", "tensor `tokenizer.ggml.eos_token_id`: tensor type 2048 is not known"),
        ("string 2^63", long_string(1 << 63),
            "Truncated", "truncated at byte 45: value of key `k` needs 9223372036854775808 bytes, 3 remain"),
        ("string max", long_string(u64::MAX),
            "Truncated", "truncated at byte 45: value of key `k` needs 18446744073709551615 bytes, 3 remain"),
        ("string one too long", long_string(4),
            "Truncated", "truncated at byte 45: value of key `k` needs 4 bytes, 3 remain"),
        ("array 2^63", claims(4, 1 << 63, &[0; 8]),
            "TooLarge", "byte 41: array length of key `k`: expected at most 2, got 9223372036854775808"),
        ("array max", claims(0, u64::MAX, &[0; 8]),
            "TooLarge", "byte 41: array length of key `k`: expected at most 8, got 18446744073709551615"),
        ("array one too long", claims(4, 3, &[0; 8]),
            "TooLarge", "byte 41: array length of key `k`: expected at most 2, got 3"),
        ("array wraps", claims(10, (1 << 61) + 1, &[0; 8]),
            "TooLarge", "byte 41: array length of key `k`: expected at most 1, got 2305843009213693953"),
        ("strings max", claims(8, u64::MAX, &[0; 8]),
            "TooLarge", "byte 41: array length of key `k`: expected at most 1, got 18446744073709551615"),
        ("strings one too many", claims(8, 2, &string(b"12345678")),
            "Truncated", "truncated at byte 65: value of key `k` needs 8 bytes, 0 remain"),
        ("string in array max", claims(8, 1, &u64::MAX.to_le_bytes()),
            "Truncated", "truncated at byte 57: value of key `k` needs 18446744073709551615 bytes, 0 remain"),
        ("65537 entries", (0..65_537u32).fold(File::new(), |f, i| f.entry(i.to_string(), 0u8)).bytes(),
            "TooLarge", "byte 16: metadata count: expected at most 65536, got 65537"),
        // Keys and values.
        ("key too long", one(vec![b'k'; 65_536], 1u32),
            "TooLarge", "byte 24: length of key: expected at most 65535, got 65536"),
        ("key length max", [&empty.bytes()[..16], &[1, 0, 0, 0, 0, 0, 0, 0], &[255; 16]].concat(),
            "TooLarge", "byte 24: length of key: expected at most 65535, got 18446744073709551615"),
        ("key empty", one("", 1u32), "Invalid", "byte 24: key: expected at least one byte, got an empty string"),
        ("key not UTF-8", one(b"k\xff", 1u32), "Invalid", "byte 24: key: expected UTF-8, got \"k\\xff\""),
        ("key not UTF-8 and long", one([&[b'k'; 64][..], b"\xff"].concat(), 1u32),
            "Invalid", concat!("byte 24: key: expected UTF-8, got \"kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk", "kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk\"…")),
        ("key steers a terminal", one("k\x1b[2J", 1u32),
            "Invalid", "byte 24: key: expected text without control characters, got \"k\\u{1b}[2J\""),
        ("key twice", empty.clone().entry("k", 1u32).entry("k", 2u8).bytes(),
            "DuplicateKey", "byte 41: key `k` appears twice"),
        ("value type 13", one("k", Value(13, vec![0; 8])),
            "Invalid", "byte 33: value type of key `k`: expected 0 to 12, got 13"),
        ("value type max", one("k", Value(u32::MAX, vec![0; 8])),
            "Invalid", "byte 33: value type of key `k`: expected 0 to 12, got 4294967295"),
        ("element type 13", claims(13, 1, &[0; 8]),
            "Invalid", "byte 37: value type of key `k`: expected 0 to 12, got 13"),
        ("nested arrays", claims(9, 1, &[0; 32]),
            "Invalid", "byte 37: element type of key `k`: expected a scalar or a string (arrays do not nest), got array"),
        ("bool of 2", one("k", Value(7, vec![2])),
            "Invalid", "byte 37: value of key `k`: expected a bool of 0 or 1, got 2"),
        ("bool of 255 in an array", claims(7, 3, &[0, 1, 255]),
            "Invalid", "byte 51: value of key `k`: expected a bool of 0 or 1, got 255"),
        // Alignment.
        ("alignment 0", alignment(0),
            "Invalid", "byte 53: general.alignment: expected a power of two from 8 to 1048576, got 0"),
        ("alignment 3", alignment(3),
            "Invalid", "byte 53: general.alignment: expected a power of two from 8 to 1048576, got 3"),
        ("alignment 4", alignment(4),
            "Invalid", "byte 53: general.alignment: expected a power of two from 8 to 1048576, got 4"),
        ("alignment 12", alignment(12),
            "Invalid", "byte 53: general.alignment: expected a power of two from 8 to 1048576, got 12"),
        ("alignment 2^21", alignment(1 << 21),
            "Invalid", "byte 53: general.alignment: expected a power of two from 8 to 1048576, got 2097152"),
        ("alignment 2^31", alignment(1 << 31),
            "Invalid", "byte 53: general.alignment: expected a power of two from 8 to 1048576, got 2147483648"),
        ("alignment of u64", one("general.alignment", 32u64),
            "ValueType", "key `general.alignment`: expected u32, got u64"),
        ("alignment of an array", one("general.alignment", &vec![32u32]),
            "ValueType", "key `general.alignment`: expected u32, got array of u32"),
        ("alignment beyond the file", empty.clone().entry("general.alignment", 4096u32).tensor("t", &[32]).bytes(),
            "Truncated", "truncated at byte 90: padding before tensor data needs 4006 bytes, 134 remain"),
        // Dimensions.
        ("no dimensions", one_tensor(|t| t.n_dims = Some(0)),
            "Invalid", "byte 33: dimension count of tensor `t`: expected 1 to 4, got 0"),
        ("five dimensions", one_tensor(|t| t.dims = vec![1; 5]),
            "Invalid", "byte 33: dimension count of tensor `t`: expected 1 to 4, got 5"),
        ("2^32 - 1 dimensions", one_tensor(|t| t.n_dims = Some(u32::MAX)),
            "Invalid", "byte 33: dimension count of tensor `t`: expected 1 to 4, got 4294967295"),
        ("2^64 elements", one_tensor(|t| t.dims = vec![1 << 32, 1 << 32]),
            "TensorShape", "tensor `t`: shape [4294967296, 4294967296] of F32: more than 2^63 elements"),
        ("2^63 elements", one_tensor(|t| t.dims = vec![1 << 31, 1 << 31, 2]),
            "TensorShape", "tensor `t`: shape [2147483648, 2147483648, 2] of F32: more than 2^63 elements"),
        ("product wraps to 32", one_tensor(|t| t.dims = vec![1 << 33, 1 << 33, 32]),
            "TensorShape", "tensor `t`: shape [8589934592, 8589934592, 32] of F32: more than 2^63 elements"),
        ("2^64 bytes", one_tensor(|t| t.dims = vec![1 << 62]),
            "TensorShape", "tensor `t`: shape [4611686018427387904] of F32: more than 2^64 bytes"),
        ("half a block of Q8_0", one_tensor(|t| (t.id, t.dims) = (8, vec![16])),
            "TensorShape", "tensor `t`: shape [16] of Q8_0: row length must be a multiple of the block length 32"),
        ("a block and a half of Q4_K", one_tensor(|t| (t.id, t.dims) = (12, vec![384, 2])),
            "TensorShape", "tensor `t`: shape [384, 2] of Q4_K: row length must be a multiple of the block length 256"),
        // Types.
        ("interleaved rows of floats", id(1 << 16),
            "TensorType", "tensor `t`: tensor type 65536 is not known"),
        ("interleaved twice", id(3 << 16 | 2),
            "TensorType", "tensor `t`: tensor type 196610 is not known"),
        ("type 4", id(4),
            "TensorType", "tensor `t`: tensor type 4 is Q4_2, which GGML removed; it was withdrawn in 2023: convert the original model again"),
        ("type 5", id(5),
            "TensorType", "tensor `t`: tensor type 5 is Q4_3, which GGML removed; it was withdrawn in 2023: convert the original model again"),
        ("type 31", id(31),
            "TensorType", "tensor `t`: tensor type 31 is Q4_0_4_4, which GGML removed; it was Q4_0 repacked for one CPU: quantise the original model to Q4_0"),
        ("type 32", id(32),
            "TensorType", "tensor `t`: tensor type 32 is Q4_0_4_8, which GGML removed; it was Q4_0 repacked for one CPU: quantise the original model to Q4_0"),
        ("type 33", id(33),
            "TensorType", "tensor `t`: tensor type 33 is Q4_0_8_8, which GGML removed; it was Q4_0 repacked for one CPU: quantise the original model to Q4_0"),
        ("type 36", id(36),
            "TensorType", "tensor `t`: tensor type 36 is IQ4_NL_4_4, which GGML removed; it was IQ4_NL repacked for one CPU: quantise the original model to IQ4_NL; in BitNet's own files it is I2_S: convert the folder of the original model"),
        ("type 37", id(37),
            "TensorType", "tensor `t`: tensor type 37 is IQ4_NL_4_8, which GGML removed; it was IQ4_NL repacked for one CPU: quantise the original model to IQ4_NL"),
        ("type 38", id(38),
            "TensorType", "tensor `t`: tensor type 38 is IQ4_NL_8_8, which GGML removed; it was IQ4_NL repacked for one CPU: quantise the original model to IQ4_NL"),
        ("type 133", id(133),
            "TensorType", "tensor `t`: tensor type 133 is a format of the fork ik_llama.cpp (Q6_0)"),
        ("type 137", id(137),
            "TensorType", "tensor `t`: tensor type 137 is a format of the fork ik_llama.cpp (IQ2_K)"),
        ("type 144", id(144),
            "TensorType", "tensor `t`: tensor type 144 is a format of the fork ik_llama.cpp (IQ4_KS)"),
        ("type 202", id(202),
            "TensorType", "tensor `t`: tensor type 202 is a format of the fork ik_llama.cpp (row-interleaved)"),
        ("type 999", id(999), "TensorType", "tensor `t`: tensor type 999 is not known"),
        ("type max", id(u32::MAX), "TensorType", "tensor `t`: tensor type 4294967295 is not known"),
        // Names.
        ("name empty", one_tensor(|t| t.name.clear()),
            "Invalid", "byte 24: tensor name: expected at least one byte, got an empty string"),
        ("name of 65 bytes", one_tensor(|t| t.name = vec![b't'; 65]),
            "TooLarge", "byte 24: length of tensor name: expected at most 64, got 65"),
        ("name not UTF-8", one_tensor(|t| t.name = b"\xc3(".to_vec()),
            "Invalid", "byte 24: tensor name: expected UTF-8, got \"\\xc3(\""),
        ("name with a NUL", one_tensor(|t| t.name = b"t\0".to_vec()),
            "Invalid", "byte 24: tensor name: expected text without control characters, got \"t\\0\""),
        ("name twice", empty.clone().tensor("t", &[8]).tensor("t", &[8]).bytes(),
            "DuplicateTensor", "byte 57: tensor `t` appears twice"),
        // Places.
        ("offset not aligned", two_tensors(8),
            "Invalid", "byte 82: offset of tensor `b`: expected a multiple of the alignment, got 8 (alignment 32)"),
        ("offset past the end", two_tensors(1 << 20),
            "TensorRange", "tensor `b`: data at bytes 1048672..1048800, but the file has 352 bytes"),
        ("offset max", two_tensors(u64::MAX),
            "Invalid", "byte 82: offset of tensor `b`: expected a multiple of the alignment, got 18446744073709551615 (alignment 32)"),
        ("offset wraps", two_tensors(u64::MAX - 31),
            "TensorRange", "tensor `b`: data at bytes 18446744073709551615..18446744073709551615, but the file has 352 bytes"),
        ("partly the same bytes", two_tensors(96), "Overlap", "tensors `a` and `b` overlap at byte 192"),
        ("the same bytes", two_tensors(0), "Overlap", "tensors `a` and `b` overlap at byte 96"),
        ("one inside the other", empty.clone().tensor("a", &[8]).last(|t| t.offset = Some(32)).tensor("b", &[32]).last(|t| t.offset = Some(0)).bytes(),
            "Overlap", "tensors `b` and `a` overlap at byte 128"),
        ("data one byte short", one_tensor(|t| t.data.truncate(127)),
            "TensorRange", "tensor `t`: data at bytes 64..192, but the file has 191 bytes"),
        ("no data", one_tensor(|t| t.data.clear()),
            "TensorRange", "tensor `t`: data at bytes 64..192, but the file has 64 bytes"),
    ];
    check(&rows, |bytes| parse(bytes).map(drop));
}

/// Opens a file as an application would: vocabulary, hyper-parameters, program.
fn open(bytes: &[u8]) -> Result<(), Error> {
    let gguf = Gguf::from_source(Source::from_bytes("test", bytes))?;
    let model = Model::from_gguf(gguf)?;
    model.program(ProgramOptions::default(), 256)?;
    Tokenizer::from_gguf(model.gguf()).map(drop)
}

#[test]
fn models_that_do_not_make_sense() {
    let set = |key: &str, value: Value| llama().set(key, value).bytes();
    let shape = |name: &str, dims: &[u64]| llama().without(name).tensor(name, dims).bytes();
    let mixed = |key: &str, v: u32| mixture().set(key, v).bytes();
    #[rustfmt::skip]
    let rows: Vec<Row> = vec![
        ("no architecture", llama().without("general.architecture").bytes(),
            "Gguf", "test: key `general.architecture` is missing"),
        ("architecture of u32", set("general.architecture", 1u32.into()),
            "Gguf", "test: key `general.architecture`: expected string, got u32"),
        ("architecture not UTF-8", set("general.architecture", b"\xffllama"[..].into()),
            "Gguf", "test: byte 64: key `general.architecture`: expected UTF-8, got \"\\xffllama\""),
        ("unknown architecture", set("general.architecture", "mamba3".into()),
            "Architecture", "model: architecture \"mamba3\" is not supported; the nearest ones are mamba2 by name and llama by its tensors (supported: arcee, baichuan, …"),
        ("unknown blocks", llama().set("general.architecture", "arwkv").tensor("blk.0.time_mix_w1.weight", &[8]).tensor("blk.0.indexer.proj.weight", &[8]).bytes(),
            "Architecture", "model: architecture \"arwkv\" is not supported; no supported family has its sparse attention by an indexer and RWKV time mixing; the nearest one is llama (supported: …"),
        ("all blocks draft", set("llama.nextn_predict_layers", 1u32.into()),
            "Model", "model: key `llama.nextn_predict_layers`: expected less than the 1 blocks, got 1"),
        ("one unknown block", llama().set("general.architecture", "mamba3").tensor("blk.0.indexer.proj.weight", &[8]).bytes(),
            "Architecture", "model: architecture \"mamba3\" is not supported; no supported family has its sparse attention by an indexer; the nearest ones are mamba2 by name and llama by its tensors (supported: …"),
        ("block_count missing", llama().without("llama.block_count").bytes(),
            "Gguf", "test: key `llama.block_count` is missing"),
        ("block_count of string", set("llama.block_count", "1".into()),
            "Gguf", "test: key `llama.block_count`: expected an integer, got string"),
        ("block_count of f32", set("llama.block_count", 1f32.into()),
            "Gguf", "test: key `llama.block_count`: expected an integer, got f32"),
        ("block_count of bool", set("llama.block_count", true.into()),
            "Gguf", "test: key `llama.block_count`: expected an integer, got bool"),
        ("block_count negative", set("llama.block_count", (-1i32).into()),
            "Gguf", "test: byte 208: key `llama.block_count`: expected an integer that is not negative, got -1"),
        ("block_count of array", set("llama.block_count", (&vec![1u32]).into()),
            "Gguf", "test: key `llama.block_count`: expected an integer, got array of u32"),
        ("block_count 2^32", set("llama.block_count", (1u64 << 32).into()),
            "Gguf", "test: byte 208: key `llama.block_count`: expected at most 2^32 - 1, got 4294967296"),
        ("block_count 0", set("llama.block_count", 0u32.into()),
            "Model", "model: key `llama.block_count`: expected 1 to 1024, got 0"),
        ("block_count 2000", set("llama.block_count", 2000u32.into()),
            "Model", "model: key `llama.block_count`: expected 1 to 1024, got 2000"),
        ("block_count max", set("llama.block_count", u32::MAX.into()),
            "Model", "model: key `llama.block_count`: expected 1 to 1024, got 4294967295"),
        ("block_count one too many", set("llama.block_count", 2u32.into()),
            "Model", "model: tensor `blk.1.attn_norm.weight` [8] is missing from the file"),
        ("context_length 0", set("llama.context_length", 0u32.into()),
            "Model", "model: key `llama.context_length`: expected 1 to 4294967295, got 0"),
        ("embedding_length 0", set("llama.embedding_length", 0u32.into()),
            "Model", "model: key `llama.embedding_length`: expected 1 to 16777216, got 0"),
        ("embedding_length max", set("llama.embedding_length", u32::MAX.into()),
            "Model", "model: key `llama.embedding_length`: expected 1 to 16777216, got 4294967295"),
        ("feed_forward_length missing", llama().without("llama.feed_forward_length").bytes(),
            "Gguf", "test: key `llama.feed_forward_length` is missing"),
        ("feed_forward_length of two layers", set("llama.feed_forward_length", (&vec![16u32, 16]).into()),
            "Gguf", "test: byte 261: key `llama.feed_forward_length`: expected one value of 0 to 2^32 - 1 for each layer, got 2 × U32 [16, 16]"),
        ("feed_forward_length negative", set("llama.feed_forward_length", (&vec![-16i32]).into()),
            "Gguf", "test: byte 261: key `llama.feed_forward_length`: expected one value of 0 to 2^32 - 1 for each layer, got 1 × I32 [-16]"),
        ("feed_forward_length of strings", set("llama.feed_forward_length", (&vec!["16"]).into()),
            "Gguf", "test: key `llama.feed_forward_length`: expected array of integers, got array of string"),
        ("head_count 0", set("llama.attention.head_count", 0u32.into()),
            "Model", "model: key `llama.attention.head_count`: expected 1 to 16777216, got 0"),
        ("head_count above the row", set("llama.attention.head_count", 16u32.into()),
            "Model", "model: key `llama.attention.head_count`: expected at most the embedding's 8 elements, got 16"),
        ("head_count_kv 0", set("llama.attention.head_count_kv", 0u32.into()),
            "Model", "model: key `llama.attention.head_count_kv`: expected 1 to 16777216, got 0"),
        ("heads and KV heads", set("llama.attention.head_count_kv", 3u32.into()),
            "Model", "model: 2 attention heads are not a multiple of 3 KV heads"),
        ("key_length too large", set("llama.attention.key_length", u32::MAX.into()),
            "Model", "model: key `llama.attention.key_length`: expected 1 to 4096, got 4294967295"),
        ("heads wrap", llama().set("llama.attention.head_count", 1u32 << 20).set("llama.attention.head_count_kv", 1u32 << 20).set("llama.attention.key_length", 1u32 << 12).set("llama.attention.value_length", 4u32).bytes(),
            "Model", "model: 1048576 attention heads of 4096 elements: expected at most 16777216 in all"),
        ("epsilon missing", llama().without("llama.attention.layer_norm_rms_epsilon").bytes(),
            "Model", "model: key `llama.attention.layer_norm_rms_epsilon` is missing"),
        ("epsilon of the other norm", gpt2().without("gpt2.attention.layer_norm_epsilon").entry("gpt2.attention.layer_norm_rms_epsilon", 1e-5f32).bytes(),
            "Model", "model: key `gpt2.attention.layer_norm_epsilon` is missing"),
        ("epsilon negative", set("llama.attention.layer_norm_rms_epsilon", (-1f32).into()),
            "Model", "model: key `llama.attention.layer_norm_rms_epsilon`: expected at least 0, got -1"),
        ("epsilon NaN", set("llama.attention.layer_norm_rms_epsilon", f32::NAN.into()),
            "Gguf", "test: byte 390: key `llama.attention.layer_norm_rms_epsilon`: expected a finite number, got NaN"),
        ("epsilon of f64", set("llama.attention.layer_norm_rms_epsilon", 1e-5f64.into()),
            "Gguf", "test: key `llama.attention.layer_norm_rms_epsilon`: expected f32, got f64"),
        ("rope dimensions odd", set("llama.rope.dimension_count", 3u32.into()),
            "Model", "model: key `llama.rope.dimension_count`: expected an even number up to 4, got 3"),
        ("rope dimensions above a head", set("llama.rope.dimension_count", 6u32.into()),
            "Model", "model: key `llama.rope.dimension_count`: expected an even number up to 4, got 6"),
        ("rope base 0", set("llama.rope.freq_base", 0f32.into()),
            "Model", "model: key `llama.rope.freq_base`: expected a positive number, got 0"),
        ("rope base infinite", set("llama.rope.freq_base", f32::INFINITY.into()),
            "Gguf", "test: byte 975: key `llama.rope.freq_base`: expected a finite number, got inf"),
        ("rope scaling unknown", set("llama.rope.scaling.type", "longer".into()),
            "Model", "model: key `llama.rope.scaling.type`: scaling \"longer\" is not supported (none, linear, yarn, longrope)"),
        ("yarn without factor", set("llama.rope.scaling.type", "yarn".into()),
            "Gguf", "test: key `llama.rope.scaling.factor` is missing"),
        ("yarn with a negative beta", gpt_oss().entry("gpt-oss.rope.scaling.yarn_beta_slow", -1f32).bytes(),
            "Model", "model: key `gpt-oss.rope.scaling.yarn_beta_slow`: expected a positive number, got -1"),
        ("yarn with an attention factor of its own", gpt_oss().entry("gpt-oss.rope.scaling.yarn_attn_factor", 2f32).bytes(),
            "Model", "model: key `gpt-oss.rope.scaling.yarn_attn_factor`: only 1 is supported"),
        ("LongRoPE without factors", set("llama.rope.scaling.type", "longrope".into()),
            "Model", "model: tensor `rope_factors_long.weight` [2] is missing from the file"),
        ("factors of half the pairs", phi3().without("rope_factors_long.weight").tensor("rope_factors_long.weight", &[1]).bytes(),
            "Model", "model: tensor `rope_factors_long.weight`: expected shape [2], got [1]"),
        ("original context 0", phi3().set("phi3.rope.scaling.original_context_length", 0u32).bytes(),
            "Model", "model: key `phi3.rope.scaling.original_context_length`: expected 1 to 4294967295, got 0"),
        ("pooling unknown", set("llama.pooling_type", 5u32.into()),
            "Model", "model: key `llama.pooling_type`: expected 0 (none), 1 (mean), 2 (CLS), 3 (last) or 4 (rank), got 5"),
        ("rank without a head", set("llama.pooling_type", 4u32.into()),
            "Model", "model: tensor `cls.output.weight` [8] is missing from the file"),
        ("the mean before a head that reads one token", llama().entry("llama.pooling_type", 4u32).entry("llama.classifier.pooling_type", 1u32).tensor("cls.output.weight", &[8, 1]).bytes(),
            "Model", "model: key `llama.classifier.pooling_type`: expected 2 (CLS) or 3 (last), got Mean"),
        ("not causal", set("llama.attention.causal", false.into()),
            "Model", "model: key `llama.attention.causal`: only true is supported"),
        ("ALiBi", set("llama.attention.max_alibi_bias", 8f32.into()),
            "Model", "model: key `llama.attention.max_alibi_bias`: only 0 is supported"),
        ("shared experts", mixed("llama.expert_shared_count", 1),
            "Model", "model: key `llama.expert_shared_count`: the file has no shared experts"),
        ("unknown gating", mixed("llama.expert_gating_func", 9),
            "Model", "model: key `llama.expert_gating_func`: expected 0 to 3, got 9"),
        ("pattern of two layers", gemma3().entry("gemma3.attention.sliding_window_pattern", &vec![true, false]).bytes(),
            "Gguf", "test: byte 1105: key `gemma3.attention.sliding_window_pattern`: expected one value of 0 to 2^32 - 1 for each layer, got 2 × Bool [true, false]"),
        ("windows without a size", gpt_oss().without("gpt-oss.attention.sliding_window").bytes(),
            "Model", "model: key `gpt-oss.attention.sliding_window` is missing"),
        ("sinks of one head", gpt_oss().without("blk.0.attn_sinks.weight").tensor("blk.0.attn_sinks.weight", &[1]).bytes(),
            "Model", "model: tensor `blk.0.attn_sinks.weight`: expected shape [2], got [1]"),
        ("one of three biases missing", gpt_oss().without("blk.0.ffn_up_exps.bias").bytes(),
            "Model", "model: tensor `blk.0.ffn_up_exps.bias` [16, 4] is missing from the file"),
        ("norms of queries, not of keys", command_r().tensor("blk.0.attn_q_norm.weight", &[4, 2]).bytes(),
            "Model", "model: tensor `blk.0.attn_k_norm.weight` [4] is missing from the file"),
        ("blocks parallel or not", family("gptneox", llama()).entry("gptneox.attention.layer_norm_epsilon", 1e-5f32).bytes(),
            "Model", "model: key `gptneox.use_parallel_residual` is missing"),
        ("factors of old MiniCPM files missing", family("minicpm", llama()).bytes(),
            "Model", "model: key `minicpm.embedding_scale` is missing"),
        ("logit scale missing", granite().without("granite.logit_scale").bytes(),
            "Model", "model: key `granite.logit_scale` is missing"),
        ("logit scale negative", granite().set("granite.logit_scale", -8f32).bytes(),
            "Model", "model: key `granite.logit_scale`: expected a positive number, got -8"),
        ("fused rows missing", phi3().without("blk.0.attn_qkv.weight").tensor("blk.0.attn_qkv.weight", &[8, 12]).bytes(),
            "Model", "model: tensor `blk.0.attn_qkv.weight`: expected shape [8, 16], got [8, 12]"),
        ("half of a fused bias", phi3().tensor("blk.0.ffn_up.bias", &[16]).bytes(),
            "Model", "model: tensor `blk.0.ffn_up.bias`: expected shape [32], got [16]"),
        ("fewer positions than the context", gpt2().set("gpt2.context_length", 256u32).bytes(),
            "Model", "model: tensor `position_embd.weight`: expected shape [8, 256], got [8, 64]"),
        ("tensor of another family", llama().tensor("blk.0.attn_q_norm.weight", &[4]).bytes(),
            "Model", "model: tensor `blk.0.attn_q_norm.weight` of the file is unknown to the family \"llama\""),
        ("scale of a weight", llama().tensor("blk.0.attn_q.scale", &[2]).bytes(),
            "Model", "model: tensor `blk.0.attn_q.scale`: expected shape [1], got [2]"),
        ("scale of a norm", llama().tensor("blk.0.attn_norm.scale", &[1]).bytes(),
            "Model", "model: tensor `blk.0.attn_norm.scale` of the file is unknown to the family \"llama\""),
        ("experts in every other layer", mixed("llama.interleave_moe_layer_step", 2),
            "Model", "model: key `llama.interleave_moe_layer_step`: only up to 1 is supported"),
        ("rope scaling without factor", set("llama.rope.scaling.type", "linear".into()),
            "Gguf", "test: key `llama.rope.scaling.factor` is missing"),
        ("rope scaling negative", set("llama.rope.scaling.factor", (-2f32).into()),
            "Model", "model: key `llama.rope.scaling.factor`: expected a positive number, got -2"),
        ("experts used above experts", mixed("llama.expert_used_count", 5),
            "Model", "model: 5 experts used of 4: expected 1 to all of at most 1024"),
        ("experts used 0", mixed("llama.expert_used_count", 0),
            "Model", "model: 0 experts used of 4: expected 1 to all of at most 1024"),
        ("experts 2^20", mixed("llama.expert_count", 1 << 20),
            "Model", "model: 2 experts used of 1048576: expected 1 to all of at most 1024"),
        ("experts one too many", mixed("llama.expert_count", 5),
            "Model", "model: tensor `blk.0.ffn_gate_inp.weight`: expected shape [8, 5], got [8, 4]"),
        ("vocab_size 0", set("llama.vocab_size", 0u32.into()),
            "Model", "model: key `llama.vocab_size`: expected 1 to 16777216, got 0"),
        ("vocab_size other than the table", set("llama.vocab_size", 13u32.into()),
            "Model", "model: tensor `token_embd.weight`: expected shape [8, 13], got [8, 12]"),
        ("tensor missing", llama().without("blk.0.attn_q.weight").bytes(),
            "Model", "model: tensor `blk.0.attn_q.weight` [8, 8] is missing from the file"),
        ("table missing", llama().without("token_embd.weight").bytes(),
            "Model", "model: tensor `token_embd.weight` [8, 12] is missing from the file"),
        ("matrix transposed", shape("blk.0.ffn_up.weight", &[16, 8]),
            "Model", "model: tensor `blk.0.ffn_up.weight`: expected shape [8, 16], got [16, 8]"),
        ("norm too long", shape("output_norm.weight", &[16]),
            "Model", "model: tensor `output_norm.weight`: expected shape [8], got [16]"),
        ("matrix as a cube", shape("blk.0.attn_q.weight", &[8, 8, 2]),
            "Model", "model: tensor `blk.0.attn_q.weight`: expected shape [8, 8], got [8, 8, 2]"),
        ("bias too short", llama().tensor("blk.0.attn_q.bias", &[4]).bytes(),
            "Model", "model: tensor `blk.0.attn_q.bias`: expected shape [8], got [4]"),
        ("norm of F16", llama().without("output_norm.weight").tensor_of("output_norm.weight", &[8], 1, vec![0; 16]).bytes(),
            "Program", "program: Norm in segment `output`: weight `output_norm.weight`: expected F32, got F16"),
    ];
    check(&rows, open);
}

#[test]
fn positions_decide_what_a_program_needs() {
    let program = |file: File, positions| {
        let model = Model::from_source(Source::from_bytes("test", &file.bytes()))?;
        model.program(ProgramOptions::default(), positions)
    };
    let factors = |positions| {
        let program = program(phi3(), positions).unwrap();
        ["short", "long"].map(|name| program.find(&format!("rope_factors_{name}.weight")).is_some())
    };
    assert_eq!(factors(4), [true, false]);
    assert_eq!(factors(5), [false, true]);
    assert!(program(gpt2(), 64).is_ok());
    assert_eq!(
        program(gpt2(), 65).unwrap_err().to_string(),
        "model: positions of the KV cache: expected at most the 64 of the position embeddings, got 65"
    );
    let tempered = |original: u32| {
        llama()
            .entry("llama.attention.temperature_scale", 0.1f32)
            .entry("llama.rope.scaling.original_context_length", original)
    };
    assert_eq!(
        program(tempered(1), 1 << 20).unwrap_err().to_string(),
        "model: 1048576 positions, of which each 1 have a factor on scores: expected at most 65536 factors"
    );
    let grows = |positions| {
        let program = program(tempered(32), positions).unwrap();
        program.ops().any(|(_, op)| matches!(op, halite::program::Op::Attend { growth: Some(_), .. }))
    };
    assert!(!grows(32) && grows(33));
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
    let charsmap = |value: Value| unigram().set("tokenizer.ggml.precompiled_charsmap", value).bytes();
    let merge = |text: &'static str| set_bpe("merges", (&vec!["a b", text]).into());
    let mut scores = vec![0f32; 12];
    scores[3] = f32::NAN;
    #[rustfmt::skip]
    let rows: Vec<Row> = vec![
        ("model of u32", set("model", 1u32.into()),
            "Gguf", "test: key `tokenizer.ggml.model`: expected string, got u32"),
        ("unknown model", set("model", "wordpiece\x1b[2J".into()),
            "Tokenizer", "tokenizer: tokenizer model \"wordpiece\\u{1b}[2J\" is not supported (llama, gpt2, gemma4, bert, t5, plamo2, none)"),
        ("WordPiece without an unknown token", wordpiece().without("tokenizer.ggml.unknown_token_id").bytes(),
            "Tokenizer", "tokenizer: unknown_token_id is missing"),
        ("lowercase of u32", wordpiece().set("tokenizer.ggml.normalizer.lowercase", 1u32).bytes(),
            "Gguf", "test: key `tokenizer.ggml.normalizer.lowercase`: expected bool, got u32"),
        ("charsmap of u32", charsmap((&vec![0u32; 8]).into()),
            "Gguf", "test: key `tokenizer.ggml.precompiled_charsmap`: expected array of bytes, got array of u32"),
        ("charsmap of 3 bytes", charsmap((&vec![0u8; 3]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.precompiled_charsmap: expected a size of 4 bytes"),
        ("charsmap longer than it is", charsmap((&vec![255u8; 8]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.precompiled_charsmap: the array does not end inside"),
        ("charsmap of half a unit", charsmap((&vec![2u8, 0, 0, 0, 0, 0, 0]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.precompiled_charsmap: expected units of 4 bytes"),
        ("charsmap with texts that are no UTF-8", charsmap((&vec![0u8, 0, 0, 0, 255, 0]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.precompiled_charsmap: expected texts in UTF-8"),
        ("charsmap with a value outside", charsmap((&vec![4u8, 0, 0, 0, 0, 1, 0, 64, b'a', 0]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.precompiled_charsmap: unit 0 does not lead to a text of at most 64 bytes"),
        ("charsmap with a text without end", charsmap((&vec![8u8, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 128, b'a']).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.precompiled_charsmap: unit 0 does not lead to a text of at most 64 bytes"),
        ("tokens missing", llama().without("tokenizer.ggml.tokens").bytes(),
            "Tokenizer", "tokenizer: tokenizer.ggml.tokens is missing"),
        ("tokens empty", set("tokens", array(8, 0, &[])), "Tokenizer", "tokenizer: tokenizer.ggml.tokens: expected 1 to 4194304 tokens, got 0"),
        ("2^22 + 1 tokens", set("tokens", array(8, (1 << 22) + 1, &[0; 8 * ((1 << 22) + 1)])),
            "Tokenizer", "tokenizer: tokenizer.ggml.tokens: expected 1 to 4194304 tokens, got 4194305"),
        ("tokens of u32", set("tokens", (&vec![1u32]).into()),
            "Gguf", "test: key `tokenizer.ggml.tokens`: expected array of string, got array of u32"),
        ("more tokens than rows", set("tokens", (&vec!["a"; 13]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.tokens: expected at most 12, the embedding's rows, got 13"),
        ("scores one short", set("scores", (&vec![0f32; 11]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.scores: expected 12 values, one per token, got 11"),
        ("scores one too many", set("scores", (&vec![0i32; 13]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.scores: expected 12 values, one per token, got 13"),
        ("scores of strings", set("scores", (&vec![""; 12]).into()),
            "Gguf", "test: key `tokenizer.ggml.scores`: expected array of numbers, got array of string"),
        ("scores NaN", set("scores", (&scores).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.scores: expected numbers, got NaN"),
        ("types one short", set("token_type", (&vec![1i32; 11]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.token_type: expected 12 values, one per token, got 11"),
        ("types of f32", set("token_type", (&vec![1f32; 12]).into()),
            "Gguf", "test: key `tokenizer.ggml.token_type`: expected array of integers, got array of f32"),
        ("type 0", set("token_type", (&vec![0i32; 12]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.token_type[0]: expected 1 to 6, got 0"),
        ("type 7", set("token_type", (&vec![7i32; 12]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.token_type[0]: expected 1 to 6, got 7"),
        ("type negative", set("token_type", (&vec![-1i32; 12]).into()),
            "Tokenizer", "tokenizer: tokenizer.ggml.token_type[0]: expected 1 to 6, got -1"),
        ("eos negative", set("eos_token_id", (-1i32).into()),
            "Gguf", "test: byte 939: key `tokenizer.ggml.eos_token_id`: expected an integer that is not negative, got -1"),
        ("add_bos of u8", set("add_bos_token", 1u8.into()),
            "Gguf", "test: key `tokenizer.ggml.add_bos_token`: expected bool, got u8"),
        ("byte token -1", byte_token("<0x-1>"),
            "Tokenizer", "tokenizer: byte token: expected <0x00> to <0xFF>, got \"<0x-1>\""),
        ("byte token +1", byte_token("<0x+1>"),
            "Tokenizer", "tokenizer: byte token: expected <0x00> to <0xFF>, got \"<0x+1>\""),
        ("byte token of one digit", byte_token("<0x1>"),
            "Tokenizer", "tokenizer: byte token: expected <0x00> to <0xFF>, got \"<0x1>\""),
        ("byte token of three digits", byte_token("<0x100>"),
            "Tokenizer", "tokenizer: byte token: expected <0x00> to <0xFF>, got \"<0x100>\""),
        ("byte token empty", byte_token(""),
            "Tokenizer", "tokenizer: byte token: expected <0x00> to <0xFF>, got \"\""),
        ("pre-tokenizer unknown", set_bpe("pre", "klingon".into()),
            "Tokenizer", "tokenizer: pre-tokenizer \"klingon\" is not supported (default, …"),
        ("pre-tokenizer of u32", set_bpe("pre", 1u32.into()),
            "Gguf", "test: key `tokenizer.ggml.pre`: expected string, got u32"),
        ("merges missing", bpe().without("tokenizer.ggml.merges").bytes(),
            "Tokenizer", "tokenizer: tokenizer.ggml.merges is missing"),
        ("merges of u32", set_bpe("merges", (&vec![1u32]).into()),
            "Gguf", "test: key `tokenizer.ggml.merges`: expected array of string, got array of u32"),
        ("merge of one part", merge("ab"),
            "Tokenizer", "tokenizer: tokenizer.ggml.merges[1] = \"ab\": expected two parts"),
        ("merge empty", merge(""), "Tokenizer", "tokenizer: tokenizer.ggml.merges[1] = \"\": expected two parts"),
        ("merge with nothing on the right", merge("a "),
            "Tokenizer", "tokenizer: tokenizer.ggml.merges[1] = \"a \": expected two parts"),
        ("merge of an unknown part", merge("a c"),
            "Tokenizer", "tokenizer: tokenizer.ggml.merges[1] = \"a c\": a part is not in the vocabulary"),
        ("merge of an unknown character", merge("\u{120} \u{121}"),
            "Tokenizer", "tokenizer: tokenizer.ggml.merges[1] = \"\u{120} \u{121}\": a part is not in the vocabulary"),
        ("merge into an unknown token", merge("b a"),
            "Tokenizer", "tokenizer: tokenizer.ggml.merges[1] = \"b a\": a part is not in the vocabulary"),
    ];
    check(&rows, vocabulary);
}

#[test]
fn truncated_anywhere() {
    let file = llama();
    let whole = file.bytes();
    let header = parse(&whole).unwrap();
    let last = header.tensors.iter().map(|t| t.bytes.end).max().unwrap();
    assert_eq!(last, whole.len());
    for len in 0..whole.len() {
        let part = &whole[..len];
        assert!(parse(part).is_err(), "the first {len} of {} bytes were accepted", whole.len());
        exercise::model(part);
    }
    // Padding after the last tensor may be there or not.
    let padded = [&whole[..], &[0; 31]].concat();
    assert_eq!(parse(&padded).unwrap(), header);
}

#[test]
fn versions_2_and_3_are_alike() {
    for file in [
        llama(),
        mixture(),
        gemma3(),
        phi3(),
        gpt2(),
        gpt_oss(),
        windowed(),
        bpe(),
        wordpiece(),
        unigram(),
        every_type(),
        File::new(),
    ] {
        let three = parse(&file.bytes()).unwrap();
        let mut two = parse(&File { version: 2, ..file }.bytes()).unwrap();
        assert_eq!((two.version, three.version), (2, 3));
        two.version = 3;
        assert_eq!(two, three);
    }
}

#[test]
fn alignments_and_orders() {
    for alignment in [8usize, 16, 32, 64, 4096, 1 << 20] {
        let file = File { alignment, ..llama() }.entry("general.alignment", alignment as u32);
        let bytes = file.bytes();
        let header = parse(&bytes).unwrap();
        assert_eq!(header.alignment, alignment as u64);
        for (record, tensor) in header.tensors.iter().zip(&file.tensors) {
            assert_eq!(record.bytes.start % alignment, 0);
            assert_eq!(bytes[record.bytes.clone()], tensor.data);
        }
    }
    // Data in any order are found where the records say: here in reverse.
    let mut file = File::new().tensor("a", &[8]).tensor("b", &[16]).tensor("c", &[24]);
    for (tensor, offset) in file.tensors.iter_mut().zip([160, 96, 0]) {
        tensor.offset = Some(offset);
    }
    let header = parse(&file.bytes()).unwrap();
    let starts: Vec<_> = header.tensors.iter().map(|t| t.bytes.start - header.data_start).collect();
    assert_eq!(starts, [160, 96, 0]);
}

#[test]
fn typed_values() {
    let gguf = Gguf::from_source(Source::from_bytes("test", &every_type().bytes())).unwrap();
    let u64s: Vec<_> = ["u8", "u16", "u32", "u64"].map(|key| gguf.optional_u64(key).unwrap().unwrap()).into();
    assert_eq!(u64s, [200, 60_000, 4_000_000_000, u64::MAX]);
    assert_eq!(gguf.u32("u32").unwrap(), 4_000_000_000);
    assert_eq!(gguf.f32("f32").unwrap(), 1.5);
    assert_eq!(gguf.optional_bool("bool").unwrap(), Some(true));
    assert_eq!(gguf.str("string").unwrap(), "text");
    let texts: Vec<_> = gguf.optional_strings("strings").unwrap().unwrap().iter().collect();
    assert_eq!(texts, [&b""[..], b"two"]);
    let integers = |key| gguf.optional_integers(key).unwrap().unwrap().collect::<Vec<i128>>();
    assert_eq!(integers("u8s"), [1, 255]);
    assert_eq!(integers("i8s"), [-1, 1]);
    assert_eq!(integers("u16s"), [1, 2, 3]);
    assert_eq!(integers("i16s"), [-1]);
    assert_eq!(integers("u32s"), [7, 8]);
    assert_eq!(integers("i32s"), [-7, 8]);
    assert_eq!(integers("u64s"), [u64::MAX.into()]);
    assert_eq!(integers("i64s"), [i64::MIN.into()]);
    assert_eq!(integers("bools"), [1, 0]);
    assert_eq!(integers("empty"), []);
    assert_eq!(gguf.optional_f32s("f32s").unwrap().unwrap(), [0.5, -0.5]);
    assert_eq!(gguf.optional_f32s("i8s").unwrap().unwrap(), [-1.0, 1.0]);
    assert_eq!(gguf.optional_u32_per_layer("u16s", 3).unwrap().unwrap(), [1, 2, 3]);
    assert_eq!(gguf.optional_u32_per_layer("u8", 2).unwrap().unwrap(), [200, 200]);

    // Every getter refuses every key that it does not name here, and says what it found instead.
    let unsigned = ["u8", "u16", "u32", "u64"];
    let arrays = ["u8s", "i8s", "u16s", "i16s", "u32s", "i32s", "u64s", "i64s", "bools", "empty"];
    for (key, value) in gguf.metadata() {
        let key = key.as_str();
        let is = |result: Result<bool, Error>, good: bool| match result {
            Ok(found) => assert!(found && good, "`{key}` was read as another type"),
            Err(Error::Gguf { source: GgufError::ValueType { got, .. }, .. }) => {
                assert!(!good && got == value.describe(), "`{key}`: got {got}");
            }
            Err(Error::Gguf { source: GgufError::Invalid { .. }, .. }) => {
                assert!(key.starts_with('i') && !good)
            }
            Err(e) => panic!("`{key}`: {e}"),
        };
        is(gguf.optional_u64(key).map(|v| v.is_some()), unsigned.contains(&key));
        is(gguf.optional_f32(key).map(|v| v.is_some()), key == "f32");
        is(gguf.optional_bool(key).map(|v| v.is_some()), key == "bool");
        is(gguf.optional_str(key).map(|v| v.is_some()), key == "string");
        is(gguf.optional_strings(key).map(|v| v.is_some()), key == "strings");
        is(gguf.optional_integers(key).map(|v| v.is_some()), arrays.contains(&key));
        is(gguf.optional_f32s(key).map(|v| v.is_some()), arrays.contains(&key) || key == "f32s");
        assert!(!gguf.display_value(value).is_empty());
    }
    assert!(gguf.optional_u64("absent").unwrap().is_none());
    assert!(gguf.optional_str("absent").unwrap().is_none());
    let missing = gguf.u32("absent").unwrap_err();
    assert!(matches!(missing, Error::Gguf { source: GgufError::MissingKey { .. }, .. }), "{missing}");
    let wide = gguf.optional_u32("u64").unwrap_err().to_string();
    assert_eq!(wide, "test: byte 207: key `u64`: expected at most 2^32 - 1, got 18446744073709551615");
}

#[test]
fn tokens_that_are_no_text() {
    // Half a character as a token of its own must not cut the character in two, and one text may be several tokens.
    let texts: Vec<&[u8]> = vec![b"<unk>", b"\xa9", b"\xc3", b"<x>", b"<x>", b""];
    let file = File::new()
        .entry("tokenizer.ggml.model", "llama")
        .entry("tokenizer.ggml.tokens", &texts)
        .entry("tokenizer.ggml.token_type", &vec![2i32, 4, 3, 4, 4, 4])
        .entry("tokenizer.ggml.add_space_prefix", false);
    let gguf = Gguf::from_source(Source::from_bytes("test", &file.bytes())).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap().unwrap();
    let options = EncodeOptions::default().add_special(false).parse_special(true);
    assert_eq!(tokenizer.encode("\u{e9}<x>", options), [2, 1, 3]);
    assert_eq!(tokenizer.decode(&[2, 1, 3], true), "\u{e9}<x>");
}

/// A folder that is removed at the end of the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("halite-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Three files of one llama, as they stand on disk.
fn three_parts() -> [File; 3] {
    let mut first = llama();
    let mut others = first.tensors.split_off(4);
    let last = others.split_off(4);
    let part = |no: u16, file: File| file.entry("split.no", no).entry("split.count", 3u16);
    let total = llama().tensors.len() as i32;
    [
        part(0, first).entry("split.tensors.count", total),
        part(1, File { tensors: others, ..File::new() }),
        part(2, File { tensors: last, ..File::new() }),
    ]
}

#[test]
fn split_models() {
    let folder = Folder::new("split");
    let name = |no: usize| format!("tiny-0000{no}-of-00003.gguf");
    let write = |parts: &[File; 3]| -> PathBuf {
        for (i, part) in parts.iter().enumerate() {
            folder.write(&name(i + 1), &part.bytes());
        }
        folder.0.join(name(1))
    };
    // The message without the path in front of it.
    let refused = |path: &Path| match Gguf::open(path).unwrap_err() {
        Error::Gguf { source: GgufError::Split(message), .. } => {
            message.replace(&*folder.0.to_string_lossy(), "")
        }
        e => panic!("{e}"),
    };

    let first = write(&three_parts());
    let model = Model::open(&first).unwrap();
    assert!(model.program(ProgramOptions::default(), 256).is_ok());
    assert_eq!(model.gguf().parts().count(), 3);
    let whole = Gguf::from_source(Source::from_bytes("whole", &llama().bytes())).unwrap();
    for (part, whole) in model.gguf().tensors().zip(whole.tensors()) {
        assert_eq!(part.record.name, whole.record.name);
        assert_eq!(part.region().unwrap().mapped().unwrap(), whole.region().unwrap().mapped().unwrap());
    }
    model.gguf().verify().unwrap();

    assert_eq!(refused(&folder.0.join(name(2))), "this is file 2 of 3; open the first one");
    let renamed = folder.write("renamed.gguf", &three_parts()[0].bytes());
    let message = "the file name must end in -00001-of-00003.gguf to find its siblings";
    assert_eq!(refused(&renamed), message);

    let changed = |part: usize, change: &dyn Fn(File) -> File| {
        let mut parts = three_parts();
        parts[part] = change(parts[part].clone());
        refused(&write(&parts))
    };
    assert_eq!(
        changed(1, &|f| f.set("split.no", 2u16)),
        "/tiny-00002-of-00003.gguf: expected split.no 1 of 3, got 2 of 3"
    );
    assert_eq!(
        changed(2, &|f| f.set("split.count", 4u16)),
        "/tiny-00003-of-00003.gguf: expected split.no 2 of 3, got 2 of 4"
    );
    assert_eq!(
        changed(2, &|f| f.without("split.no").without("split.count")),
        "/tiny-00003-of-00003.gguf: expected split.no 2 of 3, got none of none"
    );
    assert_eq!(
        changed(0, &|f| f.set("split.tensors.count", 12i32)),
        "split.tensors.count: expected 12 tensors in all files, got 11"
    );
    assert_eq!(
        changed(2, &|f| f.tensor("token_embd.weight", &[8])),
        "tensor `token_embd.weight` is in two files"
    );
    assert_eq!(
        changed(0, &|f| f.set("split.count", u64::MAX)),
        format!("split.count: expected at most 1024, got {}", u64::MAX)
    );

    let first = write(&three_parts());
    folder.write(&name(3), b"GGUF");
    let broken = Gguf::open(&first).unwrap_err();
    assert!(matches!(&broken, Error::Gguf { source: GgufError::Truncated { .. }, .. }), "{broken}");
    std::fs::remove_file(folder.0.join(name(3))).unwrap();
    let missing = Gguf::open(&first).unwrap_err();
    assert!(matches!(&missing, Error::Io { path, .. } if path.ends_with(name(3))), "{missing}");
}

/// A packed file is one file: it claims no others, and keeps what it does not know.
#[test]
fn a_split_model_is_packed_as_one_file() {
    let folder = Folder::new("pack");
    for (i, part) in three_parts().iter().enumerate() {
        let part = part.clone().entry("split.by", "rows");
        folder.write(&format!("tiny-0000{}-of-00003.gguf", i + 1), &part.bytes());
    }
    let single = llama().entry("split.count", 1u16).entry("split.no", 0u16).entry("split.by", "rows");
    let single = folder.write("single.gguf", &single.bytes());
    for path in [folder.0.join("tiny-00001-of-00003.gguf"), single] {
        let mut packed = Vec::new();
        halite::pack::pack(&Gguf::open(&path).unwrap(), &mut packed, &mut |_| {}).unwrap();
        let packed = Model::open(folder.write("packed.gguf", &packed)).unwrap();
        assert!(packed.program(ProgramOptions::default(), 256).is_ok());
        let keys = packed.gguf().metadata().iter().map(|(key, _)| key.as_str());
        assert_eq!(keys.filter(|key| key.starts_with("split.")).collect::<Vec<_>>(), ["split.by"]);
        assert_eq!(packed.gguf().tensors().count(), 11);
    }
}

/// llama.cpp writes such tensors, and reads them.
#[test]
fn tensors_without_elements_are_left_out() {
    for dims in [&[0][..], &[0, 0], &[32, 0], &[0, 32, 7], &[1 << 40, 1 << 40, 0]] {
        let file = llama().tensor("unused.weight", &[1]).last(|t| {
            t.dims = dims.to_vec();
            t.data.clear();
            // Inside another tensor.
            t.offset = Some(32);
        });
        let file = file.tensor_of("also.weight", &[0], 0, Vec::new());
        let model = Model::from_source(Source::from_bytes("empty", &file.bytes())).unwrap();
        assert!(model.program(ProgramOptions::default(), 64).is_ok(), "{dims:?}");
        assert_eq!(model.warnings(), ["tensor `unused.weight` and 1 others: ignored, has no elements"]);
        assert!(exercise::model(&file.bytes()));
    }
    let model = |file: File| Model::from_source(Source::from_bytes("empty", &file.bytes())).unwrap();
    assert_eq!(model(llama()).warnings(), [""; 0]);
    let needed = model(llama().last(|t| t.dims = vec![16, 0]));
    let error = needed.program(ProgramOptions::default(), 64).unwrap_err().to_string();
    assert!(error.contains("ffn_down"), "{error}");
    let part = |i: usize| match i {
        2 => three_parts()[2].clone().tensor_of("unused.weight", &[0], 0, Vec::new()),
        _ => three_parts()[i].clone(),
    };
    let folder = Folder::new("empty-split");
    for i in 0..3 {
        let part = if i == 0 { part(i).set("split.tensors.count", 12i32) } else { part(i) };
        folder.write(&format!("tiny-0000{}-of-00003.gguf", i + 1), &part.bytes());
    }
    assert!(Gguf::open(&folder.0.join("tiny-00001-of-00003.gguf")).is_ok());
}

/// What is odd about a vocabulary, but not so odd that nothing can be done with it.
#[test]
fn odd_vocabularies_are_used_with_a_warning() {
    let read = |file: File| {
        Tokenizer::from_gguf(&Gguf::from_source(Source::from_bytes("odd", &file.bytes())).unwrap())
            .unwrap()
            .unwrap()
    };
    for file in [llama(), bpe(), wordpiece(), unigram()] {
        assert_eq!(read(file).warnings(), [""; 0]);
    }
    let id = |name: &str, id: u32| read(llama().set(&format!("tokenizer.ggml.{name}_token_id"), id));
    assert_eq!(id("bos", 12).warnings(), ["bos_token_id: expected below 12, got 12: 1 is used instead"]);
    assert_eq!(id("bos", 12).bos(), Some(1));
    assert_eq!(id("eos", u32::MAX).eos(), Some(2));
    assert_eq!(id("eot", 99).warnings(), ["eot_token_id: expected below 12, got 99: none is used instead"]);
    assert_eq!(id("unknown", 99).warnings().len(), 1);
    let t = read(wordpiece().set("tokenizer.ggml.seperator_token_id", 9u32));
    assert_eq!((t.eos(), t.warnings().len()), (None, 1));

    let t = read(bpe().without("tokenizer.ggml.pre"));
    assert!(t.warnings()[0].starts_with("tokenizer.ggml.pre is missing"), "{:?}", t.warnings());

    // Published files of Gemma 3 call the ends of turns normal tokens.
    for text in
        ["<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|eom_id|>", "<|return|>"]
    {
        let mut tokens =
            vec!["<unk>", "<s>", "</s>", "<0x0A>", "<0x41>", "\u{2581}", "a", "b", "ab", "\u{2581}a"];
        tokens.extend([text, "</i>"]);
        let t = read(
            llama()
                .set("tokenizer.ggml.tokens", &tokens)
                .set("tokenizer.ggml.token_type", &vec![2i32, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1, 1]),
        );
        assert_eq!(t.kind(10), Some(halite::tokenizer::TokenKind::Control), "{text}");
        assert!(t.is_end(10), "{text}");
        let ids = t.encode(text, EncodeOptions::default().add_special(false).parse_special(true));
        assert_eq!(ids, [10], "{text}");
        assert_ne!(t.encode(text, EncodeOptions::default().add_special(false)), [10]);
        assert!(t.warnings().len() == 1 && t.warnings()[0].contains(text), "{:?}", t.warnings());
    }
}

#[test]
fn paths_that_are_no_model() {
    let folder = Folder::new("paths");
    let empty = folder.write("empty.gguf", b"");
    let message =
        |path: &Path| Gguf::open(path).unwrap_err().to_string().replace(&*folder.0.to_string_lossy(), "");
    assert_eq!(message(&empty), "/empty.gguf: not a GGUF file: expected magic 47 47 55 46, got []");
    assert!(matches!(Gguf::open(&folder.0), Err(Error::Io { .. })));
    #[cfg(unix)]
    assert_eq!(message(&folder.0), ": not a regular file");
    assert!(matches!(Gguf::open(&folder.0.join("absent.gguf")), Err(Error::Io { .. })));
    // Opening a pipe waits for its other end; reading a device may never end.
    #[cfg(unix)]
    {
        let pipe = folder.0.join("pipe.gguf");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(message(&pipe), "/pipe.gguf: not a regular file");
        assert_eq!(message(Path::new("/dev/zero")), "/dev/zero: not a regular file");
        assert!(halite::map::read(&pipe, 1).is_err());
    }
    let small = folder.write("small", b"abc");
    assert_eq!(halite::map::read(&small, 3).unwrap(), b"abc");
    let error = halite::map::read(&small, 2).unwrap_err().to_string();
    assert!(error.ends_with("expected at most 2 bytes, got more"), "{error}");
}

#[test]
fn files_that_change_after_opening() {
    // Windows does not let a mapped file be truncated.
    if cfg!(windows) {
        return;
    }
    let folder = Folder::new("changed");
    let bytes = llama().bytes();
    let opened = |name: &str| {
        let path = folder.write(name, &bytes);
        let source = Source::open(&path).unwrap();
        source.verify().unwrap();
        let gguf = Gguf::from_source(source.clone()).unwrap();
        gguf.verify().unwrap();
        // Modification times are as coarse as the system's clock.
        std::thread::sleep(Duration::from_millis(50));
        (path, source, gguf)
    };
    let changed = |source: &Source, gguf: &Gguf, detail: &str| {
        for result in [source.verify(), gguf.verify()] {
            match result {
                Err(Error::FileChanged { detail: found, .. }) => assert_eq!(found, detail),
                other => panic!("{other:?}"),
            }
        }
    };
    let (path, source, gguf) = opened("truncated.gguf");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    changed(&source, &gguf, &format!("it had {} bytes, it has 100", bytes.len()));

    let (path, source, gguf) = opened("rewritten.gguf");
    std::fs::write(&path, &bytes).unwrap();
    changed(&source, &gguf, "it was written to");

    // As `rsync --inplace --times` writes.
    #[cfg(unix)]
    {
        let (path, source, gguf) = opened("restored.gguf");
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        std::io::Write::write_all(&mut &file, &bytes).unwrap();
        file.set_modified(modified).unwrap();
        changed(&source, &gguf, "it was written to, and its time stamp set back");
    }

    // Other names and rights are no other bytes.
    let (path, source, _) = opened("links.gguf");
    std::fs::hard_link(&path, folder.0.join("linked.gguf")).unwrap();
    source.verify().unwrap();
    std::fs::rename(&path, folder.0.join("renamed.gguf")).unwrap();
    source.verify().unwrap();
    let mut rights = std::fs::metadata(folder.0.join("renamed.gguf")).unwrap().permissions();
    rights.set_readonly(true);
    std::fs::set_permissions(folder.0.join("renamed.gguf"), rights).unwrap();
    source.verify().unwrap();

    // A file put in its place leaves the mapped one as it was.
    let (path, source, gguf) = opened("replaced.gguf");
    std::fs::rename(folder.write("new.gguf", b"new"), &path).unwrap();
    source.verify().unwrap();
    gguf.verify().unwrap();
}

/// Flips one to four of a file's first `within` bytes at a time, and gives `f` each of `times` such files: none may panic.
fn mutate(mut file: Vec<u8>, within: usize, times: usize, seed: u64, f: fn(&[u8]) -> bool) {
    let mut random = SplitMix(seed);
    let mut accepted = 0;
    for _ in 0..times {
        let mut undo = Vec::new();
        for _ in 0..1 + random.below(4) {
            let at = random.below(within);
            undo.push((at, file[at]));
            file[at] = match random.below(4) {
                0 => [0, 1, 2, 32, 127, 128, 255][random.below(7)],
                1 => file[at] ^ (1 << random.below(8)),
                2 => file[at].wrapping_add(1),
                _ => random.below(256) as u8,
            };
        }
        accepted += usize::from(f(&file));
        for (at, byte) in undo.into_iter().rev() {
            file[at] = byte;
        }
    }
    // Some changes are harmless, others are not.
    assert!(accepted > 0 && accepted < times, "{accepted} of {times} mutants were accepted");
}

#[test]
fn mutants_of_small_files() {
    for (seed, file) in [llama(), mixture(), gemma3(), phi3(), gpt2(), gpt_oss()].into_iter().enumerate() {
        let bytes = file.bytes();
        let header_bytes = parse(&bytes).unwrap().data_start;
        mutate(bytes, header_bytes, 5000, seed as u64, exercise::model);
    }
}

#[test]
fn mutants_of_a_real_file() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/austen/halite-austen.gguf");
    let bytes = std::fs::read(path).unwrap();
    let header_bytes = parse(&bytes).unwrap().data_start;
    mutate(bytes, header_bytes, 2000, 7, exercise::model);
}

/// Weights may be any numbers, infinities and NaN among them.
#[test]
fn mutants_that_run() {
    for (seed, file) in [llama(), mixture(), gemma3(), phi3(), gpt2(), gpt_oss()].into_iter().enumerate() {
        let bytes = file.bytes();
        let len = bytes.len();
        mutate(bytes, len, 1000, seed as u64, exercise::run);
    }
}

fn seed_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds")
}

/// Writes the first seeds of the fuzz targets.
#[test]
#[ignore = "writes into the source tree"]
fn write_fuzz_seeds() {
    let files = [
        ("llama", llama()),
        ("mixture", mixture()),
        ("gemma3", gemma3()),
        ("phi3", phi3()),
        ("gpt2", gpt2()),
        ("gpt-oss", gpt_oss()),
        ("bpe", bpe()),
        ("wordpiece", wordpiece()),
        ("unigram", unigram()),
        ("every-type", every_type()),
        ("empty", File::new()),
    ];
    for (name, file) in files {
        std::fs::write(seed_dir().join(name).with_extension("gguf"), file.bytes()).unwrap();
    }
}

#[test]
fn fuzz_seeds() {
    assert!(exercise::model(&llama().bytes()));
    assert!(exercise::model(&mixture().bytes()));
    assert!(exercise::model(&gemma3().bytes()));
    assert!(exercise::model(&phi3().bytes()));
    assert!(exercise::model(&gpt2().bytes()));
    assert!(exercise::model(&gpt_oss().bytes()));
    assert!(exercise::model(&granite().bytes()));
    let mut seeds = 0;
    for entry in std::fs::read_dir(seed_dir()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        exercise::header(&bytes);
        exercise::model(&bytes);
        seeds += 1;
    }
    assert!(seeds >= 5, "{seeds} seeds");
}
