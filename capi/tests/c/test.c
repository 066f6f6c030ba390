/* The C interface as a program in C uses it; under AddressSanitizer, UBSan and valgrind in .ci/capi. The argument is a folder
 * for files; a second one is an encoder. */
#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <halite.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, halite_last_error());      \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define OK(call)                                                                                                       \
    do {                                                                                                               \
        HaliteResult result_ = (call);                                                                                 \
        if (result_ != HALITE_OK) {                                                                                    \
            fprintf(stderr, "%s:%d: %s: %s: %s\n", __FILE__, __LINE__, #call, halite_result_name(result_),             \
                    halite_last_error());                                                                              \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define GIVES(result, call) CHECK((call) == (result))

static unsigned messages;

static void on_log(HaliteLogLevel level, const char *message, void *user) {
    (void)user;
    CHECK(level >= HALITE_LOG_ERROR && level <= HALITE_LOG_INFO && message[0] != 0);
    messages++;
}

struct text {
    char bytes[4096];
    size_t length;
    unsigned calls, stop_after;
};

static int on_text(const char *text, size_t bytes, void *user) {
    struct text *to = user;
    CHECK(strlen(text) == bytes && to->length + bytes < sizeof to->bytes);
    memcpy(to->bytes + to->length, text, bytes + 1);
    to->length += bytes;
    return ++to->calls == to->stop_after;
}

/* An allocator with a budget. */
struct budget {
    size_t used, most;
    unsigned calls;
    pthread_mutex_t lock;
};

static void *allocate(size_t bytes, size_t alignment, void *user) {
    struct budget *budget = user;
    void *memory = NULL;
    pthread_mutex_lock(&budget->lock);
    budget->calls++;
    if (budget->used + bytes <= budget->most && posix_memalign(&memory, alignment, bytes) == 0) {
        budget->used += bytes;
        memset(memory, 0xa5, bytes);
    }
    pthread_mutex_unlock(&budget->lock);
    return memory;
}

static void give_back(void *memory, size_t bytes, void *user) {
    struct budget *budget = user;
    pthread_mutex_lock(&budget->lock);
    budget->used -= bytes;
    pthread_mutex_unlock(&budget->lock);
    free(memory);
}

static void *cancel_soon(void *session) {
    struct timespec wait = {0, 20 * 1000 * 1000};
    nanosleep(&wait, NULL);
    OK(halite_session_cancel(session));
    return NULL;
}

static size_t encode(const HaliteTokenizer *tokenizer, const char *text, uint32_t *tokens, size_t capacity) {
    size_t length = 0;
    OK(halite_tokenizer_encode(tokenizer, text, HALITE_ZERO_TERMINATED, 0, tokens, capacity, &length));
    return length;
}

static void tokenizers(const HaliteModel *model, const HaliteTokenizer *tokenizer) {
    HaliteTokenizerInfo info = {sizeof info, 0, 0, 0, 0, 0};
    OK(halite_tokenizer_info(tokenizer, &info));
    HaliteModelInfo sizes = {sizeof sizes, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    OK(halite_model_info(model, &sizes));
    CHECK(info.token_count <= sizes.vocab_size && sizes.file_bytes > 1000000);

    const char *text = "Gr\xc3\xbc\xc3\x9f Gott, \xe4\xb8\x96\xe7\x95\x8c! Once upon a time";
    uint32_t tokens[128];
    char back[256], streamed[256], piece[64];
    size_t length = 0, all = 0, n = encode(tokenizer, text, tokens, 128);
    /* The length first, then the text. */
    OK(halite_tokenizer_decode(tokenizer, tokens, n, 0, NULL, 0, &length));
    GIVES(HALITE_TOO_SMALL, halite_tokenizer_decode(tokenizer, tokens, n, 0, back, length, &length));
    OK(halite_tokenizer_decode(tokenizer, tokens, n, 0, back, length + 1, &length));
    CHECK(strlen(back) == length && strstr(back, "Once upon a time"));
    /* As a stream. */
    HaliteDecoder *decoder;
    OK(halite_decoder_open(tokenizer, 0, &decoder));
    for (size_t i = 0; i < n; i++) {
        OK(halite_decoder_push(decoder, tokens[i]));
        OK(halite_decoder_take(decoder, piece, sizeof piece, &length));
        memcpy(streamed + all, piece, length + 1);
        all += length;
    }
    OK(halite_decoder_finish(decoder));
    OK(halite_decoder_close(decoder));
    CHECK(strcmp(back, streamed) == 0);
    /* A token and its text in the vocabulary. */
    uint8_t bytes[256];
    uint32_t token, kind, is_end;
    OK(halite_tokenizer_piece(tokenizer, tokens[n - 1], bytes, sizeof bytes, &length));
    OK(halite_tokenizer_find(tokenizer, bytes, length, &token));
    CHECK(token == tokens[n - 1]);
    OK(halite_tokenizer_kind(tokenizer, token, &kind, &is_end));
    CHECK(kind == HALITE_TOKEN_NORMAL && !is_end);
}

static void sequences(HaliteSession *session, const uint32_t *prompt, size_t n) {
    HaliteSessionInfo info = {sizeof info, 0, 0, 0, 0, 0};
    OK(halite_session_info(session, &info));
    HaliteSequence a, b;
    OK(halite_session_add(session, &a));
    OK(halite_session_prefill(session, a, prompt, n, HALITE_OUTPUT_LOGITS, 0));
    float *alone = calloc(info.vocab_size, sizeof *alone), *both = calloc(2 * info.vocab_size, sizeof *both);
    size_t length = 0, best = 0;
    OK(halite_session_logits(session, alone, info.vocab_size, &length));
    CHECK(length == info.vocab_size);
    for (size_t i = 1; i < length; i++) {
        best = alone[i] > alone[best] ? i : best;
    }
    /* The fork and its origin go on with the same token: the same logits, in one step. */
    OK(halite_session_fork(session, a, &b));
    uint32_t next = (uint32_t)best, tokens[64], pair[2], *top = calloc(info.top_k, sizeof *top);
    HaliteRun runs[2] = {{sizeof(HaliteRun), HALITE_OUTPUT_LAST, a, &next, 1}, {sizeof(HaliteRun), HALITE_OUTPUT_LAST, b, &next, 1}};
    OK(halite_session_step(session, runs, 2, HALITE_OUTPUT_LOGITS, 0));
    OK(halite_session_logits(session, both, 2 * info.vocab_size, &length));
    CHECK(length == 2 * info.vocab_size && memcmp(both, both + info.vocab_size, info.vocab_size * sizeof *both) == 0);
    /* The same again as tokens. */
    OK(halite_session_truncate(session, a, (uint32_t)n));
    OK(halite_session_truncate(session, b, (uint32_t)n));
    OK(halite_session_step(session, runs, 2, HALITE_OUTPUT_ARG_MAX, 0));
    OK(halite_session_arg_max(session, pair, 2, &length));
    CHECK(length == 2 && pair[0] == pair[1]);
    OK(halite_session_truncate(session, a, (uint32_t)n));
    OK(halite_session_step(session, runs, 1, HALITE_OUTPUT_TOP_K, 0));
    OK(halite_session_top_k(session, top, alone, info.top_k, &length));
    CHECK(length == info.top_k && top[0] == pair[0] && alone[0] == both[pair[0]] && alone[0] >= alone[1]);
    OK(halite_session_tokens(session, a, tokens, 64, &length));
    CHECK(length == n + 1 && tokens[n] == next && memcmp(tokens, prompt, n * sizeof *prompt) == 0);
    OK(halite_session_remove(session, b));
    GIVES(HALITE_HANDLE, halite_session_truncate(session, b, 0));
    OK(halite_session_remove(session, a));
    free(top);
    free(both);
    free(alone);
}

static void saved(HaliteSession *session, const uint32_t *prompt, size_t n, const char *folder) {
    HaliteSequence a, b, c;
    OK(halite_session_add(session, &a));
    OK(halite_session_prefill(session, a, prompt, n, HALITE_OUTPUT_ARG_MAX, 0));
    size_t length = 0;
    OK(halite_session_save(session, a, NULL, 0, &length));
    unsigned char *bytes = malloc(length);
    OK(halite_session_save(session, a, bytes, length, NULL));
    OK(halite_session_restore(session, bytes, length, &b));
    bytes[length / 2] ^= 1;
    GIVES(HALITE_MALFORMED, halite_session_restore(session, bytes, length, &c));
    free(bytes);
    char path[512];
    snprintf(path, sizeof path, "%s/saved.halite", folder);
    OK(halite_session_save_file(session, a, path));
    OK(halite_session_restore_file(session, path, &c));
    uint32_t next = prompt[0], best[3];
    HaliteRun runs[3];
    HaliteSequence all[3] = {a, b, c};
    for (int i = 0; i < 3; i++) {
        HaliteRun run = {sizeof run, HALITE_OUTPUT_LAST, all[i], &next, 1};
        runs[i] = run;
    }
    OK(halite_session_step(session, runs, 3, HALITE_OUTPUT_ARG_MAX, 0));
    OK(halite_session_arg_max(session, best, 3, NULL));
    CHECK(best[0] == best[1] && best[1] == best[2]);
    for (int i = 0; i < 3; i++) {
        OK(halite_session_remove(session, all[i]));
    }
}

static void generations(HaliteSession *session, const HaliteTokenizer *tokenizer, const uint32_t *prompt, size_t n) {
    HaliteSequence sequence;
    OK(halite_session_add(session, &sequence));
    HaliteGenerateOptions options;
    memset(&options, 0, sizeof options);
    options.struct_bytes = sizeof options;
    options.max_tokens = 12;
    options.temperature = 0.8f;
    options.seed = 7;
    HaliteGenerationInfo info;
    memset(&info, 0, sizeof info);
    info.struct_bytes = sizeof info;
    struct text pushed, pulled;
    memset(&pushed, 0, sizeof pushed);
    memset(&pulled, 0, sizeof pulled);
    OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, on_text, &pushed, &info));
    CHECK(info.finish == HALITE_FINISH_LENGTH && info.tokens == 12 && info.prompt_tokens == n && pushed.length > 0);

    /* The same text by pulling, with a buffer that is too small at first. */
    HaliteGeneration *generation;
    OK(halite_generation_open(session, sequence, tokenizer, prompt, n, &options, &generation));
    char piece[256];
    size_t length;
    HaliteResult result;
    while ((result = halite_generation_next(generation, piece, 1, &length)) == HALITE_TOO_SMALL) {
        OK(halite_generation_next(generation, piece, sizeof piece, &length));
        on_text(piece, length, &pulled);
    }
    CHECK(result == HALITE_END && strcmp(pushed.bytes, pulled.bytes) == 0);
    OK(halite_generation_info(generation, &info));
    uint32_t tokens[16];
    OK(halite_generation_tokens(generation, tokens, 16, &length));
    CHECK(length == 12 && info.finish == HALITE_FINISH_LENGTH);
    OK(halite_generation_close(generation));

    /* Ended by the callback, and by a text that appeared before. */
    struct text cut;
    memset(&cut, 0, sizeof cut);
    cut.stop_after = 2;
    OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, on_text, &cut, &info));
    CHECK(info.finish == HALITE_FINISH_CALLBACK && cut.calls == 2);
    char word[8] = {0};
    memcpy(word, pushed.bytes + pushed.length / 2, 3);
    const char *stops[] = {word};
    options.stop = stops;
    options.stop_count = 1;
    memset(&cut, 0, sizeof cut);
    OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, on_text, &cut, &info));
    CHECK(info.finish == HALITE_FINISH_STOP && !strstr(cut.bytes, word));
    options.stop_count = 0;

    /* Held to a grammar, twice with the same. */
    HaliteGrammar *grammar;
    OK(halite_grammar_open(tokenizer, HALITE_GRAMMAR_REGEX, "(yes|no), [0-9]{3}", &grammar));
    options.grammar = grammar;
    for (int i = 0; i < 2; i++) {
        memset(&cut, 0, sizeof cut);
        OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, on_text, &cut, &info));
        CHECK(info.finish == HALITE_FINISH_END && (!strncmp(cut.bytes, "yes, ", 5) || !strncmp(cut.bytes, "no, ", 4)));
    }
    OK(halite_grammar_close(grammar));
    GIVES(HALITE_HANDLE, halite_generate(session, sequence, tokenizer, prompt, n, &options, NULL, NULL, NULL));
    options.grammar = NULL;

    /* Drafts do not change a greedy text. */
    struct text plain, drafted;
    memset(&plain, 0, sizeof plain);
    memset(&drafted, 0, sizeof drafted);
    options.temperature = 0;
    OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, on_text, &plain, NULL));
    options.lookup = 2;
    OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, on_text, &drafted, &info));
    CHECK(strcmp(plain.bytes, drafted.bytes) == 0);
    options.lookup = 0;

    /* A deadline, and another thread; both leave the session in order. */
    options.max_tokens = 200;
    options.ignore_end = 1;
    options.deadline_ms = 1;
    OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, NULL, NULL, &info));
    CHECK(info.finish == HALITE_FINISH_DEADLINE && info.tokens < 200);
    options.deadline_ms = 0;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, cancel_soon, session) == 0);
    do {
        OK(halite_generate(session, sequence, tokenizer, prompt, n, &options, NULL, NULL, &info));
    } while (info.finish == HALITE_FINISH_LENGTH);
    CHECK(info.finish == HALITE_FINISH_CANCELLED);
    CHECK(pthread_join(thread, NULL) == 0);
    uint32_t many[200];
    for (size_t i = 0; i < 200; i++) {
        many[i] = prompt[i % n];
    }
    OK(halite_session_truncate(session, sequence, 0));
    GIVES(HALITE_CANCELLED, halite_session_prefill(session, sequence, many, 200, HALITE_OUTPUT_ARG_MAX, 0));
    OK(halite_session_reset(session));
    // A thread watches the deadline; a busy machine may let it run too late.
    result = HALITE_OK;
    for (int tries = 0; result == HALITE_OK && tries < 1000; tries++) {
        result = halite_session_prefill(session, sequence, many, 200, HALITE_OUTPUT_ARG_MAX, 1);
        OK(halite_session_truncate(session, sequence, 0));
    }
    CHECK(result == HALITE_DEADLINE);
    OK(halite_session_prefill(session, sequence, many, 20, HALITE_OUTPUT_ARG_MAX, 600000));
    OK(halite_session_prefill(session, sequence, many, 200, HALITE_OUTPUT_ARG_MAX, 0));
    GIVES(HALITE_CONTEXT_FULL, halite_session_prefill(session, sequence, many, 200, HALITE_OUTPUT_ARG_MAX, 0));
    OK(halite_session_remove(session, sequence));
}

