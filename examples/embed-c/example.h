/* What the examples share: a call that fails ends the program with its message. A product would clean up and go on. */
#ifndef EXAMPLE_H
#define EXAMPLE_H

#include <stdio.h>
#include <stdlib.h>

#include <halite.h>

static void check(HaliteResult result, const char *call) {
    if (result != HALITE_OK) {
        fprintf(stderr, "%s: %s: %s\n", call, halite_result_name(result), halite_last_error());
        exit(1);
    }
}

#define TRY(call) check((call), #call)

/* The model of a file, or the built-in one. */
static HaliteModel *open_model(const char *path) {
    HaliteModel *model;
    if (path) {
        TRY(halite_model_open(path, &model));
    } else {
        TRY(halite_model_open_builtin(&model));
    }
    return model;
}

#endif
