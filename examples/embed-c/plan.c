/* A memory plan: plan [MODEL.gguf]. Finds the longest context whose memory fits in a budget, before anything is loaded. */
#include <string.h>

#include "example.h"

int main(int argc, char **argv) {
    const uint64_t budget_bytes = 4u << 20;
    HaliteModel *model = open_model(argc > 1 ? argv[1] : NULL);
    HaliteOpenBackend *backend;
    HaliteSession *session;
    TRY(halite_backend_open("cpu", NULL, &backend));
    char name[256];
    TRY(halite_model_name(model, name, sizeof name, NULL));
    HaliteSessionOptions options;
    memset(&options, 0, sizeof options);
    options.struct_bytes = sizeof options;
    options.batch = 64;
    options.kv_format = "q8_0";
    for (options.context = 4096; options.context >= 64; options.context /= 2) {
        HaliteMemoryPlan plan;
        memset(&plan, 0, sizeof plan);
        plan.struct_bytes = sizeof plan;
        TRY(halite_session_plan(model, backend, &options, &plan));
        /* Weights stay in the mapped file. */
        uint64_t bytes = plan.kv_bytes + plan.scratch_bytes + plan.io_bytes;
        printf("%s: context %u: %.1f MiB, and %.1f MiB of mapped weights\n", name, (unsigned)plan.context,
               (double)bytes / (1 << 20), (double)plan.weight_bytes / (1 << 20));
        if (bytes <= budget_bytes) {
            TRY(halite_session_open(model, backend, &options, &session));
            TRY(halite_session_close(session));
            break;
        }
    }
    TRY(halite_backend_close(backend));
    TRY(halite_model_close(model));
    return 0;
}
