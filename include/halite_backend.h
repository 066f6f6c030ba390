/* The C interface of Halite's plug-in backends.
 *
 * A plug-in is a shared library that exports `halite_backend`. examples/chip-c is one; docs/bring-your-chip.md explains how to
 * write one. Structs that are passed by pointer begin with their size: a reader uses only the fields that lie inside it.
 *
 * Generated from backends/plugin/src/abi.rs. Do not edit. */

#ifndef HALITE_BACKEND_H
#define HALITE_BACKEND_H

#include <stddef.h>
#include <stdint.h>

// Version of this interface. Hosts accept plug-ins of their own version.
#define HALITE_ABI_VERSION 1

// In place of a tensor's or a place's number: there is none. In a page table: the sequence dropped this page.
#define HALITE_NONE UINT32_MAX

// Most weights of a HALITE_OP_MATMUL.
#define HALITE_MAX_PARTS 4

// Positions in one page of the KV cache.
#define HALITE_PAGE_POSITIONS 64

#define HALITE_OK 0

// The device failed.
#define HALITE_ERROR 1

// The device has not enough memory.
#define HALITE_OUT_OF_MEMORY 2

// An argument is wrong.
#define HALITE_ARGUMENT 3

// HaliteStep::is_cancelled returned a number other than 0.
#define HALITE_CANCELLED 4

// From `supports` alone: not implemented yet.
#define HALITE_NOT_YET 5

// From `supports` alone: the hardware cannot run it.
#define HALITE_NEVER 6

#define HALITE_F32 0

#define HALITE_F16 1

#define HALITE_Q4_0 2

#define HALITE_Q8_0 8

#define HALITE_I32 26

// A fixed number.
#define HALITE_ROWS_FIXED 0

// One for each token of the step.
#define HALITE_ROWS_TOKENS 1

// One for each output of the step.
#define HALITE_ROWS_OUTPUTS 2

// Number `slot_index` of HaliteBindings::weights, which holds the tensor. Read-only.
#define HALITE_SLOT_WEIGHT 0

// Number `slot_index` of HaliteBindings::io. It holds at least the tensor for the plan's limits.
#define HALITE_SLOT_IO 1

// Memory of the plan; see HaliteTensor::place.
#define HALITE_SLOT_SCRATCH 2

// A KV cache.
#define HALITE_STATE_CACHE 0

// A recurrent state: a page holds `[kv_heads][key_dim][value_dim]` in HALITE_F32, after the last position of the page that was
// computed. Before position 0 it is zero. In a step, the page of the position before the first token and that of the last token
// are there. Others may be HALITE_NONE: what a position in such a page computes goes to the next page that is there. Only
// kinds of ops from HALITE_OP_CONV on use such states.
#define HALITE_STATE_RECURRENT 1

// A KV cache of one head whose pages have keys alone: the first `value_dim` elements of a key are the value. Only
// HALITE_OP_LATENT_WRITE and HALITE_OP_LATENT_ATTEND use such states.
#define HALITE_STATE_LATENT 2

// `gate * sigmoid(gate)`.
#define HALITE_GATE_SILU 0

// The tanh approximation of GELU, from and to half precision.
#define HALITE_GATE_GELU 1

// GELU by the error function.
#define HALITE_GATE_GELU_ERF 2

// `max(gate, 0)`.
#define HALITE_GATE_RELU 3

// `g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + 1)` with `g = min(gate, limit)`.
#define HALITE_GATE_SILU_CLAMPED 4

// `sigmoid(gate)`.
#define HALITE_GATE_SIGMOID 5

// `gate`.
#define HALITE_GATE_IDENTITY 6

// `(1 + erf(gate / sqrt(2))) / 2`, the normal distribution function.
#define HALITE_GATE_NORMAL 7

// Pairs are `(2i, 2i + 1)`.
#define HALITE_ROPE_ADJACENT 0

// Pairs are `(i, i + pairs)`.
#define HALITE_ROPE_HALVES 1

#define HALITE_OP_EMBED 0

#define HALITE_OP_GATHER 1

#define HALITE_OP_NORM 2

#define HALITE_OP_MATMUL 3

#define HALITE_OP_ROPE 4

#define HALITE_OP_KV_WRITE 5

#define HALITE_OP_ROPE_KV 6

#define HALITE_OP_ATTEND 7

#define HALITE_OP_GLU 8

#define HALITE_OP_ADD 9

#define HALITE_OP_UNARY 10

#define HALITE_OP_ROUTE 11

#define HALITE_OP_EXPERTS 12

