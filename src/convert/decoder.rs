//! Decoders: writes the metadata of a family of the table, and what families have beyond it.

use std::path::Path;

use serde_json::Value;

use super::families::{
    FAMILIES, Family, GRANITE_4_ONLY, GRANITE_4_SHARED, NAMES, NOPE_PERIOD, Names, OPTIONAL, REQUIRED,
    UNUSED, Window,
};
use super::folder::{Json, has, read_bytes};
use super::options;
use super::part::Scheme;
use super::rope::Rope;
use super::sentence::{self, Sentence};
use super::vocabulary::Task;
use super::{Axis, Factors, Plan, Rows, Shape, ValueHeads, encoder, vocabulary};
use crate::error::Result;
use crate::gguf::write::Writer;
use crate::model::llama4::EXPERTS_OF_MAVERICK;
use crate::rank;

/// Where a folder says in words what it is.
const README: &str = "README.md";
const MAX_README_BYTES: u64 = 1 << 20;

/// The first of Gemma 3n's layers keep the largest elements of their gates, and the share that they do not keep.
const SPARSE_LAYERS: usize = 10;
const SPARSE_SHARE: f64 = 0.95;

/// Steps of Mamba below this are as good as none.
const LEAST_STEP: f64 = 1e-9;

/// Maximum layers that draft tokens.
const MAX_DRAFTING: u32 = 16;

/// Maximum layers and elements of a head, checked before allocations; the runtime's limits are lower.
const MAX_EXTENT: u32 = 1 << 16;

/// Models that also see or hear: `model_type` of the whole.
const SEEING: &[&str] = &[
    "gemma3",
    "gemma3n",
    "gemma4",
    "llama4",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
];

