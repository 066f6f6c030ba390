/* A plug-in backend of Halite in one C file. Copy it for a chip.
 *
 * It stands for a small accelerator with memory of its own. Here this memory is the process's, and the chip
 * is plain loops. Replace `take_memory`, `write_buffer` and `read_buffer` with the chip's allocator and
 * copies, and the ops one after the other with the chip's commands.
 *
 * From top to bottom: device memory, opening a device, what the chip runs, number formats, the ops, plans,
 * steps, and the table of calls that the host gets. src/backend/reference.rs and docs/numeric-contract.md say
 * what each op computes. All numbers in memory have their low byte first.
 *
 * Options, separated by commas:
 *   memory=MIB       the device's memory, 1024 unless given
 *   only=NAME+NAME   run only these ops, such as `only=MatMul+Add`, to bring the chip up op by op */

#define _POSIX_C_SOURCE 199309L /* For clock_gettime. */

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "halite_backend.h"

#define MIB ((uint64_t)1 << 20)
/* Elements that share a scale in HALITE_Q8_0 and HALITE_Q4_0. */
#define BLOCK 32

/* What the host offers. `halite_backend` sets it before all other calls. */
static const HaliteHost *host;

struct HaliteDevice {
    uint64_t capacity_bytes;
    uint64_t used_bytes;
    char only[256]; /* Names of ops, each between two `+`; empty: all ops. */
    char description[64];
};

struct HaliteBuffer {
    uint64_t bytes;
    uint8_t *memory;
};

/* Where a token of a step is. */
typedef struct Token {
    const HaliteSpan *span;
    uint32_t position;
} Token;

struct HalitePlan {
    const HaliteProgram *program;
    HaliteBuffer *scratch; /* Holds the places and the rows below. */
    uint8_t **places;      /* The memory of each of the program's places. */
    Token *tokens;         /* The tokens of the step. */
    uint64_t nanoseconds;  /* The time of the step so far. */
    /* Rows for values inside an op, each as wide as the widest tensor. */
    float *decoded; /* A weight row. */
    float *gate;    /* Products of a gated linear unit. */
    float *up;
    float *result; /* What an op goes on with: an expert's output, a rotated key, a router's probabilities. */
    float *scales; /* Activations in HALITE_Q8_0: a scale for each block, and a code for each element. */
    int8_t *codes;
};

/* A submission. An op that fails sets `status`, and the submission ends. */
typedef struct Run {
    const HalitePlan *plan;
    const HaliteStep *step;
    const HaliteBindings *bindings;
    HaliteMessage *message;
    HaliteStatus status;
} Run;

/* Writes a message, and returns the status for the caller to return. */
static HaliteStatus say(HaliteMessage *message, HaliteStatus status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message->text, message->capacity_bytes, format, arguments);
    va_end(arguments);
    return status;
}

/* Allocates zeroed memory of the host. `calloc` may return NULL for nothing. */
static void *zeroed(uint64_t count, size_t bytes) {
    return calloc(count > 0 ? count : 1, bytes);
}

/* ---- Device memory ---- */

static HaliteStatus take_memory(HaliteDevice *device, uint64_t bytes, HaliteBuffer **result,
                                HaliteMessage *message) {
    uint64_t left = device->capacity_bytes - device->used_bytes;
    if (bytes > left)
        return say(message, HALITE_OUT_OF_MEMORY, "%" PRIu64 " bytes wanted, %" PRIu64 " left", bytes, left);
    HaliteBuffer *buffer = zeroed(1, sizeof *buffer);
    uint8_t *memory = zeroed(bytes, 1);
    if (buffer == NULL || memory == NULL) {
        free(buffer);
        free(memory);
        return say(message, HALITE_OUT_OF_MEMORY, "the system has no %" PRIu64 " bytes left", bytes);
    }
    buffer->bytes = bytes;
    buffer->memory = memory;
    device->used_bytes += bytes;
    *result = buffer;
    return HALITE_OK;
}

/* A chip with several memories chooses one by the use of the buffer. */
static HaliteStatus alloc_buffer(HaliteDevice *device, uint64_t bytes, HaliteUsage usage,
                                 HaliteBuffer **buffer, HaliteMessage *message) {
    (void)usage;
    return take_memory(device, bytes, buffer, message);
}

static void release_buffer(HaliteDevice *device, HaliteBuffer *buffer) {
    device->used_bytes -= buffer->bytes;
    free(buffer->memory);
    free(buffer);
}

static HaliteStatus check_range(const HaliteBuffer *buffer, uint64_t offset, uint64_t count,
                                HaliteMessage *message) {
    if (offset <= buffer->bytes && count <= buffer->bytes - offset)
        return HALITE_OK;
    return say(message, HALITE_ARGUMENT, "%" PRIu64 " bytes at %" PRIu64 " of a buffer of %" PRIu64, count,
               offset, buffer->bytes);
}

static HaliteStatus write_buffer(HaliteDevice *device, HaliteBuffer *buffer, uint64_t offset,
                                 const uint8_t *bytes, uint64_t count, HaliteMessage *message) {
    (void)device;
    HaliteStatus status = check_range(buffer, offset, count, message);
    if (status == HALITE_OK && count > 0)
        memcpy(buffer->memory + offset, bytes, count);
    return status;
}

static HaliteStatus read_buffer(HaliteDevice *device, HaliteBuffer *buffer, uint64_t offset, uint8_t *bytes,
                                uint64_t count, HaliteMessage *message) {
    (void)device;
    HaliteStatus status = check_range(buffer, offset, count, message);
    if (status == HALITE_OK && count > 0)
        memcpy(bytes, buffer->memory + offset, count);
    return status;
}

/* ---- Opening a device ---- */

/* Reads one option, which a comma or the end of the text follows after `length` characters. */
static HaliteStatus set_option(HaliteDevice *device, const char *option, int length, HaliteMessage *message) {
    uint64_t mib = 0;
    char names[sizeof device->only - 2]; /* 253 characters and a zero. */
    int end = 0;
    if (sscanf(option, "memory=%12" SCNu64 "%n", &mib, &end) == 1 && end == length && mib > 0
        && mib <= SIZE_MAX / MIB)
        device->capacity_bytes = mib * MIB;
    else if (sscanf(option, "only=%253[^,]%n", names, &end) == 1 && end == length)
        snprintf(device->only, sizeof device->only, "+%s+", names);
    else
        return say(message, HALITE_ARGUMENT, "option `%.*s`: expected memory=MIB or only=NAME+NAME", length,
                   option);
    return HALITE_OK;
}

static HaliteStatus set_options(HaliteDevice *device, const char *options, HaliteMessage *message) {
    HaliteStatus status = HALITE_OK;
    while (*options != '\0' && status == HALITE_OK) {
        int length = (int)strcspn(options, ",");
        status = set_option(device, options, length, message);
        options += options[length] == ',' ? length + 1 : length;
    }
    return status;
}

static HaliteStatus open_device(const char *options, HaliteDevice **result, HaliteMessage *message) {
    HaliteDevice *device = zeroed(1, sizeof *device);
    if (device == NULL)
        return say(message, HALITE_OUT_OF_MEMORY, "no memory for a device");
    device->capacity_bytes = 1024 * MIB;
    HaliteStatus status = set_options(device, options, message);
    if (status != HALITE_OK) {
        free(device);
        return status;
    }
    snprintf(device->description, sizeof device->description, "an example in C, %" PRIu64 " MiB",
             device->capacity_bytes / MIB);
    *result = device;
    return HALITE_OK;
}

static void close_device(HaliteDevice *device) {
    free(device);
}

static HaliteStatus get_caps(HaliteDevice *device, HaliteCaps *caps, HaliteMessage *message) {
    (void)message;
    caps->contract = HALITE_CONTRACT_CLOSE;
    /* The loops below gain nothing from fused ops. They run them all the same, for conformance. */
    caps->fusions = 0;
    caps->memory_bytes = device->capacity_bytes;
    caps->device = device->description;
    return HALITE_OK;
}

/* ---- What the chip runs ---- */

/* The checks of an op. The first that fails sets `status`. */
typedef struct Check {
    const HaliteProgram *program;
    HaliteMessage *message;
    HaliteStatus status;
} Check;

/* Refuses a number behind the last one that the chip knows. */
static void check_number(Check *check, const char *what, uint32_t number, uint32_t last) {
    if (check->status == HALITE_OK && number > last)
        check->status = say(check->message, HALITE_NOT_YET, "the chip does not know %s %" PRIu32, what,
                            number);
}