#define HALITE_OP_ARG_MAX 13

#define HALITE_OP_TOP_K 14

#define HALITE_OP_CONV 15

#define HALITE_OP_RECUR 16

#define HALITE_OP_SLICE 17

#define HALITE_OP_MUL 18

#define HALITE_OP_ROUTE_AMONG 19

#define HALITE_OP_JOIN 20

#define HALITE_OP_BLOCK_MATMUL 21

// HaliteKvWrite to a state of HALITE_STATE_LATENT: `k` has the `key_dim - value_dim` elements behind the value.
#define HALITE_OP_LATENT_WRITE 22

// HaliteAttend to a state of HALITE_STATE_LATENT.
#define HALITE_OP_LATENT_ATTEND 23

#define HALITE_OP_ROUTE_SCALED 24

#define HALITE_OP_SPREAD 25

#define HALITE_OP_MIX 26

// The token's id.
#define HALITE_INDEX_TOKEN 0

// The token's position in its sequence.
#define HALITE_INDEX_POSITION 1

// Row 0 for every token.
#define HALITE_INDEX_FIRST 2

// The number of tokens `separator` before the token in its span, at most the table's last row. A span that does not start at position
// 0 is HALITE_ARGUMENT.
#define HALITE_INDEX_PART 3

// `x / sqrt(mean(x^2) + eps)`.
#define HALITE_NORM_RMS 0

// `(x - mean(x)) / sqrt(var(x) + eps)`.
#define HALITE_NORM_LAYER 1

// Each product is an output.
#define HALITE_EPILOGUE_NONE 0

// Two weights of the output's rows: `out = act(product 0) * product 1`.
#define HALITE_EPILOGUE_GLU 1

// One weight: `out = residual + product 0`.
#define HALITE_EPILOGUE_ADD 2

// `x * sigmoid(x)`.
#define HALITE_UNARY_SILU 0

// The tanh approximation of GELU, from and to half precision.
#define HALITE_UNARY_GELU 1

// GELU by the error function.
#define HALITE_UNARY_GELU_ERF 2

// `max(x, 0)`.
#define HALITE_UNARY_RELU 3

// `max(x, 0)^2`.
#define HALITE_UNARY_RELU_SQUARED 4

// `x * parameter`.
#define HALITE_UNARY_SCALE 5

// `parameter * tanh(x / parameter)`.
#define HALITE_UNARY_SOFT_CAP 6

// `max(-parameter, min(x, parameter))`; NaN stays.
#define HALITE_UNARY_CLAMP 7

// `x + parameter`.
#define HALITE_UNARY_SHIFT 8

// Softmax over all experts, then the largest.
#define HALITE_GATING_SOFTMAX 0

// The largest, then softmax over their logits.
#define HALITE_GATING_SOFTMAX_OF_TOP 1

// Sigmoid of each logit, then the largest.
#define HALITE_GATING_SIGMOID 2

// `u = sigmoid(beta) * (v - S^T k)` and `out = scale * S^T q`. Head h has the query and key `h mod key_heads`.
#define HALITE_RULE_DELTA 0

// `u = rate * v` and `out = S^T q + d * v`. Head h has the query and key `h * key_heads / heads`.
#define HALITE_RULE_SCAN 1

// HALITE_RULE_DELTA, but head h has the query and key `h * key_heads / heads`.
#define HALITE_RULE_DELTA_OF_NEIGHBOURS 2

#define HALITE_CLOCK_HOST 0

// The device's own timestamps.
#define HALITE_CLOCK_DEVICE 1

// A timing model of the device.
#define HALITE_CLOCK_SIMULATED 2

// The bits of the reference, as docs/numeric-contract.md defines them.
#define HALITE_CONTRACT_EXACT 0

// Close to the reference: sums may be reordered.
#define HALITE_CONTRACT_CLOSE 1

// Close to the reference up to the rounding of the device's own number formats.
#define HALITE_CONTRACT_NATIVE 2

// HALITE_OP_MATMUL with several weights.
#define HALITE_FUSE_SHARED_INPUT 1

// HALITE_OP_NORM with `add`.
#define HALITE_FUSE_ADD_NORM 2

// HALITE_EPILOGUE_GLU.
#define HALITE_FUSE_GLU 4

// HALITE_EPILOGUE_ADD.
#define HALITE_FUSE_RESIDUAL 8

// HALITE_OP_ROPE_KV.
#define HALITE_FUSE_ROPE_KV 16

// Written once, read by every step.
#define HALITE_USAGE_WEIGHT 0

// Read and written by steps.
#define HALITE_USAGE_STATE 1

