/* Several sequences: sequences [MODEL.gguf]. One prompt runs once; its copies go on in different ways, in one step each. */
#include <string.h>

#include "example.h"

enum { COPIES = 3, STEPS = 12 };

int main(int argc, char **argv) {
    HaliteModel *model = open_model(argc > 1 ? argv[1] : NULL);
    HaliteTokenizer *tokenizer;
    HaliteOpenBackend *backend;
    HaliteSession *session;
    HaliteSequence sequences[COPIES];
    TRY(halite_tokenizer_open(model, &tokenizer));
    TRY(halite_backend_open("cpu", NULL, &backend));
    HaliteSessionOptions options;
    memset(&options, 0, sizeof options);
    options.struct_bytes = sizeof options;
    options.context = 1024;
    options.sequences = COPIES;
    options.outputs = COPIES;
    TRY(halite_session_open(model, backend, &options, &session));

    uint32_t prompt[64];
    size_t length;
    TRY(halite_tokenizer_encode(tokenizer, "She looked at him", HALITE_ZERO_TERMINATED, 0, prompt, 64, &length));
    TRY(halite_session_add(session, &sequences[0]));
    TRY(halite_session_prefill(session, sequences[0], prompt, length, HALITE_OUTPUT_TOP_K, 0));
    HaliteSessionInfo info;
    memset(&info, 0, sizeof info);
    info.struct_bytes = sizeof info;
    TRY(halite_session_info(session, &info));
    uint32_t *top = malloc(info.top_k * sizeof *top);
    float *logits = malloc(info.top_k * sizeof *logits);
    if (!top || !logits) {
        return 1;
    }
    TRY(halite_session_top_k(session, top, logits, info.top_k, NULL));
    /* Copies share the memory of the prompt. Each starts with another likely token. */
    uint32_t next[COPIES];
    for (int i = 0; i < COPIES; i++) {
        if (i > 0) {
            TRY(halite_session_fork(session, sequences[0], &sequences[i]));
        }
        next[i] = top[i];
    }
    for (int step = 0; step < STEPS; step++) {
        HaliteRun runs[COPIES];
        for (int i = 0; i < COPIES; i++) {
            memset(&runs[i], 0, sizeof runs[i]);
            runs[i].struct_bytes = sizeof runs[i];
            runs[i].sequence = sequences[i];
            runs[i].tokens = &next[i];
            runs[i].token_count = 1;
        }
        TRY(halite_session_step(session, runs, COPIES, HALITE_OUTPUT_ARG_MAX, 0));
        uint32_t best[COPIES];
        TRY(halite_session_arg_max(session, best, COPIES, NULL));
        memcpy(next, best, sizeof best);
    }
    for (int i = 0; i < COPIES; i++) {
        uint32_t tokens[256];
        char text[2048];
        TRY(halite_session_tokens(session, sequences[i], tokens, 256, &length));
        TRY(halite_tokenizer_decode(tokenizer, tokens, length, 0, text, sizeof text, NULL));
        puts(text);
        TRY(halite_session_remove(session, sequences[i]));
    }
    free(logits);
    free(top);
    TRY(halite_session_close(session));
    TRY(halite_backend_close(backend));
    TRY(halite_tokenizer_close(tokenizer));
    TRY(halite_model_close(model));
    return 0;
}
