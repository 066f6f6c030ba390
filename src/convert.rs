//! Folders of safetensors, as models are published in, to GGUF: config.json, model.safetensors and a vocabulary become one file
//! under the names that llama.cpp's converter gives. BERT-style encoders so far.

use std::io::{self, Write};
use std::path::Path;

use halite_kernels::formats::Format;
use halite_kernels::math;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::gguf::write::Writer;
use crate::map::Source;

/// Alignment of tensor data: a cache line.
const ALIGNMENT: u32 = 64;

/// Names in the folder, and in GGUF files. Each stands for a weight, a bias or both.
const BERT: &[(&str, &str)] = &[
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("embeddings.LayerNorm", "token_embd_norm"),
    ("encoder.layer.{}.attention.self.query", "blk.{}.attn_q"),
    ("encoder.layer.{}.attention.self.key", "blk.{}.attn_k"),
    ("encoder.layer.{}.attention.self.value", "blk.{}.attn_v"),
    ("encoder.layer.{}.attention.output.dense", "blk.{}.attn_output"),
    ("encoder.layer.{}.attention.output.LayerNorm", "blk.{}.attn_output_norm"),
    ("encoder.layer.{}.intermediate.dense", "blk.{}.ffn_up"),
    ("encoder.layer.{}.output.dense", "blk.{}.ffn_down"),
    ("encoder.layer.{}.output.LayerNorm", "blk.{}.layer_output_norm"),
];

/// What embeddings do not need: heads of the pre-training, and positions written out.
const BERT_UNUSED: &[&str] = &["pooler.", "cls.", "embeddings.position_ids"];

/// Matrices that stay F32: they are small, and read a row at a time.
const PLAIN: &[&str] = &["position_embd.weight", "token_types.weight"];

/// Special tokens of WordPiece: their key in the file, their key in the folder, and their usual text.
const SPECIAL: &[(&str, &str, &str)] = &[
    ("unknown", "unk_token", "[UNK]"),
    ("seperator", "sep_token", "[SEP]"),
    ("padding", "pad_token", "[PAD]"),
    ("cls", "cls_token", "[CLS]"),
    ("mask", "mask_token", "[MASK]"),
];

/// Writes the model of a folder as GGUF, with matrices in `format`. `progress` is told the bytes of each tensor done.
///
/// # Errors
/// [`Error::Io`] for what cannot be read (of `out` without a path), [`Error::Model`] for a family, an option, a tensor or a
/// vocabulary that is not known, or a format that has no quantiser or whose blocks do not fit.
pub fn convert(
    folder: &Path,
    format: Format,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let config = Json::open(folder, "config.json")?;
    let family = config.str("model_type")?;
    if family != "bert" {
        return Err(config.wrong("model_type", "bert", family));
    }
    let mut writer = Writer::new(ALIGNMENT)?;
    bert(folder, &config, &mut writer)?;

    let source = Source::open(&folder.join("model.safetensors"))?;
    let wrong =
        |message: String| Error::Model(format!("{}: {message}", folder.join("model.safetensors").display()));
    let tensors = SafeTensors::deserialize(source.bytes()).map_err(|e| wrong(e.to_string()))?;
    let mut sources = Vec::new();
    for (name, view) in tensors.iter() {
        let short = name.strip_prefix("bert.").unwrap_or(name);
        if BERT_UNUSED.iter().any(|unused| short.starts_with(unused)) {
            continue;
        }
        let new =
            gguf_name(short).ok_or_else(|| wrong(format!("tensor `{name}` is unknown to the family")))?;
        sources.push((new, view));
    }
    sources.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, view) in &sources {
        let dims: Vec<u64> = view.shape().iter().rev().map(|&n| n as u64).collect();
        let plain = dims.len() < 2 || PLAIN.contains(&name.as_str());
        writer.tensor(name, &dims, if plain { Format::F32 } else { format })?;
    }
    let mut sources = sources.iter();
    let mut failure = None;
    let written = writer.write(out, &mut |new, out| {
        let (_, view) = sources.next().ok_or(io::ErrorKind::NotFound)?;
        progress(new.bytes);
        let cols = new.dims.first().copied().unwrap_or(1) as usize;
        write_rows(view, cols, new.format, out).map_err(|error| match error {
            Error::Io { source, .. } => source,
            error => {
                failure = Some(Error::Model(format!("tensor `{}`: {error}", new.name)));
                io::ErrorKind::InvalidData.into()
            }
        })
    });
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, written) => written.map_err(|source| Error::Io { path: Default::default(), source }),
    }
}

