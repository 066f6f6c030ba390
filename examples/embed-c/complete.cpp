// Completes a text in C++17: complete-cpp [MODEL.gguf [TEXT]].
#include <iostream>

#include "halite.hpp"

int main(int argc, char **argv) try {
    halite::Model model = argc > 1 && std::string_view(argv[1]) != "-" ? halite::Model(halite_model_open, argv[1])
                                                                      : halite::Model(halite_model_open_builtin);
    halite::Tokenizer tokenizer(halite_tokenizer_open, model);
    halite::Backend backend(halite_backend_open, "cpu", nullptr);
    halite::Session session(halite_session_open, model, backend, nullptr);
    const std::string_view text = argc > 2 ? argv[2] : "Once upon a time";
    auto options = halite::defaults<HaliteGenerateOptions>();
    options.max_tokens = 32;
    std::cout << text;
    auto info = halite::generate(session, halite::add_sequence(session), tokenizer, halite::encode(tokenizer, text), options,
                                 [](std::string_view piece) {
                                     std::cout << piece << std::flush;
                                     return true;
                                 });
    std::cout << "\n" << info.tokens << " tokens\n";
    // A wrong file is an exception with a message.
    try {
        halite::Model missing(halite_model_open, "/nowhere.gguf");
        return 1;
    } catch (const halite::Error &error) {
        return error.result == HALITE_IO ? 0 : 1;
    }
} catch (const std::exception &error) {
    std::cerr << error.what() << "\n";
    return 1;
}
