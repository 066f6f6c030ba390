/* A chat: chat [MODEL.gguf]. Reads a message from each line, and streams the answer. Without a template in the model file it
 * uses a simple one. */
#include <string.h>

#include "example.h"

static const char *const SIMPLE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

/* The whole answer, for the next prompt. */
struct answer {
    char text[16384];
    size_t length;
};

static int on_text(const char *text, size_t bytes, void *user) {
    struct answer *answer = user;
    if (answer->length + bytes >= sizeof answer->text) {
        return 1;
    }
    memcpy(answer->text + answer->length, text, bytes + 1);
    answer->length += bytes;
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
    return 0;
}

int main(int argc, char **argv) {
    HaliteModel *model = open_model(argc > 1 ? argv[1] : NULL);
    HaliteTokenizer *tokenizer;
    HaliteOpenBackend *backend;
    HaliteSession *session;
    HaliteSequence sequence;
    HaliteChat *chat;
    TRY(halite_tokenizer_open(model, &tokenizer));
    TRY(halite_backend_open("cpu", NULL, &backend));
    TRY(halite_session_open(model, backend, NULL, &session));
    TRY(halite_session_add(session, &sequence));
    HaliteResult opened = halite_chat_open(model, tokenizer, NULL, &chat);
    if (opened == HALITE_NOT_FOUND) {
        opened = halite_chat_open(model, tokenizer, SIMPLE, &chat);
    }
    check(opened, "halite_chat_open");

    HaliteGenerateOptions options;
    memset(&options, 0, sizeof options);
    options.struct_bytes = sizeof options;
    options.max_tokens = 64;
    options.temperature = 0.7f;
    options.show_special = 1;
    options.deadline_ms = 60000;
    char line[4096];
    static uint32_t prompt[1 << 16];
    static struct answer answer;
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\r\n")] = 0;
        size_t length;
        /* What users write is not trusted: control tokens in it are plain text. */
        TRY(halite_chat_add(chat, "user", line, 0));
        TRY(halite_chat_prompt(chat, prompt, sizeof prompt / sizeof *prompt, &length));
        answer.length = 0;
        answer.text[0] = 0;
        /* The sequence keeps what the prompt has in common with the last one, so only the new message runs. */
        TRY(halite_generate(session, sequence, tokenizer, prompt, length, &options, on_text, &answer, NULL));
        puts("");
        TRY(halite_chat_add_answer(chat, answer.text));
    }
    TRY(halite_chat_close(chat));
    TRY(halite_session_close(session));
    TRY(halite_backend_close(backend));
    TRY(halite_tokenizer_close(tokenizer));
    TRY(halite_model_close(model));
    return 0;
}
