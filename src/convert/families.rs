//! The decoders: each family's names of weights and options, in folders and in GGUF files.

use super::options::{Key, Kind, Only};
use crate::model::llama4::CHUNK;

pub(super) type Names = &'static [(&'static str, &'static str)];

/// The differences between families.
pub(super) struct Family {
    /// `model_type` of config.json, and `general.architecture`.
    pub(super) model_type: &'static str,
    pub(super) architecture: &'static str,
    /// Optional prefixes of names.
    pub(super) prefixes: &'static [&'static str],
    /// The family's own names, which come before [`NAMES`].
    pub(super) names: &'static [Names],
    /// The name of the output matrix.
    pub(super) output: &'static str,
    /// Names to ignore, besides [`UNUSED`].
    pub(super) unused: &'static [&'static str],
    /// The family's own options.
    pub(super) keys: &'static [Key],
    /// Keys of all families that it lacks, or whose values are its own.
    pub(super) without: &'static [&'static str],
    /// Keys that are the same for all its models.
    pub(super) fixed: &'static [(&'static str, u32)],
    pub(super) defaults: Defaults,
    /// Options with a single supported value.
    pub(super) only: &'static [(&'static str, Only)],
    /// Whether rows are reordered: published weights rotate elements `(i, i + n / 2)` of a head, GGUF files
    /// adjacent ones.
    pub(super) interleaved: bool,
    /// Ends of the names in GGUF files, without `.weight`, of plain matrices that the family multiplies with from the right.
    pub(super) by_columns: &'static [&'static str],
    /// Added to the weights of norms.
    pub(super) norm_offset: f32,
    pub(super) window: Window,
    /// Whether it has rotary positions.
    pub(super) has_rope: bool,
    /// Whether tokens see later ones, too, as `use_bidirectional_attention` says: an encoder.
    pub(super) both_ways: bool,
    /// What layers without attention are called in `layer_types`; nothing: all have it.
    pub(super) recurrent: &'static [&'static str],
    /// Default base of rotary frequencies.
    pub(super) rope_base: Option<f64>,
}

/// The layers with a sliding window.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Window {
    /// None: the library ignores the option.
    None,
    /// All layers, if the config has a window.
    All,
    /// All layers but the last of each period, unless the config lists the layers.
    Period(u32),
    /// The same, unless the config has another period.
    OwnPeriod(u32),
}

/// Required options.
pub(super) const REQUIRED: &[Key] = &[
    ("context_length", &["max_position_embeddings"], Kind::U32),
    ("embedding_length", &["hidden_size"], Kind::U32),
    ("block_count", &["num_hidden_layers"], Kind::U32),
    ("feed_forward_length", &["intermediate_size"], Kind::U32),
    ("attention.head_count", &["num_attention_heads"], Kind::U32),
    ("vocab_size", &["vocab_size"], Kind::U32),
];