static void check_format(Check *check, const char *what, HaliteFormat format, int known) {
    if (check->status == HALITE_OK && !known)
        check->status = say(check->message, HALITE_NOT_YET, "the chip does not know format %" PRIu32 " of %s",
                            format, what);
}

/* A weight may have any format that the host can decode. */
static void check_weight(Check *check, uint32_t number) {
    const HaliteTensor *weight = check->program->tensors[number];
    check_format(check, "weights", weight->format, host->row_bytes(weight->format, weight->cols) > 0);
}

static void check_state(Check *check, uint32_t number) {
    HaliteFormat format = check->program->states[number]->format;
    int is_float = format == HALITE_F32 || format == HALITE_F16;
    check_format(check, "caches", format, is_float || format == HALITE_Q8_0 || format == HALITE_Q4_0);
}

static void check_gate(Check *check, const HaliteGate *act) {
    check_number(check, "gate", act->kind, HALITE_GATE_NORMAL);
}

static void check_pairing(Check *check, const HaliteRotation *rotation) {
    check_number(check, "pairing", rotation->pairing, HALITE_ROPE_HALVES);
}

static void check_embed(Check *check, const HaliteEmbed *op) {
    check_number(check, "index", op->index, HALITE_INDEX_PART);
    check_weight(check, op->table);
}

static void check_matmul(Check *check, const HaliteMatMul *op) {
    check_number(check, "epilogue", op->epilogue, HALITE_EPILOGUE_ADD);
    for (uint32_t part = 0; part < op->parts; part++)
        check_weight(check, op->weights[part]);
    if (op->epilogue == HALITE_EPILOGUE_GLU)
        check_gate(check, &op->act);
}

static void check_rope_kv(Check *check, const HaliteRopeKv *op) {
    check_pairing(check, &op->rotation);
    check_state(check, op->state);
}

static void check_experts(Check *check, const HaliteExperts *op) {
    check_weight(check, op->gate);
    check_weight(check, op->up);
    check_weight(check, op->down);
    check_gate(check, &op->act);
}

static void check_op(Check *check, const HaliteOp *op) {
    const HaliteOperands *o = &op->operands;
    switch (op->kind) {
    case HALITE_OP_EMBED: check_embed(check, &o->embed); break;
    case HALITE_OP_NORM: check_number(check, "norm", o->norm.kind, HALITE_NORM_LAYER); break;
    case HALITE_OP_MATMUL: check_matmul(check, &o->matmul); break;
    case HALITE_OP_ROPE: check_pairing(check, &o->rope.rotation); break;
    case HALITE_OP_KV_WRITE:
    case HALITE_OP_LATENT_WRITE: check_state(check, o->kv_write.state); break;
    case HALITE_OP_ROPE_KV: check_rope_kv(check, &o->rope_kv); break;
    case HALITE_OP_ATTEND:
    case HALITE_OP_LATENT_ATTEND: check_state(check, o->attend.state); break;
    case HALITE_OP_BLOCK_MATMUL: check_weight(check, o->block_matmul.weight); break;
    case HALITE_OP_GLU: check_gate(check, &o->glu.act); break;
    case HALITE_OP_UNARY: check_number(check, "function", o->unary.function, HALITE_UNARY_SHIFT); break;
    case HALITE_OP_ROUTE: check_number(check, "gating", o->route.gating, HALITE_GATING_SIGMOID); break;
    case HALITE_OP_ROUTE_AMONG:
    case HALITE_OP_ROUTE_SCALED: /* It begins like the other. */
        check_number(check, "gating", o->route_among.route.gating, HALITE_GATING_SIGMOID);
        break;
    case HALITE_OP_EXPERTS: check_experts(check, &o->experts); break;
    case HALITE_OP_RECUR: check_number(check, "rule", o->recur.rule, HALITE_RULE_DELTA_OF_NEIGHBOURS); break;
    case HALITE_OP_SPREAD: check_number(check, "norm", o->spread.kind, HALITE_NORM_LAYER); break;
    default: check_number(check, "op", op->kind, HALITE_OP_MIX); /* Nothing else to check. */
    }
}

static int is_allowed(const HaliteDevice *device, const char *name) {
    char between[64];
    snprintf(between, sizeof between, "+%s+", name);
    return device->only[0] == '\0' || strstr(device->only, between) != NULL;
}

static HaliteStatus supports(HaliteDevice *device, const HaliteProgram *program, const HaliteOp *op,
                             HaliteMessage *message) {
    if (!is_allowed(device, op->name))
        return say(message, HALITE_NOT_YET, "the chip has no command for this %s", op->name);
    Check check = {program, message, HALITE_OK};
    check_op(&check, op);
    return check.status;
}

/* Here the message is the answer. */
static HaliteStatus explain(HaliteDevice *device, const HaliteProgram *program, const HaliteOp *op,
                            uint32_t tokens, HaliteMessage *message) {
    (void)tokens;
    if (!is_allowed(device, op->name))
        return say(message, HALITE_OK, "%s", "");
    if (op->kind != HALITE_OP_MATMUL)
        return say(message, HALITE_OK, "plain loops");
    switch (program->tensors[op->operands.matmul.weights[0]]->format) {
    case HALITE_F32: return say(message, HALITE_OK, "float dot products");
    case HALITE_Q8_0: return say(message, HALITE_OK, "integer dot products of Q8_0");
    default: return say(message, HALITE_OK, "decoded by the host, then float");
    }
}

/* ---- Number formats ---- */

static uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Half precision has a sign, 5 bits of exponent with bias 15, and 10 bits of fraction. */
static float float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)half >> 15 << 31, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) /* Infinity or NaN. */
        return float_of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) { /* Zero or subnormal: a multiple of 2^-24. */
        float magnitude = (float)fraction * 0x1p-24f;
        return sign != 0 ? -magnitude : magnitude;
    }
    return float_of_bits(sign | (exponent - 15 + 127) << 23 | fraction << 13);
}

/* Rounds to nearest, ties to even. */
static uint16_t half_of_float(float x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    float magnitude = fabsf(x);
    if (isnan(x))
        return sign | 0x7e00;
    if (magnitude >= 65520.0f) /* Halfway from the largest number to 2^16. */
        return sign | 0x7c00;
    if (magnitude < 0x1p-14f) /* Subnormal: a multiple of 2^-24. */
        return sign | (uint16_t)rintf(magnitude * 0x1p24f);
    int exponent;
    float part = frexpf(magnitude, &exponent); /* 0.5 to 1: the number is part * 2^exponent. */
    int fraction = (int)rintf(part * 0x1p11f); /* With the leading 1, which adds 1 to the exponent below. */
    return sign | (uint16_t)((exponent + 13) * 1024 + fraction);
}

/* Whether elements of a format share a scale: then a single one is no whole block. */
static int has_blocks(HaliteFormat format) {
    return host->block_len(format) > 1;
}

static int all_finite(const float *x, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        if (!isfinite(x[i]))
            return 0;
    return 1;
}

static float largest_magnitude(const float *x, uint32_t count) {
    float largest = 0;
    for (uint32_t i = 0; i < count; i++)
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    return largest;
}

/* Quantises a block of finite numbers to 8 bits. Returns the scale in half precision. */
static uint16_t quantise_q8_0(const float *x, int8_t *codes) {
    float largest = largest_magnitude(x, BLOCK);
    float inverse = 127.0f / largest;
    if (!isfinite(inverse)) { /* All are zero, or too small for a scale. */
        memset(codes, 0, BLOCK);
        return 0;
    }
    for (uint32_t i = 0; i < BLOCK; i++)
        codes[i] = (int8_t)rintf(x[i] * inverse);
    return half_of_float(largest / 127.0f);
}

/* Quantises a block of finite numbers to 4 bits. Returns the scale in half precision. */
static uint16_t quantise_q4_0(const float *x, uint8_t *codes) {
    float magnitude = largest_magnitude(x, BLOCK);
    uint32_t largest = 0;
    while (fabsf(x[largest]) != magnitude)
        largest++;
    float scale = x[largest] / -8.0f; /* The largest gets code 0, which stands for -8. */
    float inverse = scale == 0 ? 0 : 1.0f / scale;
    for (uint32_t i = 0; i < BLOCK; i++) {
        float code = x[i] * inverse + 8.5f;
        /* The inverse of a tiny scale is infinite, so the code may be anything. NaN becomes 0. */
        codes[i] = code >= 15 ? 15 : code > 0 ? (uint8_t)code : 0;
    }
    return half_of_float(scale);
}