/// A tensor's name in a GGUF file.
fn gguf_name(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let kind = match kind {
        "weight" | "gamma" => "weight",
        "bias" | "beta" => "bias",
        _ => return None,
    };
    BERT.iter().find_map(|(from, to)| {
        let Some((before, after)) = from.split_once("{}") else {
            return (*from == stem).then(|| format!("{to}.{kind}"));
        };
        let layer: u32 = stem.strip_prefix(before)?.strip_suffix(after)?.parse().ok()?;
        Some(format!("{}.{kind}", to.replace("{}", &layer.to_string())))
    })
}

/// Writes a tensor's rows in a format.
fn write_rows(view: &TensorView<'_>, cols: usize, format: Format, out: &mut dyn Write) -> Result<()> {
    let value: fn(&[u8]) -> f32 = match view.dtype() {
        Dtype::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::F16 => |b| math::f16_to_f32(u16::from_le_bytes([b[0], b[1]])),
        Dtype::BF16 => |b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16),
        other => return Err(Error::Model(format!("expected F32, F16 or BF16, got {other:?}"))),
    };
    let size = view.dtype().bitsize() / 8;
    let wrong = |e: &dyn std::fmt::Display| Error::Model(e.to_string());
    let mut blocks = vec![0; format.row_bytes(cols).ok_or_else(|| wrong(&"rows are not whole blocks"))?];
    let mut values = Vec::with_capacity(cols);
    for row in view.data().chunks_exact(cols.saturating_mul(size).max(1)) {
        values.clear();
        values.extend(row.chunks_exact(size).map(value));
        format.quantize(&values, &mut blocks).map_err(|e| wrong(&e))?;
        out.write_all(&blocks).map_err(|source| Error::Io { path: Default::default(), source })?;
    }
    Ok(())
}