/// Options by the names that GPT-2 has for them.
const GPT_2_OPTIONS: &[(&str, &str)] = &[
    ("hidden_size", "n_embd"),
    ("intermediate_size", "n_inner"),
    ("max_position_embeddings", "n_positions"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
];

/// Prefixes of the names of their language model.
const OF_TEXT: &[&str] = &["model.language_model.", "language_model.model.", "language_model.", "model."];

/// Their tensors besides those of the language model: for images and sounds, and to draft tokens.
const BESIDE_TEXT: &[&str] = &[
    "audio_tower.*",
    "embed_audio.*",
    "embed_vision.*",
    "mtp.*",
    "multi_modal_projector.*",
    "vision_model.*",
    "vision_tower.*",
    "visual.*",
];

/// Writes the metadata of a decoder, and returns the mapping of its tensors.
pub(super) fn plan(folder: &Path, config: &Json, w: &mut Writer) -> Result<Plan> {
    // The language model of one that also sees or hears has options of its own.
    let outer = config;
    let seeing =
        SEEING.iter().any(|model_type| outer.value.get("model_type").is_some_and(|t| t == model_type));
    let text = if seeing { outer.object("text_config")? } else { None };
    if seeing && text.is_none() {
        return Err(outer.missing("text_config", "the options of the language model"));
    }
    let config = text.as_ref().unwrap_or(outer);
    let model_type = config.str("model_type")?;
    let both_ways = config.get("use_bidirectional_attention").is_some_and(|value| *value == true);
    let kinds = if model_type == "nemotron_h" { nemotron_layers(config)? } else { Vec::new() };
    let has_experts = kinds.contains(&Block::Experts);
    let fits = |family: &&Family| {
        family.both_ways == both_ways
            && (kinds.is_empty() || (family.architecture == "nemotron_h_moe") == has_experts)
    };
    let mut families = FAMILIES.iter().filter(|family| family.model_type == model_type);
    let family = families.clone().find(fits).or(families.next());
    let family = family.ok_or_else(|| {
        let decoders = FAMILIES.iter().map(|family| family.model_type);
        let mut known: Vec<&str> =
            encoder::model_types().chain(decoders).chain(SEEING.iter().copied()).collect();
        known.sort_unstable();
        known.dedup();
        config.wrong("model_type", &format!("one of {}", known.join(", ")), model_type)
    })?;
    let mut config = config.with(family.defaults);
    match family.architecture {
        "gemma4" => config = gemma_4_global(&config)?,
        "gpt2" => config = gpt_2_options(&config)?,
        _ => {}
    }
    let config = &config;
    let scheme = if config.get("quantization_config").is_some() { config } else { outer };
    let scheme = Scheme::of(scheme)?;
    options::check(config, family.only)?;
    // Some embed texts with tokens that also see later ones, which the families of decoders do not.
    for (key, causal) in [("is_causal", true), ("use_bidirectional_attention", false)] {
        if let Some(other) = config.bool(key).unwrap_or(None).filter(|other| *other != causal)
            && !family.both_ways
        {
            return Err(config.wrong(key, &causal.to_string(), other));
        }
    }
    let architecture = family.architecture;
    w.entry("general.architecture", architecture)?;
    let name = config.value.get("_name_or_path").and_then(Value::as_str).filter(|name| !name.is_empty());
    let name = name.or(folder.file_name().and_then(|name| name.to_str()));
    w.entry("general.name", name.unwrap_or(model_type))?;
    for (required, keys) in [(true, REQUIRED), (false, OPTIONAL), (false, family.keys)] {
        let own = std::ptr::eq(keys, family.keys);
        for (key, from, kind) in keys {
            let there = from.iter().find(|from| config.get(from).is_some());
            let Some(from) = there.or(from.first().filter(|_| required)) else { continue };
            let no_experts = config.optional_u32("num_local_experts")? == Some(0)
                || architecture == "gemma4" && config.bool("enable_moe_block")? != Some(true);
            if no_experts && key.starts_with("expert_") || !own && family.without.contains(key) {
                continue;
            }
            kind.write(&format!("{architecture}.{key}"), config, from, w)?;
        }
    }
    for (key, value) in family.fixed {
        w.entry(&format!("{architecture}.{key}"), *value)?;
    }
    match architecture {
        "granitehybrid" => granite_4_hidden(config, w)?,
        "lfm2" => w.entry("lfm2.feed_forward_length", lfm2_hidden(config)?)?,
        _ => {}
    }
    let heads = match family.fixed.iter().find(|(key, _)| *key == "attention.head_count") {
        Some((_, heads)) => *heads,
        None => config.u32("num_attention_heads")?,
    };
    let layers = match kinds.is_empty() {
        true => config.u32("num_hidden_layers")?,
        false => kinds.len() as u32,
    };
    nemotron_blocks(config, architecture, &kinds, w)?;
    let head_dim = match config.optional_u32(match architecture {
        "gemma4" => "global_head_dim",
        "deepseek2" | "minicpm3" => "qk_rope_head_dim",
        _ => "head_dim",
    })? {
        Some(head_dim) => head_dim,
        None => config.u32("hidden_size")?.checked_div(heads).unwrap_or(0),
    };
    for (key, extent) in [("num_hidden_layers", layers), ("head_dim", head_dim)] {
        if extent > MAX_EXTENT {
            return Err(config.wrong(key, &format!("at most {MAX_EXTENT}"), extent));
        }
    }
    if let Some(scalar) = config.optional_f64("query_pre_attn_scalar")? {
        w.entry(&format!("{architecture}.attention.scale"), (1.0 / scalar.sqrt()) as f32)?;
    }
    window(config, family, layers, w)?;
    recurrent_layers(config, family, layers, w)?;
    if architecture == "gemma3n" {
        gemma_3n_layers(config, layers, w)?;
    }
    if architecture == "gemma4" {
        gemma_4_layers(config, layers, w)?;
    }
    if matches!(architecture, "smollm3" | "llama4") {
        // An empty list is as good as none.
        let listed =
            config.get("no_rope_layers").filter(|list| list.as_array().is_none_or(|l| !l.is_empty()));
        let usual = layer_values(layers, [1, 0]);
        if let Some(other) = listed.filter(|list| list.as_array() != Some(&usual)) {
            return Err(config.wrong(
                "no_rope_layers",
                "0 for every fourth layer and 1 for the others",
                other,
            ));
        }
    }
    if architecture == "llama4" {
        llama_4_layers(config, layers)?;
    }
    let rope = Rope { config, architecture, head_dim, default_base: family.rope_base, default_local: None };
    let vectors = if family.has_rope { rope.write(w)? } else { Vec::new() };
    sections(config, architecture, w)?;
    if matches!(architecture, "ernie4_5-moe" | "exaone-moe") {
        let shared = match config.optional_u32("moe_num_shared_experts")? {
            Some(shared) => shared,
            None => config.optional_u32("num_shared_experts")?.unwrap_or(0),
        };
        let hidden = config.u32("moe_intermediate_size")?.saturating_mul(shared);
        w.entry(&format!("{architecture}.expert_shared_feed_forward_length"), hidden)?;
    }
    if model_type == "ministral3"
        && let Some(rope) = config.object("rope_parameters")?.or(config.object("rope_scaling")?)
        && let Some(scale) = rope.optional_f64("llama_4_scaling_beta")?
    {
        w.entry("mistral3.attention.temperature_scale", scale as f32)?;
    }
    let reranker = Reranker::of(folder, config)?;
    let embeds = reranker.is_none() && sentence::is_there(folder);
    let task = if embeds { Task::Embed } else { Task::Generate };
    let mut left_out = vocabulary::write(folder, config, task, w)?;
    if family.window == Window::None && config.optional_u32("sliding_window")?.is_some() {
        left_out.push("config.json: sliding_window is left out: layers of the family have no window".into());
    }
    let mut beside = Vec::new();
    if embeds {
        let dense: &[&str] = if family.both_ways { &["dense_2", "dense_3"] } else { &[] };
        let positions = config.u32("max_position_embeddings")?;
        let sentence = Sentence { architecture, positions, dense, word_pieces: false };
        let found = sentence.write(folder, w)?;
        left_out.extend(found.left_out);
        beside = found.beside;
    }
    if architecture == "gpt-oss" {
        left_out.push(
            "YaRN begins and ends at whole pairs, although the folder's `truncate` may say otherwise"
                .to_owned(),
        );
    }

    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
    let least = config.optional_f64("time_step_min")?.unwrap_or(0.0);
    if !kinds.is_empty() && least > LEAST_STEP {
        left_out
            .push(format!("key `time_step_min` is left out: steps of Mamba's layers may be below {least}"));
    }
    let (mut unused, mut required) = (owned(UNUSED), Vec::new());
    unused.extend(owned(family.unused));
    let output = format!("{}.weight", family.output);
    if seeing {
        unused.extend(owned(BESIDE_TEXT));
        left_out.push("what the model has besides its language model is left out".to_owned());
    }
    let tied = match (config.bool("tie_word_embeddings")?, outer.bool("tie_word_embeddings")?) {
        // Versions of the library differ in which of them counts, so the folder's matrix does.
        (Some(inner), Some(outer)) if inner != outer => None,
        (inner, outer) => inner.or(outer).or((!seeing).then_some(false)),
    };
    match tied {
        // Vectors and scores of a matrix of its own need no output matrix.
        _ if embeds || matches!(reranker, Some(Reranker::Scores)) => unused.push(output),
        // Some folders also store the tied output matrix.
        Some(true) => unused.push(output),
        Some(false) => required.push(output),
        None => {}
    }
    if architecture == "gemma4" && config.bool("enable_moe_block")? == Some(true) {
        // Without it, a layer would have no experts.
        required.extend((0..layers).map(|layer| format!("layers.{layer}.router.proj.weight")));
    }
    // Layers behind the others draft tokens.
    let drafting = config.optional_u32("num_nextn_predict_layers")?.unwrap_or(0).min(MAX_DRAFTING);
    for layer in layers..layers.saturating_add(drafting) {
        unused.push(format!("layers.{layer}.*"));
    }
    if drafting > 0 {
        left_out.push("layers that draft tokens are left out".to_owned());
    }
    if config.optional_u32("moe_layer_interval")? == Some(0) {
        return Err(config.wrong("moe_layer_interval", "at least 1", 0));
    }
    if let (Some(groups), Some(used)) = (config.optional_u32("n_group")?, config.optional_u32("topk_group")?)
        && used > groups
    {
        return Err(config.wrong("topk_group", &format!("at most n_group, {groups}"), used));
    }
    if let Some(last) = config.get("moe_layer_end_index").filter(|last| last.as_i64() != Some(-1))
        && last.as_u64() != Some(u64::from(layers).saturating_sub(1))
    {
        return Err(config.wrong("moe_layer_end_index", "the last layer", last));
    }
    let kv_heads = config.optional_u32("num_key_value_heads")?.unwrap_or(heads);
    let matrices = scan(config, architecture, w)?;
    let mut names = family.names.to_vec();
    names.push(NAMES);
    if architecture == "granitehybrid" {
        let has_experts = config.optional_u32("num_local_experts")?.is_some_and(|count| count > 0);
        names.push(if has_experts { GRANITE_4_SHARED } else { GRANITE_4_ONLY });
    }
    let mut taken = Vec::new();
    if architecture == "deepseek2" {
        taken.extend(latent(config, w)?);
    }
    if architecture == "minicpm3" {
        let extents = [extent(config, "qk_nope_head_dim")?, extent(config, "qk_rope_head_dim")?];
        w.entry("minicpm3.attention.key_length", extents.iter().sum::<u32>())?;
    }
    match &reranker {
        Some(Reranker::Tokens(ids)) => {
            w.entry(&format!("{architecture}.pooling_type"), 4u32)?;
            let labels = LABELS.map(str::to_owned);
            w.entry(&format!("{architecture}.classifier.output_labels"), &labels[..])?;
            let of = if tied == Some(true) { "token_embd.weight" } else { "cls.output.weight" };
            names.insert(0, HEAD);
            taken.push(("cls.output.weight", of, Rows::Of(ids.clone())));
        }
        Some(Reranker::Scores) => {
            left_out.extend(encoder::activation(config));
            encoder::classification_head(config, architecture, w)?;
            names.insert(0, HEAD);
        }
        None => {}
    }
    if reranker.is_some() {
        w.entry("tokenizer.chat_templates", &["rerank".to_owned()][..])?;
        w.entry(rank::TEMPLATE, RERANK)?;
    }
    let has_delta_net = matches!(architecture, "qwen35" | "qwen35moe" | "qwen3next");
    let padded = match architecture {
        // Only tokens of texts have inputs of their own in each layer.
        "gemma3n" => Some(("per_layer_token_embd.weight", config.u32("vocab_size")?.into())),
        _ => None,
    };
    let fused = [(".attn_qkv", Axis::Rows, ValueHeads::interleaved(heads, 3, head_dim))];
    if architecture == "qwen3next" {
        taken.extend(neighbours(config)?);
    }
    let by_value_head = if architecture == "gptneox" {
        fused.to_vec()
    } else if has_delta_net {
        value_heads(config, architecture, w)?
    } else {
        Vec::new()
    };
    let by_columns = match architecture {
        // Versions of the library have them either way.
        "qwen3vlmoe" => {
            let (hidden, inner) = (config.u32("hidden_size")?, config.u32("moe_intermediate_size")?);
            [("_gate_exps", hidden), ("_up_exps", hidden), ("_down_exps", inner)]
                .map(|(end, columns)| (end, Some(columns as usize)))
                .to_vec()
        }
        _ => family.by_columns.iter().map(|&end| (end, None)).collect(),
    };
    let interleaved = vec![(".attn_q", heads as usize), (".attn_k", kv_heads as usize)];
    Ok(Plan {
        scheme,
        takes_turns: architecture == "gpt-oss",
        by_columns,
        prefixes: if seeing { OF_TEXT } else { family.prefixes },
        names,
        unused,
        required,
        interleaved: if family.interleaved { interleaved } else { Vec::new() },
        by_value_head,
        matrices,
        taken,
        beside,
        factors: if architecture == "falcon-h1" { falcon_factors(config)? } else { Vec::new() },
        padded,
        norm_offset: family.norm_offset,
        vectors,
        left_out,
        keys: vec![family.keys, REQUIRED, OPTIONAL],
    })
}

/// How Qwen3-Reranker scores a pair of texts.
enum Reranker {
    /// By the rows of two tokens in the output matrix.
    Tokens(Vec<usize>),
    /// By a matrix of its own.
    Scores,
}

/// Qwen3-Reranker's answers, which are the labels of its scores, and the prompt that it was trained with.
const LABELS: [&str; 2] = ["yes", "no"];
const RERANK: &str = "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the \
Instruct provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web \
search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n\
<|im_start|>assistant\n<think>\n\n</think>\n\n";

/// Names of what gives its scores. They come before those of other models.
const HEAD: Names = &[("lm_head", "cls.output"), ("score", "cls.output")];

impl Reranker {
    /// Its configuration is that of a model that generates, so only its name tells.
    fn of(folder: &Path, config: &Json) -> Result<Option<Reranker>> {
        let scores = encoder::has_classification_head(config);
        let is_qwen = config.get("model_type").is_some_and(|kind| kind == "qwen3");
        let names = [
            folder.file_name().and_then(|name| name.to_str()),
            config.get("_name_or_path").and_then(Value::as_str),
        ];
        let mut is_named =
            names.into_iter().flatten().any(|name| name.to_lowercase().contains("qwen3-reranker"));
        if is_qwen && !is_named && has(folder, README) {
            // Whatever else it has is of no concern.
            let bytes = read_bytes(folder, README, MAX_README_BYTES).unwrap_or_default();
            is_named = String::from_utf8_lossy(&bytes).to_lowercase().contains("# qwen3-reranker");
        }
        match (is_qwen && is_named, scores) {
            (true, true) => Ok(Some(Reranker::Scores)),
            (true, false) => {
                let ids = LABELS.map(|label| vocabulary::id_of(folder, label));
                let ids: Result<Vec<u32>> = ids.into_iter().collect();
                Ok(Some(Reranker::Tokens(ids?.into_iter().map(|id| id as usize).collect())))
            }
            (false, true) => {
                let got =
                    config.value.pointer("/architectures/0").and_then(Value::as_str).unwrap_or_default();
                let expected = "a model that generates, or Qwen3-Reranker: a qwen3 with that name as part of its folder's name or of \
                                `_name_or_path`, or as the title of its README.md";
                Err(config.wrong("architectures", expected, got))
            }
            (false, false) => Ok(None),
        }
    }
}

/// Returns the hidden elements of LFM2's feed-forward block, which its options may adjust.
fn lfm2_hidden(config: &Json) -> Result<u32> {
    let hidden = match config.optional_u32("block_ff_dim")? {
        Some(hidden) => hidden,
        None => config.u32("intermediate_size")?,
    };
    if config.bool("block_auto_adjust_ff_dim")? == Some(false) {
        return Ok(hidden);
    }
    let mut hidden = (2 * u64::from(hidden)) / 3;
    if let Some(factor) = config.optional_f64("block_ffn_dim_multiplier")? {
        hidden = (factor * hidden as f64) as u64;
        let multiple = u64::from(config.u32("block_multiple_of")?.max(1));
        hidden = hidden.div_ceil(multiple).saturating_mul(multiple);
    }
    Ok(hidden.min(u32::MAX.into()) as u32)
}

/// Writes which layers have no attention: their number of KV heads is 0, or a list says so.
fn recurrent_layers(config: &Json, family: &Family, layers: u32, w: &mut Writer) -> Result<()> {
    let [.., recurrent] = family.recurrent else { return Ok(()) };
    let expected = format!("{recurrent} or full_attention for each layer");
    let types = config.get("layer_types").ok_or_else(|| config.missing("layer_types", &expected))?;
    let is_recurrent = |kind: &Value| match kind.as_str()? {
        "full_attention" | "attention" => Some(false),
        other => family.recurrent.contains(&other).then_some(true),
    };
    let list: Option<Vec<bool>> = types.as_array().and_then(|list| list.iter().map(is_recurrent).collect());
    let list = list.filter(|list| list.len() == layers as usize);
    let list = list.ok_or_else(|| config.wrong("layer_types", &expected, types))?;
    let kv_heads = config.u32("num_key_value_heads")?;
    let architecture = family.architecture;
    if matches!(architecture, "qwen35" | "qwen35moe" | "qwen3next") {
        w.entry(&format!("{architecture}.attention.head_count_kv"), kv_heads)?;
        return w.entry(&format!("{architecture}.attention.recurrent_layers"), &list[..]);
    }
    let heads: Vec<u32> = list.iter().map(|&recurrent| if recurrent { 0 } else { kv_heads }).collect();
    w.entry(&format!("{architecture}.attention.head_count_kv"), &heads[..])
}

/// Gemma 4's options with those of single layers, which newer versions of the library write, in the keys of older ones: these have one
/// value for all layers without a window.
fn gemma_4_global(config: &Json) -> Result<Json> {
    let Some(by_layer) = config.get("per_layer_config") else { return Ok(config.with(&[])) };
    let types = config.get("layer_types").and_then(Value::as_array).into_iter().flatten();
    let mut of_global = types.enumerate().filter(|(_, kind)| **kind == "full_attention").map(|(layer, _)| {
        let own = by_layer.get(layer.to_string())?;
        own.as_object().filter(|own| own.contains_key("head_dim"))
    });
    let first = of_global.next().flatten();
    let count = 1 + of_global.clone().count();
    let is_one =
        of_global.all(|own| own == first) && by_layer.as_object().is_some_and(|all| all.len() == count);
    let expected =
        "the same head_dim and num_key_value_heads for each layer of full_attention, and none for others";
    let first = first.filter(|_| is_one).ok_or_else(|| config.missing("per_layer_config", expected))?;
    let mut values = Vec::new();
    for (key, value) in first {
        let older = match &key[..] {
            "head_dim" => "global_head_dim",
            "num_key_value_heads" => "num_global_key_value_heads",
            _ => return Err(config.missing("per_layer_config", expected)),
        };
        if let Some(other) = config.get(older).filter(|other| *other != value) {
            return Err(config.wrong(older, "the same as per_layer_config", other));
        }
        values.push((older, value.to_string()));
    }
    let values: Vec<(&str, &str)> = values.iter().map(|(key, value)| (*key, &value[..])).collect();
    Ok(config.with(&values))
}

/// GPT-2's options by the names that other families have for them.
fn gpt_2_options(config: &Json) -> Result<Json> {
    let hidden = config.u32("n_embd")?.saturating_mul(4).to_string();
    let mut options = Vec::new();
    for (name, own) in GPT_2_OPTIONS {
        match config.get(own) {
            Some(value) => options.push((*name, value.to_string())),
            None if *own == "n_inner" => options.push((*name, hidden.clone())),
            None => {
                config.u32(own)?;
            }
        }
    }
    let options: Vec<(&str, &str)> = options.iter().map(|(name, value)| (*name, &value[..])).collect();
    Ok(config.with(&options))
}

/// Values for the layers of a model of which the last of each period differs from the others.
fn layer_values<T: Into<Value> + Copy>(layers: u32, [others, last]: [T; 2]) -> Vec<Value> {
    let is_last = |layer: usize| layer.is_multiple_of(NOPE_PERIOD);
    (1..=layers as usize).map(|layer| if is_last(layer) { last.into() } else { others.into() }).collect()
}

/// Checks what Llama 4's files do not say: which layers see chunks, have experts, and normalise queries and keys.
fn llama_4_layers(config: &Json, layers: u32) -> Result<()> {
    let usual = layer_values(layers, ["chunked_attention", "full_attention"]);
    if let Some(other) = config.get("layer_types").filter(|list| list.as_array() != Some(&usual)) {
        let expected = "full_attention for every fourth layer and chunked_attention for the others";
        return Err(config.wrong("layer_types", expected, other));
    }
    let step = config.u32("interleave_moe_layer_step")?.max(1);
    let usual: Vec<Value> = (step - 1..layers).step_by(step as usize).map(Value::from).collect();
    if let Some(other) = config.get("moe_layers").filter(|list| list.as_array() != Some(&usual)) {
        return Err(config.wrong("moe_layers", "the last layer of each interleave_moe_layer_step", other));
    }
    let normalises = config.u32("num_local_experts")? != EXPERTS_OF_MAVERICK;
    match config.bool("use_qk_norm")?.unwrap_or(true) {
        other if other != normalises => {
            let expected = format!("{normalises}, because runtimes tell by the number of experts");
            Err(config.wrong("use_qk_norm", &expected, other))
        }
        _ => Ok(()),
    }
}

/// Writes in what Gemma 4's layers differ: heads, hidden elements, inputs of their own.
fn gemma_4_layers(config: &Json, layers: u32, w: &mut Writer) -> Result<()> {
    let length = config.u32("global_head_dim")?;
    w.entry("gemma4.attention.key_length", length)?;
    w.entry("gemma4.attention.value_length", length)?;
    if let Some(length) = config.optional_u32("hidden_size_per_layer_input")?.filter(|&length| length > 0) {
        w.entry("gemma4.embedding_length_per_layer_input", length)?;
    }
    let types = config.get("layer_types").and_then(Value::as_array).map_or(&[][..], |types| &types[..]);
    if types.len() != layers as usize {
        return Err(config.missing("layer_types", "one for each layer"));
    }
    let kv_heads = config.u32("num_key_value_heads")?;
    let global = match config.bool("attention_k_eq_v")? {
        Some(true) => config.optional_u32("num_global_key_value_heads")?.unwrap_or(kv_heads),
        _ => kv_heads,
    };
    let heads: Vec<u32> =
        types.iter().map(|kind| if kind == "sliding_attention" { kv_heads } else { global }).collect();
    w.entry("gemma4.attention.head_count_kv", &heads[..])?;
    // Layers that use the caches of others may have twice as many hidden elements.
    let hidden = config.u32("intermediate_size")?;
    let own = layers.saturating_sub(config.optional_u32("num_kv_shared_layers")?.unwrap_or(0));
    let wide = config.bool("use_double_wide_mlp")? == Some(true);
    let hidden: Vec<u32> = (0..layers)
        .map(|layer| if wide && layer >= own { hidden.saturating_mul(2) } else { hidden })
        .collect();
    w.entry("gemma4.feed_forward_length", &hidden[..])
}

/// Writes the hidden elements of Granite 4's feed-forward blocks.
fn granite_4_hidden(config: &Json, w: &mut Writer) -> Result<()> {
    let shared = config.u32("shared_intermediate_size")?;
    if config.optional_u32("num_local_experts")?.is_none_or(|count| count == 0) {
        return w.entry("granitehybrid.feed_forward_length", shared);
    }
    w.entry("granitehybrid.expert_shared_feed_forward_length", shared)?;
    w.entry("granitehybrid.feed_forward_length", config.u32("intermediate_size")?)
}

/// Writes what Mamba 2's layers have in all, and in Granite 4 whether attention has positions, and returns the vectors that are
/// matrices in files.
fn scan(config: &Json, architecture: &str, w: &mut Writer) -> Result<Vec<(&'static str, u64)>> {
    let product = |a: &str, b: &str| Ok(config.u32(a)?.saturating_mul(config.u32(b)?));
    let (inner, groups) = match architecture {
        "falcon-h1" => (config.u32("mamba_d_ssm")?, "mamba_n_groups"),
        "granitehybrid" => (product("mamba_expand", "hidden_size")?, "mamba_n_groups"),
        "mamba2" => (product("expand", "hidden_size")?, "n_groups"),
        "nemotron_h" | "nemotron_h_moe" => (product("mamba_num_heads", "mamba_head_dim")?, "n_groups"),
        _ => return Ok(Vec::new()),
    };
    w.entry(&format!("{architecture}.ssm.inner_size"), inner)?;
    if let Some(limits) = config.get("time_step_limit") {
        // Without an end: JSON has no infinity, for which the library also writes an object.
        let is_all = match limits.as_array().map(|limits| &limits[..]) {
            Some([first, end]) => {
                let end = end.get("__float__").map_or(end.is_null(), |end| end == "Infinity");
                first.as_f64() == Some(0.0) && end
            }
            _ => false,
        };
        if !is_all {
            return Err(config.missing("time_step_limit", "0 and no end"));
        }
    }
    if architecture == "granitehybrid" {
        let kind = config.get("position_embedding_type");
        let positions = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
            Some("rope") => true,
            Some("nope") | None => false,
            Some(_) => return Err(config.missing("position_embedding_type", "rope or nope")),
        };
        w.entry("granitehybrid.rope.scaling.finetuned", positions)?;
    }
    let group = inner.checked_div(config.u32(groups)?).unwrap_or(0);
    Ok(vec![(".ssm_a", 1), (".ssm_d", 1), (".ssm_norm", group.into())])
}

