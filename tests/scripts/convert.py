#!/usr/bin/env python3
"""Writes tiny models of random weights as the library transformers publishes them, with its logits and the ids of the library
tokenizers, which tests/convert.rs reads.

    pip install torch transformers tokenizers sentencepiece protobuf compressed-tensors
    convert.py                          the committed folders: tests/data/convert
    convert.py --check FOLDER LOGITS    how far the logits that `halite logits` wrote of a folder's `tokens` are off

Each folder has, besides what the library writes, a file expected.json (texts with their ids, and the ids of a longer text) and
logits.f32, the logits of the last positions of the longer text. Folders of encoders and rerankers have vectors.f32 instead: the vector
of each text and of the longer one, or the score of each pair of texts. Weights are bfloat16 in the folder, and float32 in the forward
pass.
"""

import argparse
import io
import json
import pathlib
import random
import shutil
import tempfile

import numpy as np
import safetensors.torch
import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/data/convert"
VOCAB = 288
TOKENS = 40
POSITIONS = 3

SHAPE = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=32, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
             pad_token_id=None)
WINDOW = dict(sliding_window=10)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=32)
VISION = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=24, patch_size=2, num_position_embeddings=4)
SIGLIP = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2)
WRAPPERS = {"ministral3": "mistral3"}
# Four heads of values for two of keys.
QWEN_3_5 = dict(model_type="qwen3_5_text", vocabulary="qwen35", num_hidden_layers=2,
                layer_types=["linear_attention", "full_attention"], head_dim=16, tie_word_embeddings=True, linear_conv_kernel_dim=4,
                linear_key_head_dim=6, linear_value_head_dim=6, linear_num_key_heads=2, linear_num_value_heads=4,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_interleaved=True, mrope_section=[2, 1, 1],
                                     partial_rotary_factor=0.5))
HYBRID = dict(model_type="granitemoehybrid", vocabulary="starcoder", num_hidden_layers=2, layer_types=["mamba", "attention"],
              position_embedding_type="nope", shared_intermediate_size=20, mamba_n_heads=4, mamba_d_head=12, mamba_d_state=8,
              mamba_expand=2, mamba_d_conv=4, tie_word_embeddings=True, attention_multiplier=0.3, embedding_multiplier=1.7,
              residual_multiplier=0.4, logits_scaling=1.3)
MIXTURE = dict(num_hidden_layers=2, intermediate_size=20, moe_intermediate_size=16, num_experts_per_tok=2, first_k_dense_replace=1,
               n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5, tie_word_embeddings=True)
LATENT = dict(MIXTURE, vocabulary="llama3", num_key_value_heads=4, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10,
              rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=0.7, beta_fast=32, beta_slow=1))
NEMOTRON = dict(model_type="nemotron_h", vocabulary="tekken", head_dim=8, mamba_num_heads=4, mamba_head_dim=12, ssm_state_size=8,
                n_groups=2, time_step_min=1e-30)