// Exchanged between the host and steps.
#define HALITE_USAGE_IO 2

// Memory of a device.
typedef struct HaliteBuffer HaliteBuffer;

// A device that the plug-in opened. The plug-in defines what is behind it.
typedef struct HaliteDevice HaliteDevice;

// A prepared program.
typedef struct HalitePlan HalitePlan;

// What a call returns. Every other number is treated as HALITE_ERROR.
typedef uint32_t HaliteStatus;

// The host's memory for a message. A call that does not return HALITE_OK writes UTF-8 to it, with a zero at the end.
typedef struct HaliteMessage {
  uint32_t struct_bytes;
  // Bytes of `text`, the zero included.
  uint32_t capacity_bytes;
  char *text;
} HaliteMessage;

// What a device promises about its results.
typedef uint32_t HaliteContract;

// Fusions that a device asks for, added up. A device that asks for none gets only the simple forms of the ops.
typedef uint32_t HaliteFusions;

// A device's fixed properties. The host sets `struct_bytes` and zeroes the rest; the plug-in fills it.
typedef struct HaliteCaps {
  uint32_t struct_bytes;
  HaliteContract contract;
  HaliteFusions fusions;
  uint32_t reserved;
  // Bytes of memory available to buffers; 0: no limit.
  uint64_t memory_bytes;
  // A line for people. It stays valid until `close`.
  const char *device;
} HaliteCaps;

// How many rows a tensor has.
typedef uint32_t HaliteRows;

// How the elements of a tensor are stored: the numbers of GGUF's tensor types, such as 0 for F32, 1 for F16, 8 for Q8_0
// and 26 for I32.
typedef uint32_t HaliteFormat;

// Where a tensor lives.
typedef uint32_t HaliteSlot;

// A tensor: `experts` matrices, one after the other, of `rows` rows of `cols` elements. Rows are contiguous. All extents are
// 1 to 2^27. Only tables of HALITE_OP_EMBED, weights of HALITE_OP_MATMUL and matrices of HALITE_OP_EXPERTS have formats other than
// HALITE_F32 and HALITE_I32.
typedef struct HaliteTensor {
  uint32_t struct_bytes;
  // 1, except in mixtures of experts.
  uint32_t experts;
  HaliteRows rows;
  // Rows of each matrix under HALITE_ROWS_FIXED.
  uint32_t fixed_rows;
  uint32_t cols;
  // Any format for weights; HALITE_F32 or HALITE_I32 for the others.
  HaliteFormat format;
  HaliteSlot slot;
  uint32_t slot_index;
  // For scratch: number of the place in HaliteProgram::places. Tensors share a place if they are not needed at the
  // same time; outputs of an op never share the place of its inputs.
  uint32_t place;
  const char *name;
} HaliteTensor;

// A layer's KV cache, in pages of HALITE_PAGE_POSITIONS positions.
//
// A page holds keys `[kv_heads][key_dim][position]`, then values `[kv_heads][position][value_dim]`. In HALITE_Q8_0 and
// HALITE_Q4_0 these are codes, followed by scales in half precision: `[kv_heads][key_dim / 32][position]` of the keys,
// then `[kv_heads][value_dim / 32][position]` of the values; keys and values are then whole blocks of 32. Each 32 codes of HALITE_Q4_0 in this order take 16 bytes:
// the first 16 codes are the low halves, the others the high halves.
typedef struct HaliteState {
  uint32_t struct_bytes;
  uint32_t kv_heads;
  uint32_t key_dim;
  uint32_t value_dim;
  // HALITE_F32, HALITE_F16, HALITE_Q8_0 or HALITE_Q4_0.
  HaliteFormat format;
  // How many positions up to its own, which counts, a token sees; 0: all.
  uint32_t window;
  // How many positions after its own a token sees, up to the end of its span; 0: attention is causal.
  uint32_t after;
  // Which of HaliteSpan::tables has the pages.
  uint32_t table;
  uint64_t page_bytes;
  const char *name;
  // HALITE_STATE_CACHE, HALITE_STATE_RECURRENT or HALITE_STATE_LATENT.
  uint32_t kind;
  // Whether windows lie side by side, the first at position 0: a token sees its own window up to its own position, and
  // nothing of those before.
  uint32_t aligned;
} HaliteState;

// Memory for scratch tensors: 4 * rows * cols bytes.
typedef struct HalitePlace {
  uint32_t struct_bytes;
  HaliteRows rows;
  uint32_t fixed_rows;
  uint32_t cols;
} HalitePlace;