/// Optional options. If a family requires one, opening the result reports it.
pub(super) const OPTIONAL: &[Key] = &[
    ("attention.head_count_kv", &["num_key_value_heads"], Kind::U32),
    ("attention.key_length", &["head_dim"], Kind::U32),
    ("attention.value_length", &["head_dim"], Kind::U32),
    ("attention.layer_norm_rms_epsilon", &["rms_norm_eps", "norm_eps"], Kind::F32),
    ("attention.layer_norm_epsilon", &["layer_norm_eps", "norm_epsilon"], Kind::F32),
    ("expert_count", &["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], Kind::U32),
    ("expert_used_count", &["num_experts_per_tok", "moe_k"], Kind::U32),
];

/// Names that most families have, without `model.` in front.
pub(super) const NAMES: Names = &[
    ("embed_tokens", "token_embd"),
    ("norm", "output_norm"),
    ("lm_head", "output"),
    ("layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    ("layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    ("layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
];

/// Norms after the blocks as well as before them, or instead.
pub(super) const POST_NORMS: Names = &[
    ("layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
    ("layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
    ("layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
];

/// GLM's names: gate and up are in one weight.
pub(super) const GLM: Names = &[("layers.{}.mlp.gate_up_proj", "blk.{}.ffn_up")];

/// GLM-4-0414's norms after its blocks.
pub(super) const GLM_4: Names = &[
    ("layers.{}.post_self_attn_layernorm", "blk.{}.post_attention_norm"),
    ("layers.{}.post_mlp_layernorm", "blk.{}.post_ffw_norm"),
    ("layers.{}.mlp.gate_up_proj", "blk.{}.ffn_up"),
];

/// Gemma 4's names.
pub(super) const GEMMA_4: Names = &[
    ("embed_tokens_per_layer", "per_layer_token_embd"),
    ("per_layer_model_projection", "per_layer_model_proj"),
    ("per_layer_projection_norm", "per_layer_proj_norm"),
    ("layers.{}.per_layer_input_gate", "blk.{}.inp_gate"),
    ("layers.{}.per_layer_projection", "blk.{}.proj"),
    ("layers.{}.post_per_layer_input_norm", "blk.{}.post_norm"),
    ("layers.{}.layer_scalar", "blk.{}.layer_output_scale.weight"),
];

/// Gemma 4's names of its mixtures of experts.
const GEMMA_4_EXPERTS: Names = &[
    ("layers.{}.router.scale", "blk.{}.ffn_gate_inp.scale"),
    ("layers.{}.router.per_expert_scale", "blk.{}.ffn_down_exps.scale"),
    ("layers.{}.router.proj", "blk.{}.ffn_gate_inp"),
    ("layers.{}.experts.gate_up_proj", "blk.{}.ffn_gate_up_exps.weight"),
    ("layers.{}.experts.down_proj", "blk.{}.ffn_down_exps.weight"),
    ("layers.{}.post_feedforward_layernorm_1", "blk.{}.post_ffw_norm_1"),
    ("layers.{}.pre_feedforward_layernorm_2", "blk.{}.pre_ffw_norm_2"),
    ("layers.{}.post_feedforward_layernorm_2", "blk.{}.post_ffw_norm_2"),
];

/// gpt-oss's names.
pub(super) const GPT_OSS: Names = &[
    ("layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
    ("layers.{}.self_attn.sinks", "blk.{}.attn_sinks.weight"),
    ("layers.{}.mlp.router", "blk.{}.ffn_gate_inp"),
    ("layers.{}.mlp.experts.gate_up_proj", "blk.{}.ffn_gate_up_exps.weight"),
    ("layers.{}.mlp.experts.gate_up_proj_bias", "blk.{}.ffn_gate_up_exps.bias"),
    ("layers.{}.mlp.experts.down_proj", "blk.{}.ffn_down_exps.weight"),
    ("layers.{}.mlp.experts.down_proj_bias", "blk.{}.ffn_down_exps.bias"),
];

/// Granite 4's names. Without experts, the block for all tokens is the only one.
pub(super) const GRANITE_4: Names = &[
    ("layers.{}.mamba.in_proj", "blk.{}.ssm_in"),
    ("layers.{}.mamba.conv1d", "blk.{}.ssm_conv1d"),
    ("layers.{}.mamba.A_log", "blk.{}.ssm_a"),
    ("layers.{}.mamba.D", "blk.{}.ssm_d"),
    ("layers.{}.mamba.dt_bias", "blk.{}.ssm_dt.bias"),
    ("layers.{}.mamba.norm", "blk.{}.ssm_norm"),
    ("layers.{}.mamba.out_proj", "blk.{}.ssm_out"),
    ("layers.{}.block_sparse_moe.router.layer", "blk.{}.ffn_gate_inp"),
    ("layers.{}.block_sparse_moe.input_linear", "blk.{}.ffn_gate_up_exps"),
    ("layers.{}.block_sparse_moe.output_linear", "blk.{}.ffn_down_exps"),
];
pub(super) const GRANITE_4_ONLY: Names = &[
    ("layers.{}.shared_mlp.input_linear", "blk.{}.ffn_gate_up"),
    ("layers.{}.shared_mlp.output_linear", "blk.{}.ffn_down"),
];
pub(super) const GRANITE_4_SHARED: Names = &[
    ("layers.{}.shared_mlp.input_linear", "blk.{}.ffn_gate_up_shexp"),
    ("layers.{}.shared_mlp.output_linear", "blk.{}.ffn_down_shexp"),
];

pub(super) const LFM2: Names = &[
    ("embedding_norm", "token_embd_norm"),
    ("layers.{}.operator_norm", "blk.{}.attn_norm"),
    ("layers.{}.ffn_norm", "blk.{}.ffn_norm"),
    ("layers.{}.conv.conv", "blk.{}.shortconv.conv"),
    ("layers.{}.conv.in_proj", "blk.{}.shortconv.in_proj"),
    ("layers.{}.conv.out_proj", "blk.{}.shortconv.out_proj"),
    ("layers.{}.self_attn.out_proj", "blk.{}.attn_output"),
    ("layers.{}.self_attn.q_layernorm", "blk.{}.attn_q_norm"),
    ("layers.{}.self_attn.k_layernorm", "blk.{}.attn_k_norm"),
    ("layers.{}.feed_forward.w1", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.w2", "blk.{}.ffn_down"),
    ("layers.{}.feed_forward.w3", "blk.{}.ffn_up"),
];

pub(super) const LFM2_EXPERTS: Names = &[
    ("layers.{}.feed_forward.gate", "blk.{}.ffn_gate_inp"),
    ("layers.{}.feed_forward.expert_bias", "blk.{}.exp_probs_b.bias"),
    ("layers.{}.feed_forward.experts.{}.w1", "blk.{}.ffn_gate_exps"),
    ("layers.{}.feed_forward.experts.{}.w2", "blk.{}.ffn_down_exps"),
    ("layers.{}.feed_forward.experts.{}.w3", "blk.{}.ffn_up_exps"),
];

/// Experts are tensors of their own, or parts of one.
pub(super) const EXPERTS: Names = &[
    ("layers.{}.mlp.gate", "blk.{}.ffn_gate_inp"),
    ("layers.{}.mlp.experts.{}.gate_proj", "blk.{}.ffn_gate_exps"),
    ("layers.{}.mlp.experts.{}.up_proj", "blk.{}.ffn_up_exps"),
    ("layers.{}.mlp.experts.{}.down_proj", "blk.{}.ffn_down_exps"),
    ("layers.{}.mlp.experts.gate_up_proj", "blk.{}.ffn_gate_up_exps.weight"),
    ("layers.{}.mlp.experts.down_proj", "blk.{}.ffn_down_exps.weight"),
    ("layers.{}.mlp.gate.e_score_correction_bias", "blk.{}.exp_probs_b.bias"),
    ("layers.{}.mlp.e_score_correction_bias", "blk.{}.exp_probs_b.bias"),
    ("layers.{}.mlp.shared_expert_gate", "blk.{}.ffn_gate_inp_shexp"),
    ("layers.{}.mlp.shared_expert.gate_proj", "blk.{}.ffn_gate_shexp"),
    ("layers.{}.mlp.shared_expert.up_proj", "blk.{}.ffn_up_shexp"),
    ("layers.{}.mlp.shared_expert.down_proj", "blk.{}.ffn_down_shexp"),
    ("layers.{}.mlp.shared_experts.gate_proj", "blk.{}.ffn_gate_shexp"),
    ("layers.{}.mlp.shared_experts.up_proj", "blk.{}.ffn_up_shexp"),
    ("layers.{}.mlp.shared_experts.down_proj", "blk.{}.ffn_down_shexp"),
];

/// Keys of mixtures of many small experts.
pub(super) const MIXTURE: &[Key] = &[
    ("leading_dense_block_count", &["first_k_dense_replace", "moe_layer_start_index"], Kind::U32),
    ("interleave_moe_layer_step", &["moe_layer_interval"], Kind::U32),
    ("expert_feed_forward_length", &["moe_intermediate_size"], Kind::U32),
    (
        "expert_shared_feed_forward_length",
        &["shared_expert_intermediate_size", "shared_intermediate_size"],
        Kind::U32,
    ),
    ("expert_shared_count", &["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], Kind::U32),
    ("expert_group_count", &["n_group"], Kind::U32),
    ("expert_group_used_count", &["topk_group"], Kind::U32),
    ("expert_weights_norm", &["norm_topk_prob"], Kind::Bool),
    ("expert_weights_scale", &["routed_scaling_factor"], Kind::F32),
];

/// A value of `expert_gating_func`.
const SIGMOID: &[(&str, u32)] = &[("expert_gating_func", 2)];

/// Options of mixtures with a single supported value.
const ALL_LAYERS: [(&str, Only); 2] =
    [("decoder_sparse_step", Only::Number(1.0)), ("mlp_only_layers", Only::Nothing)];

/// Keys of Granite's factors.
const GRANITE_FACTORS: &[Key] = &[
    ("attention.scale", &["attention_multiplier"], Kind::F32),
    ("embedding_scale", &["embedding_multiplier"], Kind::F32),
    ("residual_scale", &["residual_multiplier"], Kind::F32),
    ("logit_scale", &["logits_scaling"], Kind::F32),
];

/// Values of options that folders leave out, as JSON has them: those of the library transformers.
type Defaults = &'static [(&'static str, &'static str)];

const TIED: (&str, &str) = ("tie_word_embeddings", "true");
const WINDOW: (&str, &str) = ("sliding_window", "4096");
const HALF_ROTATES: (&str, &str) = ("partial_rotary_factor", "0.5");
const QUARTER_ROTATES: (&str, &str) = ("partial_rotary_factor", "0.25");
const NORMALIZES: (&str, &str) = ("norm_topk_prob", "true");
const NO_WINDOW: Defaults = &[("use_sliding_window", "false")];
const GRANITE_DEFAULTS: [(&str, &str); 4] = [
    ("attention_multiplier", "1.0"),
    ("embedding_multiplier", "1.0"),
    ("residual_multiplier", "1.0"),
    ("logits_scaling", "1.0"),
];

/// Published models that also see name few options.
const GEMMA_3_DEFAULTS: Defaults = &[
    ("head_dim", "256"),
    ("max_position_embeddings", "131072"),
    ("num_attention_heads", "8"),
    ("num_key_value_heads", "4"),
    ("query_pre_attn_scalar", "256"),
    ("rms_norm_eps", "1e-6"),
    ("vocab_size", "262208"),
    TIED,
    WINDOW,
];

/// Matrices of experts.
const EXPERTS_BY_COLUMNS: &[&str] = &["_exps"];

/// Names of norms behind the blocks alone.
const RESULT_NORMS: Names = &[
    ("layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
    ("layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
];

const GPT_NEOX: Names = &[
    ("embed_in", "token_embd"),
    ("final_layer_norm", "output_norm"),
    ("embed_out", "output"),
    ("layers.{}.attention.query_key_value", "blk.{}.attn_qkv"),
    ("layers.{}.attention.dense", "blk.{}.attn_output"),
    ("layers.{}.mlp.dense_h_to_4h", "blk.{}.ffn_up"),
    ("layers.{}.mlp.dense_4h_to_h", "blk.{}.ffn_down"),
];

const GPT_2: Names = &[
    ("wte", "token_embd"),
    ("wpe", "position_embd"),
    ("ln_f", "output_norm"),
    ("h.{}.ln_1", "blk.{}.attn_norm"),
    ("h.{}.attn.c_attn", "blk.{}.attn_qkv"),
    ("h.{}.attn.c_proj", "blk.{}.attn_output"),
    ("h.{}.ln_2", "blk.{}.ffn_norm"),
    ("h.{}.mlp.c_fc", "blk.{}.ffn_up"),
    ("h.{}.mlp.c_proj", "blk.{}.ffn_down"),
];

const LLAMA_4: Names = &[
    ("layers.{}.feed_forward.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.up_proj", "blk.{}.ffn_up"),
    ("layers.{}.feed_forward.down_proj", "blk.{}.ffn_down"),
    ("layers.{}.feed_forward.router", "blk.{}.ffn_gate_inp"),
    ("layers.{}.feed_forward.experts.gate_up_proj", "blk.{}.ffn_gate_up_exps.weight"),
    ("layers.{}.feed_forward.experts.down_proj", "blk.{}.ffn_down_exps.weight"),
    ("layers.{}.feed_forward.shared_expert.gate_proj", "blk.{}.ffn_gate_shexp"),
    ("layers.{}.feed_forward.shared_expert.up_proj", "blk.{}.ffn_up_shexp"),
    ("layers.{}.feed_forward.shared_expert.down_proj", "blk.{}.ffn_down_shexp"),
];

const PHI_2: Names = &[
    ("final_layernorm", "output_norm"),
    ("layers.{}.self_attn.dense", "blk.{}.attn_output"),
    ("layers.{}.mlp.fc1", "blk.{}.ffn_up"),
    ("layers.{}.mlp.fc2", "blk.{}.ffn_down"),
];

const MIXTRAL: Names = &[
    ("layers.{}.block_sparse_moe.gate", "blk.{}.ffn_gate_inp"),
    ("layers.{}.block_sparse_moe.e_score_correction_bias", "blk.{}.exp_probs_b.bias"),
    ("layers.{}.block_sparse_moe.experts.{}.w1", "blk.{}.ffn_gate_exps"),
    ("layers.{}.block_sparse_moe.experts.{}.w2", "blk.{}.ffn_down_exps"),
    ("layers.{}.block_sparse_moe.experts.{}.w3", "blk.{}.ffn_up_exps"),
];

/// Gemma 3n's names; numbers of the tensors outside layers are those of streams.
const GEMMA_3N: Names = &[
    ("altup_projections.{}", "altup_proj"),
    ("altup_unembed_projections.{}", "altup_unembd_proj"),
    ("layers.{}.altup.correct_output_scale", "blk.{}.altup_correct_scale.weight"),
    ("layers.{}.altup.correction_coefs", "blk.{}.altup_correct_coef"),
    ("layers.{}.altup.modality_router", "blk.{}.altup_router"),
    ("layers.{}.altup.prediction_coefs", "blk.{}.altup_predict_coef"),
    ("layers.{}.altup.router_norm", "blk.{}.altup_router_norm"),
    ("layers.{}.laurel.linear_left", "blk.{}.laurel_l"),
    ("layers.{}.laurel.linear_right", "blk.{}.laurel_r"),
    ("layers.{}.laurel.post_laurel_norm", "blk.{}.laurel_post_norm"),
];

/// Mamba's names, those of both versions.
const MAMBA: Names = &[
    ("embeddings", "token_embd"),
    ("norm_f", "output_norm"),
    ("layers.{}.norm", "blk.{}.attn_norm"),
    ("layers.{}.mixer.in_proj", "blk.{}.ssm_in"),
    ("layers.{}.mixer.conv1d", "blk.{}.ssm_conv1d"),
    ("layers.{}.mixer.x_proj", "blk.{}.ssm_x"),
    ("layers.{}.mixer.dt_proj", "blk.{}.ssm_dt"),
    ("layers.{}.mixer.dt_bias", "blk.{}.ssm_dt.bias"),
    ("layers.{}.mixer.A_log", "blk.{}.ssm_a"),
    ("layers.{}.mixer.D", "blk.{}.ssm_d"),
    ("layers.{}.mixer.norm", "blk.{}.ssm_norm"),
    ("layers.{}.mixer.out_proj", "blk.{}.ssm_out"),
];

/// Nemotron-H's names, besides Mamba's: each layer has a block of one kind.
const NEMOTRON_H: Names = &[
    ("layers.{}.mixer.q_proj", "blk.{}.attn_q"),
    ("layers.{}.mixer.k_proj", "blk.{}.attn_k"),
    ("layers.{}.mixer.v_proj", "blk.{}.attn_v"),
    ("layers.{}.mixer.o_proj", "blk.{}.attn_output"),
    ("layers.{}.mixer.up_proj", "blk.{}.ffn_up"),
    ("layers.{}.mixer.down_proj", "blk.{}.ffn_down"),
    ("layers.{}.mixer.gate", "blk.{}.ffn_gate_inp"),
    ("layers.{}.mixer.gate.e_score_correction_bias", "blk.{}.exp_probs_b.bias"),
    ("layers.{}.mixer.experts.{}.up_proj", "blk.{}.ffn_up_exps"),
    ("layers.{}.mixer.experts.{}.down_proj", "blk.{}.ffn_down_exps"),
    ("layers.{}.mixer.shared_experts.up_proj", "blk.{}.ffn_up_shexp"),
    ("layers.{}.mixer.shared_experts.down_proj", "blk.{}.ffn_down_shexp"),
    ("layers.{}.mixer.fc1_latent_proj", "blk.{}.ffn_latent_down"),
    ("layers.{}.mixer.fc2_latent_proj", "blk.{}.ffn_latent_up"),
];

const FALCON_H1: Names = &[
    ("final_layernorm", "output_norm"),
    // Its files leave out the ending.
    ("layers.{}.pre_ff_layernorm.weight", "blk.{}.ffn_norm"),
    ("layers.{}.feed_forward.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.up_proj", "blk.{}.ffn_up"),
    ("layers.{}.feed_forward.down_proj", "blk.{}.ffn_down"),
];

/// Keys of what models of Mamba alone lack.
const NO_ATTENTION: &[&str] = &[
    "context_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
];
const ANY_LENGTH: &[(&str, u32)] =
    &[("context_length", 1 << 20), ("feed_forward_length", 0), ("attention.head_count", 0)];

/// DeepSeek's latent attention. The matrix of keys and values becomes two.
const LATENT: Names = &[
    ("layers.{}.self_attn.q_a_proj", "blk.{}.attn_q_a"),
    ("layers.{}.self_attn.q_a_layernorm", "blk.{}.attn_q_a_norm"),
    ("layers.{}.self_attn.q_b_proj", "blk.{}.attn_q_b"),
    ("layers.{}.self_attn.kv_a_proj_with_mqa", "blk.{}.attn_kv_a_mqa"),
    ("layers.{}.self_attn.kv_a_layernorm", "blk.{}.attn_kv_a_norm"),
    ("layers.{}.self_attn.kv_b_proj", "blk.{}.attn_kv_b"),
];

/// Keys of Qwen 3.5's recurrent layers; a mixture also has those of its experts.
pub(super) const DELTA_NET: &[Key] = &[
    ("ssm.conv_kernel", &["linear_conv_kernel_dim"], Kind::U32),
    ("ssm.state_size", &["linear_key_head_dim"], Kind::U32),
    ("ssm.group_count", &["linear_num_key_heads"], Kind::U32),
    ("ssm.time_step_rank", &["linear_num_value_heads"], Kind::U32),
    ("expert_feed_forward_length", &["moe_intermediate_size"], Kind::U32),
    ("expert_shared_feed_forward_length", &["shared_expert_intermediate_size"], Kind::U32),
];

const QWEN_3_NEXT: Names = &[
    ("layers.{}.linear_attn.in_proj_qkvz", "blk.{}.attn_qkvz"),
    ("layers.{}.linear_attn.in_proj_ba", "blk.{}.ssm_ba"),
];

pub(super) const QWEN_3_5: Names = &[
    ("layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
    ("layers.{}.linear_attn.in_proj_qkv", "blk.{}.attn_qkv"),
    ("layers.{}.linear_attn.in_proj_z", "blk.{}.attn_gate"),
    ("layers.{}.linear_attn.in_proj_b", "blk.{}.ssm_beta"),
    ("layers.{}.linear_attn.in_proj_a", "blk.{}.ssm_alpha"),
    ("layers.{}.linear_attn.conv1d", "blk.{}.ssm_conv1d"),
    ("layers.{}.linear_attn.A_log", "blk.{}.ssm_a"),
    ("layers.{}.linear_attn.dt_bias", "blk.{}.ssm_dt.bias"),
    ("layers.{}.linear_attn.norm", "blk.{}.ssm_norm"),
    ("layers.{}.linear_attn.out_proj", "blk.{}.ssm_out"),
];

/// Ignored tensors: RoPE frequencies, which are computed.
pub(super) const UNUSED: &[&str] = &["*.rotary_emb.inv_freq"];

/// The most common option.
const SILU: (&str, Only) = ("hidden_act", Only::Text("silu"));

/// Llama; the families below state their differences from it.
pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "llama",
    prefixes: &["model."],
    names: &[],
    output: "lm_head",
    unused: &[],
    keys: &[],
    without: &[],
    fixed: &[],
    defaults: &[],
    only: &[("hidden_act", Only::Text("silu"))],
    interleaved: true,
    by_columns: &[],
    norm_offset: 0.0,
    window: Window::None,
    has_rope: true,
    both_ways: false,
    recurrent: &[],
    rope_base: None,
};

pub(super) const GEMMA: Family = Family {
    names: &[POST_NORMS],
    keys: &[
        ("attn_logit_softcapping", &["attn_logit_softcapping"], Kind::F32),
        ("final_logit_softcapping", &["final_logit_softcapping"], Kind::F32),
    ],
    only: &[
        ("hidden_activation", Only::Text("gelu_pytorch_tanh")),
        ("use_bidirectional_attention", Only::Bool(false)),
    ],
    interleaved: false,
    norm_offset: 1.0,
    ..LLAMA
};

/// Nemotron-H without experts. Its layers' kinds make lists of heads and hidden elements.
const NEMOTRON: Family = Family {
    model_type: "nemotron_h",
    architecture: "nemotron_h",
    prefixes: &["backbone."],
    names: &[NEMOTRON_H, MAMBA],
    unused: &["mtp.*"],
    keys: &[
        ("attention.layer_norm_rms_epsilon", &["layer_norm_epsilon", "rms_norm_eps"], Kind::F32),
        ("ssm.conv_kernel", &["conv_kernel"], Kind::U32),
        ("ssm.state_size", &["ssm_state_size"], Kind::U32),
        ("ssm.group_count", &["n_groups"], Kind::U32),
        ("ssm.time_step_rank", &["mamba_num_heads"], Kind::U32),
    ],
    without: &[
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "block_count",
        "expert_count",
        "expert_used_count",
        "feed_forward_length",
    ],
    only: &[
        ("mlp_hidden_act", Only::Text("relu2")),
        ("tie_word_embeddings", Only::Bool(false)),
        ("mamba_hidden_act", Only::Text("silu")),
        ("mamba_proj_bias", Only::Bool(false)),
        ("use_bias", Only::Bool(false)),
        ("sliding_window", Only::Absent),
    ],
    has_rope: false,
    interleaved: false,
    ..LLAMA
};

const DEEPSEEK: Family = Family {
    architecture: "deepseek2",
    names: &[LATENT, EXPERTS],
    keys: MIXTURE,
    // All heads share the latent vectors.
    without: &["attention.head_count_kv", "attention.key_length", "attention.value_length"],
    fixed: &[("attention.head_count_kv", 1)],
    interleaved: false,
    ..LLAMA
};

pub(super) const OLMO: Family =
    Family { architecture: "olmo2", names: &[POST_NORMS], interleaved: false, ..LLAMA };

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_type: "arcee",
        architecture: "arcee",
        only: &[("hidden_act", Only::Text("relu2"))],
        ..LLAMA
    },
    Family {
        model_type: "bitnet",
        architecture: "bitnet-b1.58",
        names: &[&[
            ("layers.{}.self_attn.attn_sub_norm", "blk.{}.attn_sub_norm"),
            ("layers.{}.mlp.ffn_sub_norm", "blk.{}.ffn_sub_norm"),
        ]],
        only: &[("hidden_act", Only::Text("relu2"))],
        interleaved: false,
        rope_base: Some(500_000.0),
        ..LLAMA
    },
    // Its published weights already rotate adjacent elements.
    Family {
        model_type: "cohere",
        architecture: "command-r",
        defaults: &[("logit_scale", "0.0625"), TIED],
        // Published models state fewer positions than they were trained with.
        keys: &[
            ("context_length", &["model_max_length", "max_position_embeddings"], Kind::U32),
            ("logit_scale", &["logit_scale"], Kind::F32),
        ],
        without: &["context_length"],
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "cohere2",
        architecture: "cohere2",
        defaults: &[("logit_scale", "0.0625"), TIED, WINDOW],
        keys: &[("logit_scale", &["logit_scale"], Kind::F32)],
        only: &[
            ("hidden_act", Only::Text("silu")),
            ("use_qk_norm", Only::Bool(false)),
            ("rotary_pct", Only::Number(1.0)),
        ],
        // Its published weights already rotate adjacent elements.
        interleaved: false,
        window: Window::OwnPeriod(4),
        ..LLAMA
    },
    Family { model_type: "deepseek_v2", only: &[SILU, ("topk_method", Only::Text("greedy"))], ..DEEPSEEK },
    Family {
        model_type: "deepseek_v3",
        defaults: &[("n_group", "8"), NORMALIZES, ("routed_scaling_factor", "2.5"), ("topk_group", "4")],
        only: &[
            SILU,
            ("topk_method", Only::Text("noaux_tc")),
            ("scoring_func", Only::Text("sigmoid")),
            ("rope_interleave", Only::Bool(true)),
        ],
        fixed: &[("attention.head_count_kv", 1), ("expert_gating_func", 2)],
        ..DEEPSEEK
    },
    Family {
        model_type: "dots1",
        architecture: "dots1",
        names: &[EXPERTS],
        keys: MIXTURE,
        defaults: &[("max_window_layers", "62")],
        fixed: SIGMOID,
        only: &[SILU, ("scoring_func", Only::Text("noaux_tc"))],
        interleaved: false,
        window: Window::All,
        ..LLAMA
    },
    // Its published weights already rotate adjacent elements.
    Family {
        model_type: "ernie4_5",
        architecture: "ernie4_5",
        defaults: &[TIED],
        only: &[SILU, ("use_bias", Only::Bool(false))],
        interleaved: false,
        rope_base: Some(5e5),
        ..LLAMA
    },
    Family {
        model_type: "ernie4_5_moe",
        architecture: "ernie4_5-moe",
        defaults: &[("moe_num_shared_experts", "2"), TIED],
        names: &[
            &[("layers.{}.mlp.moe_statics.e_score_correction_bias", "blk.{}.exp_probs_b.bias")],
            EXPERTS,
        ],
        unused: &["mtp_*"],
        keys: MIXTURE,
        only: &[SILU, ("moe_norm_min", Only::Number(1e-12)), ("use_bias", Only::Bool(false))],
        interleaved: false,
        rope_base: Some(5e5),
        ..LLAMA
    },
    Family {
        model_type: "exaone4",
        architecture: "exaone4",
        defaults: &[WINDOW],
        names: &[RESULT_NORMS],
        interleaved: false,
        window: Window::OwnPeriod(4),
        ..LLAMA
    },
    Family {
        model_type: "exaone_moe",
        architecture: "exaone-moe",
        defaults: &[NORMALIZES, ("num_shared_experts", "1"), ("routed_scaling_factor", "2.5"), WINDOW],
        names: &[EXPERTS],
        unused: &["mtp.*"],
        keys: MIXTURE,
        fixed: SIGMOID,
        interleaved: false,
        window: Window::OwnPeriod(4),
        ..LLAMA
    },
    // Its blocks of Mamba stand beside attention.
    Family {
        model_type: "falcon_h1",
        architecture: "falcon-h1",
        names: &[FALCON_H1, GRANITE_4],
        keys: &[
            ("ssm.conv_kernel", &["mamba_d_conv"], Kind::U32),
            ("ssm.state_size", &["mamba_d_state"], Kind::U32),
            ("ssm.group_count", &["mamba_n_groups"], Kind::U32),
            ("ssm.time_step_rank", &["mamba_n_heads"], Kind::U32),
        ],
        only: &[
            SILU,
            ("attention_bias", Only::Bool(false)),
            ("mamba_proj_bias", Only::Bool(false)),
            ("mamba_rms_norm", Only::Bool(false)),
            ("mlp_bias", Only::Bool(false)),
            ("projectors_bias", Only::Bool(false)),
        ],
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "gemma",
        architecture: "gemma",
        defaults: &[TIED],
        names: &[],
        keys: &[],
        only: &[
            ("hidden_act", Only::Text("gelu_pytorch_tanh")),
            ("hidden_activation", Only::Text("gelu_pytorch_tanh")),
            ("use_bidirectional_attention", Only::Bool(false)),
        ],
        rope_base: Some(1e4),
        ..GEMMA
    },
    Family {
        model_type: "gemma2",
        architecture: "gemma2",
        defaults: &[
            ("attn_logit_softcapping", "50.0"),
            ("final_logit_softcapping", "30.0"),
            ("query_pre_attn_scalar", "256"),
            TIED,
            WINDOW,
        ],
        window: Window::Period(2),
        rope_base: Some(1e4),
        ..GEMMA
    },
    Family {
        model_type: "gemma3_text",
        architecture: "gemma3",
        defaults: GEMMA_3_DEFAULTS,
        window: Window::OwnPeriod(6),
        rope_base: Some(1e6),
        ..GEMMA
    },
    // EmbeddingGemma.
    Family {
        model_type: "gemma3_text",
        architecture: "gemma-embedding",
        defaults: GEMMA_3_DEFAULTS,
        rope_base: Some(1e6),
        names: &[
            &[("dense_2.linear.weight", "dense_2.weight"), ("dense_3.linear.weight", "dense_3.weight")],
            POST_NORMS,
        ],
        keys: &[],
        only: &[
            ("hidden_activation", Only::Text("gelu_pytorch_tanh")),
            ("attn_logit_softcapping", Only::Number(0.0)),
            ("final_logit_softcapping", Only::Number(0.0)),
        ],
        window: Window::OwnPeriod(6),
        both_ways: true,
        ..GEMMA
    },
    Family {
        model_type: "gemma3n_text",
        architecture: "gemma3n",
        defaults: &[
            ("final_logit_softcapping", "30.0"),
            ("hidden_size_per_layer_input", "256"),
            ("num_kv_shared_layers", "15"),
            ("sliding_window", "512"),
            TIED,
        ],
        names: &[GEMMA_3N, GEMMA_4, POST_NORMS],
        keys: &[
            ("final_logit_softcapping", &["final_logit_softcapping"], Kind::F32),
            ("attention.shared_kv_layers", &["num_kv_shared_layers"], Kind::U32),
            ("embedding_length_per_layer_input", &["hidden_size_per_layer_input"], Kind::U32),
            ("altup.active_idx", &["altup_active_idx"], Kind::U32),
            ("altup.num_inputs", &["altup_num_inputs"], Kind::U32),
        ],
        without: &["feed_forward_length"],
        only: &[
            ("hidden_activation", Only::Text("gelu_pytorch_tanh")),
            ("altup_active_idx", Only::Number(0.0)),
            ("altup_num_inputs", Only::Number(4.0)),
            ("altup_correct_scale", Only::Bool(true)),
            ("laurel_rank", Only::Number(64.0)),
        ],
        norm_offset: 0.0,
        window: Window::Period(5),
        ..GEMMA
    },
    Family {
        model_type: "gemma4_text",
        architecture: "gemma4",
        defaults: &[("hidden_size_per_layer_input", "256"), ("sliding_window", "512"), TIED],
        names: &[GEMMA_4, GEMMA_4_EXPERTS, POST_NORMS],
        without: &[
            "attention.head_count_kv",
            "attention.key_length",
            "attention.value_length",
            "feed_forward_length",
        ],
        keys: &[
            ("final_logit_softcapping", &["final_logit_softcapping"], Kind::F32),
            ("attention.shared_kv_layers", &["num_kv_shared_layers"], Kind::U32),
            ("attention.key_length_swa", &["head_dim"], Kind::U32),
            ("attention.value_length_swa", &["head_dim"], Kind::U32),
            ("rope.dimension_count_swa", &["head_dim"], Kind::U32),
            ("expert_used_count", &["top_k_experts"], Kind::U32),
            ("expert_feed_forward_length", &["moe_intermediate_size", "expert_intermediate_size"], Kind::U32),
        ],
        only: &[
            ("hidden_activation", Only::Text("gelu_pytorch_tanh")),
            // Images are not read.
            ("use_bidirectional_attention", Only::Text("vision")),
        ],
        norm_offset: 0.0,
        window: Window::OwnPeriod(6),
        ..GEMMA
    },
    // Its published weights already rotate adjacent elements.
    Family {
        model_type: "glm",
        architecture: "chatglm",
        defaults: &[HALF_ROTATES],
        names: &[GLM],
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "glm4",
        architecture: "glm4",
        defaults: &[HALF_ROTATES],
        names: &[GLM_4],
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "glm4_moe",
        architecture: "glm4moe",
        defaults: &[HALF_ROTATES, NORMALIZES],
        names: &[&[("layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm")], EXPERTS],
        keys: MIXTURE,
        fixed: SIGMOID,
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "glm4_moe_lite",
        defaults: &[NORMALIZES, ("routed_scaling_factor", "1.8")],
        only: &[SILU, ("rope_interleave", Only::Bool(true))],
        fixed: &[("attention.head_count_kv", 1), ("expert_gating_func", 2)],
        ..DEEPSEEK
    },
    Family {
        model_type: "gpt2",
        architecture: "gpt2",
        defaults: &[TIED],
        prefixes: &["transformer."],
        names: &[GPT_2],
        unused: &["*.attn.bias", "*.attn.masked_bias"],
        keys: &[("attention.layer_norm_epsilon", &["layer_norm_epsilon"], Kind::F32)],
        only: &[
            ("activation_function", Only::Text("gelu_new")),
            ("add_cross_attention", Only::Bool(false)),
            ("scale_attn_by_inverse_layer_idx", Only::Bool(false)),
            ("scale_attn_weights", Only::Bool(true)),
        ],
        interleaved: false,
        by_columns: &[".attn_qkv", ".attn_output", ".ffn_up", ".ffn_down"],
        has_rope: false,
        ..LLAMA
    },
    Family {
        model_type: "gpt_neox",
        architecture: "gptneox",
        defaults: &[("rotary_pct", "0.25"), ("use_parallel_residual", "true")],
        prefixes: &["gpt_neox."],
        names: &[GPT_NEOX],
        output: "embed_out",
        unused: &["*.attention.bias", "*.attention.masked_bias"],
        keys: &[("use_parallel_residual", &["use_parallel_residual"], Kind::Bool)],
        only: &[("hidden_act", Only::Text("gelu"))],
        interleaved: false,
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family {
        model_type: "gpt_oss",
        architecture: "gpt-oss",
        defaults: &[("sliding_window", "128")],
        names: &[GPT_OSS],
        by_columns: EXPERTS_BY_COLUMNS,
        keys: &[("expert_feed_forward_length", &["intermediate_size"], Kind::U32)],
        only: &[
            ("hidden_act", Only::Text("silu")),
            ("swiglu_alpha", Only::Number(1.702)),
            ("swiglu_limit", Only::Number(7.0)),
            ("attention_bias", Only::Bool(true)),
        ],
        interleaved: false,
        window: Window::Period(2),
        ..LLAMA
    },
    Family {
        model_type: "granite",
        architecture: "granite",
        defaults: &GRANITE_DEFAULTS,
        keys: GRANITE_FACTORS,
        ..LLAMA
    },
    Family {
        model_type: "granitemoe",
        architecture: "granitemoe",
        defaults: &GRANITE_DEFAULTS,
        names: &[GRANITE_4],
        keys: GRANITE_FACTORS,
        ..LLAMA
    },
    Family {
        model_type: "granitemoeshared",
        architecture: "granitemoe",
        defaults: &GRANITE_DEFAULTS,
        names: &[GRANITE_4, GRANITE_4_SHARED],
        keys: &[
            GRANITE_FACTORS[0],
            GRANITE_FACTORS[1],
            GRANITE_FACTORS[2],
            GRANITE_FACTORS[3],
            ("expert_shared_feed_forward_length", &["shared_intermediate_size"], Kind::U32),
        ],
        ..LLAMA
    },
    Family {
        model_type: "granitemoehybrid",
        architecture: "granitehybrid",
        defaults: &[
            GRANITE_DEFAULTS[0],
            GRANITE_DEFAULTS[1],
            GRANITE_DEFAULTS[2],
            GRANITE_DEFAULTS[3],
            ("num_experts_per_tok", "2"),
            ("num_local_experts", "8"),
        ],
        without: &["attention.head_count_kv", "feed_forward_length"],
        names: &[GRANITE_4],
        keys: &[
            ("attention.scale", &["attention_multiplier"], Kind::F32),
            ("embedding_scale", &["embedding_multiplier"], Kind::F32),
            ("residual_scale", &["residual_multiplier"], Kind::F32),
            ("logit_scale", &["logits_scaling"], Kind::F32),
            ("ssm.conv_kernel", &["mamba_d_conv"], Kind::U32),
            ("ssm.state_size", &["mamba_d_state"], Kind::U32),
            ("ssm.group_count", &["mamba_n_groups"], Kind::U32),
            ("ssm.time_step_rank", &["mamba_n_heads"], Kind::U32),
        ],
        only: &[("hidden_act", Only::Text("silu")), ("mamba_proj_bias", Only::Bool(false))],
        recurrent: &["mamba", "linear_attention"],
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family {
        model_type: "hunyuan_v1_dense",
        architecture: "hunyuan-dense",
        names: &[&[
            ("layers.{}.self_attn.query_layernorm", "blk.{}.attn_q_norm"),
            ("layers.{}.self_attn.key_layernorm", "blk.{}.attn_k_norm"),
        ]],
        interleaved: false,
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family {
        model_type: "lfm2",
        architecture: "lfm2",
        defaults: &[("block_ffn_dim_multiplier", "1.0"), ("block_multiple_of", "256"), TIED],
        without: &["attention.head_count_kv", "feed_forward_length"],
        names: &[LFM2],
        keys: &[("shortconv.l_cache", &["conv_L_cache"], Kind::U32)],
        only: &[("conv_bias", Only::Bool(false))],
        interleaved: false,
        recurrent: &["conv"],
        rope_base: Some(1e6),
        ..LLAMA
    },
    Family {
        model_type: "lfm2_moe",
        architecture: "lfm2moe",
        defaults: &[NORMALIZES, TIED],
        without: &["attention.head_count_kv"],
        names: &[LFM2, LFM2_EXPERTS],
        keys: &[
            ("shortconv.l_cache", &["conv_L_cache"], Kind::U32),
            ("leading_dense_block_count", &["num_dense_layers"], Kind::U32),
            ("expert_feed_forward_length", &["moe_intermediate_size"], Kind::U32),
            ("expert_weights_norm", &["norm_topk_prob"], Kind::Bool),
            ("expert_weights_scale", &["routed_scaling_factor"], Kind::F32),
        ],
        only: &[("conv_bias", Only::Bool(false))],
        interleaved: false,
        recurrent: &["conv"],
        rope_base: Some(1e6),
        ..LLAMA
    },
    Family { rope_base: Some(1e4), ..LLAMA },
    // Its published weights already rotate adjacent elements.
    Family {
        model_type: "llama4_text",
        architecture: "llama4",
        names: &[LLAMA_4],
        keys: &[
            ("feed_forward_length", &["intermediate_size_mlp"], Kind::U32),
            ("expert_feed_forward_length", &["intermediate_size"], Kind::U32),
            ("interleave_moe_layer_step", &["interleave_moe_layer_step"], Kind::U32),
        ],
        without: &["feed_forward_length"],
        defaults: &[
            ("interleave_moe_layer_step", "1"),
            ("num_local_experts", "16"),
            ("num_experts_per_tok", "1"),
        ],
        // What files do not say.
        only: &[
            SILU,
            ("attention_bias", Only::Bool(false)),
            ("attention_chunk_size", Only::Number(CHUNK as f64)),
            ("attn_scale", Only::Number(0.1)),
            ("attn_temperature_tuning", Only::Bool(true)),
            ("floor_scale", Only::Number(CHUNK as f64)),
            ("no_rope_layer_interval", Only::Number(NOPE_PERIOD as f64)),
        ],
        interleaved: false,
        by_columns: EXPERTS_BY_COLUMNS,
        rope_base: Some(5e5),
        ..LLAMA
    },
    Family {
        model_type: "mamba",
        architecture: "mamba",
        defaults: &[TIED],
        prefixes: &["backbone."],
        names: &[MAMBA],
        keys: &[
            ("attention.layer_norm_rms_epsilon", &["layer_norm_epsilon"], Kind::F32),
            ("ssm.conv_kernel", &["conv_kernel"], Kind::U32),
            ("ssm.inner_size", &["intermediate_size"], Kind::U32),
            ("ssm.state_size", &["state_size"], Kind::U32),
            ("ssm.time_step_rank", &["time_step_rank"], Kind::U32),
        ],
        without: NO_ATTENTION,
        fixed: ANY_LENGTH,
        only: &[SILU, ("use_bias", Only::Bool(false))],
        has_rope: false,
        ..LLAMA
    },
    Family {
        model_type: "mamba2",
        architecture: "mamba2",
        prefixes: &["backbone."],
        names: &[MAMBA],
        keys: &[
            ("attention.layer_norm_rms_epsilon", &["layer_norm_epsilon"], Kind::F32),
            ("ssm.conv_kernel", &["conv_kernel"], Kind::U32),
            ("ssm.state_size", &["state_size"], Kind::U32),
            ("ssm.group_count", &["n_groups"], Kind::U32),
            ("ssm.time_step_rank", &["num_heads"], Kind::U32),
        ],
        without: NO_ATTENTION,
        fixed: ANY_LENGTH,
        only: &[SILU, ("use_bias", Only::Bool(false))],
        has_rope: false,
        ..LLAMA
    },
    Family {
        model_type: "minicpm3",
        architecture: "minicpm3",
        names: &[LATENT],
        keys: &[
            ("attention.q_lora_rank", &["q_lora_rank"], Kind::U32),
            ("attention.kv_lora_rank", &["kv_lora_rank"], Kind::U32),
            ("attention.value_length", &["v_head_dim"], Kind::U32),
        ],
        without: &["attention.key_length", "attention.value_length"],
        defaults: &[TIED],
        // Files do not have these factors.
        only: &[
            SILU,
            ("scale_emb", Only::Stated(12.0)),
            ("scale_depth", Only::Stated(1.4)),
            ("dim_model_base", Only::Stated(256.0)),
        ],
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "minimax_m2",
        architecture: "minimax-m2",
        names: &[MIXTRAL],
        unused: &["mtp.*"],
        keys: &[("expert_feed_forward_length", &["intermediate_size"], Kind::U32)],
        fixed: SIGMOID,
        only: &[
            SILU,
            ("scoring_func", Only::Text("sigmoid")),
            ("use_qk_norm", Only::Bool(true)),
            ("qk_norm_type", Only::Text("per_layer")),
            ("shared_intermediate_size", Only::Number(0.0)),
        ],
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "ministral3",
        architecture: "mistral3",
        only: &[SILU, ("sliding_window", Only::Absent)],
        window: Window::All,
        ..LLAMA
    },
    Family { model_type: "mistral", defaults: &[WINDOW], rope_base: Some(1e4), window: Window::All, ..LLAMA },
    Family { model_type: "mixtral", names: &[MIXTRAL], window: Window::All, ..LLAMA },
    NEMOTRON,
    Family {
        architecture: "nemotron_h_moe",
        defaults: &[NORMALIZES],
        keys: &[
            NEMOTRON.keys[0],
            NEMOTRON.keys[1],
            NEMOTRON.keys[2],
            NEMOTRON.keys[3],
            NEMOTRON.keys[4],
            ("expert_count", &["n_routed_experts"], Kind::U32),
            ("expert_used_count", &["num_experts_per_tok"], Kind::U32),
            ("expert_feed_forward_length", &["moe_intermediate_size"], Kind::U32),
            ("expert_shared_feed_forward_length", &["moe_shared_expert_intermediate_size"], Kind::U32),
            ("expert_shared_count", &["n_shared_experts"], Kind::U32),
            ("expert_group_count", &["n_group"], Kind::U32),
            ("expert_group_used_count", &["topk_group"], Kind::U32),
            ("expert_weights_norm", &["norm_topk_prob"], Kind::Bool),
            ("expert_weights_scale", &["routed_scaling_factor"], Kind::F32),
            ("moe_latent_size", &["moe_latent_size"], Kind::U32),
        ],
        fixed: SIGMOID,
        ..NEMOTRON
    },
    Family {
        model_type: "nemotron",
        architecture: "nemotron",
        defaults: &[HALF_ROTATES],
        keys: &[("attention.layer_norm_epsilon", &["norm_eps"], Kind::F32)],
        without: &["attention.layer_norm_rms_epsilon"],
        only: &[("hidden_act", Only::Text("relu2"))],
        interleaved: false,
        norm_offset: 1.0,
        ..LLAMA
    },
    Family {
        model_type: "olmo",
        architecture: "olmo",
        defaults: &[("layer_norm_eps", "1e-5")],
        keys: &[("attention.clamp_kqv", &["clip_qkv"], Kind::F32)],
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family { model_type: "olmo2", ..OLMO },
    Family { model_type: "olmo3", defaults: &[WINDOW], window: Window::Period(4), ..OLMO },
    Family {
        model_type: "olmoe",
        architecture: "olmoe",
        names: &[EXPERTS],
        keys: &[("expert_weights_norm", &["norm_topk_prob"], Kind::Bool)],
        only: &[SILU, ("clip_qkv", Only::Absent)],
        interleaved: false,
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family {
        model_type: "phi",
        architecture: "phi2",
        defaults: &[HALF_ROTATES],
        names: &[PHI_2],
        only: &[("hidden_act", Only::Text("gelu_new")), ("qk_layernorm", Only::Bool(false))],
        interleaved: false,
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family {
        model_type: "phi3",
        architecture: "phi3",
        names: &[&[
            ("layers.{}.self_attn.qkv_proj", "blk.{}.attn_qkv"),
            ("layers.{}.mlp.gate_up_proj", "blk.{}.ffn_up"),
        ]],
        interleaved: false,
        rope_base: Some(1e4),
        window: Window::All,
        ..LLAMA
    },
    Family {
        model_type: "qwen2",
        architecture: "qwen2",
        defaults: NO_WINDOW,
        interleaved: false,
        window: Window::All,
        ..LLAMA
    },
    Family {
        model_type: "qwen2_5_vl_text",
        architecture: "qwen2vl",
        defaults: NO_WINDOW,
        interleaved: false,
        window: Window::All,
        ..LLAMA
    },
    Family {
        model_type: "qwen2_moe",
        architecture: "qwen2moe",
        defaults: NO_WINDOW,
        names: &[EXPERTS],
        keys: MIXTURE,
        only: &[SILU, ALL_LAYERS[0], ALL_LAYERS[1]],
        interleaved: false,
        window: Window::All,
        ..LLAMA
    },
    Family {
        model_type: "qwen3",
        architecture: "qwen3",
        defaults: NO_WINDOW,
        interleaved: false,
        window: Window::All,
        ..LLAMA
    },
    Family {
        model_type: "qwen3_5_moe_text",
        architecture: "qwen35moe",
        defaults: &[QUARTER_ROTATES],
        // All layers have experts.
        without: &["attention.head_count_kv", "feed_forward_length"],
        names: &[QWEN_3_5, EXPERTS],
        keys: DELTA_NET,
        interleaved: false,
        norm_offset: 1.0,
        recurrent: &["linear_attention"],
        ..LLAMA
    },
    Family {
        model_type: "qwen3_5_text",
        architecture: "qwen35",
        defaults: &[QUARTER_ROTATES],
        without: &["attention.head_count_kv"],
        names: &[QWEN_3_5],
        keys: DELTA_NET,
        interleaved: false,
        norm_offset: 1.0,
        recurrent: &["linear_attention"],
        ..LLAMA
    },
    Family {
        model_type: "qwen3_moe",
        architecture: "qwen3moe",
        defaults: NO_WINDOW,
        names: &[EXPERTS],
        keys: &[
            ("expert_feed_forward_length", &["moe_intermediate_size"], Kind::U32),
            ("expert_weights_norm", &["norm_topk_prob"], Kind::Bool),
        ],
        only: &[
            ("hidden_act", Only::Text("silu")),
            ("decoder_sparse_step", Only::Number(1.0)),
            ("mlp_only_layers", Only::Nothing),
        ],
        interleaved: false,
        window: Window::All,
        ..LLAMA
    },
    Family {
        model_type: "qwen3_vl_moe_text",
        architecture: "qwen3vlmoe",
        defaults: &[NORMALIZES],
        names: &[EXPERTS],
        keys: &[
            ("expert_feed_forward_length", &["moe_intermediate_size"], Kind::U32),
            ("expert_weights_norm", &["norm_topk_prob"], Kind::Bool),
        ],
        only: &[SILU, ALL_LAYERS[0], ALL_LAYERS[1]],
        interleaved: false,
        ..LLAMA
    },
    Family { model_type: "qwen3_vl_text", architecture: "qwen3vl", interleaved: false, ..LLAMA },
    Family {
        model_type: "seed_oss",
        architecture: "seed_oss",
        names: &[&[("layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm")]],
        interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "qwen3_next",
        architecture: "qwen3next",
        defaults: &[QUARTER_ROTATES],
        names: &[QWEN_3_NEXT, QWEN_3_5, EXPERTS],
        unused: &["mtp.*"],
        keys: DELTA_NET,
        without: &["attention.head_count_kv"],
        only: &[SILU, ALL_LAYERS[0], ALL_LAYERS[1], ("norm_topk_prob", Only::Bool(true))],
        interleaved: false,
        norm_offset: 1.0,
        recurrent: &["linear_attention"],
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        architecture: "smollm3",
        defaults: &[NO_WINDOW[0], TIED],
        only: &[
            ("hidden_act", Only::Text("silu")),
            ("no_rope_layer_interval", Only::Number(NOPE_PERIOD as f64)),
        ],
        window: Window::All,
        ..LLAMA
    },
    Family {
        model_type: "stablelm",
        architecture: "stablelm",
        defaults: &[QUARTER_ROTATES, ("use_parallel_residual", "false")],
        keys: &[("use_parallel_residual", &["use_parallel_residual"], Kind::Bool)],
        only: &[SILU, ("qk_layernorm", Only::Bool(false))],
        interleaved: false,
        rope_base: Some(1e4),
        ..LLAMA
    },
    Family {
        model_type: "starcoder2",
        architecture: "starcoder2",
        defaults: &[TIED],
        names: &[&[("layers.{}.mlp.c_fc", "blk.{}.ffn_up"), ("layers.{}.mlp.c_proj", "blk.{}.ffn_down")]],
        only: &[("hidden_act", Only::Text("gelu_pytorch_tanh"))],
        interleaved: false,
        window: Window::All,
        ..LLAMA
    },
];

/// Period of SmolLM3's and Llama 4's layers: the last layer of each period has no RoPE.
pub(super) const NOPE_PERIOD: usize = 4;