GRANITE = dict(attention_multiplier=0.3, embedding_multiplier=1.7, residual_multiplier=0.4, logits_scaling=1.3)
QUANTISED = dict(model_type="qwen3", vocabulary="qwen2", num_hidden_layers=1, hidden_size=64, intermediate_size=96, head_dim=16,
                 tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
BITNET = dict(QUANTISED, model_type="bitnet", vocabulary="llama3", rope_parameters=dict(rope_type="default", rope_theta=500000.0))
# The numbers of experts are odd so that no shape is right by chance.
FAMILIES = {
    "llama": dict(model_type="llama", vocabulary="llama3", rope_parameters=LLAMA3, head_dim=8, attention_bias=True),
    "llama-spm": dict(model_type="llama", vocabulary="spm", tie_word_embeddings=True, num_hidden_layers=1,
                      rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "llama-pieces": dict(model_type="llama", vocabulary="pieces", num_hidden_layers=1,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "mistral": dict(model_type="mistral", vocabulary="tekken", num_hidden_layers=1, **WINDOW),
    "mixtral": dict(model_type="mixtral", vocabulary="gpt2", num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2),
    "qwen2": dict(model_type="qwen2", vocabulary="qwen2", num_hidden_layers=1, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3": dict(model_type="qwen3", vocabulary="qwen2", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True),
    "qwen3_moe": dict(model_type="qwen3_moe", vocabulary="qwen2", num_hidden_layers=1, num_experts=3, num_experts_per_tok=2,
                      moe_intermediate_size=16, head_dim=8, norm_topk_prob=True, tie_word_embeddings=True),
    "gemma2": dict(model_type="gemma2", vocabulary="gemma", head_dim=8, query_pre_attn_scalar=12, **WINDOW),
    "gemma3": dict(model_type="gemma3_text", vocabulary="gemma", head_dim=8, query_pre_attn_scalar=12, num_hidden_layers=6,
                   intermediate_size=16, **WINDOW, rope_parameters=dict(
                       full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                       sliding_attention=dict(rope_type="default", rope_theta=10000.0))),
    # The last two layers use the caches of the first two.
    "gemma4": dict(model_type="gemma4_text", vocabulary="gemma", head_dim=8, global_head_dim=16, num_hidden_layers=4,
                   layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, use_double_wide_mlp=True,
                   intermediate_size=16, hidden_size_per_layer_input=4, final_logit_softcapping=3.0, tie_word_embeddings=True, **WINDOW,
                   rope_parameters=dict(full_attention=dict(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.25),
                                        sliding_attention=dict(rope_type="default", rope_theta=10000.0))),
    # Newer keys, mixtures beside feed-forward blocks, and no values of their own in layers without a window.
    "gemma4-moe": dict(model_type="gemma4_text", vocabulary="gemma", head_dim=8, global_head_dim=16, num_hidden_layers=2,
                       layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, attention_k_eq_v=True,
                       num_global_key_value_heads=1, intermediate_size=16, hidden_size_per_layer_input=0, enable_moe_block=True,
                       num_experts=3, top_k_experts=2, moe_intermediate_size=20, tie_word_embeddings=True, **WINDOW,
                       rope_parameters=dict(full_attention=dict(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.25),
                                            sliding_attention=dict(rope_type="default", rope_theta=10000.0))),
    "phi3": dict(model_type="phi3", vocabulary="gpt2", num_hidden_layers=1, original_max_position_embeddings=32,
                 tie_word_embeddings=True, rope_parameters=dict(
                     rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 2.0, 4.0])),
    "glm": dict(model_type="glm", vocabulary="llama3", num_hidden_layers=1, head_dim=8, attention_bias=True, tie_word_embeddings=True),
    "glm4": dict(model_type="glm4", vocabulary="llama3", num_hidden_layers=1, head_dim=8, attention_bias=True, tie_word_embeddings=True),
    "lfm2": dict(model_type="lfm2", vocabulary="llama3", num_hidden_layers=2, layer_types=["conv", "full_attention"],
                 block_auto_adjust_ff_dim=True, block_multiple_of=8, intermediate_size=36, tie_word_embeddings=True),
    "lfm2_moe": dict(model_type="lfm2_moe", vocabulary="llama3", num_hidden_layers=2, layer_types=["conv", "full_attention"],
                     num_dense_layers=1, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=1.5,
                     tie_word_embeddings=True),
    # A model that also sees.
    "qwen3_5": dict(QWEN_3_5, vision_config=VISION),
    "qwen3_5_moe": dict(QWEN_3_5, model_type="qwen3_5_moe_text", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
                        shared_expert_intermediate_size=20, vision_config=VISION),
    "qwen3_5_text": dict(QWEN_3_5),
    # Phi-4-mini rotates a part of each head.
    "phi4": dict(model_type="phi3", vocabulary="gpt4o", num_hidden_layers=1, original_max_position_embeddings=32, head_dim=8,
                 num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=dict(
                     rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.2],
                     long_factor=[1.0, 2.0, 4.0])),
    # Quantised: rows and columns of whole words and groups.
    "qwen3-fp8": dict(QUANTISED), "qwen3-fp8-rows": dict(QUANTISED), "qwen3-gptq": dict(QUANTISED), "qwen3-gptq-order": dict(QUANTISED),
    "qwen3-awq": dict(QUANTISED), "qwen3-packed": dict(QUANTISED),
    "llama-bitnet": dict(QUANTISED, model_type="llama"), "bitnet": dict(BITNET, intermediate_size=256), "bitnet-rounded": dict(BITNET),
    "smollm3": dict(model_type="smollm3", vocabulary="llama3", num_hidden_layers=4, intermediate_size=16),
    "gpt_oss": dict(model_type="gpt_oss", vocabulary="gpt4o", num_hidden_layers=2, hidden_size=32, head_dim=8, num_local_experts=3,
                    num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"], **WINDOW,
                    rope_parameters=dict(YARN, beta_fast=32.0, beta_slow=1.0)),
    "granite": dict(model_type="granite", vocabulary="starcoder", num_hidden_layers=1, tie_word_embeddings=True,
                    attention_multiplier=0.3, embedding_multiplier=1.7, residual_multiplier=0.4, logits_scaling=1.3),
    "granitehybrid": dict(HYBRID, num_local_experts=0, mamba_n_groups=2),
    "granitehybrid-moe": dict(HYBRID, num_local_experts=3, num_experts_per_tok=2, intermediate_size=16, mamba_n_groups=1),
    "arcee": dict(model_type="arcee", vocabulary="llama3", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True),
    "deepseek_v2": dict(LATENT, model_type="deepseek_v2", n_routed_experts=3, n_shared_experts=2, q_lora_rank=None,
                        norm_topk_prob=False),
    "minicpm3": dict(model_type="minicpm3", vocabulary="llama3", num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6,
                     qk_rope_head_dim=4, v_head_dim=10, tie_word_embeddings=True, rope_parameters=dict(
                         rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1], long_factor=[1.2, 2.0],
                         original_max_position_embeddings=64)),
    "deepseek_v3": dict(LATENT, model_type="deepseek_v3", n_routed_experts=6, n_shared_experts=1, q_lora_rank=12, n_group=3, topk_group=2),
    "dots1": dict(MIXTURE, model_type="dots1", vocabulary="qwen2", head_dim=8, n_routed_experts=3, n_shared_experts=2),
    "ernie4_5": dict(model_type="ernie4_5", vocabulary="spm", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True),
    "ernie4_5_moe": dict(model_type="ernie4_5_moe", vocabulary="llama3", moe_num_experts=3, moe_k=2, moe_intermediate_size=16,
                         moe_layer_start_index=1, moe_layer_end_index=1, moe_num_shared_experts=2, intermediate_size=20,
                         tie_word_embeddings=True),
    "exaone4": dict(model_type="exaone4", vocabulary="gpt2", num_hidden_layers=4, intermediate_size=16, tie_word_embeddings=True,
                    sliding_window_pattern=4, rope_parameters=LLAMA3, **WINDOW),
    "exaone4-full": dict(model_type="exaone4", vocabulary="gpt2", num_hidden_layers=1, tie_word_embeddings=True, sliding_window=None,
                         layer_types=["full_attention"], rope_parameters=LLAMA3),
    "gemma": dict(model_type="gemma", vocabulary="gemma", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True),
    "glm4_moe": dict(MIXTURE, model_type="glm4_moe", vocabulary="llama3", head_dim=8, n_routed_experts=3, n_shared_experts=1,
                     use_qk_norm=True, attention_bias=True),
    "gpt_neox": dict(model_type="gpt_neox", vocabulary="gpt2", num_hidden_layers=1, num_key_value_heads=None, hidden_size=32),
    "gpt2": dict(model_type="gpt2", vocabulary="gpt2", n_inner=40),
    "granitemoe": dict(GRANITE, model_type="granitemoe", vocabulary="starcoder", num_hidden_layers=1, num_local_experts=3,
                       num_experts_per_tok=2, intermediate_size=16, tie_word_embeddings=True),
    "granitemoeshared": dict(GRANITE, model_type="granitemoeshared", vocabulary="starcoder", num_hidden_layers=1, num_local_experts=3,
                             num_experts_per_tok=2, intermediate_size=16, shared_intermediate_size=20, tie_word_embeddings=True),
    "hunyuan_v1_dense": dict(model_type="hunyuan_v1_dense", vocabulary="qwen2", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True,
                             rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, alpha=50.0, factor=1.0)),
    "minimax_m2": dict(model_type="minimax_m2", vocabulary="llama3", num_hidden_layers=1, head_dim=8, rotary_dim=4, num_local_experts=3,
                       num_experts_per_tok=2, intermediate_size=16, tie_word_embeddings=True),
    "olmoe": dict(model_type="olmoe", vocabulary="gpt2", num_hidden_layers=1, num_experts=3, num_experts_per_tok=2, intermediate_size=16,
                  tie_word_embeddings=True),
    "phi": dict(model_type="phi", vocabulary="gpt2", num_hidden_layers=1, num_key_value_heads=None, hidden_size=32),
    "qwen2_moe": dict(model_type="qwen2_moe", vocabulary="qwen2", num_hidden_layers=1, num_experts=3, num_experts_per_tok=2,
                      moe_intermediate_size=16, shared_expert_intermediate_size=20, tie_word_embeddings=True),
    "seed_oss": dict(model_type="seed_oss", vocabulary="qwen2", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True),
    "falcon_h1": dict(model_type="falcon_h1", vocabulary="gpt2", num_hidden_layers=1, head_dim=8, mamba_d_ssm=48, mamba_n_heads=4,
                      mamba_d_head=12, mamba_d_state=8, mamba_n_groups=2, attention_in_multiplier=0.7, attention_out_multiplier=0.9,
                      key_multiplier=0.6, ssm_in_multiplier=1.2, ssm_out_multiplier=0.8, ssm_multipliers=[0.5, 1.1, 0.8, 1.2, 0.7],
                      mlp_multipliers=[0.6, 1.3], embedding_multiplier=1.4, lm_head_multiplier=0.6),
    "gemma3n": dict(model_type="gemma3n_text", vocabulary="gemma", head_dim=8, num_hidden_layers=4, num_kv_shared_layers=2,
                    layer_types=["sliding_attention", "full_attention"] * 2, intermediate_size=[16] * 4, laurel_rank=64,
                    hidden_size_per_layer_input=4, activation_sparsity_pattern=[0.95] * 4, tie_word_embeddings=True, **WINDOW,
                    rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e6),
                                         sliding_attention=dict(rope_type="default", rope_theta=10000.0))),
    "mamba": dict(model_type="mamba", vocabulary="gpt2", intermediate_size=48, num_hidden_layers=2, state_size=8, time_step_rank=3),
    "mamba2": dict(model_type="mamba2", vocabulary="gpt2", num_heads=4, head_dim=12, state_size=8, n_groups=1, tie_word_embeddings=True),
    "nemotron_h": dict(NEMOTRON, layers_block_type=["linear_attention", "full_attention", "mlp"]),
    "nemotron_h-moe": dict(NEMOTRON, layers_block_type=["linear_attention", "full_attention", "moe"], n_routed_experts=3,
                           num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=20, moe_latent_size=12,
                           routed_scaling_factor=1.5, n_group=1, topk_group=1),
    "qwen3_next": dict(QWEN_3_5, model_type="qwen3_next", vocabulary="qwen2", num_experts=3, num_experts_per_tok=2,
                       moe_intermediate_size=16, shared_expert_intermediate_size=20,
                       rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25)),
    # Models that also see.
    "gemma3-vision": dict(model_type="gemma3_text", vocabulary="gemma", head_dim=8, query_pre_attn_scalar=12, num_hidden_layers=2,
                          intermediate_size=16, tie_word_embeddings=True, vision_config=SIGLIP, **WINDOW),
    "mistral3": dict(model_type="ministral3", vocabulary="tekken", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True,
                     vision_config=dict(SIGLIP, model_type="pixtral", head_dim=4),
                     rope_parameters=dict(YARN, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0,
                                          beta_slow=1.0, llama_4_scaling_beta=0.1)),
    "qwen2_5_vl": dict(model_type="qwen2_5_vl_text", vocabulary="qwen2", num_hidden_layers=1, hidden_size=32, tie_word_embeddings=True,
                       vision_config=dict(VISION, out_hidden_size=32, fullatt_block_indexes=[0]),
                       rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])),
    "qwen3_vl": dict(model_type="qwen3_vl_text", vocabulary="qwen2", num_hidden_layers=1, head_dim=8, tie_word_embeddings=True,
                     vision_config=dict(VISION, deepstack_visual_indexes=[]),
                     rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1], mrope_interleaved=True)),
    "qwen3_vl_moe": dict(model_type="qwen3_vl_moe_text", vocabulary="qwen2", num_hidden_layers=2, head_dim=8, num_experts=3,
                         num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=True,
                         vision_config=dict(VISION, deepstack_visual_indexes=[]),
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1], mrope_interleaved=True)),
    "llama4": dict(model_type="llama4_text", vocabulary="llama3", num_hidden_layers=4, head_dim=8, intermediate_size=16,
                   intermediate_size_mlp=20, num_local_experts=3, num_experts_per_tok=1, interleave_moe_layer_step=2,
                   tie_word_embeddings=False, rope_parameters=LLAMA3,
                   vision_config=dict(SIGLIP, vision_output_dim=8, projector_input_dim=8, projector_output_dim=8)),
    "cohere": dict(model_type="cohere", vocabulary="starcoder", num_hidden_layers=1, use_qk_norm=True, tie_word_embeddings=True),
    "exaone_moe": dict(MIXTURE, model_type="exaone_moe", vocabulary="gpt2", head_dim=8, num_experts=3, num_shared_experts=2,
                       layer_types=["sliding_attention", "full_attention"], **WINDOW),
    # The library has this epsilon in the norms of latent vectors, whatever the option says.
    "glm4_moe_lite": dict(LATENT, rms_norm_eps=1e-6, model_type="glm4_moe_lite", n_routed_experts=3, n_shared_experts=1, q_lora_rank=12,
                          rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "nemotron": dict(model_type="nemotron", vocabulary="gpt2", num_hidden_layers=1, hidden_size=32, tie_word_embeddings=True),
    "stablelm": dict(model_type="stablelm", vocabulary="gpt2", num_hidden_layers=1, hidden_size=32, use_qkv_bias=True,
                     tie_word_embeddings=True),
    "olmo": dict(model_type="olmo", vocabulary="dbrx", num_hidden_layers=1, clip_qkv=0.8, tie_word_embeddings=True),
    "olmo2": dict(model_type="olmo2", vocabulary="dbrx", num_hidden_layers=1, tie_word_embeddings=True),
    "olmo3": dict(model_type="olmo3", vocabulary="dbrx", num_hidden_layers=4, intermediate_size=16, tie_word_embeddings=True, **WINDOW),
    "starcoder2": dict(model_type="starcoder2", vocabulary="starcoder", num_hidden_layers=1, **WINDOW),
    "cohere2": dict(model_type="cohere2", vocabulary="starcoder", num_hidden_layers=4, intermediate_size=16, **WINDOW),
}