static void chats(const HaliteModel *model, const HaliteTokenizer *tokenizer) {
    HaliteChat *chat;
    GIVES(HALITE_NOT_FOUND, halite_chat_open(model, tokenizer, NULL, &chat));
    CHECK(chat == NULL);
    OK(halite_chat_open(model, tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}me:", &chat));
    OK(halite_chat_add(chat, "user", "Hello", 0));
    OK(halite_chat_add_answer(chat, "Hi"));
    size_t count, length;
    uint32_t tokens[64];
    char text[256];
    OK(halite_chat_count(chat, &count));
    CHECK(count == 2);
    OK(halite_chat_prompt(chat, tokens, 64, &length));
    OK(halite_tokenizer_decode(tokenizer, tokens, length, 0, text, sizeof text, NULL));
    CHECK(strstr(text, "user: Hello\nassistant: Hi\nme:"));
    OK(halite_chat_truncate(chat, 0));
    OK(halite_chat_close(chat));
    GIVES(HALITE_HANDLE, halite_chat_close(chat));
}

static void embeddings(const char *path, const HaliteOpenBackend *backend) {
    HaliteModel *model;
    HaliteTokenizer *tokenizer;
    HaliteEmbedder *embedder;
    OK(halite_model_open(path, &model));
    OK(halite_tokenizer_open(model, &tokenizer));
    OK(halite_embedder_open(model, backend, NULL, &embedder));
    HaliteEmbedderInfo info = {sizeof info, 0, 0, 0};
    OK(halite_embedder_info(embedder, &info));
    const char *texts[] = {"the cat sat", "a dog", "the cat sat"};
    size_t length = 0;
    OK(halite_embedder_embed(embedder, tokenizer, texts, 3, 0, NULL, 0, &length));
    CHECK(length == 3 * (size_t)info.dimension);
    float *vectors = malloc(length * sizeof *vectors), norm = 0;
    OK(halite_embedder_embed(embedder, tokenizer, texts, 3, 60000, vectors, length, NULL));
    for (uint32_t i = 0; i < info.dimension; i++) {
        norm += vectors[i] * vectors[i];
    }
    CHECK(fabsf(norm - 1) < 1e-3f);
    CHECK(memcmp(vectors, vectors + 2 * info.dimension, info.dimension * sizeof *vectors) == 0);
    CHECK(memcmp(vectors, vectors + info.dimension, info.dimension * sizeof *vectors) != 0);
    OK(halite_embedder_cancel(embedder));
    GIVES(HALITE_CANCELLED, halite_embedder_embed(embedder, tokenizer, texts, 3, 0, vectors, length, NULL));
    OK(halite_embedder_reset(embedder));
    free(vectors);
    OK(halite_embedder_close(embedder));
    OK(halite_tokenizer_close(tokenizer));
    OK(halite_model_close(model));
}

static void own_memory(const HaliteModel *model, HaliteSession *other, const uint32_t *prompt, size_t n) {
    struct budget budget = {0, (size_t)1 << 30, 0, PTHREAD_MUTEX_INITIALIZER};
    HaliteMemory memory = {sizeof memory, 0, allocate, give_back, &budget};
    HaliteOpenBackend *backend;
    HaliteSession *session;
    OK(halite_backend_open_cpu(1, &memory, &backend));
    HaliteSessionOptions options = {.struct_bytes = sizeof options, .context = 256, .outputs = 4, .kv_format = "q8_0"};
    HaliteMemoryPlan plan = {.struct_bytes = sizeof plan};
    OK(halite_session_plan(model, backend, &options, &plan));
    OK(halite_session_open(model, backend, &options, &session));
    uint64_t planned = plan.kv_bytes + plan.scratch_bytes + plan.io_bytes;
    CHECK(budget.calls > 10 && budget.used >= planned && budget.used < planned + (1 << 16));
    /* The same results as in the library's own memory. */
    HaliteSession *sessions[2] = {session, other};
    uint32_t best[2];
    for (int i = 0; i < 2; i++) {
        HaliteSequence sequence;
        OK(halite_session_add(sessions[i], &sequence));
        OK(halite_session_prefill(sessions[i], sequence, prompt, n, HALITE_OUTPUT_ARG_MAX, 0));
        OK(halite_session_arg_max(sessions[i], &best[i], 1, NULL));
        OK(halite_session_remove(sessions[i], sequence));
    }
    CHECK(best[0] == best[1]);
    OK(halite_session_close(session));
    CHECK(budget.used == 0);
    budget.most = planned / 2;
    GIVES(HALITE_OUT_OF_MEMORY, halite_session_open(model, backend, &options, &session));
    CHECK(session == NULL && budget.used == 0);
    OK(halite_backend_close(backend));
}

int main(int argc, char **argv) {
    CHECK(argc > 1 && strlen(halite_version()) > 2);
    OK(halite_set_log(on_log, HALITE_LOG_INFO, NULL));
    HaliteModel *model;
    HaliteTokenizer *tokenizer;
    HaliteOpenBackend *backend;
    HaliteSession *session;
    GIVES(HALITE_IO, halite_model_open("/nowhere", &model));
    CHECK(model == NULL && strstr(halite_last_error(), "/nowhere"));
    OK(halite_model_open_builtin(&model));
    OK(halite_tokenizer_open(model, &tokenizer));
    OK(halite_backend_open("cpu:threads=2", NULL, &backend));
    HaliteSessionOptions options = {.struct_bytes = sizeof options, .context = 256, .outputs = 4, .kv_format = "q8_0"};
    HaliteMemoryPlan plan = {.struct_bytes = sizeof plan};
    OK(halite_session_plan(model, backend, &options, &plan));
    CHECK(plan.context == 256 && plan.weight_bytes > 1000000 && plan.kv_bytes > 0 && plan.scratch_bytes > 0);
    OK(halite_session_open(model, backend, &options, &session));
    CHECK(messages > 0);
    tokenizers(model, tokenizer);
    uint32_t prompt[16];
    size_t n = encode(tokenizer, "Once upon a time", prompt, 16);
    sequences(session, prompt, n);
    saved(session, prompt, n, argv[1]);
    generations(session, tokenizer, prompt, n);
    chats(model, tokenizer);
    own_memory(model, session, prompt, n);
    if (argc > 2) {
        embeddings(argv[2], backend);
    }
    OK(halite_session_close(session));
    OK(halite_backend_close(backend));
    OK(halite_tokenizer_close(tokenizer));
    OK(halite_model_close(model));
    GIVES(HALITE_HANDLE, halite_model_close(model));
    OK(halite_set_log(NULL, 0, NULL));
    puts("the C interface works");
    return 0;
}