// The kind of an op. `supports` refuses kinds that it does not know. An op's meaning never changes: what is added to an op
// gets a new kind.
typedef uint32_t HaliteOpKind;

// `out[t] = scale * table[row of t]`. A row beyond the table is HALITE_ARGUMENT.
typedef struct HaliteEmbed {
  uint32_t table;
  // Which row: HALITE_INDEX_TOKEN, HALITE_INDEX_POSITION, HALITE_INDEX_FIRST or HALITE_INDEX_PART.
  uint32_t index;
  uint32_t out;
  float scale;
  // For HALITE_INDEX_PART: the id of the token that ends a part of a text, and belongs to it.
  uint32_t separator;
} HaliteEmbed;

// Copies the rows of the tokens in HaliteStep::outputs.
typedef struct HaliteGather {
  uint32_t x;
  uint32_t out;
} HaliteGather;

// Normalises each `group` elements of a row: `out = norm(x + add) * weight + bias`, and `sum = x + add`.
typedef struct HaliteNorm {
  uint32_t x;
  // Or HALITE_NONE: zeros. `sum` is HALITE_NONE if this is.
  uint32_t add;
  uint32_t sum;
  // `[1, group]`, or HALITE_NONE: ones.
  uint32_t weight;
  // `[1, group]`, or HALITE_NONE: zeros.
  uint32_t bias;
  uint32_t out;
  // HALITE_NORM_RMS or HALITE_NORM_LAYER.
  uint32_t kind;
  uint32_t group;
  float eps;
} HaliteNorm;

// An activation of a gated linear unit: `act(gate) * up`.
typedef uint32_t HaliteGateKind;

typedef struct HaliteGate {
  HaliteGateKind kind;
  // For HALITE_GATE_SILU_CLAMPED.
  float alpha;
  // For HALITE_GATE_SILU_CLAMPED.
  float limit;
} HaliteGate;

// Products of the rows of `x` with the rows of each weight, plus its bias.
typedef struct HaliteMatMul {
  uint32_t x;
  // Number of weights.
  uint32_t parts;
  // Each `[rows, cols of x]`.
  uint32_t weights[HALITE_MAX_PARTS];
  // Each `[1, rows]`, or HALITE_NONE.
  uint32_t biases[HALITE_MAX_PARTS];
  // One for each weight under HALITE_EPILOGUE_NONE, else only the first.
  uint32_t outs[HALITE_MAX_PARTS];
  uint32_t epilogue;
  // For HALITE_EPILOGUE_ADD.
  uint32_t residual;
  // For HALITE_EPILOGUE_GLU.
  struct HaliteGate act;
} HaliteMatMul;

// A rotation of the first `2 * pairs` elements of each head.
typedef struct HaliteRotation {
  uint32_t head_dim;
  uint32_t pairs;
  // HALITE_ROPE_ADJACENT or HALITE_ROPE_HALVES.
  uint32_t pairing;
  // Tensor `[1, pairs]` of divisors of the frequencies, or HALITE_NONE.
  uint32_t factors;
  // A factor on sine and cosine.
  float magnitude;
  // Radians per position, one for each pair.
  const float *frequencies;
} HaliteRotation;

// Rotary position embedding of each head.
typedef struct HaliteRope {
  uint32_t x;
  uint32_t out;
  struct HaliteRotation rotation;
} HaliteRope;

// Stores keys `[tokens, kv_heads * key_dim]` and values `[tokens, kv_heads * value_dim]` of the step's tokens.
typedef struct HaliteKvWrite {
  uint32_t k;
  uint32_t v;
  uint32_t state;
} HaliteKvWrite;

// HALITE_OP_ROPE of `q` to `out` and of `k`, then HALITE_OP_KV_WRITE of the rotated keys. Only for formats of single
// elements.
typedef struct HaliteRopeKv {
  uint32_t q;
  uint32_t k;
  uint32_t v;
  uint32_t out;
  uint32_t state;
  struct HaliteRotation rotation;
} HaliteRopeKv;

// Attention over the KV cache; query head h uses KV head `h * kv_heads / heads`, and `heads` is a multiple of `kv_heads`.
typedef struct HaliteAttend {
  uint32_t q;
  uint32_t state;
  uint32_t out;
  uint32_t heads;
  // `[1, heads]`: an extra logit in each head's softmax denominator; or HALITE_NONE.
  uint32_t sinks;
  // Whether scores become `softcap * tanh(score / softcap)`.
  uint32_t has_softcap;
  float softcap;
  // A factor on the scores, before the soft-cap.
  float scale;
  // For each head a factor on the distance between the token's position and that of the key, which is taken off the score after
  // the soft-cap; or NULL.
  const float *slopes;
  // Factors on the scale by the token's position, or NULL: number `(position + growth_ahead) / growth_period`, and the last one
  // beyond.
  const float *growth;
  uint32_t growth_count;
  uint32_t growth_period;
  uint32_t growth_ahead;
  // 0.
  uint32_t reserved;
} HaliteAttend;