ENCODER = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
               max_position_embeddings=90, initializer_range=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=2)
LABEL = dict(id2label={0: "score"}, label2id={"score": 0})
# `architecture` is the class, `pooling` that of sentence-transformers, "rank" that of a reranker.
ENCODERS = {
    "xlm-roberta": dict(architecture="XLMRobertaModel", vocabulary="unigram", pooling="cls", type_vocab_size=1, layer_norm_eps=1e-5),
    "roberta": dict(architecture="RobertaModel", vocabulary="roberta", pooling="mean", type_vocab_size=1, layer_norm_eps=1e-5),
    "bert-unigram": dict(architecture="BertModel", vocabulary="unigram", pooling="mean", type_vocab_size=2),
    "distilbert": dict(architecture="DistilBertModel", vocabulary="words", pooling="mean", dim=24, n_layers=2, n_heads=4, hidden_dim=32),
    "modernbert": dict(architecture="ModernBertModel", vocabulary="modern", pooling="cls", num_hidden_layers=4, local_attention=8,
                       global_attn_every_n_layers=3, hidden_activation="gelu", cls_token_id=0, sep_token_id=2),
    "jina_embeddings_v3": dict(architecture="JinaEmbeddingsV3Model", vocabulary="unigram", pooling="mean", type_vocab_size=1,
                               layer_norm_eps=1e-5),
    "nomic_bert": dict(architecture="NomicBertModel", vocabulary="words", pooling="mean", type_vocab_size=2),
    "embedding_gemma": dict(architecture="Gemma3TextModel", vocabulary="gemma", pooling="mean", head_dim=8, num_key_value_heads=2,
                            query_pre_attn_scalar=8, sliding_window=10, use_bidirectional_attention=True, dense=40),
    "qwen3-embedding": dict(architecture="Qwen3Model", vocabulary="qwen2", pooling="lasttoken", head_dim=8, num_key_value_heads=2,
                            tie_word_embeddings=True, pad_token_id=None),
    "bert-rank": dict(architecture="BertForSequenceClassification", vocabulary="words", pooling="rank", type_vocab_size=1, **LABEL),
    "bert-rank-types": dict(architecture="BertForSequenceClassification", vocabulary="words", pooling="rank", type_vocab_size=2, **LABEL),
    "xlm-roberta-rank": dict(architecture="XLMRobertaForSequenceClassification", vocabulary="unigram", pooling="rank",
                             type_vocab_size=1, layer_norm_eps=1e-5, **LABEL),
    "modernbert-rank": dict(architecture="ModernBertForSequenceClassification", vocabulary="modern", pooling="rank", num_hidden_layers=4,
                            local_attention=8, global_attn_every_n_layers=3, classifier_pooling="mean", cls_token_id=0, sep_token_id=2,
                            **LABEL),
    "modernbert-rank-cls": dict(architecture="ModernBertForSequenceClassification", vocabulary="modern", pooling="rank",
                                num_hidden_layers=1, local_attention=8, classifier_pooling="cls", cls_token_id=0, sep_token_id=2,
                                classifier_bias=True, norm_bias=True, **LABEL),
    "qwen3-reranker": dict(architecture="Qwen3ForCausalLM", vocabulary="yes", pooling="rank", head_dim=8, num_key_value_heads=2,
                           tie_word_embeddings=True, max_position_embeddings=1024, pad_token_id=None),
    "qwen3-reranker-untied": dict(architecture="Qwen3ForCausalLM", vocabulary="yes", pooling="rank", head_dim=8,
                                  num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=1024, pad_token_id=None),
    "qwen3-reranker-scores": dict(architecture="Qwen3ForSequenceClassification", vocabulary="yes", pooling="rank", head_dim=8,
                                  num_key_value_heads=2, max_position_embeddings=1024, **LABEL),
}
PAIRS = [["Who may use the Work?", "You may use the Work."], ["Who may use the Work?", ""], ["{braces", "a {file} in <s> braces"]]
# Of the model's card.
RERANK = ("<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
          "the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant "
          "passages that answer the query\n<Query>: QUERY\n<Document>: DOCUMENT<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")