/* ---- Tensors ---- */

typedef struct Tensor {
    uint8_t *memory;
    uint64_t row_bytes;
    uint32_t rows;
    uint32_t cols;
    HaliteFormat format;
} Tensor;

static uint32_t row_count(HaliteRows rows, uint32_t fixed, uint32_t tokens, uint32_t outputs) {
    if (rows == HALITE_ROWS_TOKENS)
        return tokens;
    return rows == HALITE_ROWS_OUTPUTS ? outputs : fixed;
}

static uint8_t *memory_of(const Run *run, const HaliteTensor *tensor) {
    switch (tensor->slot) {
    case HALITE_SLOT_WEIGHT: return run->bindings->weights[tensor->slot_index]->memory;
    case HALITE_SLOT_IO: return run->bindings->io[tensor->slot_index]->memory;
    default: return run->plan->places[tensor->place];
    }
}

/* Finds an operand. The host has checked that its buffer is large enough. */
static Tensor find(const Run *run, uint32_t number) {
    const HaliteTensor *tensor = run->plan->program->tensors[number];
    Tensor found;
    found.memory = memory_of(run, tensor);
    found.row_bytes = host->row_bytes(tensor->format, tensor->cols);
    found.rows = row_count(tensor->rows, tensor->fixed_rows, run->step->token_count, run->step->output_count);
    found.cols = tensor->cols;
    found.format = tensor->format;
    return found;
}

/* A row, for a pointer to the elements of the tensor's format. */
static void *row_of(Tensor tensor, uint64_t row) {
    return tensor.memory + row * tensor.row_bytes;
}

/* A row of an operand that an op may lack; then it is NULL. */
static const float *optional_row(const Run *run, uint32_t number, uint32_t row) {
    return number == HALITE_NONE ? NULL : row_of(find(run, number), row);
}

/* ---- Functions of one element ---- */

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
static float silu(float x) { return x / (1.0f + expf(-x)); }
static float gelu_erf(float x) { return 0.5f * x * erff(x * 0.70710678f) + 0.5f * x; }
static float relu(float x) { return x > 0 || isnan(x) ? x : 0; } /* `fmaxf` would lose NaN. */
static float soft_cap(float x, float cap) { return cap * tanhf(x / cap); }
static float softplus(float x) { return relu(x) + log1pf(expf(-fabsf(x))); }

/* Models are evaluated with a table of GELU from and to half precision, so both ends are rounded. */
static float gelu(float x) {
    if (x <= -10.0f)
        return 0;
    if (x >= 10.0f)
        return x;
    float half = float_of_half(half_of_float(x));
    float t = tanhf(0.7978846f * (0.044715f * (half * half) * half + half));
    return float_of_half(half_of_float(0.5f * half * t + 0.5f * half));
}

/* `supports` has refused other functions. */
static float apply_unary(const HaliteUnary *op, float x) {
    switch (op->function) {
    case HALITE_UNARY_SILU: return silu(x);
    case HALITE_UNARY_GELU: return gelu(x);
    case HALITE_UNARY_GELU_ERF: return gelu_erf(x);
    case HALITE_UNARY_RELU: return relu(x);
    case HALITE_UNARY_RELU_SQUARED: return relu(x) * relu(x);
    case HALITE_UNARY_SCALE: return x * op->parameter;
    case HALITE_UNARY_SOFT_CAP: return soft_cap(x, op->parameter);
    case HALITE_UNARY_CLAMP: return fabsf(x) > op->parameter ? copysignf(op->parameter, x) : x;
    default: /* HALITE_UNARY_SHIFT */ return x + op->parameter;
    }
}

static float silu_clamped(float gate, float up, float alpha, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    return gate * sigmoid(alpha * gate) * (up + 1.0f);
}

/* `supports` has refused other gates. */
static float apply_gate(const HaliteGate *act, float gate, float up) {
    switch (act->kind) {
    case HALITE_GATE_SILU: return silu(gate) * up;
    case HALITE_GATE_GELU: return gelu(gate) * up;
    case HALITE_GATE_GELU_ERF: return gelu_erf(gate) * up;
    case HALITE_GATE_RELU: return relu(gate) * up;
    case HALITE_GATE_SIGMOID: return sigmoid(gate) * up;
    case HALITE_GATE_IDENTITY: return gate * up;
    case HALITE_GATE_NORMAL: return (0.5f * erff(gate * 0.70710678f) + 0.5f) * up;
    default: /* HALITE_GATE_SILU_CLAMPED */ return silu_clamped(gate, up, act->alpha, act->limit);
    }
}

static void unary(Run *run, const HaliteUnary *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    for (uint32_t t = 0; t < out.rows; t++) {
        const float *from = row_of(x, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < out.cols; i++)
            to[i] = apply_unary(op, from[i]);
    }
}

static void gate_rows(const HaliteGate *act, const float *gate, const float *up, uint32_t count, float *out) {
    for (uint32_t i = 0; i < count; i++)
        out[i] = apply_gate(act, gate[i], up[i]);
}

static void glu(Run *run, const HaliteGlu *op) {
    Tensor gate = find(run, op->gate), up = find(run, op->up), out = find(run, op->out);
    for (uint32_t t = 0; t < out.rows; t++)
        gate_rows(&op->act, row_of(gate, t), row_of(up, t), out.cols, row_of(out, t));
}

static void add_rows(const float *a, const float *b, uint32_t count, float *out) {
    for (uint32_t i = 0; i < count; i++)
        out[i] = a[i] + b[i];
}

static void add(Run *run, const HaliteAdd *op) {
    Tensor a = find(run, op->a), b = find(run, op->b), out = find(run, op->out);
    for (uint32_t t = 0; t < out.rows; t++)
        add_rows(row_of(a, t), row_of(b, t), out.cols, row_of(out, t));
}

static void mul(Run *run, const HaliteMul *op) {
    Tensor x = find(run, op->x), weight = find(run, op->weight), out = find(run, op->out);
    const float *factors = row_of(weight, 0);
    for (uint32_t t = 0; t < out.rows; t++) {
        const float *from = row_of(x, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < out.cols; i++)
            to[i] = from[i] * factors[i % weight.cols];
    }
}

static void slice(Run *run, const HaliteSlice *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    uint32_t groups = x.cols / op->group, count = out.cols / groups;
    for (uint32_t t = 0; t < out.rows; t++) {
        const float *from = row_of(x, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < groups; i++)
            memcpy(to + i * count, from + i * op->group + op->first, count * sizeof *to);
    }
}

static void join(Run *run, const HaliteJoin *op) {
    Tensor a = find(run, op->a), b = find(run, op->b), out = find(run, op->out);
    uint32_t groups = out.cols / op->group, last = op->group - op->first;
    for (uint32_t t = 0; t < out.rows; t++) {
        const float *first = row_of(a, t), *then = row_of(b, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < groups; i++) {
            memcpy(to + i * op->group, first + i * op->first, op->first * sizeof *to);
            memcpy(to + i * op->group + op->first, then + i * last % b.cols, last * sizeof *to);
        }
    }
}

/* ---- Embeddings and outputs ---- */

static void decode(Run *run, Tensor table, uint32_t row, float *out) {
    HaliteStatus status = host->dequantize(table.format, row_of(table, row), out, table.cols);
    if (status != HALITE_OK)
        run->status = say(run->message, status, "the host cannot decode format %" PRIu32, table.format);
}

/* The separators before a token in its span, which starts at position 0; at most the table's last row. */
static uint32_t part(Run *run, const HaliteEmbed *op, uint32_t token) {
    uint32_t position = run->plan->tokens[token].position, last = find(run, op->table).rows - 1, count = 0;
    if (run->plan->tokens[token].span->start > 0) {
        run->status = say(run->message, HALITE_ARGUMENT, "a text of parts does not start at position 0");
        return 0;
    }
    for (uint32_t before = token - position; before < token; before++)
        count += run->step->tokens[before] == op->separator;
    return count < last ? count : last;
}

