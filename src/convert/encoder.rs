//! Encoders: each family's names of weights and options, in folders and in GGUF files.

use std::path::Path;

use serde_json::Value;

use super::families::Names;
use super::folder::Json;
use super::options::{self, Key, Kind, Only};
use super::rope::Rope;
use super::sentence::Sentence;
use super::vocabulary::Task;
use super::{Plan, Rows, vocabulary, wordpiece};
use crate::error::Result;
use crate::gguf::write::Writer;

/// The differences between families.
struct Family {
    /// `model_type` of config.json, and `general.architecture`.
    model_type: &'static str,
    architecture: &'static str,
    /// Optional prefixes of names.
    prefixes: &'static [&'static str],
    names: Names,
    /// Names of a classification head; nothing: the family has none.
    head: Names,
    /// Names that embeddings do not need: heads of the training.
    unused: &'static [&'static str],
    /// Endings of the names that have a bias, in every layer.
    biased: &'static [&'static str],
    keys: &'static [Key],
    /// Values of options that folders leave out, as JSON has them.
    defaults: &'static [(&'static str, &'static str)],
    /// Options with a single supported value.
    only: &'static [(&'static str, Only)],
    /// Whether the table of positions has rows for padding in front.
    pads_positions: bool,
    has_rope: bool,
    /// Default bases of rotary frequencies: of all layers, and of those with a window.
    rope_bases: [Option<f64>; 2],
    /// Whether layers have windows.
    has_window: bool,
}

/// Maximum layers, of which periods are sought; the runtime's limit is lower.
const MAX_LAYERS: usize = 1 << 12;

/// Options of all families, the first of which is required.
const KEYS: &[Key] = &[
    ("vocab_size", &["vocab_size"], Kind::U32),
    ("embedding_length", &["hidden_size", "n_embd", "dim"], Kind::U32),
    ("block_count", &["num_hidden_layers", "n_layer", "n_layers"], Kind::U32),
    ("feed_forward_length", &["intermediate_size", "n_inner", "hidden_dim"], Kind::U32),
    ("attention.head_count", &["num_attention_heads", "n_head", "n_heads"], Kind::U32),
    ("attention.layer_norm_epsilon", &["layer_norm_eps", "norm_eps", "layer_norm_epsilon"], Kind::F32),
];