# The words of byte-level vocabularies, as models were published with them.
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN_WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
                r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_3_5_WORDS = LLAMA3_WORDS.replace("{1,3}", "").replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O_WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS
                + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS
                + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
TEXTS = ["", "a", "The licence is granted.", " Two  spaces,\n\n\ttabs 12345 and I'LL do it's", "Größe 世界 \U0001f600 x\r\n",
         "before<|end|>after<tool>it  ", "<s>"]


def words(regex):
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def corpus():
    return (ROOT / "LICENSE-APACHE").read_text().splitlines()


def byte_level(kind):
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama3", "tekken")))
    tokenizer.pre_tokenizer = {"gpt2": plain, "roberta": plain, "modern": plain, "yes": words(QWEN_WORDS), "starcoder": digits, "llama3": words(LLAMA3_WORDS), "dbrx": words(LLAMA3_WORDS),
                               "qwen2": words(QWEN_WORDS), "tekken": words(TEKKEN_WORDS),
                               "qwen35": words(QWEN_3_5_WORDS), "gpt4o": words(GPT_4O_WORDS)}[kind]
    if kind in ("qwen2", "qwen35", "yes", "modern"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<mask>"] if kind in ("roberta", "modern") else ["<s>", "</s>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 6, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus() + ["yes", "no"] * 500 * (kind == "yes"), trainer)
    tokenizer.add_tokens(["<tool>"])
    if kind == "llama3":
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])])
    elif kind == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    elif kind == "modern":
        tokenizer.post_processor = around("<s>", "</s>", "")(tokenizer)
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def around(first, last, between):
    """What stands before, behind and between texts."""
    return lambda tokenizer: processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} {between} $B {last}".split(),
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in (first, last)])