/// The block of a layer of Nemotron-H.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Scan,
    Attention,
    FeedForward,
    Experts,
}

/// Returns the kinds of Nemotron-H's layers, which a text or a list has.
fn nemotron_layers(config: &Json) -> Result<Vec<Block>> {
    let block = |kind: &str| match kind {
        "M" | "mamba" | "linear_attention" => Some(Block::Scan),
        "*" | "attention" | "full_attention" => Some(Block::Attention),
        "-" | "mlp" => Some(Block::FeedForward),
        "E" | "moe" => Some(Block::Experts),
        _ => None,
    };
    let key = if config.get("layers_block_type").is_some() {
        "layers_block_type"
    } else {
        "hybrid_override_pattern"
    };
    let kinds: Option<Vec<Block>> = match config.get(key) {
        Some(Value::Array(list)) => list.iter().map(|kind| block(kind.as_str()?)).collect(),
        Some(Value::String(text)) => text.chars().map(|kind| block(kind.encode_utf8(&mut [0; 4]))).collect(),
        _ => None,
    };
    let kinds = kinds.filter(|kinds| !kinds.is_empty() && kinds.len() <= MAX_EXTENT as usize);
    let kinds = kinds.ok_or_else(|| config.missing(key, "mamba, attention, mlp or moe for each layer"))?;
    match kinds.contains(&Block::FeedForward) && kinds.contains(&Block::Experts) {
        true => Err(config.wrong(key, "mlp or moe", "both")),
        false => Ok(kinds),
    }
}

