// Writes the intermediate results of llama.cpp for a list of tokens, for `halite bisect --dump`:
//
//     c++ -O2 -I LLAMA/include -I LLAMA/ggml/include llama_dump.cpp -o llama_dump LIBRARIES OF LLAMA.CPP
//     llama_dump MODEL.gguf OUT.safetensors TOKEN...
//
// The file is in the safetensors format: `tokens` as I32, and each named result of the graph as F32 [tokens, elements]. Of
// several results with one name, the last is kept.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

struct Result {
    int64_t rows, cols;
    std::vector<float> values;
};

struct Results {
    int64_t tokens;
    std::map<std::string, Result> all;
};

// Called before each node to ask whether it is wanted, and after it with its data.
static bool keep(ggml_tensor * t, bool ask, void * user) {
    Results * results = static_cast<Results *>(user);
    const bool named = strchr(t->name, '-') != nullptr || strncmp(t->name, "result_", 7) == 0 ||
                       strncmp(t->name, "inp_", 4) == 0;
    const int64_t elements = ggml_nelements(t);
    const bool wanted = named && t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && strchr(t->name, '(') == nullptr &&
                        elements % results->tokens == 0;
    if (ask) {
        return wanted;
    }
    if (wanted) {
        Result result{results->tokens, elements / results->tokens, std::vector<float>(elements)};
        ggml_backend_tensor_get(t, result.values.data(), 0, elements * sizeof(float));
        results->all[t->name] = std::move(result);
    }
    return true;
}

int main(int count, char ** arguments) {
    if (count < 4) {
        fprintf(stderr, "usage: %s MODEL.gguf OUT.safetensors TOKEN...\n", arguments[0]);
        return 2;
    }
    std::vector<llama_token> tokens;
    for (int i = 3; i < count; i++) {
        tokens.push_back(atoi(arguments[i]));
    }
    Results results{static_cast<int64_t>(tokens.size()), {}};
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (model == nullptr) {
        return 1;
    }
    llama_context_params options = llama_context_default_params();
    options.n_ctx = options.n_batch = options.n_ubatch = 512;
    options.n_threads = options.n_threads_batch = 1;
    options.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    options.type_k = options.type_v = GGML_TYPE_F16;
    options.cb_eval = keep;
    options.cb_eval_user_data = &results;
    llama_context * context = llama_init_from_model(model, options);
    // Every token has outputs, so that all results have a row for each.
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    batch.n_tokens = tokens.size();
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (context == nullptr || llama_decode(context, batch) != 0) {
        return 1;
    }
    std::string header = "{\"tokens\":{\"dtype\":\"I32\",\"shape\":[" + std::to_string(tokens.size()) +
                         "],\"data_offsets\":[0," + std::to_string(4 * tokens.size()) + "]}";
    size_t at = 4 * tokens.size();
    for (const auto & [name, result] : results.all) {
        const size_t end = at + 4 * result.values.size();
        header += ",\"" + name + "\":{\"dtype\":\"F32\",\"shape\":[" + std::to_string(result.rows) + "," +
                  std::to_string(result.cols) + "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(end) + "]}";
        at = end;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    FILE * file = fopen(arguments[2], "wb");
    if (file == nullptr) {
        perror(arguments[2]);
        return 1;
    }
    const uint64_t bytes = header.size();
    bool written = fwrite(&bytes, 8, 1, file) == 1 && fwrite(header.data(), 1, bytes, file) == bytes &&
                   fwrite(tokens.data(), 4, tokens.size(), file) == tokens.size();
    for (const auto & [name, result] : results.all) {
        written = written && fwrite(result.values.data(), 4, result.values.size(), file) == result.values.size();
    }
    if (fclose(file) != 0 || !written) {
        perror(arguments[2]);
        return 1;
    }
    printf("%zu results\n", results.all.size());
    return 0;
}
