// Writes llama.cpp's logits of a list of tokens, or an encoder's vectors of them, for families.py:
//
//     c++ -O2 -I LLAMA/include -I LLAMA/ggml/include llama_logits.cpp -o llama_logits LIBRARIES OF LLAMA.CPP
//     llama_logits MODEL.gguf OUT.f32 TOKEN...
//     llama_logits --vectors MODEL.gguf OUT.f32 TOKEN...
//
// The file has float32 [tokens, vocabulary] or [tokens, elements of a vector]. The KV cache is F32, so that nothing but the model's own arithmetic rounds.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "llama.h"

int main(int count, char ** arguments) {
    const bool vectors = count > 1 && strcmp(arguments[1], "--vectors") == 0;
    if (vectors) {
        count--;
        arguments++;
    }
    if (count < 4) {
        fprintf(stderr, "usage: llama_logits [--vectors] MODEL.gguf OUT.f32 TOKEN...\n");
        return 2;
    }
    std::vector<llama_token> tokens;
    for (int i = 3; i < count; i++) {
        tokens.push_back(atoi(arguments[i]));
    }
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(arguments[1], llama_model_default_params());
    if (model == nullptr) {
        return 1;
    }
    llama_context_params options = llama_context_default_params();
    options.n_ctx = options.n_batch = tokens.size() < 256 ? 256 : tokens.size();
    options.n_ubatch = 256;
    options.n_threads = options.n_threads_batch = 1;
    options.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    options.type_k = options.type_v = GGML_TYPE_F32;
    if (vectors) {
        options.embeddings = true;
        options.pooling_type = LLAMA_POOLING_TYPE_NONE;
    }
    llama_context * context = llama_init_from_model(model, options);
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
    const size_t length = vectors ? llama_model_n_embd_out(model) : llama_vocab_n_tokens(llama_model_get_vocab(model));
    FILE * file = fopen(arguments[2], "wb");
    bool written = file != nullptr;
    for (size_t i = 0; written && i < tokens.size(); i++) {
        const float * row = vectors ? llama_get_embeddings_ith(context, i) : llama_get_logits_ith(context, i);
        written = row != nullptr && fwrite(row, sizeof(float), length, file) == length;
    }
    if (!written || fclose(file) != 0) {
        perror(arguments[2]);
        return 1;
    }
    return 0;
}