/// Writes what each of Nemotron-H's layers has.
fn nemotron_blocks(config: &Json, architecture: &str, kinds: &[Block], w: &mut Writer) -> Result<()> {
    if kinds.is_empty() {
        return Ok(());
    }
    let of =
        |kind, value| kinds.iter().map(|other| if *other == kind { value } else { 0 }).collect::<Vec<u32>>();
    w.entry(&format!("{architecture}.block_count"), kinds.len() as u32)?;
    let heads = of(Block::Attention, config.u32("num_key_value_heads")?);
    w.entry(&format!("{architecture}.attention.head_count_kv"), &heads[..])?;
    let hidden = match kinds.contains(&Block::Experts) {
        true => of(Block::Experts, config.u32("moe_intermediate_size")?),
        false => of(Block::FeedForward, config.u32("intermediate_size")?),
    };
    w.entry(&format!("{architecture}.feed_forward_length"), &hidden[..])
}

/// Writes the hidden elements of Gemma 3n's layers, and checks which gates are sparse: files do not say so.
fn gemma_3n_layers(config: &Json, layers: u32, w: &mut Writer) -> Result<()> {
    let hidden = config.get("intermediate_size");
    let list = match hidden.and_then(Value::as_array) {
        Some(list) => {
            list.iter().map(|hidden| hidden.as_u64().and_then(|hidden| hidden.try_into().ok())).collect()
        }
        None => Some(vec![config.u32("intermediate_size")?; layers as usize]),
    };
    let list: Option<Vec<u32>> = list.filter(|list: &Vec<u32>| list.len() == layers as usize);
    let list = list.ok_or_else(|| config.missing("intermediate_size", "a number for each layer"))?;
    w.entry("gemma3n.feed_forward_length", &list[..])?;
    let sparse = |(layer, share): (usize, &Value)| {
        share.as_f64() == Some(if layer < SPARSE_LAYERS { SPARSE_SHARE } else { 0.0 })
    };
    let shares = config.get("activation_sparsity_pattern").and_then(Value::as_array);
    match shares.filter(|shares| shares.len() == layers as usize && shares.iter().enumerate().all(sparse)) {
        Some(_) => Ok(()),
        None => {
            let expected =
                format!("{SPARSE_SHARE} for the first {SPARSE_LAYERS} layers, and 0 for the others");
            Err(config.missing("activation_sparsity_pattern", &expected))
        }
    }
}

