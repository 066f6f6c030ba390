// Writes what llama.cpp's quantisers make of values, and which types its mixes choose:
//
//     c++ -O2 -I LLAMA/include -I LLAMA/ggml/include -I LLAMA/src quantize.cpp -o quantize LIBRARIES OF LLAMA.CPP
//     quantize blocks > tests/data/quantize/blocks.txt
//     quantize mixes > tests/data/quantize/mixes.txt
//
// `blocks`: each line is a format, `plain` or `weighted`, a kind of values, and a hash of the bytes of each 256 values.
// kernels/tests/quantize.rs makes the same values. `mixes`: each line is a model, a mix, its number, its
// common type, and the matrices that have another one, by their place in the line of the model's `names`.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "ggml.h"
#include "llama-ext.h"
#include "llama.h"

static const int ROWS = 16, COLS = 768;

struct Random {
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }

    // In [0, 1), in steps of 2^-24.
    float unit() {
        return (next() >> 40) / 16777216.0f;
    }
};

static float value(const std::string & kind, int row, int col, Random & random) {
    if (kind == "bell") {
        float sum = random.unit();
        for (int i = 0; i < 3; i++) sum += random.unit();
        return (sum - 2.0f) * 0.05f;
    }
    float u = 2.0f * random.unit() - 1.0f;
    if (kind == "tails") {
        return u * u * u * 2.0f;
    }
    switch (row % 8) {
        case 0: return 0.0f;
        case 1: return 0.5f;
        case 2: return -0.25f;
        case 3: return u * u;
        case 4: return u * 1e-17f;
        case 5: return col % 128 == 77 ? u : 0.0f;
        case 6: return (float) (int) (u * 8.0f);
        default: return col % 2 ? 1.0f : -1.0f;
    }
}

static uint32_t hash(const uint8_t * bytes, size_t count) {
    uint32_t state = 0x811c9dc5;
    for (size_t i = 0; i < count; i++) state = (state ^ bytes[i]) * 0x01000193;
    return state;
}

static void blocks() {
    const ggml_type formats[] = {
        GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_Q2_K,
        GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS,
        GGML_TYPE_MXFP4, GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0, GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S, GGML_TYPE_IQ2_XXS,
        GGML_TYPE_IQ2_XS, GGML_TYPE_IQ2_S, GGML_TYPE_IQ1_S, GGML_TYPE_IQ1_M, GGML_TYPE_NVFP4, GGML_TYPE_Q1_0,
        GGML_TYPE_Q2_0,
    };
    for (ggml_type format : formats) {
        std::string name = ggml_type_name(format);
        for (char & c : name) {
            if (c >= 'a' && c <= 'z') c -= 32;
        }
        for (bool weighted : {false, true}) {
            if (!weighted && ggml_quantize_requires_imatrix(format)) continue;
            for (const char * kind : {"bell", "tails", "edges"}) {
                Random random = {(uint64_t) strlen(kind)};
                std::vector<float> values;
                for (int row = 0; row < ROWS; row++) {
                    for (int col = 0; col < COLS; col++) values.push_back(value(kind, row, col, random));
                }
                Random weights = {42};
                std::vector<float> importance;
                for (int col = 0; col < COLS; col++) {
                    float u = weights.unit();
                    importance.push_back(u * u + 0.001f);
                }
                size_t row_size = ggml_row_size(format, COLS);
                std::vector<uint8_t> bytes(row_size * ROWS);
                ggml_quantize_chunk(format, values.data(), bytes.data(), 0, ROWS, COLS, weighted ? importance.data() : nullptr);
                printf("%s %s %s", name.c_str(), weighted ? "weighted" : "plain", kind);
                size_t step = ggml_row_size(format, 256);
                for (size_t at = 0; at < bytes.size(); at += step) printf(" %08x", hash(bytes.data() + at, step));
                printf("\n");
            }
        }
    }
}

struct Shape {
    const char * name;
    llama_quant_model_desc desc;
    bool tied, fused;
};