/* The row of the table that a token takes. */
static uint32_t embed_index(Run *run, const HaliteEmbed *op, uint32_t token) {
    switch (op->index) {
    case HALITE_INDEX_TOKEN: return run->step->tokens[token];
    case HALITE_INDEX_POSITION: return run->plan->tokens[token].position;
    case HALITE_INDEX_PART: return part(run, op, token);
    default: /* HALITE_INDEX_FIRST */ return 0;
    }
}

static void embed(Run *run, const HaliteEmbed *op) {
    Tensor table = find(run, op->table), out = find(run, op->out);
    const char *name = run->plan->program->tensors[op->table]->name;
    for (uint32_t t = 0; t < out.rows && run->status == HALITE_OK; t++) {
        uint32_t index = embed_index(run, op, t);
        if (index >= table.rows) {
            run->status = say(run->message, HALITE_ARGUMENT,
                              "row %" PRIu32 " of `%s`, which has %" PRIu32 " rows", index, name, table.rows);
            return;
        }
        float *to = row_of(out, t);
        decode(run, table, index, to);
        for (uint32_t i = 0; i < out.cols; i++)
            to[i] *= op->scale;
    }
}

static void gather(Run *run, const HaliteGather *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    for (uint32_t i = 0; i < out.rows; i++)
        memcpy(row_of(out, i), row_of(x, run->step->outputs[i]), out.row_bytes);
}

/* ---- Norms ---- */

static float sum_of(const float *x, uint32_t count) {
    float sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += x[i];
    return sum;
}

static float mean_of(uint32_t kind, const float *x, uint32_t group) {
    return kind == HALITE_NORM_LAYER ? sum_of(x, group) / (float)group : 0;
}