/// Returns the factors that Falcon-H1 has on results of its matrices, by rows: the end of each part and its factor.
fn falcon_factors(config: &Json) -> Result<Factors> {
    let one = |key: &str| Ok(config.optional_f64(key)?.unwrap_or(1.0) as f32);
    let list = |key: &str, count: usize| {
        let list = config.optional_f32s(key)?.unwrap_or_else(|| vec![1.0; count]);
        if list.len() == count { Ok(list) } else { Err(config.missing(key, &format!("{count} numbers"))) }
    };
    let (attention, scan) = (one("attention_in_multiplier")?, one("ssm_in_multiplier")?);
    let (mlp, parts) = (list("mlp_multipliers", 2)?, list("ssm_multipliers", 5)?);
    let inner = config.u32("mamba_d_ssm")? as usize;
    let states = config.u32("mamba_n_groups")?.saturating_mul(config.u32("mamba_d_state")?) as usize;
    let (mut end, mut of_scan) = (0usize, Vec::new());
    for (length, part) in [inner, inner, states, states, usize::MAX].into_iter().zip(parts) {
        end = end.saturating_add(length);
        of_scan.push((end, scan * part));
    }
    let (embedding, output) = (one("embedding_multiplier")?, one("lm_head_multiplier")?);
    if config.bool("tie_word_embeddings")? == Some(true) && embedding != output {
        return Err(config.wrong(
            "tie_word_embeddings",
            "false, because both have factors of their own",
            true,
        ));
    }
    let all = |factor| vec![(usize::MAX, factor)];
    Ok(vec![
        ("token_embd", all(embedding)),
        ("output", all(output)),
        (".attn_q", all(attention)),
        (".attn_k", all(attention * one("key_multiplier")?)),
        (".attn_v", all(attention)),
        (".attn_output", all(one("attention_out_multiplier")?)),
        (".ssm_in", of_scan),
        (".ssm_out", all(one("ssm_out_multiplier")?)),
        (".ffn_gate", all(mlp[0])),
        (".ffn_down", all(mlp[1])),
    ])
}