const BERT_NAMES: Names = &[
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

const DISTIL_NAMES: Names = &[
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.LayerNorm", "token_embd_norm"),
    ("transformer.layer.{}.attention.q_lin", "blk.{}.attn_q"),
    ("transformer.layer.{}.attention.k_lin", "blk.{}.attn_k"),
    ("transformer.layer.{}.attention.v_lin", "blk.{}.attn_v"),
    ("transformer.layer.{}.attention.out_lin", "blk.{}.attn_output"),
    ("transformer.layer.{}.sa_layer_norm", "blk.{}.attn_output_norm"),
    ("transformer.layer.{}.ffn.lin1", "blk.{}.ffn_up"),
    ("transformer.layer.{}.ffn.lin2", "blk.{}.ffn_down"),
    ("transformer.layer.{}.output_layer_norm", "blk.{}.layer_output_norm"),
];

/// Names as the model's authors publish them.
const NOMIC_NAMES: Names = &[
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("emb_ln", "token_embd_norm"),
    ("encoder.layers.{}.attn.Wqkv", "blk.{}.attn_qkv"),
    ("encoder.layers.{}.attn.out_proj", "blk.{}.attn_output"),
    ("encoder.layers.{}.norm1", "blk.{}.attn_output_norm"),
    ("encoder.layers.{}.mlp.fc11", "blk.{}.ffn_up"),
    ("encoder.layers.{}.mlp.fc12", "blk.{}.ffn_gate"),
    ("encoder.layers.{}.mlp.fc2", "blk.{}.ffn_down"),
    ("encoder.layers.{}.norm2", "blk.{}.layer_output_norm"),
];

const JINA_NAMES: Names = &[
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("emb_ln", "token_embd_norm"),
    ("encoder.layers.{}.mixer.Wqkv", "blk.{}.attn_qkv"),
    ("encoder.layers.{}.mixer.out_proj", "blk.{}.attn_output"),
    ("encoder.layers.{}.norm1", "blk.{}.attn_output_norm"),
    ("encoder.layers.{}.mlp.fc1", "blk.{}.ffn_up"),
    ("encoder.layers.{}.mlp.fc2", "blk.{}.ffn_down"),
    ("encoder.layers.{}.norm2", "blk.{}.layer_output_norm"),
];

const MODERN_NAMES: Names = &[
    ("embeddings.tok_embeddings", "token_embd"),
    ("embeddings.norm", "token_embd_norm"),
    ("layers.{}.attn_norm", "blk.{}.attn_norm"),
    ("layers.{}.attn.Wqkv", "blk.{}.attn_qkv"),
    ("layers.{}.attn.Wo", "blk.{}.attn_output"),
    ("layers.{}.mlp_norm", "blk.{}.ffn_norm"),
    ("layers.{}.mlp.Wi", "blk.{}.ffn_up"),
    ("layers.{}.mlp.Wo", "blk.{}.ffn_down"),
    ("final_norm", "output_norm"),
];

/// BERT (Devlin et al. 2019); the families below state their differences from it.
const BERT: Family = Family {
    model_type: "bert",
    architecture: "bert",
    prefixes: &["bert."],
    names: BERT_NAMES,
    head: &[("pooler.dense", "cls"), ("classifier", "cls.output")],
    unused: &["pooler.*", "cls.*", "embeddings.position_ids"],
    biased: &["LayerNorm", "query", "key", "value", "dense", "classifier", "out_proj"],
    keys: &[],
    defaults: &[("type_vocab_size", "2")],
    only: &[
        ("hidden_act", Only::Text("gelu")),
        ("position_embedding_type", Only::Text("absolute")),
        ("is_decoder", Only::Bool(false)),
    ],
    pads_positions: false,
    has_rope: false,
    rope_bases: [None; 2],
    has_window: false,
};

/// RoBERTa (Liu et al. 2019).
const ROBERTA: Family = Family {
    model_type: "roberta",
    prefixes: &["roberta."],
    head: &[("classifier.dense", "cls"), ("classifier.out_proj", "cls.output")],
    unused: &["pooler.*", "lm_head.*", "embeddings.position_ids"],
    pads_positions: true,
    ..BERT
};

const FAMILIES: &[Family] = &[
    BERT,
    Family { model_type: "camembert", ..ROBERTA },
    // Jina's third model (Sturua et al. 2024).
    Family {
        model_type: "jina_embeddings_v3",
        architecture: "jina-bert-v3",
        prefixes: &["roberta."],
        names: JINA_NAMES,
        head: &[],
        unused: &["pooler.*", "lm_head.*"],
        biased: &["emb_ln", "Wqkv", "out_proj", "norm1", "norm2", "fc1", "fc2"],
        defaults: &[("type_vocab_size", "1"), ("layer_norm_eps", "1e-5")],
        only: &[("hidden_act", Only::Text("gelu"))],
        has_rope: true,
        rope_bases: [Some(20_000.0), None],
        ..BERT
    },
    // DistilBERT (Sanh et al. 2019) has no types of tokens.
    Family {
        model_type: "distilbert",
        prefixes: &["distilbert."],
        names: DISTIL_NAMES,
        head: &[],
        unused: &["vocab_*"],
        biased: &["LayerNorm", "_lin", "lin1", "lin2", "layer_norm"],
        defaults: &[("layer_norm_eps", "1e-12")],
        only: &[("activation", Only::Text("gelu"))],
        ..BERT
    },
    Family {
        model_type: "modernbert",
        architecture: "modern-bert",
        prefixes: &["model."],
        names: MODERN_NAMES,
        head: &[("head.dense", "cls"), ("head.norm", "cls.norm"), ("classifier", "cls.output")],
        unused: &["head.*", "decoder.*"],
        biased: &["classifier"],
        keys: &[("hidden_activation", &["hidden_activation"], Kind::Text)],
        defaults: &[("classifier_pooling", "\"cls\"")],
        only: &[("is_decoder", Only::Bool(false)), ("classifier_activation", Only::Text("gelu"))],
        has_rope: true,
        rope_bases: [Some(160_000.0), Some(10_000.0)],
        has_window: true,
        ..BERT
    },
    Family {
        model_type: "nomic_bert",
        architecture: "nomic-bert",
        names: NOMIC_NAMES,
        head: &[],
        biased: &["emb_ln", "norm1", "norm2"],
        only: &[
            ("hidden_act", Only::Text("silu")),
            ("activation_function", Only::Text("swiglu")),
            ("causal", Only::Bool(false)),
            ("is_decoder", Only::Bool(false)),
            // Its second model, whose mixtures of experts are packed in a way of their own.
            ("moe_every_n_layers", Only::Number(0.0)),
            ("prenorm", Only::Bool(false)),
            ("rotary_emb_fraction", Only::Number(1.0)),
            ("rotary_emb_interleaved", Only::Bool(false)),
            ("use_rms_norm", Only::Bool(false)),
        ],
        has_rope: true,
        rope_bases: [Some(1000.0), None],
        ..BERT
    },
    ROBERTA,
    Family { model_type: "xlm-roberta", ..ROBERTA },
];

/// The families by name.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// Writes the metadata of an encoder, and returns the mapping of its tensors.
pub(super) fn plan(folder: &Path, config: &Json, w: &mut Writer) -> Result<Plan> {
    let model_type = config.str("model_type")?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    let family = family.ok_or_else(|| config.missing("model_type", "an encoder"))?;
    let architecture = family.architecture;
    let config = &config.with(family.defaults);
    options::check(config, family.only)?;
    w.entry("general.architecture", architecture)?;
    let name = config.value.get("_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty());
    let name = name.or(folder.file_name().and_then(|name| name.to_str()));
    w.entry("general.name", name.unwrap_or(model_type))?;
    for (required, keys) in [(true, KEYS), (false, family.keys)] {
        for (key, from, kind) in keys {
            let there = from.iter().find(|from| config.get(from).is_some());
            let Some(from) = there.or(from.first().filter(|_| required)) else { continue };
            kind.write(&format!("{architecture}.{key}"), config, from, w)?;
        }
    }
    let mut taken = Vec::new();
    let mut positions = positions(config)?;
    if family.pads_positions {
        // Positions begin behind the one of padding.
        let padding = config.optional_u32("pad_token_id")?.unwrap_or(1).saturating_add(1);
        positions = positions.checked_sub(padding).filter(|&left| left > 0).ok_or_else(|| {
            config.wrong("max_position_embeddings", &format!("more than {padding}"), positions)
        })?;
        taken.push(("position_embd.weight", "position_embd.weight", Rows::From(padding as usize)));
    }
    w.entry(&format!("{architecture}.context_length"), positions)?;
    w.entry(&format!("{architecture}.attention.causal"), false)?;
    if family.has_rope {
        rope(config, family, w)?;
    }
    if family.has_window {
        window(config, architecture, w)?;
    }
    if let Some(types) = config.optional_u32("type_vocab_size")? {
        w.entry("tokenizer.ggml.token_type_count", types)?;
    }
    let (mut names, mut unused, mut required) = (vec![family.names], family.unused.to_vec(), Vec::new());
    let count = KEYS
        .iter()
        .find(|(key, ..)| *key == "block_count")
        .and_then(|(_, from, _)| from.iter().find_map(|from| config.get(from).and_then(Value::as_u64)));
    let layers = count.unwrap_or(0).min(MAX_LAYERS as u64);
    let is_biased = |from: &str| family.biased.iter().any(|end| from.ends_with(end));
    for (from, _) in family.names.iter().filter(|(from, _)| is_biased(from)) {
        let of_layers = if from.contains("{}") { layers } else { 1 };
        required.extend((0..of_layers).map(|layer| from.replace("{}", &layer.to_string()) + ".bias"));
    }
    let ranks = has_classification_head(config);
    if ranks {
        if family.head.is_empty() {
            let got = "one with a classification head, which the family lacks";
            return Err(config.wrong("architectures", "a model that gives vectors", got));
        }
        classification_head(config, architecture, w)?;
        names.push(family.head);
        if config.get("classifier_pooling").is_some() {
            let pooling: u32 = match config.str("classifier_pooling")? {
                "mean" => 1,
                "cls" => 2,
                other => return Err(config.wrong("classifier_pooling", "mean or cls", other)),
            };
            w.entry(&format!("{architecture}.classifier.pooling_type"), pooling)?;
        }
        for (from, _) in family.head {
            unused.retain(|pattern| !super::matches(pattern, from));
            required.push(format!("{from}.weight"));
            required.extend(is_biased(from).then(|| format!("{from}.bias")));
        }
    }
    let fast = Json::open_if_there(folder, "tokenizer.json")?;
    let kind = fast.object("model")?;
    let word_pieces = kind.is_none_or(|model| model.get("type").is_none_or(|kind| kind == "WordPiece"));
    let mut left_out = Vec::new();
    if config.optional_u32("type_vocab_size")?.is_some_and(|types| types > 1) {
        types_of_tokens(&fast, ranks)?;
    }
    match word_pieces {
        true => wordpiece::write(folder, w)?,
        false => {
            left_out = vocabulary::write(folder, config, if ranks { Task::Rank } else { Task::Embed }, w)?
        }
    }
    if ranks {
        left_out.extend(activation(config));
    }
    let mut beside = Vec::new();
    if !ranks {
        let sentence = Sentence { architecture, positions, dense: &[], word_pieces };
        let found = sentence.write(folder, w)?;
        left_out.extend(found.left_out);
        beside = found.beside;
    }
    let unused = unused.into_iter().map(str::to_owned).collect();
    Ok(Plan {
        prefixes: family.prefixes,
        names,
        unused,
        required,
        taken,
        beside,
        left_out,
        keys: vec![family.keys, KEYS],
        ..Plan::default()
    })
}

/// The positions of a model.
fn positions(config: &Json) -> Result<u32> {
    let Some(positions) = config.optional_u32("n_positions")? else {
        return config.u32("max_position_embeddings");
    };
    // Nomic's models state four times the positions that they were trained with.
    Ok(config.optional_u32("max_trained_positions")?.unwrap_or(2048).min(positions))
}

fn rope(config: &Json, family: &Family, w: &mut Writer) -> Result<()> {
    let count = |keys: [&'static str; 2]| match config.optional_u32(keys[1])? {
        Some(count) => Ok(count),
        None => config.u32(keys[0]),
    };
    let heads = count(["num_attention_heads", "n_head"])?;
    let head_dim = count(["hidden_size", "n_embd"])?.checked_div(heads).unwrap_or(0);
    let [default_base, default_local] = family.rope_bases;
    let rope = Rope { config, architecture: family.architecture, head_dim, default_base, default_local };
    // None of the kinds of scaling of encoders needs vectors.
    match rope.write(w)?.first() {
        Some(_) => Err(config.missing("rope_parameters", "no factors of single frequencies")),
        None => Ok(()),
    }
}

/// Writes the sliding window, which the first layer of each period lacks.
fn window(config: &Json, architecture: &str, w: &mut Writer) -> Result<()> {
    w.entry(&format!("{architecture}.attention.sliding_window"), config.u32("local_attention")?)?;
    let pattern = format!("{architecture}.attention.sliding_window_pattern");
    let period = config.optional_u32("global_attn_every_n_layers")?.unwrap_or(3);
    let Some(types) = config.get("layer_types") else { return w.entry(&pattern, period) };
    let windowed = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let list: Option<Vec<bool>> = types.as_array().and_then(|list| list.iter().map(windowed).collect());
    let layers = config.u32("num_hidden_layers")? as usize;
    if layers > MAX_LAYERS {
        return Err(config.wrong("num_hidden_layers", &format!("at most {MAX_LAYERS}"), layers));
    }
    let list = list.filter(|list| list.len() == layers).ok_or_else(|| {
        config.wrong("layer_types", "sliding_attention or full_attention for each layer", types)
    })?;
    // Files of the usual kind have the period alone.
    let by_period = |period: usize| list.iter().enumerate().all(|(at, &is)| is != at.is_multiple_of(period));
    match (1..=layers).find(|&period| by_period(period)) {
        Some(period) => w.entry(&pattern, period as u32),
        None => w.entry(&pattern, &list[..]),
    }
}

/// Rejects a template that gives tokens other types than 0 up to the token that ends the first text, and 1 behind it.
fn types_of_tokens(fast: &Json, of_pairs: bool) -> Result<()> {
    let Some(post) = fast.object("post_processor")? else { return Ok(()) };
    let pieces = |key: &str| post.get(key).and_then(Value::as_array).into_iter().flatten();
    let kind = |piece: &Value| {
        let of = |kind: &str| piece.pointer(&format!("/{kind}/type_id"))?.as_u64();
        of("Sequence").or(of("SpecialToken"))
    };
    if let Some(piece) = pieces("single").find(|piece| kind(piece) != Some(0)) {
        return Err(post.wrong("single", "types 0", piece));
    }
    if !of_pairs {
        return Ok(());
    }
    // RoBERTa's gives all tokens the type 0.
    if !matches!(post.str("type")?, "BertProcessing" | "TemplateProcessing") {
        return Err(post.missing("type", "TemplateProcessing or BertProcessing"));
    }
    let mut part = 0;
    let mut is_behind_first = false;
    for piece in pieces("pair") {
        if kind(piece) != Some(part) {
            return Err(post.wrong("pair", "types 0 of the first text and 1 of the second one", piece));
        }
        if is_behind_first {
            part = 1;
        }
        is_behind_first = piece.pointer("/Sequence/id").is_some_and(|id| *id == "A");
    }
    Ok(())
}

/// Whether the model scores its texts.
pub(super) fn has_classification_head(config: &Json) -> bool {
    let name = config.value.pointer("/architectures/0").and_then(Value::as_str);
    name.is_some_and(|name| name.ends_with("ForSequenceClassification"))
}

/// A warning about what sentence-transformers would do to scores.
pub(super) fn activation(config: &Json) -> Option<String> {
    let newer = config.value.pointer("/sentence_transformers/activation_fn").and_then(Value::as_str);
    let older = || config.get("sbert_ce_default_activation_function").and_then(Value::as_str);
    let name = match newer.or_else(older) {
        Some(name) if name.rsplit('.').next() == Some("Identity") => return None,
        Some(name) => name.chars().filter(|c| !c.is_control()).take(64).collect(),
        None => "Sigmoid, which sentence-transformers takes where none is stated,".to_owned(),
    };
    Some(format!("config.json: the activation {name} is left out: scores are those of the head"))
}

/// Writes the keys of a reranker, whose head has a single label.
pub(super) fn classification_head(config: &Json, architecture: &str, w: &mut Writer) -> Result<()> {
    w.entry(&format!("{architecture}.pooling_type"), 4u32)?;
    let Some(labels) = config.get("id2label") else { return Ok(()) };
    let name = labels.as_object().filter(|labels| labels.len() == 1);
    let name = name.and_then(|labels| labels.values().next()?.as_str());
    let name = name.ok_or_else(|| config.wrong("id2label", "one label", labels))?;
    w.entry(&format!("{architecture}.classifier.output_labels"), &[name.to_owned()][..])
}