// `out = act(gate) * up`.
typedef struct HaliteGlu {
  uint32_t gate;
  uint32_t up;
  uint32_t out;
  struct HaliteGate act;
} HaliteGlu;

// `out = a + b`.
typedef struct HaliteAdd {
  uint32_t a;
  uint32_t b;
  uint32_t out;
} HaliteAdd;

// A function of each element.
typedef struct HaliteUnary {
  uint32_t x;
  uint32_t out;
  uint32_t function;
  // For HALITE_UNARY_SCALE, HALITE_UNARY_SOFT_CAP, HALITE_UNARY_CLAMP and HALITE_UNARY_SHIFT.
  float parameter;
} HaliteUnary;

// Chooses experts for each token in order of decreasing gated value (for HALITE_GATING_SOFTMAX_OF_TOP, of the logit); the
// lower index comes first on ties, and NaN before all other values.
typedef struct HaliteRoute {
  // `[tokens, experts]`.
  uint32_t logits;
  // `[tokens, used]` of HALITE_I32.
  uint32_t ids;
  // `[tokens, used]`.
  uint32_t weights;
  uint32_t gating;
  // Whether the chosen weights are divided by their sum.
  uint32_t normalise;
  // A factor on the weights, last.
  float scale;
} HaliteRoute;

// Gated feed-forward experts: `out = sum of weight * down(act(gate x) * (up x))` in the order of `ids`.
typedef struct HaliteExperts {
  uint32_t x;
  uint32_t ids;
  uint32_t weights;
  // Experts of `[hidden, cols]`.
  uint32_t gate;
  // Experts of `[hidden, cols]`.
  uint32_t up;
  // Experts of `[cols, hidden]`.
  uint32_t down;
  // `[experts, hidden]`, or HALITE_NONE; so are the other two if this is.
  uint32_t gate_bias;
  uint32_t up_bias;
  // `[experts, cols]`.
  uint32_t down_bias;
  uint32_t out;
  struct HaliteGate act;
} HaliteExperts;

// The index of each row's largest element, the lowest on ties; -1 if that element is not finite or the row has a NaN.
typedef struct HaliteArgMax {
  uint32_t x;
  // `[rows, 1]` of HALITE_I32.
  uint32_t out;
} HaliteArgMax;

// Each row's k largest elements, largest first, in IEEE 754's total order with NaN above all; the lower index first on
// ties.
typedef struct HaliteTopK {
  uint32_t x;
  // `[rows, k]` of HALITE_I32.
  uint32_t ids;
  // `[rows, k]`.
  uint32_t values;
} HaliteTopK;

// A causal convolution of each channel over the last `taps` tokens of its sequence, zeros before its first:
// `out[t][c] = bias[c] + sum of weight[c][j] * x[t - taps + 1 + j][c]`, taps in order.
typedef struct HaliteConv {
  // `[tokens, channels]`.
  uint32_t x;
  // `[channels, taps]`; 2 to 8 taps.
  uint32_t weight;
  // `[1, channels]`, or HALITE_NONE: zeros.
  uint32_t bias;
  // The last `taps - 1` inputs of each channel, oldest first: a recurrent state of `channels` heads of 1 by `taps - 1`.
  uint32_t state;
  uint32_t out;
} HaliteConv;

// A linear recurrence, token by token. For each head, with a recurrent state S of `key_dim` by `value_dim` and
// `rate = softplus(decay)`: `S = exp(a * rate) * S`, then `S = S + k u^T` with the update u of the rule, then the result of the rule.
// Each row of S has a decay or an `a` of its own where these tensors have `heads * key_dim` columns.
typedef struct HaliteRecur {
  // `[tokens, key_heads * key_dim]`; so is `k`.
  uint32_t q;
  uint32_t k;
  // `[tokens, heads * value_dim]`.
  uint32_t v;
  // `[tokens, heads]`, or with the delta rules `[tokens, heads * key_dim]`.
  uint32_t decay;
  // `[1, heads]` or `[1, heads * key_dim]`.
  uint32_t a;
  // HALITE_RULE_DELTA, HALITE_RULE_SCAN or HALITE_RULE_DELTA_OF_NEIGHBOURS.
  uint32_t rule;
  // For the delta rules: `[tokens, heads]`.
  uint32_t beta;
  // For HALITE_RULE_SCAN: `[1, heads]`.
  uint32_t d;
  uint32_t state;
  uint32_t out;
  // For the delta rules.
  float scale;
} HaliteRecur;