static float spread_around(float mean, const float *x, uint32_t group, float eps) {
    float squares = 0;
    for (uint32_t i = 0; i < group; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    return sqrtf(squares / (float)group + eps);
}

static void spread(Run *run, const HaliteSpread *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    for (uint32_t t = 0; t < x.rows; t++) {
        const float *from = row_of(x, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < out.cols; i++, from += op->group)
            to[i] = spread_around(mean_of(op->kind, from, op->group), from, op->group, op->eps);
    }
}

static void mix(Run *run, const HaliteMix *op) {
    Tensor x = find(run, op->x), out = find(run, op->out), factors = find(run, op->factors);
    uint32_t length = x.cols / op->parts;
    for (uint32_t t = 0; t < out.rows; t++) {
        const float *from = row_of(x, t), *factor = row_of(factors, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < out.cols; i++) {
            to[i] = 0;
            for (uint32_t j = 0; j < op->parts; j++)
                to[i] += factor[i / length * op->parts + j] * from[j * length + i % length];
        }
    }
}

/* Normalises a group of elements. `weight` and `bias` may be NULL. */
static void normalise(const HaliteNorm *op, const float *x, const float *weight, const float *bias,
                      float *out) {
    float mean = mean_of(op->kind, x, op->group);
    float scale = 1.0f / spread_around(mean, x, op->group, op->eps);
    for (uint32_t i = 0; i < op->group; i++) {
        out[i] = (x[i] - mean) * scale;
        if (weight != NULL)
            out[i] *= weight[i];
        if (bias != NULL)
            out[i] += bias[i];
    }
}

static void norm(Run *run, const HaliteNorm *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    const float *weight = optional_row(run, op->weight, 0), *bias = optional_row(run, op->bias, 0);
    if (op->add != HALITE_NONE) {
        Tensor added = find(run, op->add), sum = find(run, op->sum);
        for (uint32_t t = 0; t < x.rows; t++)
            add_rows(row_of(x, t), row_of(added, t), x.cols, row_of(sum, t));
        x = sum;
    }
    for (uint32_t t = 0; t < x.rows; t++) {
        const float *from = row_of(x, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < x.cols; i += op->group)
            normalise(op, from + i, weight, bias, to + i);
    }
}

/* ---- Products ---- */

/* A block of a weight of HALITE_Q8_0. */
typedef struct Q8Block {
    uint16_t scale;
    int8_t codes[BLOCK];
} Q8Block;

static float dot(const float *a, const float *b, uint32_t count) {
    float sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

/* The sum inside a block is exact in integers. */
static float dot_q8_0(const Q8Block *weight, const float *scales, const int8_t *codes, uint32_t blocks) {
    float sum = 0;
    for (uint32_t block = 0; block < blocks; block++) {
        int32_t products = 0;
        for (uint32_t i = 0; i < BLOCK; i++)
            products += weight[block].codes[i] * codes[block * BLOCK + i];
        sum += (float)products * (float_of_half(weight[block].scale) * scales[block]);
    }
    return sum;
}

/* Quantises the activations, then takes products in integers. */
static void products_of_q8_0(const HalitePlan *plan, Tensor weight, const float *x, float *y) {
    uint32_t blocks = weight.cols / BLOCK;
    for (uint32_t block = 0; block < blocks; block++)
        plan->scales[block] = float_of_half(quantise_q8_0(x + block * BLOCK, plan->codes + block * BLOCK));
    for (uint32_t row = 0; row < weight.rows; row++)
        y[row] = dot_q8_0(row_of(weight, row), plan->scales, plan->codes, blocks);
}

/* The host decodes the weights, so that all formats run from the first day. A chip has loops of its own for
 * the formats that matter to it. */
static void products_of_others(Run *run, Tensor weight, const float *x, float *y) {
    for (uint32_t row = 0; row < weight.rows && run->status == HALITE_OK; row++) {
        decode(run, weight, row, run->plan->decoded);
        y[row] = dot(run->plan->decoded, x, weight.cols);
    }
}

static void products(Run *run, Tensor weight, const float *x, float *y) {
    if (has_blocks(weight.format) && !all_finite(x, weight.cols)) {
        /* Infinity and NaN have no codes. Whatever depends on them becomes NaN. */
        for (uint32_t row = 0; row < weight.rows; row++)
            y[row] = NAN;
    } else if (weight.format == HALITE_Q8_0) {
        products_of_q8_0(run->plan, weight, x, y);
    } else if (weight.format == HALITE_F32) {
        for (uint32_t row = 0; row < weight.rows; row++)
            y[row] = dot(row_of(weight, row), x, weight.cols);
    } else {
        products_of_others(run, weight, x, y);
    }
}

/* Products of a row with an expert's matrix, plus the expert's bias. Other weights have the one expert 0. */
static void linear(Run *run, uint32_t weight, uint32_t bias, uint32_t expert, const float *x, float *y) {
    Tensor matrix = find(run, weight);
    const float *added = optional_row(run, bias, expert);
    matrix.memory = row_of(matrix, (uint64_t)expert * matrix.rows);
    products(run, matrix, x, y);
    if (added != NULL)
        add_rows(y, added, matrix.rows, y);
}

/* Each block of a row with a matrix of its own. */
static void block_matmul(Run *run, const HaliteBlockMatMul *op) {
    Tensor x = find(run, op->x), weight = find(run, op->weight), out = find(run, op->out);
    uint32_t blocks = x.cols / weight.cols;
    for (uint32_t t = 0; t < x.rows && run->status == HALITE_OK; t++) {
        const float *from = row_of(x, t);
        float *to = row_of(out, t);
        for (uint32_t i = 0; i < blocks; i++)
            linear(run, op->weight, HALITE_NONE, i, from + i * weight.cols, to + i * weight.rows);
    }
}

static void matmul_row(Run *run, const HaliteMatMul *op, uint32_t t) {
    const float *x = row_of(find(run, op->x), t);
    Tensor out = find(run, op->outs[0]);
    float *y = row_of(out, t);
    linear(run, op->weights[0], op->biases[0], 0, x, y);
    if (op->epilogue == HALITE_EPILOGUE_ADD) {
        add_rows(row_of(find(run, op->residual), t), y, out.cols, y);
    } else if (op->epilogue == HALITE_EPILOGUE_GLU) {
        linear(run, op->weights[1], op->biases[1], 0, x, run->plan->up);
        gate_rows(&op->act, y, run->plan->up, out.cols, y);
    } else {
        for (uint32_t part = 1; part < op->parts; part++)
            linear(run, op->weights[part], op->biases[part], 0, x, row_of(find(run, op->outs[part]), t));
    }
}

static void matmul(Run *run, const HaliteMatMul *op) {
    uint32_t rows = find(run, op->x).rows;
    for (uint32_t t = 0; t < rows && run->status == HALITE_OK; t++)
        matmul_row(run, op, t);
}

/* ---- Rotary embeddings ---- */

static void rotate_head(const HaliteRotation *r, const float *factors, uint32_t position, float *head) {
    for (uint32_t i = 0; i < r->pairs; i++) {
        float frequency = factors != NULL ? r->frequencies[i] / factors[i] : r->frequencies[i];
        float angle = (float)position * frequency;
        float sine = sinf(angle) * r->magnitude, cosine = cosf(angle) * r->magnitude;
        uint32_t first = r->pairing == HALITE_ROPE_ADJACENT ? 2 * i : i;
        uint32_t second = r->pairing == HALITE_ROPE_ADJACENT ? 2 * i + 1 : i + r->pairs;
        float x = head[first], y = head[second];
        head[first] = x * cosine - y * sine;
        head[second] = x * sine + y * cosine;
    }
}

static void rotate_row(Run *run, const HaliteRotation *r, uint32_t t, Tensor x, float *out) {
    const float *factors = optional_row(run, r->factors, 0);
    memcpy(out, row_of(x, t), x.row_bytes);
    for (uint32_t head = 0; head < x.cols; head += r->head_dim)
        rotate_head(r, factors, run->plan->tokens[t].position, out + head);
}

static void rope(Run *run, const HaliteRope *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    for (uint32_t t = 0; t < x.rows; t++)
        rotate_row(run, &op->rotation, t, x, row_of(out, t));
}

/* ---- The KV cache ---- */

/* A position of a cache: its page, and its slot there. HaliteState describes pages. */
typedef struct Position {
    const HaliteState *state;
    uint8_t *page;
    uint32_t slot;
} Position;

/* Where an element is in its page: its index, and that of its scale. */
typedef struct Element {
    uint64_t index;
    uint64_t scale;
} Element;

/* Finds a position of the sequence that token `t` belongs to. */
static Position find_position(const Run *run, uint32_t state, uint32_t t, uint32_t position) {
    Position at;
    at.state = run->plan->program->states[state];
    const uint32_t *table = run->plan->tokens[t].span->tables[at.state->table];
    uint64_t page = table[position / HALITE_PAGE_POSITIONS];
    at.page = run->bindings->states[state]->memory + page * at.state->page_bytes;
    at.slot = position % HALITE_PAGE_POSITIONS;
    return at;
}

/* Element `d` of a head's key: slots lie side by side. */
static Element key_element(const Position *at, uint32_t head, uint32_t d) {
    uint64_t before = (uint64_t)head * at->state->key_dim + d;
    Element element;
    element.index = before * HALITE_PAGE_POSITIONS + at->slot;
    element.scale = before / BLOCK * HALITE_PAGE_POSITIONS + at->slot;
    return element;
}

static int is_latent(const HaliteState *state) {
    return state->kind == HALITE_STATE_LATENT;
}

/* Element `d` of a head's value: the elements of a slot lie side by side, behind all keys. A latent value is the
 * beginning of the key. */
static Element value_element(const Position *at, uint32_t head, uint32_t d) {
    if (is_latent(at->state))
        return key_element(at, head, d);
    uint64_t dim = at->state->value_dim;
    uint64_t before = (uint64_t)at->state->kv_heads * at->state->key_dim + head * dim;
    Element element;
    element.index = before * HALITE_PAGE_POSITIONS + at->slot * dim + d;
    element.scale = (before + d) / BLOCK * HALITE_PAGE_POSITIONS + at->slot;
    return element;
}

/* The scales, which lie behind the codes. */
static uint16_t *scales_of(const Position *at) {
    uint64_t dims = (uint64_t)at->state->key_dim + (is_latent(at->state) ? 0 : at->state->value_dim);
    uint64_t codes = at->state->kv_heads * dims * HALITE_PAGE_POSITIONS;
    return (uint16_t *)(at->page + (at->state->format == HALITE_Q4_0 ? codes / 2 : codes));
}

/* The byte with a 4-bit code, in the low half for the first 16 of 32 codes. */
static uint8_t *byte_of_code(const Position *at, uint64_t index) {
    return at->page + index / 32 * 16 + index % 16;
}

static float load(const Position *at, Element element) {
    HaliteFormat format = at->state->format;
    if (format == HALITE_F32)
        return ((const float *)at->page)[element.index];
    if (format == HALITE_F16)
        return float_of_half(((const uint16_t *)at->page)[element.index]);
    float scale = float_of_half(scales_of(at)[element.scale]);
    if (format == HALITE_Q8_0)
        return scale * (float)((const int8_t *)at->page)[element.index];
    uint8_t byte = *byte_of_code(at, element.index);
    int code = element.index % 32 < 16 ? byte & 15 : byte >> 4;
    return scale * (float)(code - 8);
}

static void store_q8_0(const Position *at, Element first, uint64_t stride, const float *x) {
    int8_t codes[BLOCK];
    scales_of(at)[first.scale] = quantise_q8_0(x, codes);
    for (uint32_t i = 0; i < BLOCK; i++)
        ((int8_t *)at->page)[first.index + i * stride] = codes[i];
}

static void store_q4_0(const Position *at, Element first, uint64_t stride, const float *x) {
    uint8_t codes[BLOCK];
    scales_of(at)[first.scale] = quantise_q4_0(x, codes);
    for (uint32_t i = 0; i < BLOCK; i++) {
        uint64_t index = first.index + i * stride;
        uint8_t *byte = byte_of_code(at, index);
        *byte = index % 32 < 16 ? (*byte & 0xf0) | codes[i] : (*byte & 0x0f) | codes[i] << 4;
    }
}

/* Stores up to BLOCK elements of a key or a value, whose indices are `stride` apart. */
static void store(const Position *at, Element first, uint64_t stride, const float *x, uint32_t count) {
    HaliteFormat format = at->state->format;
    if (format == HALITE_F32) {
        for (uint32_t i = 0; i < count; i++)
            ((float *)at->page)[first.index + i * stride] = x[i];
    } else if (format == HALITE_F16) {
        for (uint32_t i = 0; i < count; i++)
            ((uint16_t *)at->page)[first.index + i * stride] = half_of_float(x[i]);
    } else if (!all_finite(x, BLOCK)) { /* With this scale, all elements are NaN, whatever their codes. */
        scales_of(at)[first.scale] = half_of_float(NAN);
    } else if (format == HALITE_Q8_0) {
        store_q8_0(at, first, stride, x);
    } else {
        store_q4_0(at, first, stride, x);
    }
}

/* Stores elements of a head's key, from number `first` on, in blocks. Only formats of single elements have a shorter
 * last block. */
static void store_key(const Position *at, uint32_t head, uint32_t first, const float *x, uint32_t dim) {
    for (uint32_t d = 0; d < dim; d += BLOCK) {
        uint32_t count = dim - d < BLOCK ? dim - d : BLOCK;
        store(at, key_element(at, head, first + d), HALITE_PAGE_POSITIONS, x + d, count);
    }
}

static void store_value(const Position *at, uint32_t head, const float *x, uint32_t dim) {
    for (uint32_t d = 0; d < dim; d += BLOCK) {
        uint32_t count = dim - d < BLOCK ? dim - d : BLOCK;
        store(at, value_element(at, head, d), 1, x + d, count);
    }
}

/* Stores the keys and the values of token `t`. */
static void store_token(const Run *run, uint32_t state_number, uint32_t t, const float *k, const float *v) {
    Position at = find_position(run, state_number, t, run->plan->tokens[t].position);
    uint32_t key_dim = at.state->key_dim, value_dim = at.state->value_dim;
    if (is_latent(at.state)) {
        store_key(&at, 0, 0, v, value_dim);
        store_key(&at, 0, value_dim, k, key_dim - value_dim);
        return;
    }
    for (uint32_t head = 0; head < at.state->kv_heads; head++) {
        store_key(&at, head, 0, k + head * key_dim, key_dim);
        store_value(&at, head, v + head * value_dim, value_dim);
    }
}

static void kv_write(Run *run, const HaliteKvWrite *op) {
    Tensor k = find(run, op->k), v = find(run, op->v);
    for (uint32_t t = 0; t < k.rows; t++)
        store_token(run, op->state, t, row_of(k, t), row_of(v, t));
}

static void rope_kv(Run *run, const HaliteRopeKv *op) {
    Tensor q = find(run, op->q), k = find(run, op->k), v = find(run, op->v), out = find(run, op->out);
    for (uint32_t t = 0; t < q.rows; t++) {
        rotate_row(run, &op->rotation, t, q, row_of(out, t));
        rotate_row(run, &op->rotation, t, k, run->plan->result);
        store_token(run, op->state, t, run->plan->result, row_of(v, t));
    }
}

/* ---- Recurrent layers ---- */

/* The page that has the state after a position: its own, or the next one that is there. */
static float *state_after(const Run *run, uint32_t number, const HaliteSpan *span, uint32_t position) {
    const HaliteState *state = run->plan->program->states[number];
    const uint32_t *table = span->tables[state->table];
    uint32_t i = position / HALITE_PAGE_POSITIONS;
    while (table[i] == HALITE_NONE)
        i++; /* The host has checked that the last page is there. */
    return (float *)(run->bindings->states[number]->memory + table[i] * state->page_bytes);
}

/* The state of token `t`, with what the token before it left. */
static float *enter_state(const Run *run, uint32_t number, uint32_t t) {
    const Token *token = &run->plan->tokens[t];
    uint64_t bytes = run->plan->program->states[number]->page_bytes;
    float *state = state_after(run, number, token->span, token->position);
    if (token->position == 0) {
        memset(state, 0, bytes);
    } else {
        const float *before = state_after(run, number, token->span, token->position - 1);
        if (before != state)
            memcpy(state, before, bytes);
    }
    return state;
}

/* One channel: the inputs that are kept, oldest first, and the new one. */
static float convolve(float *past, const float *weight, uint32_t taps, float x, float sum) {
    for (uint32_t j = 0; j + 1 < taps; j++)
        sum += weight[j] * past[j];
    memmove(past, past + 1, (taps - 2) * sizeof *past);
    past[taps - 2] = x;
    return sum + weight[taps - 1] * x;
}

static void conv(Run *run, const HaliteConv *op) {
    Tensor x = find(run, op->x), weight = find(run, op->weight), out = find(run, op->out);
    const float *bias = optional_row(run, op->bias, 0);
    uint32_t taps = weight.cols;
    for (uint32_t t = 0; t < x.rows; t++) {
        float *state = enter_state(run, op->state, t);
        const float *from = row_of(x, t);
        float *to = row_of(out, t);
        for (uint32_t c = 0; c < x.cols; c++)
            to[c] = convolve(state + c * (taps - 1), row_of(weight, c), taps, from[c],
                             bias == NULL ? 0 : bias[c]);
    }
}

/* One column of a head: `update` is added, times the key. Returns the product with the query. */
static float advance(float *column, uint32_t stride, const float *k, const float *q, uint32_t count,
                     float update) {
    float sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        column[i * stride] += k[i] * update;
        sum += column[i * stride] * q[i];
    }
    return sum;
}

/* One head of token `t`: `s` is `[key_dim][value_dim]`. */
static void recur_head(const Run *run, const HaliteRecur *op, uint32_t t, uint32_t head, float *s) {
    const HaliteState *state = run->plan->program->states[op->state];
    uint32_t key_dim = state->key_dim, value_dim = state->value_dim, heads = state->kv_heads;
    uint32_t key_heads = find(run, op->k).cols / key_dim;
    int is_delta = op->rule != HALITE_RULE_SCAN, alternate = op->rule == HALITE_RULE_DELTA;
    uint32_t key = (alternate ? head % key_heads : head * key_heads / heads) * key_dim;
    const float *q = row_of(find(run, op->q), t), *k = row_of(find(run, op->k), t);
    /* Of each head: one, or one for each row of its state. */
    uint32_t rates = find(run, op->decay).cols / heads, factors = find(run, op->a).cols / heads;
    const float *v = row_of(find(run, op->v), t), *decay = row_of(find(run, op->decay), t);
    const float *a = row_of(find(run, op->a), 0);
    float *out = row_of(find(run, op->out), t);
    float rate = softplus(decay[head * rates]);
    for (uint32_t j = 0; j < value_dim; j++) {
        float known = 0, value = v[head * value_dim + j], *result = &out[head * value_dim + j];
        for (uint32_t i = 0; i < key_dim; i++) {
            s[i * value_dim + j] *= expf(a[head * factors + i % factors] * softplus(decay[head * rates + i % rates]));
            known += s[i * value_dim + j] * k[key + i];
        }
        if (is_delta) {
            const float *beta = row_of(find(run, op->beta), t);
            float update = sigmoid(beta[head]) * (value - known);
            *result = op->scale * advance(s + j, value_dim, k + key, q + key, key_dim, update);
        } else {
            const float *d = row_of(find(run, op->d), 0);
            *result = advance(s + j, value_dim, k + key, q + key, key_dim, rate * value) + d[head] * value;
        }
    }
}

static void recur(Run *run, const HaliteRecur *op) {
    const HaliteState *state = run->plan->program->states[op->state];
    for (uint32_t t = 0; t < run->step->token_count; t++) {
        float *s = enter_state(run, op->state, t);
        for (uint32_t head = 0; head < state->kv_heads; head++)
            recur_head(run, op, t, head, s + head * state->key_dim * state->value_dim);
    }
}

/* ---- Attention ---- */

/* A softmax over the positions so far: `sum` is the sum of exp(score - max), and `out` that of
 * exp(score - max) * value. */
typedef struct Softmax {
    float max;
    float sum;
    float *out;
    uint32_t dim;
} Softmax;

/* Raises the maximum to a larger score. This scales the sums down, so that no exponential overflows. */
static void raise_max(Softmax *softmax, float score) {
    if (!(score > softmax->max))
        return;
    float scale = expf(softmax->max - score);
    softmax->max = score;
    softmax->sum *= scale;
    for (uint32_t d = 0; d < softmax->dim; d++)
        softmax->out[d] *= scale;
}

static float score_of(const HaliteAttend *op, const Position *at, uint32_t kv_head, float scale, const float *q) {
    float sum = 0;
    for (uint32_t d = 0; d < at->state->key_dim; d++)
        sum += q[d] * load(at, key_element(at, kv_head, d));
    return op->has_softcap ? soft_cap(sum * scale, op->softcap) : sum * scale;
}

/* The factor on the scores of a token. */
static float scale_of(const HaliteAttend *op, uint32_t own) {
    if (op->growth == NULL)
        return op->scale;
    uint32_t step = (own + op->growth_ahead) / op->growth_period;
    return op->scale * op->growth[step < op->growth_count ? step : op->growth_count - 1];
}

/* What the distance of a position takes off the score. */
static float bias_of(const HaliteAttend *op, uint32_t head, uint32_t own, uint32_t position) {
    uint32_t distance = own < position ? position - own : own - position;
    return op->slopes == NULL ? 0 : op->slopes[head] * (float)distance;
}

static void attend_position(const HaliteAttend *op, const Position *at, uint32_t kv_head, float scale, float bias,
                            const float *q, Softmax *softmax) {
    float score = score_of(op, at, kv_head, scale, q) - bias;
    raise_max(softmax, score);
    float weight = expf(score - softmax->max);
    softmax->sum += weight;
    for (uint32_t d = 0; d < softmax->dim; d++)
        softmax->out[d] += weight * load(at, value_element(at, kv_head, d));
}

/* The first position that a token sees, and the one behind the last. */
static uint32_t start_of(const HaliteState *state, const Token *token) {
    uint32_t own = token->position + 1;
    if (state->aligned)
        return token->position / state->window * state->window;
    return state->window > 0 && state->window < own ? own - state->window : 0;
}

static uint32_t end_of(const HaliteState *state, const Token *token) {
    uint32_t own = token->position + 1, left = token->span->start + token->span->len - own;
    return own + (state->after < left ? state->after : left);
}

static void attend_head(const Run *run, const HaliteAttend *op, uint32_t t, uint32_t head, const float *q,
                        float *out) {
    const HaliteState *state = run->plan->program->states[op->state];
    const float *sinks = optional_row(run, op->sinks, 0);
    uint32_t kv_head = head / (op->heads / state->kv_heads);
    const Token *token = &run->plan->tokens[t];
    uint32_t end = end_of(state, token);
    /* A score below this first maximum is minus infinity, and has the weight 0. */
    Softmax softmax = {-FLT_MAX, 0, out, state->value_dim};
    memset(out, 0, state->value_dim * sizeof *out);
    for (uint32_t position = start_of(state, token); position < end; position++) {
        Position at = find_position(run, op->state, t, position);
        float bias = bias_of(op, head, token->position, position);
        attend_position(op, &at, kv_head, scale_of(op, token->position), bias, q, &softmax);
    }
    if (sinks != NULL) { /* One more score, without a value. */
        raise_max(&softmax, sinks[head]);
        softmax.sum += expf(sinks[head] - softmax.max);
    }
    for (uint32_t d = 0; d < state->value_dim; d++)
        out[d] /= softmax.sum;
}

static void attend(Run *run, const HaliteAttend *op) {
    const HaliteState *state = run->plan->program->states[op->state];
    Tensor q = find(run, op->q), out = find(run, op->out);
    for (uint32_t t = 0; t < q.rows; t++) {
        const float *queries = row_of(q, t);
        float *outs = row_of(out, t);
        for (uint32_t head = 0; head < op->heads; head++)
            attend_head(run, op, t, head, queries + head * state->key_dim, outs + head * state->value_dim);
    }
}

/* ---- Ops that choose ---- */

static int32_t index_of_largest(const float *x, uint32_t count) {
    float largest = -INFINITY;
    int32_t best = -1;
    for (uint32_t i = 0; i < count; i++) {
        if (isnan(x[i]))
            return -1;
        if (x[i] > largest) {
            largest = x[i];
            best = (int32_t)i;
        }
    }
    return isfinite(largest) ? best : -1;
}

static void arg_max(Run *run, const HaliteArgMax *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    for (uint32_t t = 0; t < x.rows; t++) {
        int32_t *index = row_of(out, t);
        *index = index_of_largest(row_of(x, t), x.cols);
    }
}

/* The place of a number in IEEE 754's total order, with NaN above all others. */
static int64_t rank_of(float x) {
    int64_t bits = bits_of_float(x);
    int64_t rank = signbit(x) ? INT32_MAX - bits : bits;
    return isnan(x) ? rank + UINT32_MAX : rank;
}

/* Writes the `wanted` numbers of highest rank, the highest first, and their indices. Each number moves up
 * past those of lower rank, and stays behind equal ones. */
static void choose(const float *x, uint32_t count, uint32_t wanted, int32_t *ids, float *values) {
    uint32_t chosen = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (chosen == wanted && rank_of(x[i]) <= rank_of(values[wanted - 1]))
            continue;
        if (chosen < wanted)
            chosen++;
        uint32_t at = chosen - 1;
        for (; at > 0 && rank_of(x[i]) > rank_of(values[at - 1]); at--) {
            ids[at] = ids[at - 1];
            values[at] = values[at - 1];
        }
        ids[at] = (int32_t)i;
        values[at] = x[i];
    }
}