/// Writes what Qwen 3.5's recurrent layers have in all, and returns the weights whose rows or columns follow
/// value heads.
fn value_heads(
    config: &Json,
    architecture: &str,
    w: &mut Writer,
) -> Result<Vec<(&'static str, Axis, ValueHeads)>> {
    let extent = |name: &str| match config.u32(name)? {
        value @ 1..=MAX_EXTENT => Ok(value as usize),
        value => Err(config.wrong(name, &format!("1 to {MAX_EXTENT}"), value)),
    };
    let (keys, values) = (extent("linear_num_key_heads")?, extent("linear_num_value_heads")?);
    let (key, value) = (extent("linear_key_head_dim")?, extent("linear_value_head_dim")?);
    if !values.is_multiple_of(keys) {
        let expected = format!("a multiple of the {keys} heads of keys");
        return Err(config.wrong("linear_num_value_heads", &expected, values));
    }
    w.entry(
        &format!("{architecture}.ssm.inner_size"),
        values.saturating_mul(value).min(u32::MAX as usize) as u32,
    )?;
    if architecture == "qwen3next" {
        // Its files keep heads that share a key side by side.
        return Ok(Vec::new());
    }
    let heads = |start, length| ValueHeads { start, keys, shared: values / keys, length };
    let (rows, single) = (heads(0, value), heads(0, 1));
    let after_keys = heads(keys.saturating_mul(key).saturating_mul(2), value);
    Ok(vec![
        (".attn_qkv", Axis::Rows, after_keys),
        (".ssm_conv1d", Axis::Rows, after_keys),
        (".attn_gate", Axis::Rows, rows),
        (".ssm_out", Axis::Columns, rows),
        (".ssm_beta", Axis::Rows, single),
        (".ssm_alpha", Axis::Rows, single),
        (".ssm_a", Axis::Rows, single),
        (".ssm_dt", Axis::Rows, single),
    ])
}