// Elements `first` to `first + len` of each `group` columns of `x`; `len` is what makes the columns of `out`.
typedef struct HaliteSlice {
  uint32_t x;
  uint32_t out;
  uint32_t group;
  uint32_t first;
} HaliteSlice;

// The product with a weight, element by element: column c with element `c mod n`.
typedef struct HaliteMul {
  uint32_t x;
  // `[1, n]`; n divides the columns of `x`.
  uint32_t weight;
  uint32_t out;
} HaliteMul;

// HALITE_OP_ROUTE by other values: the gated values plus a bias, and only of experts in the groups whose two largest values have the
// largest sums. Groups are of equal numbers of consecutive experts. Weights are the gated values.
typedef struct HaliteRouteAmong {
  struct HaliteRoute route;
  // `[1, experts]`, or HALITE_NONE: zeros.
  uint32_t bias;
  // 1: all experts may be chosen.
  uint32_t group_count;
  uint32_t groups_used;
} HaliteRouteAmong;

// Each `group` columns of `out` are the next `first` columns of `a`, and then the next `group - first` of `b`, or all of them if `b`
// has only so many.
typedef struct HaliteJoin {
  uint32_t a;
  uint32_t b;
  uint32_t out;
  uint32_t group;
  uint32_t first;
} HaliteJoin;

// The product of each block of columns with a matrix of its own: columns `n * cols` to `(n + 1) * cols` of `x` with matrix n of
// the weight, to columns `n * rows` to `(n + 1) * rows` of `out`.
typedef struct HaliteBlockMatMul {
  uint32_t x;
  // HaliteTensor::experts matrices of `[rows, cols]`.
  uint32_t weight;
  uint32_t out;
} HaliteBlockMatMul;

// HALITE_OP_ROUTE_AMONG, whose weights are at last multiplied by a factor of their expert.
typedef struct HaliteRouteScaled {
  struct HaliteRouteAmong route_among;
  // `[1, experts]`.
  uint32_t scales;
} HaliteRouteScaled;

// What HALITE_OP_NORM divides each group by: `sqrt(mean(x^2) + eps)`, or `sqrt(var(x) + eps)`.
typedef struct HaliteSpread {
  uint32_t x;
  // `[rows, cols / group]`.
  uint32_t out;
  // HALITE_NORM_RMS or HALITE_NORM_LAYER.
  uint32_t kind;
  float eps;
  uint32_t group;
} HaliteSpread;

// Weighted sums of the `parts` of each row, with factors of its own: part i of the result is the sum of
// `factors[i * parts + j]` times part j, in order of j.
typedef struct HaliteMix {
  uint32_t x;
  uint32_t factors;
  uint32_t out;
  uint32_t parts;
} HaliteMix;

// The operands of an op, by its kind. Operands are numbers in HaliteProgram::tensors; `state` is one in
// HaliteProgram::states.
typedef union HaliteOperands {
  struct HaliteEmbed embed;
  struct HaliteGather gather;
  struct HaliteNorm norm;
  struct HaliteMatMul matmul;
  struct HaliteRope rope;
  struct HaliteKvWrite kv_write;
  struct HaliteRopeKv rope_kv;
  struct HaliteAttend attend;
  struct HaliteGlu glu;
  struct HaliteAdd add;
  struct HaliteUnary unary;
  struct HaliteRoute route;
  struct HaliteExperts experts;
  struct HaliteArgMax arg_max;
  struct HaliteTopK top_k;
  struct HaliteConv conv;
  struct HaliteRecur recur;
  struct HaliteSlice slice;
  struct HaliteMul mul;
  struct HaliteRouteAmong route_among;
  struct HaliteJoin join;
  struct HaliteBlockMatMul block_matmul;
  struct HaliteRouteScaled route_scaled;
  struct HaliteSpread spread;
  struct HaliteMix mix;
} HaliteOperands;

typedef struct HaliteOp {
  uint32_t struct_bytes;
  HaliteOpKind kind;
  // The kind's name, for messages.
  const char *name;
  union HaliteOperands operands;
} HaliteOp;

// Consecutive ops: usually a layer.
typedef struct HaliteSegment {
  uint32_t struct_bytes;
  uint32_t op_count;
  const char *name;
  const struct HaliteOp *const *ops;
} HaliteSegment;

