#!/usr/bin/env python3
"""Writes small models of random weights, with only the keys and tensors that real files of their family have, and what llama.cpp
says of them, for tests/golden.rs.

    pip install gguf numpy
    families.py LOGITS            all, with LOGITS the program of llama_logits.cpp: folders of tests/data/golden
    families.py LOGITS NAME...    these models; the others stay

Of encoders, these are vectors of tokens in place of logits.

The models have no vocabulary: token ids in, logits out. Each row below is a family, or a variant of it that real files have; the
keys and tensors are those that llama.cpp's converter writes and its loader reads.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import gguf
import numpy as np

OUT = pathlib.Path(__file__).resolve().parents[1] / "data" / "golden"
VOCAB, CONTEXT, TOKENS = 160, 256, 96
POSITIONS = [0, 1, 7, 15, 16, 17, 31, 40, 63, 64, 65, 80, 95]

PRE = ("attn_norm", "ffn_norm")
BIASES = dict(qkv_bias=True, out_bias=True, ffn_bias=True)
EXPERTS = dict(ffn="experts", hidden=16)
SCALES = dict(logit_scale=8.0, residual_scale=0.22, embedding_scale=12.0, attention_scale=0.015625)
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 20.0, "rope.scaling.original_context_length": 64}
PLAIN_ROPE = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": CONTEXT}

# Four heads of values for two of keys.
DELTA_NET = dict(dim=64, heads=4, kv=2, head=24, gated=True, qk_norm="head", norms=("attn_norm", "post_attention_norm"), base=1e7,
                 rotated=16, tied=True, keys={
                     "rope.dimension_sections": [3, 3, 2, 0], "ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16,
                     "ssm.time_step_rank": 4, "ssm.group_count": 2, "full_attention_interval": 4})

# Six heads.
HYBRID_KEYS = {"ssm.conv_kernel": 4, "ssm.inner_size": 96, "ssm.state_size": 24, "ssm.time_step_rank": 6, "ssm.group_count": 1}
MAMBA_2 = dict(dim=48, heads=4, norms=PRE, tied=True, keys=SCALES | HYBRID_KEYS | {"rope.scaling.finetuned": False})

GLM_4_5 = dict(EXPERTS | dict(hidden=48), layers=3, head=24, norms=("attn_norm", "post_attention_norm"), qkv_bias=True, base=1e6,
               rotated=12, shared=16, dense=1, router_bias=True, keys={
                   "leading_dense_block_count": 1, "expert_feed_forward_length": 16, "expert_shared_count": 1, "expert_gating_func": 2,
                   "expert_weights_norm": True, "expert_weights_scale": 2.5})

# Three heads: keys of 24 elements, 8 of them rotated, values of 12.
LATENT = dict(EXPERTS | dict(hidden=48), dim=48, heads=3, layers=3, mixers=["latent"] * 3, rotated=8, shared=32, dense=1)
LATENT_KEYS = {"leading_dense_block_count": 1, "expert_feed_forward_length": 16, "expert_shared_count": 2, "attention.kv_lora_rank": 32}
EXPANDED = LATENT_KEYS | {"attention.key_length": 24, "attention.value_length": 12}
ABSORBED = LATENT_KEYS | {"attention.key_length": 40, "attention.value_length": 32, "attention.key_length_mla": 24,
                          "attention.value_length_mla": 12}
DEEPSEEK_V3 = {"attention.q_lora_rank": 20, "expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5,
               "expert_group_count": 3, "expert_group_used_count": 2}
YARN_OF_SCORES = YARN | {"rope.scaling.factor": 40.0}

# One block a layer; experts without gates.
NEMOTRON_3 = dict(MAMBA_2 | EXPERTS | dict(norms=("attn_norm",), tied=False), layers=4, kv=[0, 0, 2, 0], hidden=[0, 24, 0, 0],
                  mixers=["mamba_2", None, "attention", "mamba_2"], shared=32, router_bias=True, expert_gates=False,
                  keys=HYBRID_KEYS | {"ssm.group_count": 2, "attention.layer_norm_epsilon": 1e-5, "expert_feed_forward_length": 24,
                                      "expert_shared_feed_forward_length": 32, "expert_shared_count": 1, "expert_weights_norm": True,
                                      "expert_weights_scale": 2.5, "expert_group_count": 1})

# Neighbouring heads of values share keys.
QWEN_3_NEXT = dict(DELTA_NET | EXPERTS, layers=4, mixers=["delta_net_of_neighbours"] * 3 + ["attention"], shared=16, shared_gate=True,
                   keys={name: value for name, value in DELTA_NET["keys"].items() if name != "rope.dimension_sections"} | {
                       "expert_feed_forward_length": 16})

GEMMA_3N = dict(dim=16, heads=2, kv=1, head=16, hidden=128, qk_norm="head", tied=True, base=1e6, layer_inputs=256, altup=True,
                norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), keys={
                    "attention.sliding_window": 16, "final_logit_softcapping": 30.0, "embedding_length_per_layer_input": 256,
                    "altup.active_idx": 0, "altup.num_inputs": 4})

GEMMA_4_MOE = dict(EXPERTS | dict(hidden=40), dim=48, heads=4, kv=[2, 2, 1], head=24, layers=3, qk_norm="head", tied=True, base=1e6, rotated=24,
                   norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_ffw_norm_1", "pre_ffw_norm_2",
                          "post_ffw_norm_2"), rope_factors=True, windowed=[True, True, False], window_head=16, beside=True, keys={
                       "attention.sliding_window": 16, "attention.key_length_swa": 16, "attention.value_length_swa": 16,
                       "attention.sliding_window_pattern": [True, True, False], "attention.shared_kv_layers": 0,
                       "embedding_length_per_layer_input": 0, "rope.freq_base_swa": 1e4, "rope.dimension_count_swa": 16,
                       "final_logit_softcapping": 30.0, "expert_feed_forward_length": 16})

MODERN_BERT = dict(arch="modern-bert", vectors=True, dim=24, hidden=32, layers=4, kv=2, norm="layer", norm_bias=False, embd_norm=True,
                   first_norm=False, fused_qkv=True, ffn="fused", tied=True, base=1.6e5, keys={
                       "attention.causal": False, "attention.sliding_window": 16, "rope.freq_base_swa": 1e4, "rope.scaling.type": "none",
                       "pooling_type": 2})

EMBEDDING_GEMMA = dict(arch="gemma-embedding", vectors=True, dim=16, head=16, hidden=32, layers=7, qk_norm="head", tied=True, base=1e6,
                       norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), keys={
                           "attention.sliding_window": 16, "rope.freq_base_swa": 1e4, "pooling_type": 1})

JINA_BERT = dict(vectors=True, heads=4, kv=4, norm="layer", norms=("attn_output_norm", "layer_output_norm"), embd_norm=True, last_norm=None,
                 qkv_bias=True, out_bias=True, down_bias=True, types=2, tied=True, base=None,
                 keys={"attention.causal": False, "pooling_type": 1})

ROTARY_BERT = dict(JINA_BERT | dict(base=1e4, ffn="plain", ffn_bias=True))

FAMILIES = {
    "arcee": dict(head=16, ffn="plain", keys=YARN),
    "bitnet": dict(tied=True, sub_norms=True),
    # 32 layers: from their number, llama.cpp takes that the model has rotary positions.
    "baichuan": dict(dim=16, heads=2, kv=2, hidden=16, layers=32, rotated=8),
    # 40 layers: from their number, llama.cpp takes that positions are biases by distance.
    "baichuan-13b": dict(arch="baichuan", dim=16, heads=2, kv=2, hidden=16, layers=40, rotated=8),
    "bailingmoe": dict(EXPERTS, base=6e5, rotated=16, shared=32,
                       keys={"leading_dense_block_count": 0, "expert_feed_forward_length": 16, "expert_weights_scale": 1.0,
                             "expert_shared_count": 2, "expert_weights_norm": True}),
    # Three groups of two experts.
    "bailingmoe2": dict(EXPERTS | dict(hidden=48), layers=3, head=16, fused_qkv=True, qk_norm="head", base=6e5, rotated=8, shared=16,
                        dense=1, router_bias=True, keys={
                            "leading_dense_block_count": 1, "expert_feed_forward_length": 16, "expert_shared_feed_forward_length": 16,
                            "expert_shared_count": 1, "expert_weights_norm": True, "expert_weights_scale": 2.5,
                            "expert_gating_func": 2, "expert_group_count": 3, "expert_group_used_count": 2}),
    # A number of heads that is no power of 2 has slopes of its own.
    "bloom": dict(dim=48, heads=6, kv=6, norm="layer", embd_norm=True, fused_qkv=True, **BIASES, ffn="plain", tied=True, base=None),
    "chatglm": dict(fused_qkv=True, qkv_bias=True, ffn="fused", rotated=8),
    "codeshell": dict(norm="layer", fused_qkv=True, **BIASES, ffn="plain",
                      keys={"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}),
    "command-r": dict(norm="layer", norm_bias=False, norms=("attn_norm",), tied=True, base=8e6,
                      keys={"logit_scale": 0.0625, "rope.scaling.type": "none"}),
    # 64 layers: from their number, llama.cpp takes that queries and keys have norms.
    "command-r-plus": dict(arch="command-r", dim=16, hidden=8, layers=64, norm="layer", norm_bias=False, norms=("attn_norm",),
                           qk_norm="each", tied=True, base=7.5e7, keys={"logit_scale": 0.8333333, "rope.scaling.type": "none"}),
    "dbrx": dict(EXPERTS, norm="layer", norm_bias=False, norms=("attn_norm", "attn_output_norm"), fused_qkv=True, base=5e5,
                 keys={"attention.clamp_kqv": 0.7}),
    "deepseek": dict(EXPERTS | dict(hidden=48), kv=2, layers=3, rotated=16, shared=32, dense=1,
                     keys={"rope.scaling.type": "none", "leading_dense_block_count": 1, "expert_feed_forward_length": 16,
                           "expert_weights_scale": 1.0, "expert_shared_count": 2}),
    # From a number of 27 layers, llama.cpp takes that queries have no latent vector.
    "deepseek2-lite": dict(LATENT, arch="deepseek2", dim=16, heads=2, kv=2, layers=27, mixers=["latent"] * 27, hidden=16, shared=8, keys=
                           EXPANDED | YARN_OF_SCORES | {"attention.kv_lora_rank": 16, "attention.key_length": 16, "attention.value_length": 8,
                                                        "expert_feed_forward_length": 4, "rope.scaling.yarn_log_multiplier": 0.0707}),
    "deepseek2-lite-absorbed": dict(LATENT, arch="deepseek2", dim=16, heads=2, kv=1, layers=27, mixers=["latent"] * 27, hidden=16, shared=8,
                                    keys=ABSORBED | YARN_OF_SCORES | {
                                        "attention.kv_lora_rank": 16, "attention.key_length": 24, "attention.value_length": 16,
                                        "attention.key_length_mla": 16, "attention.value_length_mla": 8,
                                        "expert_feed_forward_length": 4, "rope.scaling.yarn_log_multiplier": 0.0707}),
    "deepseek2-v3": dict(LATENT, arch="deepseek2", kv=1, router_bias=True,
                         keys=ABSORBED | DEEPSEEK_V3 | YARN_OF_SCORES | {"rope.scaling.yarn_log_multiplier": 0.1}),
    # Files of before they said how scores grow.
    "deepseek2-v3-expanded": dict(LATENT, arch="deepseek2", kv=3, router_bias=True, keys=EXPANDED | DEEPSEEK_V3 | YARN_OF_SCORES),
    # GLM-4.7-Flash has no YaRN.
    "deepseek2-glm": dict(LATENT, arch="deepseek2", kv=1, router_bias=True, shared=16, base=1e6,
                          keys=ABSORBED | DEEPSEEK_V3 | {"expert_shared_count": 1, "expert_group_count": 1, "expert_group_used_count": 1,
                                                         "expert_weights_scale": 1.8}),
    "dots1": dict(EXPERTS | dict(hidden=48), kv=2, layers=3, head=16, qk_norm="head", base=1e7, shared=32, dense=1, router_bias=True,
                  keys={"leading_dense_block_count": 1, "expert_feed_forward_length": 16, "expert_weights_scale": 2.5,
                        "expert_shared_count": 2, "expert_weights_norm": True, "expert_gating_func": 2}),
    "ernie4_5": dict(head=24, base=5e5, tied=True),
    "ernie4_5-moe": dict(EXPERTS | dict(hidden=48), layers=3, base=5e5, shared=32, dense=1, router_bias=True, tied=True, keys={
        "leading_dense_block_count": 1, "expert_feed_forward_length": 16, "expert_shared_feed_forward_length": 32,
        "expert_shared_count": 2, "interleave_moe_layer_step": 1}),
    "exaone": dict(rope_factors=True, rotated=16, base=5e5, tied=True),
    "exaone-moe": dict(EXPERTS | dict(hidden=48), layers=5, head=24, qk_norm="head", base=1e6, shared=16, dense=1, router_bias=True,
                       keys={"leading_dense_block_count": 1, "expert_feed_forward_length": 16, "expert_shared_count": 1,
                             "expert_shared_feed_forward_length": 16, "expert_gating_func": 2, "expert_weights_norm": True,
                             "expert_weights_scale": 2.5, "attention.sliding_window": 16,
                             "attention.sliding_window_pattern": [True, True, True, False, True]}),
    "exaone4": dict(norms=("post_attention_norm", "post_ffw_norm"), qk_norm="head", rope_factors=True,
                    base=1e6, tied=True),
    # 64 layers: from their number, llama.cpp takes that layers have a window.
    "exaone4-window": dict(arch="exaone4", dim=16, hidden=16, layers=64, norms=("post_attention_norm", "post_ffw_norm"),
                           qk_norm="head", base=1e6, keys={"attention.sliding_window": 16,
                                                           "attention.sliding_window_pattern": [True, True, True, False] * 16}),
    # Mamba 2 beside each attention; two groups.
    "falcon-h1": dict(MAMBA_2 | dict(norms=("attn_norm",), tied=False, keys=HYBRID_KEYS | {"ssm.group_count": 2}), kv=2, head=16,
                      base=1e11, mixers=["both"] * 2),
    "gemma-embedding": dict(EMBEDDING_GEMMA),
    # With the matrices that follow the pooling, and windows in layers that the file names.
    "gemma-embedding-dense": dict(EMBEDDING_GEMMA, layers=2, pooled=40, keys=EMBEDDING_GEMMA["keys"] | {
        "attention.sliding_window_pattern": [True, False], "dense_2_feat_in": 16, "dense_2_feat_out": 40, "dense_3_feat_in": 40,
        "dense_3_feat_out": 16}),
    "gemma": dict(dim=64, heads=4, kv=1, head=24, tied=True),
    # Of so few layers, all have caches of their own and sparse gates.
    "gemma3n": dict(GEMMA_3N, layers=6, keys=GEMMA_3N["keys"] | {
        "attention.sliding_window_pattern": [True, True, True, True, False, True]}),
    # llama.cpp takes that the first 20 layers have caches of their own, and that the first 10 are sparse. All have keys and values.
    "gemma3n-shared": dict(GEMMA_3N, arch="gemma3n", layers=22, keys=GEMMA_3N["keys"] | {
        "attention.shared_kv_layers": 2, "attention.sliding_window_pattern": ([True] * 4 + [False]) * 4 + [True, False]}),
    # Three layers use the caches of the first two.
    "gemma4": dict(dim=48, heads=4, kv=[1, 2, 1, 2, 1], head=24, layers=5, hidden=[32, 32, 64, 64, 64], qk_norm="head",
                   norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), tied=True, base=1e6, rotated=24,
                   rope_factors=True, windowed=[True, False, True, False, True], window_head=16, layer_inputs=24, shared_kv=3,
                   keys={"attention.sliding_window": 16, "attention.key_length_swa": 16, "attention.value_length_swa": 16,
                         "attention.sliding_window_pattern": [True, False, True, False, True], "attention.shared_kv_layers": 3,
                         "embedding_length_per_layer_input": 24, "rope.freq_base_swa": 1e4, "rope.dimension_count_swa": 16,
                         "final_logit_softcapping": 30.0}),
    # A mixture of experts beside the feed-forward block; keys are values in layers without a window.
    "gemma4-moe": dict(GEMMA_4_MOE, arch="gemma4"),
    "glm4": dict(norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), qkv_bias=True,
                 ffn="fused", rotated=8),
    # The order of rows is that of halves, and a text has the same coordinates in all sections.
    "glm4-sections": dict(arch="glm4", norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), qkv_bias=True,
                          ffn="fused", rotated=8, keys={"rope.dimension_sections": [1, 2, 1, 0]}),
    "glm4moe": dict(GLM_4_5, qk_norm="head"),
    "glm4moe-air": dict(GLM_4_5, arch="glm4moe"),
    "gptneox": dict(kv=2, norm="layer", fused_qkv=True, **BIASES, ffn="plain", rotated=4,
                    keys={"use_parallel_residual": True}),
    "gptneox-sequential": dict(arch="gptneox", norm="layer", kv=2, fused_qkv=True, **BIASES, ffn="plain", rotated=4,
                               keys={"use_parallel_residual": False}),
    "granitehybrid": dict(MAMBA_2, layers=3, mixers=["mamba_2", "attention", "mamba_2"], kv=[0, 2, 0]),
    "granitehybrid-moe": dict(MAMBA_2 | EXPERTS, arch="granitehybrid", layers=2, mixers=["mamba_2", "attention"], kv=[0, 2], shared=48),
    "granitemoe": dict(EXPERTS, tied=True, keys=SCALES),
    "granitemoe-shared": dict(EXPERTS, arch="granitemoe", shared=48, tied=True, keys=SCALES),
    "hunyuan-dense": dict(dim=64, heads=4, kv=2, head=24, qk_norm="head", base=1.1e7, tied=True, keys=PLAIN_ROPE),
    "hunyuan-moe": dict(EXPERTS, head=24, qk_norm="head", base=1.1e7, shared=16, tied=True,
                        keys=PLAIN_ROPE | {"expert_feed_forward_length": 16, "expert_shared_feed_forward_length": 16,
                                           "expert_shared_count": 1}),
    "internlm2": dict(base=1e6),
    "jais2": dict(norm="layer", **BIASES, ffn="plain"),
    "jina-bert-v2": dict(JINA_BERT, ffn="fused"),
    "jina-bert-v2-gate": dict(JINA_BERT, arch="jina-bert-v2"),
    "jina-bert-v2-code": dict(JINA_BERT, arch="jina-bert-v2", ffn="fused", qk_norm="row",
                              norms=JINA_BERT["norms"] + ("attn_norm_2",)),
    "jina-bert-v3": dict(ROTARY_BERT | dict(layers=3, types=1)),
    "kimi-linear": dict(LATENT, kv=[0, 0, 1], mixers=["kimi_delta", "kimi_delta", "latent"], shared=16, router_bias=True, base=None,
                        keys=ABSORBED | {"expert_shared_count": 1, "ssm.conv_kernel": 4, "kda.head_dim": 16, "expert_gating_func": 2,
                                         "expert_weights_scale": 2.446}),
    "lfm2": dict(dim=64, heads=4, kv=[0, 0, 2, 0], layers=4, mixers=["short_conv", "short_conv", "attention", "short_conv"],
                 qk_norm="head", base=1e6, tied=True, last_norm="token_embd_norm", keys={"shortconv.l_cache": 3}),
    "lfm2moe": dict(EXPERTS | dict(hidden=80), dim=64, heads=4, kv=[0, 2, 0], layers=3, mixers=["short_conv", "attention", "short_conv"], dense=1,
                    router_bias=True, qk_norm="head", base=1e6, tied=True, last_norm="token_embd_norm", keys={
                        "shortconv.l_cache": 3, "expert_feed_forward_length": 16, "leading_dense_block_count": 1,
                        "expert_gating_func": 2}),
    # The last of four layers has no positions; every other one has experts.
    "llama4": dict(EXPERTS | dict(hidden=48), kv=2, head=16, layers=4, base=5e5, rotated=16, shared=16, dense=[0, 2], used=1, rope_factors=True,
                   keys={"interleave_moe_layer_step": 2, "expert_feed_forward_length": 16, "expert_shared_count": 1}),
    # Two chunks of positions.
    "llama4-long": dict(EXPERTS | dict(hidden=32), folder="long", context=16384, tokens=8320, kept=[0, 40, 8190, 8191, 8192, 8193, 8250, 8319], arch="llama4",
                        dim=16, heads=2, kv=1, head=8, layers=4, base=5e5, rotated=8, shared=16, dense=[0, 2], used=1, tied=True,
                        keys={"interleave_moe_layer_step": 2, "expert_feed_forward_length": 16, "expert_shared_count": 1}),
    "maincoder": dict(head=24, qk_norm="head", base=1e6, tied=True),
    "mamba": dict(dim=48, heads=0, kv=None, hidden=0, base=None, layers=3, norms=("attn_norm",), tied=True, mixers=["mamba"] * 3,
                  keys={"ssm.conv_kernel": 4, "ssm.inner_size": 96, "ssm.state_size": 16, "ssm.time_step_rank": 3}),
    # FalconMamba.
    "mamba-norms": dict(arch="mamba", dim=48, heads=0, kv=None, hidden=0, base=None, norms=("attn_norm",), mixers=["mamba"] * 2,
                        keys={"ssm.conv_kernel": 4, "ssm.inner_size": 96, "ssm.state_size": 16, "ssm.time_step_rank": 3,
                              "ssm.dt_b_c_rms": True}),
    "mamba2": dict(MAMBA_2 | dict(norms=("attn_norm",), keys=HYBRID_KEYS | {"ssm.group_count": 2}), heads=0, kv=None, hidden=0, base=None,
                   layers=3, mixers=["mamba_2"] * 3),
    "mellum": dict(EXPERTS, layers=4, head=24, qk_norm="head", base=5e5, keys=YARN | {
        "expert_feed_forward_length": 16, "attention.sliding_window": 16, "attention.sliding_window_pattern": [True, True, True, False]}),
    "minicpm": dict(tied=True, keys=dict(logit_scale=9.0, residual_scale=0.22, embedding_scale=12.0)),
    "minicpm3": dict(dim=48, heads=3, kv=3, mixers=["latent"] * 2, rotated=8, tied=True, long_rope=True, keys={
        "attention.q_lora_rank": 20, "attention.kv_lora_rank": 32, "attention.key_length": 24}),
    "minimax-m2": dict(EXPERTS, heads=4, kv=2, head=16, qk_norm="row", base=5e6, rotated=8, router_bias=True,
                       keys={"expert_feed_forward_length": 16, "expert_gating_func": 2}),
    "nomic-bert-moe": dict(ROTARY_BERT | dict(ffn="experts", dense=[0, 2], expert_gates=False, layers=4, types=1, keys=ROTARY_BERT["keys"] | {
        "moe_every_n_layers": 2})),
    # Scores grow from position 32 on.
    "mistral3": dict(head=24, base=1e6, keys=YARN | {"rope.scaling.original_context_length": 32, "rope.scaling.yarn_beta_fast": 32.0,
                                                     "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_log_multiplier": 1.0,
                                                     "attention.temperature_scale": 0.1}),
    "modern-bert": dict(MODERN_BERT),
    "modern-bert-silu": dict(MODERN_BERT, keys=MODERN_BERT["keys"] | {"hidden_activation": "silu"}),
    "mpt": dict(dim=48, heads=6, kv=6, norm="layer", norm_bias=False, fused_qkv=True, ffn="plain", tied=True, base=None,
                keys={"attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 2.0}),
    "mpt-positions": dict(arch="mpt", kv=2, norm="layer", fused_qkv=True, **BIASES, ffn="plain", tied=True, positions=True,
                          keys={"attention.max_alibi_bias": 0.0}),
    "nemotron": dict(norm="layer", ffn="plain", rotated=8),
    # One block a layer; two groups.
    "nemotron_h": dict(MAMBA_2 | dict(norms=("attn_norm",), tied=False,
                                      keys=HYBRID_KEYS | {"ssm.group_count": 2, "attention.layer_norm_epsilon": 1e-5}),
                       layers=4, kv=[0, 0, 2, 0], hidden=[0, 80, 0, 0], ffn="plain",
                       mixers=["mamba_2", None, "attention", "mamba_2"]),
    "nemotron_h_moe": dict(NEMOTRON_3, keys=NEMOTRON_3["keys"]),
    # Experts that read fewer elements.
    "nemotron_h_moe-latent": dict(NEMOTRON_3, arch="nemotron_h_moe", keys=NEMOTRON_3["keys"] | {"moe_latent_size": 24}),
    "olmo": dict(norm="layer", norms=(), last_norm=None, tied=True),
    "olmoe": dict(EXPERTS, kv=2, qk_norm="row"),
    "openelm": dict(heads=[2, 4], kv=[1, 2], head=16, hidden=[32, 64], fused_qkv=True, qk_norm="head", tied=True),
    "orion": dict(norm="layer"),
    "pangu-embedded": dict(qkv_bias=True, out_bias=True, base=1.6e7),
    "phi2": dict(kv=2, norm="layer", norms=("attn_norm",), **BIASES, ffn="plain", output_bias=True, rotated=8),
    "plamo": dict(norms=("attn_norm",)),
    # Attention comes first: llama.cpp takes the number of rotated elements from the first layer, where files have none, and does not end.
    "plamo2": dict(dim=48, heads=[2, 0, 2], kv=[1, 0, 1], head=16, hidden=32, layers=3, mixers=["attention", "mamba_of_plamo", "attention"],
                   qk_norm="each", fused_qkv=True, ffn="fused", bare_norms=True, tied=True, base=1e6,
                   norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), keys={
                       "ssm.conv_kernel": 4, "ssm.inner_size": 96, "ssm.state_size": 24, "ssm.time_step_rank": 6, "ssm.group_count": 0}),
    "plamo3": dict(layers=8, head=16, qk_norm="head", fused_qkv=True, ffn="fused", bare_norms=True, base=1e6,
                   norms=("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), keys={
                       "attention.sliding_window": 16, "rope.freq_base_swa": 1e4, "attention.sliding_window_pattern": [True] * 7 + [False]}),
    "qwen2moe": dict(EXPERTS | dict(hidden=48), qkv_bias=True, base=1e6, shared=48, shared_gate=True,
                     keys={"expert_feed_forward_length": 16}),
    # A text has the same coordinates in all sections.
    # llama.cpp adds nothing under the roots of its norms, whatever the file says.
    "qwen2vl": dict(eps=1e-6, qkv_bias=True, base=1e6, tied=True, keys={"rope.dimension_sections": [4, 2, 2, 0]}),
    # Its vectors times the embedding table are its logits.
    "qwen3-embedding": dict(folder="embedding", arch="qwen3", head=24, qk_norm="head", base=1e6, tied=True, keys={"pooling_type": 3}),
    "qwen35": dict(DELTA_NET, layers=5, mixers=["delta_net"] * 3 + ["attention", "delta_net"]),
    "qwen35-moe": dict(DELTA_NET | EXPERTS | dict(keys=DELTA_NET["keys"] | {"expert_feed_forward_length": 16}), arch="qwen35moe",
                       layers=4, mixers=["delta_net"] * 3 + ["attention"], shared=16, shared_gate=True),
    "qwen3next": dict(QWEN_3_NEXT),
    "qwen3next-alternating": dict(QWEN_3_NEXT, arch="qwen3next", alternating=True),
    "qwen3vl": dict(head=24, qk_norm="head", base=5e6, tied=True, keys={"rope.dimension_sections": [4, 4, 4, 0], "n_deepstack_layers": 3}),
    "qwen3vl-moe": dict(EXPERTS, arch="qwen3vlmoe", head=24, qk_norm="head", base=5e6, keys={
        "rope.dimension_sections": [4, 4, 4, 0], "n_deepstack_layers": 3, "expert_feed_forward_length": 16}),
    "seed_oss": dict(head=24, norms=("attn_norm", "post_attention_norm"), qkv_bias=True, base=1e7),
    # llama.cpp takes a window of 4096 whatever the file says.
    "smallthinker": dict(EXPERTS, layers=5, base=1.5e6, tied=True,
                         keys={"expert_gating_func": 2, "expert_feed_forward_length": 16, "attention.sliding_window": 4096}),
    "smallthinker-softmax": dict(EXPERTS, arch="smallthinker", tied=True,
                                 keys={"expert_gating_func": 1, "expert_feed_forward_length": 16}),
    "starcoder": dict(norm="layer", positions=True, fused_qkv=True, **BIASES, ffn="plain", tied=True),
    "xverse": dict(rotated=16),
}


class File:
    """A model file in the making."""

    def __init__(self, name, architecture):
        self.random = np.random.default_rng(list(name.encode()))
        self.architecture = architecture
        self.writer = gguf.GGUFWriter(None, architecture)
        self.writer.add_name(name)
        self.writer.add_tokenizer_model("none")

    def key(self, name, value):
        name = f"{self.architecture}.{name}"
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(self.writer, f"add_{kinds[type(value)]}")(name, value)

    def tensor(self, name, *shape, scale, around=0.0, type=np.float32):
        """Random values; the shape as in the file: the length of a row first."""
        values = around + scale * self.random.standard_normal(shape[::-1])
        self.writer.add_tensor(name, values.astype(type))

    def norm(self, name, length, bias=False):
        self.tensor(f"{name}.weight", length, scale=0.1, around=1.0)
        if bias:
            self.tensor(f"{name}.bias", length, scale=0.1)

    def linear(self, name, cols, *rows, bias=False):
        self.tensor(f"{name}.weight", cols, *rows, scale=cols**-0.5)
        if bias:
            self.tensor(f"{name}.bias", *rows, scale=0.1)

    def write(self, path):
        self.writer.write_header_to_file(path)
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def model(name, arch=None, dim=32, heads=2, kv=1, head=None, hidden=48, layers=2, norm="rms", norm_bias=True, norms=PRE,
          qk_norm=None, fused_qkv=False, qkv_bias=False, out_bias=False, ffn="gated", ffn_bias=False, shared=0, shared_gate=False,
          tied=False, output_bias=False, positions=False, rotated=None, base=10000.0, rope_factors=False, mixers=None, gated=False,
          last_norm="output_norm", windowed=None, window_head=None, layer_inputs=0, shared_kv=0, dense=0, router_bias=False,
          sub_norms=False, bare_norms=False, expert_gates=True, alternating=False, long_rope=False,
          used=2, beside=False, altup=False, eps=1e-5, embd_norm=False, first_norm=True, pooled=None, types=0, down_bias=False, context=CONTEXT, keys={}):
    """The file of a family's row."""
    arch_name = arch or name
    file = File(name, arch_name)
    for key, value in dict(vocab_size=VOCAB, context_length=context, embedding_length=dim, block_count=layers,
                           feed_forward_length=hidden).items():
        file.key(key, value)
    file.key("attention.head_count", heads)
    if kv is not None:
        file.key("attention.head_count_kv", kv)
    layer_norm = norm == "layer"
    file.key("attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon", eps)
    if head:
        file.key("attention.key_length", head)
        file.key("attention.value_length", head)
    if not positions and base:
        file.key("rope.freq_base", base)
    if rotated:
        file.key("rope.dimension_count", rotated)
    # Not a power of 2, so that no shape is right by chance.
    experts = 6 if ffn == "experts" else 0
    if experts:
        file.key("expert_count", experts)
        file.key("expert_used_count", used)
    if shared and "expert_shared_count" not in keys:
        file.key("expert_shared_feed_forward_length", shared)
    for key, value in keys.items():
        file.key(key, value)

    norm_bias = norm_bias and layer_norm
    file.tensor("token_embd.weight", dim, VOCAB, scale=dim**-0.5 if tied else 1.0)
    if positions:
        file.tensor("position_embd.weight", dim, CONTEXT, scale=0.3)
    if types:
        file.writer.add_token_type_count(types)
        file.tensor("token_types.weight", dim, types, scale=0.3)
    if embd_norm:
        file.norm("token_embd_norm", dim, norm_bias)
    if last_norm:
        file.norm(last_norm, dim, norm_bias)
    if pooled:
        file.linear("dense_2", dim, pooled)
        file.linear("dense_3", pooled, dim)
    if not tied:
        file.linear("output", dim, VOCAB, bias=output_bias)
    if layer_inputs:
        file.linear("per_layer_model_proj", dim, layer_inputs * layers)
        file.norm("per_layer_proj_norm", layer_inputs)
        file.tensor("per_layer_token_embd.weight", layer_inputs * layers, VOCAB, scale=layer_inputs**-0.5, type=np.float16)
    if altup:
        file.linear("altup_proj", dim, dim, 3)
        file.linear("altup_unembd_proj", dim, dim, 3)
    if rope_factors:
        pairs = (head or dim // heads) // 2
        file.writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, pairs, dtype=np.float32))
    if long_rope:
        for which, end in ("short", 2), ("long", 8):
            file.writer.add_tensor(f"rope_factors_{which}.weight", np.linspace(1, end, rotated // 2, dtype=np.float32))
    per_layer = lambda value, layer: value[layer] if isinstance(value, list) else value
    for layer in range(layers):
        at = f"blk.{layer}."
        queries, groups, inner = (per_layer(value, layer) for value in (heads, kv or 0, hidden))
        length = window_head if windowed and windowed[layer] else head or dim // max(queries, 1)
        own_kv = layer < layers - shared_kv
        rows, kv_rows = queries * length, groups * length
        for part in norms:
            if layer == 0 and part == "attn_norm" and not first_norm:
                continue
            if bare_norms and part.startswith("post_"):
                file.tensor(at + part, dim, scale=0.1, around=1.0)
            else:
                file.norm(at + part, dim, norm_bias)
        if sub_norms:
            file.norm(at + "attn_sub_norm", queries * length)
            file.norm(at + "ffn_sub_norm", inner)
            for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
                file.tensor(f"{at}{part}.scale", 1, scale=0.1, around=1.0)
        if arch_name == "falcon-h1":
            # Its files leave out the ending.
            file.tensor(at + "ffn_norm", dim, scale=0.1, around=1.0)
        mixer = mixers[layer] if mixers else "attention"
        if mixer == "short_conv":
            short_conv(file, at, dim, keys)
        elif mixer == "delta_net":
            delta_net(file, at, dim, keys)
        elif mixer == "mamba_2":
            mamba_2(file, at, dim, keys)
        elif mixer == "mamba":
            mamba(file, at, dim, keys)
        elif mixer == "mamba_of_plamo":
            mamba_of_plamo(file, at, dim, keys)
        elif mixer == "kimi_delta":
            kimi_delta(file, at, dim, heads, keys)
        elif mixer == "latent":
            latent(file, at, dim, heads, keys)
        elif mixer == "delta_net_of_neighbours":
            delta_net(file, at, dim, keys, neighbours=True, alternating=alternating)
        elif mixer is None:
            pass
        elif fused_qkv:
            file.linear(at + "attn_qkv", dim, rows + 2 * kv_rows, bias=qkv_bias)
        else:
            for part, count in (("q", 2 * rows if gated else rows), ("k", kv_rows), ("v", kv_rows)):
                if part == "q" or own_kv and (part == "k" or not beside or windowed[layer]):
                    file.linear(f"{at}attn_{part}", dim, count, bias=qkv_bias)
        if mixer == "both":
            mamba_2(file, at, dim, keys)
        attends = mixer in ("attention", "both")
        if attends:
            file.linear(at + "attn_output", rows, dim, bias=out_bias)
        if attends and qk_norm:
            for part, count in (("q", queries), ("k", groups if own_kv else 0)):
                shape = {"head": (length,), "row": (length * count,), "each": (length, count)}[qk_norm]
                if count:
                    file.tensor(f"{at}attn_{part}_norm.weight", *shape, scale=0.1, around=1.0)
                if count and norm_bias:
                    file.tensor(f"{at}attn_{part}_norm.bias", *shape, scale=0.1)
        if layer_inputs:
            file.linear(at + "inp_gate", dim, layer_inputs)
            file.linear(at + "proj", layer_inputs, dim)
            file.norm(at + "post_norm", dim)
        if layer_inputs and not altup:
            file.tensor(at + "layer_output_scale.weight", 1, scale=0.1, around=1.0)
        if altup:
            file.norm(at + "altup_correct_scale", dim)
            file.tensor(at + "altup_correct_coef.weight", 4, 4, scale=0.1)
            file.tensor(at + "altup_predict_coef.weight", 4, 16, scale=0.1)
            file.tensor(at + "altup_router.weight", dim, 4, scale=dim**0.5)
            file.norm(at + "altup_router_norm", dim)
            file.linear(at + "laurel_l", dim, 64)
            file.linear(at + "laurel_r", 64, dim)
            file.norm(at + "laurel_post_norm", dim)
        if not inner:
            continue
        has_experts = experts and (layer not in dense if isinstance(dense, list) else layer >= dense)
        if beside:
            file.tensor(at + "ffn_gate_inp.scale", dim, scale=0.1, around=1.0)
            file.tensor(at + "ffn_down_exps.scale", experts, scale=0.1, around=1.0)
            for part, shape in (("gate", (dim, inner)), ("up", (dim, inner)), ("down", (inner, dim))):
                file.linear(at + "ffn_" + part, *shape)
        if has_experts:
            if router_bias:
                file.tensor(at + "exp_probs_b.bias", experts, scale=0.3)
            file.linear(at + "ffn_gate_inp", dim, experts)
            inner = keys.get("expert_feed_forward_length", inner)
            cols = keys.get("moe_latent_size", dim)
            if cols != dim:
                file.linear(at + "ffn_latent_down", dim, cols)
                file.linear(at + "ffn_latent_up", cols, dim)
            if beside:
                file.linear(at + "ffn_gate_up_exps", cols, 2 * inner, experts)
            elif expert_gates:
                file.linear(at + "ffn_gate_exps", cols, inner, experts)
            if not beside:
                file.linear(at + "ffn_up_exps", cols, inner, experts)
            file.linear(at + "ffn_down_exps", inner, cols, experts)
        else:
            if ffn == "gated" or ffn == "experts" and expert_gates:
                file.linear(at + "ffn_gate", dim, inner, bias=ffn_bias)
            file.linear(at + "ffn_up", dim, 2 * inner if ffn == "fused" else inner, bias=ffn_bias)
            file.linear(at + "ffn_down", inner, dim, bias=ffn_bias or down_bias)
        if shared and has_experts:
            if expert_gates:
                file.linear(at + "ffn_gate_shexp", dim, shared)
            file.linear(at + "ffn_up_shexp", dim, shared)
            file.linear(at + "ffn_down_shexp", shared, dim)
        if shared_gate:
            file.tensor(at + "ffn_gate_inp_shexp.weight", dim, scale=dim**-0.5)
    return file


def latent(file, at, dim, heads, keys):
    rank, query_rank = keys["attention.kv_lora_rank"], keys.get("attention.q_lora_rank")
    apart = "attention.key_length_mla" in keys
    of_head = lambda which: keys.get(f"attention.{which}_length_mla", keys.get(f"attention.{which}_length", dim // heads))
    key, value, turned = of_head("key"), of_head("value"), 8
    if query_rank:
        file.linear(at + "attn_q_a", dim, query_rank)
        file.norm(at + "attn_q_a_norm", query_rank)
        file.linear(at + "attn_q_b", query_rank, heads * key)
    else:
        file.linear(at + "attn_q", dim, heads * key)
    file.linear(at + "attn_kv_a_mqa", dim, rank + turned)
    file.norm(at + "attn_kv_a_norm", rank)
    if apart:
        file.linear(at + "attn_k_b", key - turned, rank, heads)
        file.linear(at + "attn_v_b", rank, value, heads)
    else:
        file.linear(at + "attn_kv_b", rank, heads * (key - turned + value))
    file.linear(at + "attn_output", heads * value, dim)


def short_conv(file, at, dim, keys):
    file.tensor(at + "shortconv.conv.weight", keys["shortconv.l_cache"], dim, scale=0.6)
    file.linear(at + "shortconv.in_proj", dim, 3 * dim)
    file.linear(at + "shortconv.out_proj", dim, dim)


def delta_net(file, at, dim, keys, neighbours=False, alternating=False):
    inner, key, heads = (keys[f"ssm.{name}"] for name in ("inner_size", "state_size", "time_step_rank"))
    channels = 2 * keys["ssm.group_count"] * key + inner
    if alternating:
        file.linear(at + "ssm_in", dim, channels + inner)
    else:
        file.linear(at + "attn_qkv", dim, channels)
        file.linear(at + "attn_gate", dim, inner)
    file.tensor(at + "ssm_conv1d.weight", keys["ssm.conv_kernel"], channels, scale=0.5)
    file.tensor(at + "ssm_dt.bias", heads, scale=0.5)
    # Always negative, so that states decay.
    file.writer.add_tensor(at + "ssm_a", -np.exp(file.random.standard_normal(heads)).astype(np.float32))
    if neighbours:
        file.linear(at + "ssm_ba", dim, 2 * heads)
    else:
        file.linear(at + "ssm_beta", dim, heads)
        file.linear(at + "ssm_alpha", dim, heads)
    file.norm(at + "ssm_norm", inner // heads)
    file.linear(at + "ssm_out", inner, dim)


def kimi_delta(file, at, dim, heads, keys):
    length, taps = keys["kda.head_dim"], keys["ssm.conv_kernel"]
    inner = heads * length
    for part in "qkv":
        file.linear(f"{at}attn_{part}", dim, inner)
        file.tensor(f"{at}ssm_conv1d_{part}.weight", taps, 1, inner, 1, scale=0.5)
    for part in "fg":
        file.linear(f"{at}ssm_{part}_a", dim, length)
        file.linear(f"{at}ssm_{part}_b", length, inner)
    file.linear(at + "ssm_beta", dim, heads)
    file.tensor(at + "ssm_dt.bias", inner, scale=0.5)
    # Always negative, so that states decay.
    file.writer.add_tensor(at + "ssm_a", -np.exp(file.random.standard_normal((1, 1, heads, 1))).astype(np.float32))
    file.norm(at + "ssm_norm", length)
    file.linear(at + "attn_output", inner, dim)


def mamba(file, at, dim, keys):
    inner, state, rank = (keys[f"ssm.{name}"] for name in ("inner_size", "state_size", "time_step_rank"))
    file.linear(at + "ssm_in", dim, 2 * inner)
    file.tensor(at + "ssm_conv1d.weight", keys["ssm.conv_kernel"], inner, scale=0.5)
    file.tensor(at + "ssm_conv1d.bias", inner, scale=0.1)
    file.linear(at + "ssm_x", inner, rank + 2 * state)
    file.linear(at + "ssm_dt", rank, inner, bias=True)
    # Always negative, so that states decay.
    file.writer.add_tensor(at + "ssm_a", -np.exp(file.random.standard_normal((inner, state))).astype(np.float32))
    file.tensor(at + "ssm_d", inner, scale=0.5)
    file.linear(at + "ssm_out", inner, dim)


def mamba_of_plamo(file, at, dim, keys):
    inner, state, heads = (keys[f"ssm.{name}"] for name in ("inner_size", "state_size", "time_step_rank"))
    rank = max(64, dim // 16)
    file.linear(at + "ssm_in", dim, 2 * inner)
    file.tensor(at + "ssm_conv1d.weight", keys["ssm.conv_kernel"], inner, scale=0.5)
    file.linear(at + "ssm_x", inner, rank + 2 * state)
    file.linear(at + "ssm_dt", rank, heads, bias=True)
    # Always negative, so that states decay.
    file.writer.add_tensor(at + "ssm_a", -np.exp(file.random.standard_normal(heads)).astype(np.float32))
    file.tensor(at + "ssm_d", heads, scale=0.5)
    for part, length in (("dt", rank), ("b", state), ("c", state)):
        file.tensor(f"{at}ssm_{part}_norm", length, scale=0.1, around=1.0)
    file.linear(at + "ssm_out", inner, dim)


def mamba_2(file, at, dim, keys):
    inner, state, heads, groups = (keys[f"ssm.{name}"] for name in ("inner_size", "state_size", "time_step_rank", "group_count"))
    channels = inner + 2 * groups * state
    file.linear(at + "ssm_in", dim, inner + channels + heads)
    file.tensor(at + "ssm_conv1d.weight", keys["ssm.conv_kernel"], channels, scale=0.5)
    file.tensor(at + "ssm_conv1d.bias", channels, scale=0.1)
    file.tensor(at + "ssm_dt.bias", heads, scale=0.5)
    # Always negative, so that states decay.
    file.writer.add_tensor(at + "ssm_a", -np.exp(file.random.standard_normal((heads, 1))).astype(np.float32))
    file.tensor(at + "ssm_d", 1, heads, scale=0.5)
    file.tensor(at + "ssm_norm.weight", inner // groups, groups, scale=0.1, around=1.0)
    file.linear(at + "ssm_out", inner, dim)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logits", help="the program of llama_logits.cpp")
    parser.add_argument("names", nargs="*", help="models to write; default: all")
    args = parser.parse_args()
    for name in args.names or FAMILIES:
        row = dict(FAMILIES[name])
        vectors = row.pop("vectors", False)
        folder = OUT / row.pop("folder", "encoders" if vectors else "families")
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.gguf"
        count, kept = row.pop("tokens", TOKENS), row.pop("kept", POSITIONS)
        model(name, **row).write(path)
        tokens = np.random.default_rng(list(name.encode())).integers(VOCAB, size=count).tolist()
        with tempfile.NamedTemporaryFile() as out:
            command = [args.logits, *(["--vectors"] if vectors else []), path, out.name, *map(str, tokens)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            logits = np.fromfile(out.name, np.float32).reshape(count, -1)[kept]
        assert np.isfinite(logits).all(), name
        result = "vectors" if vectors else "logits"
        logits.tofile(folder / f"{name}.{result}.f32")
        manifest = folder / "manifest.json"
        entries = {entry["model"]: entry for entry in json.loads(manifest.read_text())} if manifest.exists() else {}
        entries[path.name] = dict(model=path.name, tokens=tokens, positions=kept,
                                  **{result: f"{name}.{result}.f32"}, shape=list(logits.shape))
        manifest.write_text("[\n" + ",\n".join(json.dumps(entries[name]) for name in sorted(entries)) + "\n]\n")
        print(f"{name}: {path.stat().st_size} bytes, {result} {logits.std():.3f}")


if __name__ == "__main__":
    main()
