// A thin layer over halite.h for C++17: handles close themselves, failures are exceptions. Copy it into your program.
#pragma once

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <halite.h>

namespace halite {

struct Error : std::runtime_error {
    explicit Error(HaliteResult result)
        : std::runtime_error(std::string(halite_result_name(result)) + ": " + halite_last_error()), result(result) {}
    HaliteResult result;
};

inline void check(HaliteResult result) {
    if (result != HALITE_OK) throw Error(result);
}

// A handle that its function closes.
template <typename T, HaliteResult (*close)(T *)> struct Handle {
    struct Close {
        void operator()(T *handle) const { close(handle); }
    };
    // Opens a handle: the arguments are those of the C function but the last one.
    template <typename Open, typename... Args> explicit Handle(Open open, Args &&...args) {
        T *handle = nullptr;
        check(open(args..., &handle));
        it.reset(handle);
    }
    operator T *() const { return it.get(); }

private:
    std::unique_ptr<T, Close> it;
};

using Model = Handle<HaliteModel, halite_model_close>;
using Tokenizer = Handle<HaliteTokenizer, halite_tokenizer_close>;
using Backend = Handle<HaliteOpenBackend, halite_backend_close>;
using Session = Handle<HaliteSession, halite_session_close>;
using Generation = Handle<HaliteGeneration, halite_generation_close>;
using Grammar = Handle<HaliteGrammar, halite_grammar_close>;
using Chat = Handle<HaliteChat, halite_chat_close>;
using Embedder = Handle<HaliteEmbedder, halite_embedder_close>;

// A struct of zeros with its size: all defaults.
template <typename T> T defaults() {
    T value{};
    value.struct_bytes = sizeof value;
    return value;
}

inline std::vector<uint32_t> encode(HaliteTokenizer *tokenizer, std::string_view text, HaliteTextFlags flags = 0) {
    std::size_t length = 0;
    check(halite_tokenizer_encode(tokenizer, text.data(), text.size(), flags, nullptr, 0, &length));
    std::vector<uint32_t> tokens(length);
    if (length > 0) {
        check(halite_tokenizer_encode(tokenizer, text.data(), text.size(), flags, tokens.data(), length, nullptr));
    }
    return tokens;
}

inline HaliteSequence add_sequence(HaliteSession *session) {
    HaliteSequence sequence = 0;
    check(halite_session_add(session, &sequence));
    return sequence;
}

// Generates text. `on_text` returns whether to go on; an exception in it ends the generation and comes out of here.
inline HaliteGenerationInfo generate(HaliteSession *session, HaliteSequence sequence, HaliteTokenizer *tokenizer,
                                     const std::vector<uint32_t> &prompt, const HaliteGenerateOptions &options,
                                     const std::function<bool(std::string_view)> &on_text) {
    struct Call {
        const std::function<bool(std::string_view)> &on_text;
        std::exception_ptr thrown;
    } call{on_text, nullptr};
    // No exception may pass through the library.
    HaliteOnText pass = [](const char *text, std::size_t bytes, void *user) -> int {
        auto &call = *static_cast<Call *>(user);
        try {
            return call.on_text({text, bytes}) ? 0 : 1;
        } catch (...) {
            call.thrown = std::current_exception();
            return 1;
        }
    };
    auto info = defaults<HaliteGenerationInfo>();
    check(halite_generate(session, sequence, tokenizer, prompt.data(), prompt.size(), &options, pass, &call, &info));
    if (call.thrown) std::rethrow_exception(call.thrown);
    return info;
}

} // namespace halite
