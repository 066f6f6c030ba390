// The score of a query and a document by llama.cpp, and the tokens of the pair, for rank.py.
//     g++ -O1 -std=c++17 -I LLAMA/include -I LLAMA/ggml/include llama_rank.cpp -o rank -L LIBRARIES -lllama -lggml -lggml-base
//     rank MODEL.gguf QUERY DOCUMENT

#include <cstdio>
#include <string>
#include <vector>

#include "llama.h"

static std::vector<llama_token> tokens_of(const llama_vocab *vocab, const std::string &text, bool special) {
    std::vector<llama_token> tokens(text.size() + 8);
    tokens.resize(llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), false, special));
    return tokens;
}

static void replace(std::string &text, const std::string &what, const std::string &by) {
    for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += by.size()) text.replace(at, what.size(), by);
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    const llama_vocab *vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens;
    const auto add = [&](const std::vector<llama_token> &more) { tokens.insert(tokens.end(), more.begin(), more.end()); };
    if (const char *form = llama_model_chat_template(model, "rerank")) {
        std::string text = form;
        replace(text, "{query}", argv[2]);
        replace(text, "{document}", argv[3]);
        add(tokens_of(vocab, text, true));
    } else {
        if (llama_vocab_get_add_bos(vocab)) add({llama_vocab_bos(vocab)});
        add(tokens_of(vocab, argv[2], false));
        if (llama_vocab_get_add_eos(vocab)) add({llama_vocab_eos(vocab)});
        if (llama_vocab_get_add_sep(vocab)) add({llama_vocab_sep(vocab)});
        add(tokens_of(vocab, argv[3], false));
        if (llama_vocab_get_add_eos(vocab)) add({llama_vocab_eos(vocab)});
    }
    llama_context_params params = llama_context_default_params();
    params.embeddings = true;
    params.pooling_type = LLAMA_POOLING_TYPE_RANK;
    params.n_ctx = params.n_batch = params.n_ubatch = 256;
    params.n_threads = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context *context = llama_init_from_model(model, params);
    if (!context) return 1;
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = true;
    }
    batch.n_tokens = tokens.size();
    if (llama_decode(context, batch) != 0) return 1;
    printf("%.9g", llama_get_embeddings_seq(context, 0)[0]);
    for (llama_token token : tokens) printf(" %d", token);
    printf("\n");
}
