// Prints the token ids that llama.cpp gives to texts: one text a line of standard input, as the hexadecimal digits of its UTF-8.
//
//     c++ -I LLAMA/include -I LLAMA/ggml/include llama_ids.cpp -L LIB -lllama -Wl,-rpath,LIB -o llama_ids
//     llama_ids VOCABULARY.gguf < texts > ids

#include <iostream>
#include <string>
#include <vector>

#include "llama.h"

int main(int argc, char ** argv) {
    if (argc != 2) return 2;
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) return 1;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    for (std::string line; std::getline(std::cin, line);) {
        std::string text;
        for (size_t i = 0; i + 1 < line.size(); i += 2) text += (char) std::stoi(line.substr(i, 2), nullptr, 16);
        std::vector<llama_token> ids(text.size() + 8);
        const int n = llama_tokenize(vocab, text.data(), (int) text.size(), ids.data(), (int) ids.size(), false, false);
        for (int i = 0; i < n; i++) std::cout << (i ? " " : "") << ids[i];
        std::cout << '\n';
    }
}