static void top_k(Run *run, const HaliteTopK *op) {
    Tensor x = find(run, op->x), ids = find(run, op->ids), values = find(run, op->values);
    for (uint32_t t = 0; t < x.rows; t++)
        choose(row_of(x, t), x.cols, ids.cols, row_of(ids, t), row_of(values, t));
}

/* ---- Mixtures of experts ---- */

static void divide_by_sum(float *x, uint32_t count) {
    float sum = sum_of(x, count);
    for (uint32_t i = 0; i < count; i++)
        x[i] /= sum;
}

static void softmax_of(float *x, uint32_t count) {
    float max = -INFINITY;
    for (uint32_t i = 0; i < count; i++)
        max = x[i] > max ? x[i] : max;
    for (uint32_t i = 0; i < count; i++)
        x[i] = expf(x[i] - max);
    divide_by_sum(x, count);
}

/* Turns logits into what experts are chosen by. */
static void prepare_choice(uint32_t gating, float *x, uint32_t count) {
    if (gating == HALITE_GATING_SOFTMAX)
        softmax_of(x, count);
    for (uint32_t i = 0; i < count; i++) {
        if (gating == HALITE_GATING_SIGMOID)
            x[i] = sigmoid(x[i]);
        /* All zeros tie, and all NaN do: each kind gets the same bits. */
        x[i] = isnan(x[i]) ? NAN : x[i] == 0 ? 0 : x[i];
    }
}