static std::vector<std::pair<std::string, std::vector<int64_t>>> matrices(const Shape & shape) {
    const llama_quant_model_desc & d = shape.desc;
    int64_t vocab = 1000, q = d.n_head * d.n_embd_head_k, kv = d.n_head_kv * d.n_embd_head_k;
    std::vector<std::pair<std::string, std::vector<int64_t>>> all;
    if (!shape.tied) all.push_back({"output.weight", {d.n_embd, vocab}});
    all.push_back({"token_embd.weight", {d.n_embd, vocab}});
    for (uint32_t i = 0; i < d.n_layer; i++) {
        std::string blk = "blk." + std::to_string(i) + ".";
        auto add = [&](const char * name, std::vector<int64_t> dims) { all.push_back({blk + name, dims}); };
        if (shape.fused) {
            add("attn_output.weight", {q, d.n_embd});
            add("attn_qkv.weight", {d.n_embd, q + 2 * kv});
        } else {
            add("attn_k.weight", {d.n_embd, kv});
            add("attn_output.weight", {q, d.n_embd});
            add("attn_q.weight", {d.n_embd, q});
            add("attn_v.weight", {d.n_embd, kv});
        }
        if (d.n_expert > 0) {
            add("ffn_down_exps.weight", {d.n_ff, d.n_embd, d.n_expert});
            add("ffn_gate_exps.weight", {d.n_embd, d.n_ff, d.n_expert});
            add("ffn_gate_inp.weight", {d.n_embd, d.n_expert});
            add("ffn_up_exps.weight", {d.n_embd, d.n_ff, d.n_expert});
        } else {
            add("ffn_down.weight", {d.n_ff, d.n_embd});
            if (!shape.fused) add("ffn_gate.weight", {d.n_embd, d.n_ff});
            add("ffn_up.weight", {d.n_embd, d.n_ff});
        }
    }
    return all;
}