def unigram():
    """A vocabulary of SentencePiece's unigram, as XLM-RoBERTa has it."""
    rules = pathlib.Path(tempfile.mkdtemp(), "rules.tsv")
    rules.write_text("FF21\t41\nFB01\t66 69\n2026\t2E 2E 2E\n9\t20\nA\t20\nD A\t20\nA0\t20\n3000\t20\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="unigram", vocab_size=VOCAB - 4, hard_vocab_limit=False,
        num_threads=1, minloglevel=2, normalization_rule_tsv=str(rules))
    shutil.rmtree(rules.parent)
    from sentencepiece import sentencepiece_model_pb2 as protocol

    parsed = protocol.ModelProto.FromString(model.getvalue())
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece.piece, piece.score) for piece in parsed.pieces[3:]] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, 3, False))
    tokenizer.normalizer = normalizers.Precompiled(parsed.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = around("<s>", "</s>", "</s>")(tokenizer)
    return tokenizer


def word_pieces():
    """A vocabulary of WordPiece, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB - 6, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
                                        show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = around("[CLS]", "[SEP]", "")(tokenizer)
    return tokenizer


def sentence_pieces(kind):
    """A vocabulary of SentencePiece's BPE, with the merges that the scores stand for."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=VOCAB + 100, byte_fallback=True,
        character_coverage=0.995, hard_vocab_limit=False, num_threads=1, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # The head of the list, so that the table of embeddings is small: the last tokens are single characters, which all remain.
    texts = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    merged = [text for text in texts[259:] if len(text) > 1]
    single = [text for text in texts[259:] if len(text) == 1]
    kept = texts[:3] + texts[3:259] + single
    kept += merged[:max(0, EXTRA[kind] - len(kept))]
    vocab = {text: i for i, text in enumerate(kept)}
    score = {text: -i for i, text in enumerate(merged)}
    merges = []
    for text in sorted((t for t in kept if t in score), key=lambda t: -score[t]):
        splits = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
        merges += sorted(splits, key=lambda s: (vocab[s[0]], vocab[s[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    if kind == "spm":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
                                          + ([decoders.Strip(" ", 1, 0)] if kind == "spm" else []))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|end|>"])
    # Otherwise it would be one only with the space that the normaliser puts in front.
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


class Pieces:
    """A vocabulary as SentencePiece itself writes it: tokenizer.model, without tokenizer.json."""

    def __init__(self):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=VOCAB + 100, byte_fallback=True,
            character_coverage=0.995, num_threads=1, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
            control_symbols=["<|end|>"], user_defined_symbols=["<tool>"])
        self.model = model.getvalue()
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        self.token_to_id, self.get_vocab_size = self.pieces.piece_to_id, self.pieces.get_piece_size

    def encode(self, text):
        self.ids = [self.pieces.bos_id()] + self.pieces.encode(text)
        return self


def join_experts(path):
    """As published: all experts of a layer in two tensors, with gate and up in one."""
    weights = safetensors.torch.load_file(path)
    ending = ".0.up_proj.weight"
    for prefix in [key.removesuffix(ending) for key in weights if key.endswith(ending)]:
        count = sum(key.startswith(prefix) and key.endswith(".up_proj.weight") for key in weights)
        gate, up, down = ([weights.pop(f"{prefix}.{i}.{part}_proj.weight") for i in range(count)] for part in ("gate", "up", "down"))
        weights[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        weights[f"{prefix}.down_proj"] = torch.stack(down)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def words_of(codes, places=range(8)):
    """Words of eight codes of the last axis; `places` says which code each nibble has."""
    codes = np.ascontiguousarray(codes).reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    return torch.from_numpy(sum(codes[..., code] << np.uint32(4 * nibble) for nibble, code in enumerate(places)).view(np.int32))


def int4(name, stem, shape, draw):
    """A weight of four bits in the form of a folder: its tensors, and its numbers."""
    rows, columns = shape
    groups = columns // 32
    codes = draw.integers(0, 16, shape)
    zeros = np.full((rows, groups), 8) if name in ("qwen3-gptq", "qwen3-packed") else draw.integers(1, 16, (rows, groups))
    scales = (0.02 + 0.02 * draw.random((rows, groups))).astype(np.float16)
    order = np.arange(columns) // 32
    if name == "qwen3-gptq-order":
        order = draw.permutation(order)
    numbers = scales[:, order].astype(np.float32) * (codes - zeros[:, order]).astype(np.float32)
    flat = lambda a: torch.from_numpy(np.ascontiguousarray(a))
    if name.startswith("qwen3-gptq"):
        # Codes of eight columns of the same row, zeros less one.
        tensors = {".qweight": words_of(codes).T.contiguous(), ".qzeros": words_of((zeros - 1).T), ".scales": flat(scales.T),
                   ".g_idx": flat(order.astype(np.int32))}
    elif name == "qwen3-awq":
        interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {".qweight": words_of(codes.T, interleaved), ".qzeros": words_of(zeros.T, interleaved), ".scales": flat(scales.T)}
    else:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        tensors = {".weight_packed": pack_to_int32(flat((codes - 8).astype(np.int8)), 4), ".weight_scale": flat(scales),
                   ".weight_shape": torch.tensor(shape)}
    return {stem + end: tensor for end, tensor in tensors.items()}, numbers


def fp8(name, stem, shape, draw):
    """A weight of E4M3 with scales of blocks or rows."""
    codes = torch.from_numpy(draw.normal(0, 100, shape).astype(np.float32)).to(torch.float8_e4m3fn)
    height, width = (32, 32) if name == "qwen3-fp8" else (1, shape[1])
    scales = (1e-3 + 1e-3 * draw.random((-(-shape[0] // height), -(-shape[1] // width)))).astype(np.float32)
    numbers = codes.float().numpy() * scales.repeat(height, 0).repeat(width, 1)[:shape[0], :shape[1]]
    end = ".weight_scale_inv" if name == "qwen3-fp8" else ".weight_scale"
    return {stem + ".weight": codes, stem + end: torch.from_numpy(scales)}, numbers


def ternary(name, stem, shape, draw):
    """A weight of minus one, zero and one, times or, in Llama's folder, through a factor."""
    rows, columns = shape
    codes = draw.integers(0, 3, shape).astype(np.uint8)
    scale = torch.tensor([0.04 + 0.02 * draw.random()]).bfloat16()
    factor = scale.float().numpy()
    if name == "llama-bitnet":
        scale = torch.tensor([1 / factor[0]]).bfloat16()
        factor = np.float32(1) / scale.float().numpy()
    quarters = codes.reshape(4, rows // 4, columns)
    packed = sum(quarters[at] << 2 * at for at in range(4))
    return {stem + ".weight": torch.from_numpy(packed), stem + ".weight_scale": scale}, factor * (codes.astype(np.float32) - 1)


def rounded(name, stem, shape, draw):
    """A weight that the library rounds to such numbers."""
    from transformers.integrations.bitnet import WeightQuant

    weight = torch.from_numpy(draw.normal(0, 0.05, shape).astype(np.float32)).bfloat16()
    return {stem + ".weight": weight}, WeightQuant.forward(None, weight).float().numpy()


GROUP = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
ROWS = dict(num_bits=8, type="float", symmetric=True, strategy="channel")
BIT = dict(quant_method="bitnet", linear_class="autobitlinear")
SCHEMES = {
    "llama-bitnet": (ternary, dict(quant_method="bitnet", modules_to_not_convert=None)),
    "bitnet": (ternary, dict(BIT, quantization_mode="offline")),
    "bitnet-rounded": (rounded, dict(BIT, quantization_mode="online")),
    "qwen3-fp8": (fp8, dict(quant_method="fp8", weight_block_size=[32, 32])),
    "qwen3-fp8-rows": (fp8, dict(quant_method="compressed-tensors", format="float-quantized", config_groups=dict(
        group_0=dict(targets=["Linear"], weights=ROWS)))),
    "qwen3-gptq": (int4, dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True)),
    "qwen3-gptq-order": (int4, dict(quant_method="gptq", bits=4, group_size=32, desc_act=True, sym=False)),
    "qwen3-awq": (int4, dict(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True)),
    "qwen3-packed": (int4, dict(quant_method="compressed-tensors", format="pack-quantized", config_groups=dict(
        group_0=dict(targets=["Linear"], weights=GROUP)))),
}
# What the codes of MXFP4 mean.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def quantise(folder, name, model):
    """Replaces the matrices of blocks by quantised ones, in the folder and, as the numbers that they mean, in the model."""
    draw = np.random.default_rng(3)
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    parameters = dict(model.named_parameters())
    if name == "gpt_oss":
        for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
            # The library has these transposed when they are numbers.
            experts, columns, rows = weights.pop(key).shape
            blocks = draw.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
            scales = draw.integers(121, 125, (experts, rows, columns // 32)).astype(np.uint8)
            codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, rows, columns)
            numbers = np.where(codes > 7, -1, 1) * E2M1[codes & 7] * np.exp2(scales.astype(np.float32) - 127).repeat(32, -1)
            weights[key + "_blocks"], weights[key + "_scales"] = torch.from_numpy(blocks), torch.from_numpy(scales)
            parameters[key].data = torch.from_numpy(numbers.astype(np.float32)).transpose(1, 2).contiguous()
        scheme = dict(quant_method="mxfp4")
    else:
        form, scheme = SCHEMES[name]
        for key in [key for key in weights if key.endswith("_proj.weight")]:
            tensors, numbers = form(name, key.removesuffix(".weight"), tuple(weights.pop(key).shape), draw)
            weights |= tensors
            parameters[key].data = torch.from_numpy(np.ascontiguousarray(numbers, np.float32))
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=scheme), indent=2) + "\n")


# Tokens of a vocabulary with byte fallback before the added ones.
EXTRA = {"spm": 430, "gemma": 400}


def write(name, options):
    options = dict(options)
    kind = options.pop("vocabulary")
    tokenizer = Pieces() if kind == "pieces" else sentence_pieces(kind) if kind in EXTRA else byte_level(kind)
    options = {**SHAPE, "vocab_size": max(VOCAB, tokenizer.get_vocab_size() + 2), **options}
    options["bos_token_id"], options["eos_token_id"] = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    model_type = options.pop("model_type")
    if "hidden_size_per_layer_input" in options:
        options["vocab_size_per_layer_input"] = options["vocab_size"]
    torch.manual_seed(1)
    Auto = transformers.AutoModelForCausalLM
    if vision := options.pop("vision_config", None):
        Auto = transformers.AutoModelForImageTextToText
        options = dict(text_config=dict(options, model_type=model_type), vision_config=vision,
                       tie_word_embeddings=options["tie_word_embeddings"])
        model_type = WRAPPERS.get(model_type, model_type.removesuffix("_text"))
    config = transformers.AutoConfig.for_model(model_type, **options)
    model = Auto.from_config(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # Norms and biases start out as ones and zeros, which would hide where they go.
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
            elif "embed_tokens" not in key and "lm_head" not in key:
                weight *= 0.7
            weight.copy_(weight.bfloat16().float())
        for key, scalar in model.named_buffers():
            # So do factors of layers and biases of routers.
            if key.endswith(("layer_scalar", "expert_bias", "e_score_correction_bias")):
                scalar.copy_((1 + 0.2 * torch.randn_like(scalar)).bfloat16().float())
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    shards = {"max_shard_size": "12KB"} if name == "llama" else {}
    model.bfloat16().save_pretrained(folder, **shards)
    # Frequencies do not survive a change of types; they are made again.
    model = Auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if name in SCHEMES or name == "gpt_oss":
        quantise(folder, name, model)
    if name == "qwen3_5_moe":
        join_experts(folder / "model.safetensors")
    if name == "qwen3_vl_moe":
        # As published, and in the second layer as the library writes them.
        path = folder / "model.safetensors"
        weights = safetensors.torch.load_file(path)
        for key in [key for key in weights if ".layers.0.mlp.experts." in key]:
            weights[key] = weights[key].transpose(1, 2).contiguous()
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    if model_type == "gemma3n_text":
        # Runtimes take the deviation of a sample. Published blocks have thousands of elements, where that is the same.
        def sparse(self, x):
            return torch.relu(x - x.mean(-1, keepdim=True) - x.std(-1, keepdim=True) * 1.6448536)

        transformers.models.gemma3n.modeling_gemma3n.Gemma3nTextMLP._gaussian_topk = sparse
    if name == "gpt2":
        # Published configurations lack what others call otherwise.
        path = folder / "config.json"
        text = json.loads(path.read_text())
        text = {key: value for key, value in text.items() if key not in ("intermediate_size", "num_key_value_heads")}
        path.write_text(json.dumps(text, indent=2) + "\n")
    if name == "gemma4":
        # The keys of configurations before per_layer_config.
        path = folder / "config.json"
        text = json.loads(path.read_text())
        text["global_head_dim"] = text.pop("per_layer_config")["1"]["head_dim"]
        path.write_text(json.dumps(text, indent=2) + "\n")
    if name == "qwen3":
        # The keys of configurations before rope_parameters.
        path = folder / "config.json"
        text = json.loads(path.read_text())
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
        path.write_text(json.dumps(text, indent=2) + "\n")
    if kind == "pieces":
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
    else:
        text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        (folder / "tokenizer.json").write_text(text)
    about = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": None}
    if name == "llama":
        about["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    elif name == "qwen2":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<|end|>")]}))

    # The library knows no special tokens in texts.
    ids = [[text, tokenizer.encode(text).ids] for text in TEXTS if kind != "pieces" or "<" not in text]
    rng = random.Random(2)
    tokens = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(TOKENS)]
    with torch.no_grad():
        # The whole of Llama 4 cannot do without images in this version of the library.
        of_text = model.language_model if name == "llama4" else model
        logits = of_text(torch.tensor([tokens])).logits[0, -POSITIONS:].float().numpy()
    (folder / "expected.json").write_text(json.dumps({"texts": ids, "tokens": tokens}, ensure_ascii=False))
    logits.astype("<f4").tofile(folder / "logits.f32")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes, logits {logits.std():.2f}")


def write_encoder(name, options):
    options = dict(options)
    kind, pooling = options.pop("vocabulary"), options.pop("pooling")
    dense = options.pop("dense", None)
    tokenizer = {"unigram": unigram, "words": word_pieces}.get(
        kind, lambda: sentence_pieces(kind) if kind in EXTRA else byte_level(kind))()
    options = {**ENCODER, "vocab_size": max(VOCAB, tokenizer.get_vocab_size() + 2), **options}
    if kind == "words":
        options |= dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    elif kind not in ("unigram", "roberta", "modern"):
        options |= dict(bos_token_id=tokenizer.token_to_id("<s>"), eos_token_id=tokenizer.token_to_id("</s>"), pad_token_id=None)
    if kind == "gemma":
        tokenizer.post_processor = around("<s>", "</s>", "")(tokenizer)
    if name == "qwen3-embedding":
        end = "<|end|>"
        template = processors.TemplateProcessing(single=f"$A {end}", pair=f"$A {end} $B {end}",
                                                 special_tokens=[(end, tokenizer.token_to_id(end))])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    if pooling == "rank" and options.get("type_vocab_size", 1) > 1:
        special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special)
    torch.manual_seed(1)
    Class = getattr(transformers, options.pop("architecture"))
    model = Class(Class.config_class(**options))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
            elif "embed" not in key:
                weight *= 0.7
            weight.copy_(weight.bfloat16().float())
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder)
    model = Class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text)
    about = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    if kind == "words":
        about = {"cls_token": "[CLS]", "sep_token": "[SEP]", "do_lower_case": True}
    elif kind in ("unigram", "modern"):
        about = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    matrices = []
    if pooling != "rank":
        modules = ["Transformer", "Pooling"] + ["Dense"] * (2 if dense else 0) + ["Normalize"]
        paths = [f"{i}_{module}" if i else "" for i, module in enumerate(modules)]
        (folder / "modules.json").write_text(json.dumps([
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{module}"}
            for i, (module, path) in enumerate(zip(modules, paths))]))
        (folder / "1_Pooling").mkdir()
        mode = dict(mean="mean_tokens", cls="cls_token").get(pooling, pooling)
        (folder / "1_Pooling/config.json").write_text(json.dumps(
            {f"pooling_mode_{other}": other == mode for other in ("mean_tokens", "cls_token", "lasttoken")}))
        for path, shape in zip((path for path in paths if "Dense" in path), ((dense, 24), (24, dense))):
            (folder / path).mkdir()
            matrices.append((0.4 * torch.randn(shape)).bfloat16())
            safetensors.torch.save_file({"linear.weight": matrices[-1]}, folder / path / "model.safetensors")
            (folder / path / "config.json").write_text(json.dumps(dict(
                in_features=shape[1], out_features=shape[0], bias=False, activation_function="torch.nn.modules.linear.Identity")))
    texts, results, types = [], [], {}
    rng = random.Random(2)
    if pooling == "rank":
        for query, document in PAIRS:
            if "qwen3" in name:
                ids = tokenizer.encode(RERANK.replace("QUERY", query).replace("DOCUMENT", document)).ids
                if "<s>" in document:
                    # What documents say are no control tokens.
                    halves = RERANK.replace("QUERY", query).split("DOCUMENT")
                    plain = Tokenizer.from_str(tokenizer.to_str())
                    plain.encode_special_tokens = True
                    ids = plain.encode(document.join(halves)).ids
            else:
                if "<s>" in document and kind == "unigram":
                    document = document.replace("<s>", "")
                plain = Tokenizer.from_str(tokenizer.to_str())
                plain.encode_special_tokens = kind == "modern"
                pair = plain.encode(query, document)
                ids = pair.ids
                if getattr(model.config, "type_vocab_size", 1) > 1:
                    types[len(texts)] = pair.type_ids
            texts.append([[query, document], ids])
    else:
        texts = [[text, tokenizer.encode(text).ids] for text in TEXTS if not ("qwen" in name and "<s>" in text)]
        texts.append([None, [rng.randrange(3, tokenizer.get_vocab_size()) for _ in range(TOKENS)]])
    with torch.no_grad():
        for at, (_, ids) in enumerate(texts):
            out = model(input_ids=torch.tensor([ids]), **({"token_type_ids": torch.tensor([types[at]])} if at in types else {}))
            if pooling == "rank":
                logits = out.logits[0].float()
                if logits.ndim > 1:
                    answers = [tokenizer.token_to_id(answer) for answer in ("yes", "no")]
                    logits = logits[-1, answers].softmax(0)[:1]
                results.append(logits)
                continue
            hidden = out.last_hidden_state[0].float()
            vector = dict(mean=hidden.mean(0), cls=hidden[0], lasttoken=hidden[-1])[pooling]
            for matrix in matrices:
                vector = matrix.float() @ vector
            results.append(vector / vector.norm())
    (folder / "expected.json").write_text(json.dumps({"texts": texts}, ensure_ascii=False))
    torch.stack(results).numpy().astype("<f4").tofile(folder / "vectors.f32")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{name}: {size} bytes, {[round(float(x), 3) for x in torch.stack(results)[:, 0]]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", nargs=2, type=pathlib.Path, metavar=("FOLDER", "LOGITS"))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.check:
        folder, file = args.check
        tokens = json.loads((folder / "expected.json").read_text())["tokens"]
        want = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
        want = want.detach().numpy().astype(np.float64)
        got = np.fromfile(file, "<f4").reshape(want.shape)
        print(f"normalised mean square error {((got - want) ** 2).mean() / (want**2).mean():.3g}")
        return
    for families, write_one in ((FAMILIES, write), (ENCODERS, write_encoder)):
        for name, options in families.items():
            if not args.names or name in args.names:
                write_one(name, options)


main()