/// The metadata of BERT.
fn bert(folder: &Path, config: &Json, w: &mut Writer) -> Result<()> {
    for (key, only) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
        if let Some(value) = config.value.get(key).filter(|value| **value != *only) {
            return Err(config.wrong(key, only, value));
        }
    }
    w.entry("general.architecture", "bert")?;
    let name = config.value.get("_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty());
    w.entry("general.name", name.unwrap_or("bert"))?;
    for (key, from) in [
        ("vocab_size", "vocab_size"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
    ] {
        w.entry(&format!("bert.{key}"), config.u32(from)?)?;
    }
    let epsilon = config.value.get("layer_norm_eps").and_then(Value::as_f64);
    let epsilon = epsilon.ok_or_else(|| config.missing("layer_norm_eps", "a number"))?;
    w.entry("bert.attention.layer_norm_epsilon", epsilon as f32)?;
    w.entry("bert.attention.causal", false)?;
    if let Some(pooling) = pooling(folder)? {
        w.entry("bert.pooling_type", pooling)?;
    }
    wordpiece(folder, w)?;
    w.entry("tokenizer.ggml.token_type_count", config.u32("type_vocab_size")?)
}

/// How sentence-transformers pools, in the values of the key `pooling_type`.
fn pooling(folder: &Path) -> Result<Option<u32>> {
    if !folder.join("1_Pooling/config.json").is_file() {
        return Ok(None);
    }
    let config = Json::open(folder, "1_Pooling/config.json")?;
    let fields = config.value.as_object().into_iter().flatten();
    let on: Vec<&str> = fields.filter(|(_, value)| **value == true).map(|(key, _)| key.as_str()).collect();
    let modes: Vec<&&str> = on.iter().filter(|key| key.starts_with("pooling_mode_")).collect();
    match modes[..] {
        [&"pooling_mode_mean_tokens"] => Ok(Some(1)),
        [&"pooling_mode_cls_token"] => Ok(Some(2)),
        [&"pooling_mode_lasttoken"] => Ok(Some(3)),
        _ => Err(config.wrong(
            "pooling_mode_*",
            "one of mean_tokens, cls_token, lasttoken",
            format!("{modes:?}"),
        )),
    }
}

/// A WordPiece vocabulary: what begins a word gets U+2581 in front, what continues one loses its `##`.
fn wordpiece(folder: &Path, w: &mut Writer) -> Result<()> {
    let path = folder.join("vocab.txt");
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let texts: Vec<&str> = text.strip_suffix('\n').unwrap_or(&text).split('\n').collect();
    let config = Json::open(folder, "tokenizer_config.json")?;
    let mut special = Vec::new();
    for (key, from, usual) in SPECIAL {
        let token = match config.value.get(from) {
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str),
            token => token.and_then(Value::as_str),
        };
        let token = token.unwrap_or(usual);
        let id = texts.iter().position(|text| *text == token).ok_or_else(|| {
            Error::Tokenizer(format!("{}: special token `{token}` is not among the tokens", path.display()))
        })?;
        special.push((*key, id));
    }
    let is_special = |id: usize| special.iter().any(|(_, special)| *special == id);
    let tokens = texts.iter().enumerate().map(|(id, text)| match text.strip_prefix("##") {
        _ if is_special(id) => (*text).to_owned(),
        Some(rest) if !rest.is_empty() => rest.to_owned(),
        _ => format!("\u{2581}{text}"),
    });
    let tokens: Vec<String> = tokens.collect();
    let kinds: Vec<i32> = (0..tokens.len()).map(|id| if is_special(id) { 3 } else { 1 }).collect();
    w.entry("tokenizer.ggml.model", "bert")?;
    w.entry("tokenizer.ggml.tokens", &tokens[..])?;
    w.entry("tokenizer.ggml.token_type", &kinds[..])?;
    for (key, id) in special {
        w.entry(&format!("tokenizer.ggml.{key}_token_id"), id as u32)?;
    }
    let flag = |key: &str| config.value.get(key).and_then(Value::as_bool);
    let lowercase = flag("do_lower_case").unwrap_or(true);
    w.entry("tokenizer.ggml.normalizer.lowercase", lowercase)?;
    w.entry("tokenizer.ggml.normalizer.strip_accents", flag("strip_accents").unwrap_or(lowercase))
}

/// A JSON file of the folder.
struct Json {
    path: std::path::PathBuf,
    value: Value,
}

impl Json {
    fn open(folder: &Path, name: &str) -> Result<Json> {
        let path = folder.join(name);
        let text = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let value = serde_json::from_slice(&text);
        let value = value.map_err(|e| Error::Model(format!("{}: {e}", path.display())))?;
        Ok(Json { path, value })
    }

    fn wrong(&self, key: &str, expected: &str, got: impl std::fmt::Display) -> Error {
        Error::Model(format!("{}: key `{key}`: expected {expected}, got {got}", self.path.display()))
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        self.wrong(key, expected, self.value.get(key).unwrap_or(&Value::Null))
    }

    fn str(&self, key: &str) -> Result<&str> {
        self.value.get(key).and_then(Value::as_str).ok_or_else(|| self.missing(key, "a text"))
    }

    fn u32(&self, key: &str) -> Result<u32> {
        let value = self.value.get(key).and_then(Value::as_u64).and_then(|n| n.try_into().ok());
        value.ok_or_else(|| self.missing(key, "a whole number"))
    }
}