static void finish_choice(const HaliteRoute *op, float *weights, uint32_t used) {
    if (op->gating == HALITE_GATING_SOFTMAX_OF_TOP)
        softmax_of(weights, used);
    if (op->normalise)
        divide_by_sum(weights, used);
    for (uint32_t i = 0; i < used; i++)
        weights[i] *= op->scale;
}

/* Leaves only the groups whose two largest elements have the largest sums. `sums` has room for two lists of groups,
 * `order` for one. */
static void keep_groups(float *x, uint32_t count, uint32_t groups, uint32_t used, float *sums,
                        int32_t *order) {
    uint32_t each = count / groups;
    for (uint32_t i = 0; i < groups; i++) {
        int32_t ids[2];
        float best[2];
        choose(x + i * each, each, 2, ids, best);
        sums[i] = best[0] + best[1];
    }
    float *best = sums + groups;
    choose(sums, groups, groups, order, best);
    for (uint32_t i = used; i < groups; i++)
        for (uint32_t j = 0; j < each; j++)
            x[(uint32_t)order[i] * each + j] = -INFINITY;
}

static void route_scaled(Run *run, const HaliteRouteScaled *scaled) {
    const HaliteRouteAmong *among = &scaled->route_among;
    const HaliteRoute *op = &among->route;
    Tensor logits = find(run, op->logits), ids = find(run, op->ids), weights = find(run, op->weights);
    const float *bias = optional_row(run, among->bias, 0);
    const float *scales = optional_row(run, scaled->scales, 0);
    float *x = run->plan->result, *choice = run->plan->gate;
    for (uint32_t t = 0; t < logits.rows; t++) {
        int32_t *id = row_of(ids, t);
        float *weight = row_of(weights, t);
        memcpy(x, row_of(logits, t), logits.row_bytes);
        prepare_choice(op->gating, x, logits.cols);
        for (uint32_t i = 0; i < logits.cols; i++)
            choice[i] = bias == NULL ? x[i] : x[i] + bias[i];
        if (among->group_count > 1)
            /* A group has two experts or more, so a row has room for two lists of groups. */
            keep_groups(choice, logits.cols, among->group_count, among->groups_used, run->plan->up,
                        (int32_t *)run->plan->decoded);
        choose(choice, logits.cols, ids.cols, id, weight);
        for (uint32_t i = 0; i < ids.cols; i++)
            weight[i] = x[id[i]];
        finish_choice(op, weight, ids.cols);
        for (uint32_t i = 0; scales != NULL && i < ids.cols; i++)
            weight[i] *= scales[id[i]];
    }
}

static void route_among(Run *run, const HaliteRouteAmong *op) {
    HaliteRouteScaled all = {*op, HALITE_NONE};
    route_scaled(run, &all);
}

static void route(Run *run, const HaliteRoute *op) {
    HaliteRouteAmong all = {*op, HALITE_NONE, 1, 1};
    route_among(run, &all);
}

/* Adds `weight` times the output of an expert to `out`. */
static void add_expert(Run *run, const HaliteExperts *op, uint32_t expert, float weight, const float *x,
                       float *out) {
    const HalitePlan *plan = run->plan;
    const HaliteTensor *down = plan->program->tensors[op->down];
    linear(run, op->gate, op->gate_bias, expert, x, plan->gate);
    linear(run, op->up, op->up_bias, expert, x, plan->up);
    gate_rows(&op->act, plan->gate, plan->up, down->cols, plan->gate);
    linear(run, op->down, op->down_bias, expert, plan->gate, plan->result);
    for (uint32_t i = 0; i < down->fixed_rows; i++)
        out[i] += weight * plan->result[i];
}

static void experts(Run *run, const HaliteExperts *op) {
    Tensor x = find(run, op->x), out = find(run, op->out);
    Tensor ids = find(run, op->ids), weights = find(run, op->weights);
    uint32_t count = run->plan->program->tensors[op->gate]->experts;
    for (uint32_t t = 0; t < x.rows; t++) {
        const int32_t *id = row_of(ids, t);
        const float *weight = row_of(weights, t);
        memset(row_of(out, t), 0, out.row_bytes);
        for (uint32_t i = 0; i < ids.cols && run->status == HALITE_OK; i++) {
            uint32_t expert = (uint32_t)id[i];
            if (expert < count)
                add_expert(run, op, expert, weight[i], row_of(x, t), row_of(out, t));
            else
                run->status = say(run->message, HALITE_ARGUMENT, "expert %" PRIu32 " of %" PRIu32, expert,
                                  count);
        }
    }
}