/// Writes the sections of rotated pairs that images use.
fn sections(config: &Json, architecture: &str, w: &mut Writer) -> Result<()> {
    if !matches!(architecture, "qwen2vl" | "qwen35" | "qwen35moe" | "qwen3vl" | "qwen3vlmoe") {
        return Ok(());
    }
    for key in ["rope_parameters", "rope_scaling"] {
        if let Some(rope) = config.object(key)?
            && let Some(sections) = rope.optional_f32s("mrope_section")?
        {
            let sections: Vec<u32> = sections.iter().map(|&pairs| pairs as u32).chain([0]).collect();
            return w.entry(&format!("{architecture}.rope.dimension_sections"), &sections[..]);
        }
    }
    Ok(())
}

/// Returns the parts of Qwen3-Next's first matrix, which has for each head of keys its query and key, and the values and gates that
/// share them.
fn neighbours(config: &Json) -> Result<[(&'static str, &'static str, Rows); 2]> {
    let [keys, values, key, value] =
        ["linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"]
            .map(|name| config.u32(name).map(|extent| extent.min(MAX_EXTENT) as usize));
    let (key, shared) = (key?, values?.checked_div(keys?).unwrap_or(0).saturating_mul(value?));
    let values = (2 * key).saturating_add(shared);
    let ends = [key, 2 * key, values, values.saturating_add(shared)];
    let rows = |parts| Rows::Heads { length: ends[3], parts, shape: Shape::Matrix };
    Ok([
        (
            "blk.{}.attn_qkv.weight",
            "blk.{}.attn_qkvz.weight",
            rows(vec![0..ends[0], ends[0]..ends[1], ends[1]..ends[2]]),
        ),
        (
            "blk.{}.attn_gate.weight",
            "blk.{}.attn_qkvz.weight",
            rows(std::iter::once(ends[2]..ends[3]).collect()),
        ),
    ])
}

