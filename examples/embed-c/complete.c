/* Completes a text: complete [MODEL.gguf [TEXT]]. Pulls the text piece by piece. */
#include <string.h>

#include "example.h"

int main(int argc, char **argv) {
    HaliteModel *model = open_model(argc > 1 && strcmp(argv[1], "-") != 0 ? argv[1] : NULL);
    HaliteTokenizer *tokenizer;
    HaliteOpenBackend *backend;
    HaliteSession *session;
    HaliteSequence sequence;
    TRY(halite_tokenizer_open(model, &tokenizer));
    TRY(halite_backend_open("cpu", NULL, &backend));
    TRY(halite_session_open(model, backend, NULL, &session));
    TRY(halite_session_add(session, &sequence));

    const char *text = argc > 2 ? argv[2] : "Once upon a time";
    uint32_t prompt[1024];
    size_t length;
    TRY(halite_tokenizer_encode(tokenizer, text, HALITE_ZERO_TERMINATED, 0, prompt, 1024, &length));

    HaliteGenerateOptions options;
    memset(&options, 0, sizeof options);
    options.struct_bytes = sizeof options;
    options.max_tokens = 32;
    HaliteGeneration *generation;
    TRY(halite_generation_open(session, sequence, tokenizer, prompt, length, &options, &generation));
    char piece[1024];
    HaliteResult result;
    fputs(text, stdout);
    while ((result = halite_generation_next(generation, piece, sizeof piece, &length)) == HALITE_OK) {
        fwrite(piece, 1, length, stdout);
        fflush(stdout);
    }
    puts("");
    if (result != HALITE_END) {
        check(result, "halite_generation_next");
    }
    TRY(halite_generation_close(generation));
    TRY(halite_session_close(session));
    TRY(halite_backend_close(backend));
    TRY(halite_tokenizer_close(tokenizer));
    TRY(halite_model_close(model));
    return 0;
}