// A model as data. Lists are arrays of pointers, because later versions may append fields to the structs. A program is valid:
// shapes match, and each tensor is written once before it is read.
typedef struct HaliteProgram {
  uint32_t struct_bytes;
  uint32_t tensor_count;
  uint32_t state_count;
  uint32_t place_count;
  uint32_t segment_count;
  uint32_t weight_count;
  uint32_t io_count;
  // Page tables of each span.
  uint32_t table_count;
  const char *name;
  const struct HaliteTensor *const *tensors;
  const struct HaliteState *const *states;
  const struct HalitePlace *const *places;
  const struct HaliteSegment *const *segments;
} HaliteProgram;

// The use of a buffer.
typedef uint32_t HaliteUsage;

// Largest sizes of a plan's steps.
typedef struct HaliteLimits {
  uint32_t struct_bytes;
  uint32_t tokens;
  uint32_t outputs;
} HaliteLimits;

// Consecutive tokens of one sequence in a step.
typedef struct HaliteSpan {
  uint32_t struct_bytes;
  // Position of the first token.
  uint32_t start;
  uint32_t len;
  uint32_t reserved;
  // Page tables: the pages in order, which cover `start + len` positions. Pages entirely before the first token's window
  // may be HALITE_NONE.
  const uint32_t *const *tables;
  // Pages of each table.
  const uint32_t *table_lengths;
} HaliteSpan;

// A batch of tokens of one or more sequences. The host has checked it against the program and the limits.
typedef struct HaliteStep {
  uint32_t struct_bytes;
  uint32_t token_count;
  uint32_t span_count;
  uint32_t output_count;
  // In the order of `tokens`.
  const struct HaliteSpan *const *spans;
  // Token ids, span after span.
  const uint32_t *tokens;
  // Tokens that have outputs: indices into `tokens`, in increasing order.
  const uint32_t *outputs;
  // Call it before each op: if it does not return 0, `submit` returns HALITE_CANCELLED.
  uint32_t (*is_cancelled)(const void *context);
  const void *context;
} HaliteStep;

// The buffers of a submission, in the order of slots.
typedef struct HaliteBindings {
  uint32_t struct_bytes;
  uint32_t weight_count;
  uint32_t state_count;
  uint32_t io_count;
  struct HaliteBuffer *const *weights;
  // Whole pages of HaliteState::page_bytes.
  struct HaliteBuffer *const *states;
  struct HaliteBuffer *const *io;
} HaliteBindings;

// The time of a step so far: submissions add up, from the last one that began at segment 0.
typedef struct HaliteTiming {
  uint32_t struct_bytes;
  // HALITE_CLOCK_HOST, HALITE_CLOCK_DEVICE or HALITE_CLOCK_SIMULATED.
  uint32_t clock;
  uint64_t nanoseconds;
  // Energy of the step so far, if the device knows it. It is NaN when `wait` is called.
  double joules;
} HaliteTiming;