/// A dimension of a head.
fn extent(config: &Json, name: &'static str) -> Result<u32> {
    match config.u32(name)? {
        value @ 1..=MAX_EXTENT => Ok(value),
        value => Err(config.wrong(name, &format!("1 to {MAX_EXTENT}"), value)),
    }
}

/// Writes DeepSeek's latent attention, and returns what becomes of its matrix of keys and values: files have the keys of each head
/// transposed, because queries are multiplied with them.
fn latent(config: &Json, w: &mut Writer) -> Result<[(&'static str, &'static str, Rows); 2]> {
    let extent = |name| extent(config, name);
    let (rank, turned) = (extent("kv_lora_rank")?, extent("qk_rope_head_dim")?);
    let (plain, value) = (extent("qk_nope_head_dim")?, extent("v_head_dim")?);
    if let Some(rank) = config.optional_u32("q_lora_rank")? {
        w.entry("deepseek2.attention.q_lora_rank", rank)?;
    }
    for (key, value) in [
        ("kv_lora_rank", rank),
        ("key_length", rank + turned),
        ("value_length", rank),
        ("key_length_mla", plain + turned),
        ("value_length_mla", value),
    ] {
        w.entry(&format!("deepseek2.attention.{key}"), value)?;
    }
    let (plain, value) = (plain as usize, value as usize);
    let part = |part, shape| Rows::Heads { length: plain + value, parts: vec![part], shape };
    Ok([
        ("blk.{}.attn_k_b.weight", "blk.{}.attn_kv_b.weight", part(0..plain, Shape::Transposed)),
        ("blk.{}.attn_v_b.weight", "blk.{}.attn_kv_b.weight", part(plain..plain + value, Shape::Heads)),
    ])
}

/// Writes the sliding window and its layers.
fn window(config: &Json, family: &Family, layers: u32, w: &mut Writer) -> Result<()> {
    if family.architecture == "llama4" {
        // Files do not have its chunks.
        return Ok(());
    }
    // The libraries of families without a default of this option ignore it.
    let has_default = |option: &str| family.defaults.iter().any(|(key, _)| *key == option);
    let has_switch = has_default("use_sliding_window");
    let uses = !has_switch || config.bool("use_sliding_window")? != Some(false);
    let has = uses && family.window != Window::None;
    let Some(length) = config.optional_u32("sliding_window")?.filter(|_| has) else {
        let types = config.get("layer_types").and_then(Value::as_array);
        // Layers without attention are of no concern here.
        let all = family.recurrent.is_empty() && family.has_rope;
        let wrong = |kind: &&Value| **kind == "sliding_attention" || all && **kind != "full_attention";
        return match types.into_iter().flatten().find(wrong) {
            Some(kind) if kind != "sliding_attention" || family.window == Window::None => {
                Err(config.wrong("layer_types", "full_attention for each layer", kind))
            }
            Some(_) if uses => Err(config.missing("sliding_window", "the window of layer_types")),
            Some(_) => Err(config.wrong("use_sliding_window", "true, because of layer_types", false)),
            None => Ok(()),
        };
    };
    let by_period = |period: u32| (1..=layers).map(move |layer| layer.checked_rem(period) != Some(0));
    let default: Vec<bool> = match family.window {
        Window::None | Window::All => vec![true; layers as usize],
        Window::Period(period) | Window::OwnPeriod(period) => by_period(period).collect(),
    };
    let period = ["sliding_window_pattern", "_sliding_window_pattern"];
    let has_period = matches!(family.window, Window::OwnPeriod(_));
    let period = period.into_iter().find(|key| has_period && config.get(key).is_some());
    let windowed: Vec<bool> = match (config.get("layer_types"), period) {
        (Some(types), _) => {
            let windowed = |kind: &Value| match kind.as_str() {
                Some("sliding_attention") => Some(true),
                Some("full_attention") => Some(false),
                _ => None,
            };
            let list: Option<Vec<bool>> =
                types.as_array().and_then(|list| list.iter().map(windowed).collect());
            let expected = "sliding_attention or full_attention for each layer";
            let list = list.filter(|list| list.len() == layers as usize);
            list.ok_or_else(|| config.wrong("layer_types", expected, types))?
        }
        (None, Some(period)) => by_period(config.u32(period)?).collect(),
        // Windows begin at a layer that the model does not have.
        (None, None) if has_default("max_window_layers") && config.u32("max_window_layers")? >= layers => {
            return Ok(());
        }
        // Versions of the library chose the layers differently.
        (None, None) if has_switch || config.get("max_window_layers").is_some() => {
            return Err(config.missing("layer_types", "a list beside max_window_layers"));
        }
        (None, None) => default.clone(),
    };
    // Files of these always list the layers.
    let lists = matches!(family.architecture, "exaone4" | "exaone-moe" | "gemma3n" | "gemma4");
    if windowed != default || lists {
        match family.window {
            Window::All if windowed.contains(&true) => {
                return Err(config.wrong("layer_types", "the same for every layer", "some of each"));
            }
            Window::None | Window::All => return Ok(()),
            Window::Period(_) | Window::OwnPeriod(_) => {
                w.entry(&format!("{}.attention.sliding_window_pattern", family.architecture), &windowed[..])?;
            }
        }
    }
    w.entry(&format!("{}.attention.sliding_window", family.architecture), length)
}
