/* Embeddings: embed MODEL.gguf TEXT TEXT…: the cosine of each text with the first one. The model is an encoder. */
#include "example.h"

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: embed MODEL.gguf TEXT TEXT...\n");
        return 2;
    }
    HaliteModel *model = open_model(argv[1]);
    HaliteTokenizer *tokenizer;
    HaliteOpenBackend *backend;
    HaliteEmbedder *embedder;
    TRY(halite_tokenizer_open(model, &tokenizer));
    TRY(halite_backend_open("cpu", NULL, &backend));
    TRY(halite_embedder_open(model, backend, NULL, &embedder));
    HaliteEmbedderInfo info = {sizeof info, 0, 0, 0};
    TRY(halite_embedder_info(embedder, &info));
    const char *const *texts = (const char *const *)(argv + 2);
    size_t count = (size_t)argc - 2, length;
    float *vectors = malloc(count * info.dimension * sizeof *vectors);
    if (!vectors) {
        return 1;
    }
    TRY(halite_embedder_embed(embedder, tokenizer, texts, count, 0, vectors, count * info.dimension, &length));
    for (size_t text = 0; text < count; text++) {
        double cosine = 0;
        for (uint32_t i = 0; i < info.dimension; i++) {
            cosine += (double)vectors[i] * (double)vectors[text * info.dimension + i];
        }
        printf("%6.3f  %s\n", cosine, texts[text]);
    }
    free(vectors);
    TRY(halite_embedder_close(embedder));
    TRY(halite_backend_close(backend));
    TRY(halite_tokenizer_close(tokenizer));
    TRY(halite_model_close(model));
    return 0;
}