// The calls of a plug-in. Calls on one device and on its plans and buffers come one at a time, from any thread. Nothing that
// one side allocates is freed by the other. During `submit`, the thread rounds to nearest even and keeps subnormal numbers. `explain` and `import_pages` may be NULL; all others are required.
typedef struct HaliteBackend {
  uint32_t struct_bytes;
  // HALITE_ABI_VERSION.
  uint32_t abi_version;
  // A short name for reports, of at most 63 bytes.
  const char *name;
  // The plug-in's own version, for reports, of at most 63 bytes.
  const char *version;
  // Opens a device. `options` is the text behind the plug-in's path, or empty.
  HaliteStatus (*open)(const char *options, struct HaliteDevice **device, struct HaliteMessage *message);
  // Closes a device, which has no buffers and no plans any more.
  void (*close)(struct HaliteDevice *device);
  HaliteStatus (*caps)(struct HaliteDevice *device, struct HaliteCaps *caps, struct HaliteMessage *message);
  // Whether the device runs an op: HALITE_OK, HALITE_NOT_YET or HALITE_NEVER with the reason as message. The answer
  // depends on formats and shapes alone. `program` holds what the op refers to and no other op.
  HaliteStatus (*supports)(struct HaliteDevice *device,
                           const struct HaliteProgram *program,
                           const struct HaliteOp *op,
                           struct HaliteMessage *message);
  // Describes in a line, as message, which kernel runs an op for so many tokens. Without a message, there is nothing to say.
  HaliteStatus (*explain)(struct HaliteDevice *device,
                          const struct HaliteProgram *program,
                          const struct HaliteOp *op,
                          uint32_t tokens,
                          struct HaliteMessage *message);
  // Allocates zeroed memory.
  HaliteStatus (*alloc)(struct HaliteDevice *device,
                        uint64_t bytes,
                        HaliteUsage usage,
                        struct HaliteBuffer **buffer,
                        struct HaliteMessage *message);
  // Wraps read-only pages of the host, which stay valid until `release`; sets `buffer` to NULL if the device cannot read
  // them.
  HaliteStatus (*import_pages)(struct HaliteDevice *device,
                               const uint8_t *bytes,
                               uint64_t count,
                               struct HaliteBuffer **buffer,
                               struct HaliteMessage *message);
  // Frees a buffer.
  void (*release)(struct HaliteDevice *device, struct HaliteBuffer *buffer);
  // Copies from the host. The host has checked that the bytes are inside the buffer.
  HaliteStatus (*write)(struct HaliteDevice *device,
                        struct HaliteBuffer *buffer,
                        uint64_t offset,
                        const uint8_t *bytes,
                        uint64_t count,
                        struct HaliteMessage *message);
  // Copies to the host.
  HaliteStatus (*read)(struct HaliteDevice *device,
                       struct HaliteBuffer *buffer,
                       uint64_t offset,
                       uint8_t *bytes,
                       uint64_t count,
                       struct HaliteMessage *message);
  // Prepares a program, all of whose ops `supports` accepted, and reserves all memory of its steps. The program stays valid
  // until `free_plan`.
  HaliteStatus (*prepare)(struct HaliteDevice *device,
                          const struct HaliteProgram *program,
                          const struct HaliteLimits *limits,
                          struct HalitePlan **plan,
                          struct HaliteMessage *message);
  void (*free_plan)(struct HaliteDevice *device, struct HalitePlan *plan);
  // Returns the bytes that a plan needs besides its buffers.
  uint64_t (*scratch_bytes)(struct HaliteDevice *device,
                            const struct HaliteProgram *program,
                            const struct HaliteLimits *limits);
  // Starts segments `first_segment` to `first_segment + segment_count - 1` of a step. Scratch tensors keep their values
  // until the next submission that begins at segment 0. `step` and `bindings` are valid until the call returns; buffers
  // stay valid until `wait`.
  HaliteStatus (*submit)(struct HaliteDevice *device,
                         struct HalitePlan *plan,
                         const struct HaliteStep *step,
                         uint32_t first_segment,
                         uint32_t segment_count,
                         const struct HaliteBindings *bindings,
                         struct HaliteMessage *message);
  // Waits for all submissions of a plan. The host sets `struct_bytes` of `timing` and zeroes the rest.
  HaliteStatus (*wait)(struct HaliteDevice *device,
                       struct HalitePlan *plan,
                       struct HaliteTiming *timing,
                       struct HaliteMessage *message);
} HaliteBackend;

// What the host offers to plug-ins.
typedef struct HaliteHost {
  uint32_t struct_bytes;
  uint32_t abi_version;
  // Decodes `count` elements, which are whole blocks, of any weight format.
  HaliteStatus (*dequantize)(HaliteFormat format, const uint8_t *blocks, float *out, uint64_t count);
  // Returns the bytes of `count` elements of a format; 0 if they are not whole blocks or the format is unknown.
  uint64_t (*row_bytes)(HaliteFormat format, uint64_t count);
  // Returns the elements of a block of a format; 1 for plain numbers, 0 if the format is unknown.
  uint32_t (*block_len)(HaliteFormat format);
  // Returns the format to which the reference quantises the activations of products with this weight format: 8 (Q8_0),
  // 15 (Q8_K), or HALITE_F32 for none. docs/numeric-contract.md has the formulas.
  HaliteFormat (*activation_format)(HaliteFormat format);
} HaliteHost;

// The one function that a plug-in exports, as `halite_backend`. It returns the plug-in's calls, which stay valid, and touches no
// device. It returns NULL if it cannot work with this host.
typedef const struct HaliteBackend *(*HaliteBackendEntry)(const struct HaliteHost *host);

#endif  /* HALITE_BACKEND_H */

// What the plug-in defines.
#if defined(_WIN32)
#define HALITE_EXPORT __declspec(dllexport)
#elif defined(__GNUC__)
#define HALITE_EXPORT __attribute__((visibility("default")))
#else
#define HALITE_EXPORT
#endif

#ifdef __cplusplus
extern "C"
#endif
HALITE_EXPORT const HaliteBackend *halite_backend(const HaliteHost *host);