/* ---- Plans ---- */

static uint64_t place_bytes(const HalitePlace *place, const HaliteLimits *limits) {
    uint64_t rows = row_count(place->rows, place->fixed_rows, limits->tokens, limits->outputs);
    return rows * place->cols * sizeof(float);
}

/* Elements of the longest row of any tensor, rounded up to whole blocks. */
static uint64_t widest_row(const HaliteProgram *program) {
    uint64_t widest = 0;
    for (uint32_t i = 0; i < program->tensor_count; i++)
        if (program->tensors[i]->cols > widest)
            widest = program->tensors[i]->cols;
    return (widest + BLOCK - 1) / BLOCK * BLOCK;
}

static uint64_t scratch_bytes(HaliteDevice *device, const HaliteProgram *program,
                              const HaliteLimits *limits) {
    (void)device;
    uint64_t width = widest_row(program);
    uint64_t bytes = 4 * width * sizeof(float) + width / BLOCK * sizeof(float) + width;
    for (uint32_t i = 0; i < program->place_count; i++)
        bytes += place_bytes(program->places[i], limits);
    return bytes;
}

/* Divides the scratch memory as `scratch_bytes` adds it up: floats first, so that they are aligned. */
static void lay_out(HalitePlan *plan, const HaliteLimits *limits) {
    uint64_t width = widest_row(plan->program);
    uint8_t *at = plan->scratch->memory;
    for (uint32_t i = 0; i < plan->program->place_count; i++) {
        plan->places[i] = at;
        at += place_bytes(plan->program->places[i], limits);
    }
    plan->decoded = (float *)at;
    plan->gate = plan->decoded + width;
    plan->up = plan->gate + width;
    plan->result = plan->up + width;
    plan->scales = plan->result + width;
    plan->codes = (int8_t *)(plan->scales + width / BLOCK);
}

static void free_plan(HaliteDevice *device, HalitePlan *plan) {
    if (plan->scratch != NULL)
        release_buffer(device, plan->scratch);
    free(plan->places);
    free(plan->tokens);
    free(plan);
}

static HaliteStatus prepare(HaliteDevice *device, const HaliteProgram *program, const HaliteLimits *limits,
                            HalitePlan **result, HaliteMessage *message) {
    HaliteStatus status;
    HalitePlan *plan = zeroed(1, sizeof *plan);
    if (plan == NULL)
        return say(message, HALITE_OUT_OF_MEMORY, "no memory for a plan");
    plan->program = program;
    plan->places = zeroed(program->place_count, sizeof *plan->places);
    plan->tokens = zeroed(limits->tokens, sizeof *plan->tokens);
    if (plan->places == NULL || plan->tokens == NULL)
        status = say(message, HALITE_OUT_OF_MEMORY, "no memory for the lists of a plan");
    else
        status = take_memory(device, scratch_bytes(device, program, limits), &plan->scratch, message);
    if (status != HALITE_OK) {
        free_plan(device, plan);
        return status;
    }
    lay_out(plan, limits);
    *result = plan;
    return HALITE_OK;
}

/* ---- Steps ---- */

static void run_op(Run *run, const HaliteOp *op) {
    const HaliteOperands *o = &op->operands;
    switch (op->kind) {
    case HALITE_OP_EMBED: embed(run, &o->embed); break;
    case HALITE_OP_GATHER: gather(run, &o->gather); break;
    case HALITE_OP_NORM: norm(run, &o->norm); break;
    case HALITE_OP_MATMUL: matmul(run, &o->matmul); break;
    case HALITE_OP_ROPE: rope(run, &o->rope); break;
    case HALITE_OP_KV_WRITE:
    case HALITE_OP_LATENT_WRITE: kv_write(run, &o->kv_write); break;
    case HALITE_OP_ROPE_KV: rope_kv(run, &o->rope_kv); break;
    case HALITE_OP_ATTEND:
    case HALITE_OP_LATENT_ATTEND: attend(run, &o->attend); break;
    case HALITE_OP_GLU: glu(run, &o->glu); break;
    case HALITE_OP_ADD: add(run, &o->add); break;
    case HALITE_OP_UNARY: unary(run, &o->unary); break;
    case HALITE_OP_ROUTE: route(run, &o->route); break;
    case HALITE_OP_EXPERTS: experts(run, &o->experts); break;
    case HALITE_OP_ARG_MAX: arg_max(run, &o->arg_max); break;
    case HALITE_OP_TOP_K: top_k(run, &o->top_k); break;
    case HALITE_OP_CONV: conv(run, &o->conv); break;
    case HALITE_OP_RECUR: recur(run, &o->recur); break;
    case HALITE_OP_SLICE: slice(run, &o->slice); break;
    case HALITE_OP_MUL: mul(run, &o->mul); break;
    case HALITE_OP_ROUTE_AMONG: route_among(run, &o->route_among); break;
    case HALITE_OP_JOIN: join(run, &o->join); break;
    case HALITE_OP_BLOCK_MATMUL: block_matmul(run, &o->block_matmul); break;
    case HALITE_OP_ROUTE_SCALED: route_scaled(run, &o->route_scaled); break;
    case HALITE_OP_SPREAD: spread(run, &o->spread); break;
    case HALITE_OP_MIX: mix(run, &o->mix); break;
    default: run->status = say(run->message, HALITE_ERROR, "op %" PRIu32 " was prepared", op->kind);
    }
}

static void run_segment(Run *run, const HaliteSegment *segment) {
    for (uint32_t i = 0; i < segment->op_count && run->status == HALITE_OK; i++) {
        if (run->step->is_cancelled(run->step->context) != 0)
            run->status = say(run->message, HALITE_CANCELLED, "cancelled");
        else
            run_op(run, segment->ops[i]);
    }
}

static void place_tokens(Token *tokens, const HaliteStep *step) {
    uint32_t t = 0;
    for (uint32_t s = 0; s < step->span_count; s++) {
        for (uint32_t i = 0; i < step->spans[s]->len; i++, t++) {
            tokens[t].span = step->spans[s];
            tokens[t].position = step->spans[s]->start + i;
        }
    }
}

static uint64_t now_nanoseconds(void) {
    struct timespec now = {0, 0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* The loops run on the caller's thread, which may round in another way or flush small numbers to zero. They
 * take the default environment, and the caller gets its own back. A chip starts its commands here, and waits
 * for them in `wait_for`. */
static HaliteStatus submit(HaliteDevice *device, HalitePlan *plan, const HaliteStep *step,
                           uint32_t first_segment, uint32_t segment_count, const HaliteBindings *bindings,
                           HaliteMessage *message) {
    (void)device;
    uint64_t start = now_nanoseconds();
    place_tokens(plan->tokens, step);
    Run run = {plan, step, bindings, message, HALITE_OK};
    for (uint32_t i = 0; i < segment_count && run.status == HALITE_OK; i++)
        run_segment(&run, plan->program->segments[first_segment + i]);
    if (first_segment == 0)
        plan->nanoseconds = 0;
    plan->nanoseconds += now_nanoseconds() - start;
    return run.status;
}

static HaliteStatus wait_for(HaliteDevice *device, HalitePlan *plan, HaliteTiming *timing,
                             HaliteMessage *message) {
    (void)device;
    (void)message;
    timing->clock = HALITE_CLOCK_HOST;
    timing->nanoseconds = plan->nanoseconds;
    return HALITE_OK;
}

/* ---- The table of calls ---- */

const HaliteBackend *halite_backend(const HaliteHost *offered) {
    static const HaliteBackend backend = {
        .struct_bytes = sizeof backend,
        .abi_version = HALITE_ABI_VERSION,
        .name = "chip-c",
        .version = "1",
        .open = open_device,
        .close = close_device,
        .caps = get_caps,
        .supports = supports,
        .explain = explain,
        .alloc = alloc_buffer,
        .import_pages = NULL, /* The chip cannot read the host's memory. */
        .release = release_buffer,
        .write = write_buffer,
        .read = read_buffer,
        .prepare = prepare,
        .free_plan = free_plan,
        .scratch_bytes = scratch_bytes,
        .submit = submit,
        .wait = wait_for,
    };
    if (offered->abi_version != HALITE_ABI_VERSION)
        return NULL;
    host = offered;
    return &backend;
}