static void mixes() {
    // architecture, n_embd, n_ff, n_layer, n_head, n_head_kv, n_expert, n_embd_head_k, n_embd_head_v
    const Shape shapes[] = {
        {"llama", {"llama", 512, 1024, 18, 8, 2, 0, 64, 64}, false, false},
        {"heads", {"llama", 512, 1024, 9, 8, 8, 0, 64, 64}, true, false},
        {"narrow", {"llama", 288, 800, 8, 6, 6, 0, 48, 48}, false, false},
        {"seventy", {"llama", 512, 1024, 80, 8, 1, 0, 64, 64}, false, false},
        {"experts", {"llama", 512, 1024, 16, 8, 2, 8, 64, 64}, false, false},
        {"many", {"qwen3moe", 512, 768, 12, 8, 2, 64, 64, 64}, false, false},
        {"fused", {"phi2", 512, 1024, 16, 8, 8, 0, 64, 64}, false, true},
        {"falcon", {"falcon", 512, 1024, 32, 8, 1, 0, 64, 64}, true, true},
    };
    const std::pair<const char *, llama_ftype> names[] = {
        {"q4_0", LLAMA_FTYPE_MOSTLY_Q4_0}, {"q4_1", LLAMA_FTYPE_MOSTLY_Q4_1}, {"q5_0", LLAMA_FTYPE_MOSTLY_Q5_0},
        {"q5_1", LLAMA_FTYPE_MOSTLY_Q5_1}, {"q8_0", LLAMA_FTYPE_MOSTLY_Q8_0}, {"q2_k", LLAMA_FTYPE_MOSTLY_Q2_K},
        {"q2_k_s", LLAMA_FTYPE_MOSTLY_Q2_K_S},
        {"q3_k_s", LLAMA_FTYPE_MOSTLY_Q3_K_S}, {"q3_k_m", LLAMA_FTYPE_MOSTLY_Q3_K_M},
        {"q3_k_l", LLAMA_FTYPE_MOSTLY_Q3_K_L}, {"q4_k_s", LLAMA_FTYPE_MOSTLY_Q4_K_S},
        {"q4_k_m", LLAMA_FTYPE_MOSTLY_Q4_K_M}, {"q5_k_s", LLAMA_FTYPE_MOSTLY_Q5_K_S},
        {"q5_k_m", LLAMA_FTYPE_MOSTLY_Q5_K_M}, {"q6_k", LLAMA_FTYPE_MOSTLY_Q6_K},
        {"iq4_nl", LLAMA_FTYPE_MOSTLY_IQ4_NL}, {"iq4_xs", LLAMA_FTYPE_MOSTLY_IQ4_XS},
        {"tq1_0", LLAMA_FTYPE_MOSTLY_TQ1_0}, {"tq2_0", LLAMA_FTYPE_MOSTLY_TQ2_0},
        {"mxfp4_moe", LLAMA_FTYPE_MOSTLY_MXFP4_MOE}, {"iq3_xxs", LLAMA_FTYPE_MOSTLY_IQ3_XXS},
        {"iq3_xs", LLAMA_FTYPE_MOSTLY_IQ3_XS}, {"iq3_s", LLAMA_FTYPE_MOSTLY_IQ3_S}, {"iq3_m", LLAMA_FTYPE_MOSTLY_IQ3_M},
        {"iq2_xxs", LLAMA_FTYPE_MOSTLY_IQ2_XXS}, {"iq2_xs", LLAMA_FTYPE_MOSTLY_IQ2_XS},
        {"iq2_s", LLAMA_FTYPE_MOSTLY_IQ2_S}, {"iq2_m", LLAMA_FTYPE_MOSTLY_IQ2_M}, {"iq1_s", LLAMA_FTYPE_MOSTLY_IQ1_S},
        {"iq1_m", LLAMA_FTYPE_MOSTLY_IQ1_M}, {"q1_0", LLAMA_FTYPE_MOSTLY_Q1_0}, {"q2_0", LLAMA_FTYPE_MOSTLY_Q2_0},
    };
    for (const Shape & shape : shapes) {
        const llama_quant_model_desc & d = shape.desc;
        printf("%s model %s %u %u %u %u\n", shape.name, d.architecture, d.n_layer, d.n_head, d.n_head_kv, d.n_expert);
        auto all = matrices(shape);
        ggml_context * context = ggml_init({64 << 20, nullptr, true});
        std::vector<ggml_tensor *> tensors;
        llama_model_quantize_params params = llama_model_quantize_default_params();
        llama_model * model = llama_quant_model_from_metadata(&d);
        quantize_state_impl * state = llama_quant_init(model, &params);
        printf("%s names", shape.name);
        for (auto & [name, dims] : all) {
            ggml_tensor * t = ggml_new_tensor(context, GGML_TYPE_F32, dims.size(), dims.data());
            ggml_set_name(t, name.c_str());
            tensors.push_back(t);
            printf(" %s:%d", name.c_str(), (int) dims[0]);
            for (size_t i = 1; i < dims.size(); i++) printf("x%d", (int) dims[i]);
        }
        printf("\n");
        for (auto & [name, ftype] : names) {
            std::vector<ggml_type> types(tensors.size());
            try {
                llama_quant_compute_types(state, ftype, tensors.data(), types.data(), tensors.size());
            } catch (const std::exception &) {
                // Nothing takes the place of q1_0 where rows are not whole blocks.
                continue;
            }
            ggml_type common = llama_ftype_get_default_type(ftype);
            printf("%s %s %d %s", shape.name, name, (int) ftype, ggml_type_name(common));
            for (size_t i = 0; i < types.size(); i++) {
                if (types[i] != common) printf(" %d:%s", (int) i, ggml_type_name(types[i]));
            }
            printf("\n");
        }
        llama_quant_free(state);
        llama_model_free(model);
        ggml_free(context);
    }
}

static void quiet(ggml_log_level, const char *, void *) {}

int main(int count, char ** arguments) {
    std::string what = count > 1 ? arguments[1] : "";
    llama_log_set(quiet, nullptr);
    if (what == "blocks") {
        blocks();
    } else if (what == "mixes") {
        mixes();
    } else {
        fprintf(stderr, "usage: quantize blocks|mixes\n");
        return 2;
    }
}
