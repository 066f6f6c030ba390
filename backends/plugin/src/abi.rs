//! The C interface of plug-ins: `include/halite_backend.h` is generated from this file.

#![allow(missing_docs, reason = "cbindgen copies each line into the header; variants of numbers need none")]

use std::ffi::{c_char, c_void};

/// Version of this interface. Hosts accept plug-ins of their own version.
pub const HALITE_ABI_VERSION: u32 = 1;

/// In place of a tensor's or a place's number: there is none. In a page table: the sequence dropped this page.
pub const HALITE_NONE: u32 = u32::MAX;

/// Most weights of a HALITE_OP_MATMUL.
pub const HALITE_MAX_PARTS: usize = 4;

/// Positions in one page of the KV cache.
pub const HALITE_PAGE_POSITIONS: u32 = 64;

/// What a call returns. Every other number is treated as HALITE_ERROR.
pub type HaliteStatus = u32;
pub const HALITE_OK: u32 = 0;
/// The device failed.
pub const HALITE_ERROR: u32 = 1;
/// The device has not enough memory.
pub const HALITE_OUT_OF_MEMORY: u32 = 2;
/// An argument is wrong.
pub const HALITE_ARGUMENT: u32 = 3;
/// HaliteStep::is_cancelled returned a number other than 0.
pub const HALITE_CANCELLED: u32 = 4;
/// From `supports` alone: not implemented yet.
pub const HALITE_NOT_YET: u32 = 5;
/// From `supports` alone: the hardware cannot run it.
pub const HALITE_NEVER: u32 = 6;

/// The host's memory for a message. A call that does not return HALITE_OK writes UTF-8 to it, with a zero at the end.
#[repr(C)]
pub struct HaliteMessage {
    pub struct_bytes: u32,
    /// Bytes of `text`, the zero included.
    pub capacity_bytes: u32,
    pub text: *mut c_char,
}

/// How the elements of a tensor are stored: the numbers of GGUF's tensor types, such as 0 for F32, 1 for F16, 8 for Q8_0
/// and 26 for I32.
pub type HaliteFormat = u32;
pub const HALITE_F32: u32 = 0;
pub const HALITE_F16: u32 = 1;
pub const HALITE_Q4_0: u32 = 2;
pub const HALITE_Q8_0: u32 = 8;
pub const HALITE_I32: u32 = 26;

/// How many rows a tensor has.
pub type HaliteRows = u32;
/// A fixed number.
pub const HALITE_ROWS_FIXED: u32 = 0;
/// One for each token of the step.
pub const HALITE_ROWS_TOKENS: u32 = 1;
/// One for each output of the step.
pub const HALITE_ROWS_OUTPUTS: u32 = 2;

/// Where a tensor lives.
pub type HaliteSlot = u32;
/// Number `slot_index` of HaliteBindings::weights, which holds the tensor. Read-only.
pub const HALITE_SLOT_WEIGHT: u32 = 0;
/// Number `slot_index` of HaliteBindings::io. It holds at least the tensor for the plan's limits.
pub const HALITE_SLOT_IO: u32 = 1;
/// Memory of the plan; see HaliteTensor::place.
pub const HALITE_SLOT_SCRATCH: u32 = 2;

/// A tensor: `experts` matrices, one after the other, of `rows` rows of `cols` elements. Rows are contiguous. All extents are
/// 1 to 2^27. Only tables of HALITE_OP_EMBED, weights of HALITE_OP_MATMUL and matrices of HALITE_OP_EXPERTS have formats other than
/// HALITE_F32 and HALITE_I32.
#[repr(C)]
pub struct HaliteTensor {
    pub struct_bytes: u32,
    /// 1, except in mixtures of experts.
    pub experts: u32,
    pub rows: HaliteRows,
    /// Rows of each matrix under HALITE_ROWS_FIXED.
    pub fixed_rows: u32,
    pub cols: u32,
    /// Any format for weights; HALITE_F32 or HALITE_I32 for the others.
    pub format: HaliteFormat,
    pub slot: HaliteSlot,
    pub slot_index: u32,
    /// For scratch: number of the place in HaliteProgram::places. Tensors share a place if they are not needed at the
    /// same time; outputs of an op never share the place of its inputs.
    pub place: u32,
    pub name: *const c_char,
}

/// Memory for scratch tensors: 4 * rows * cols bytes.
#[repr(C)]
pub struct HalitePlace {
    pub struct_bytes: u32,
    pub rows: HaliteRows,
    pub fixed_rows: u32,
    pub cols: u32,
}

/// A layer's KV cache, in pages of HALITE_PAGE_POSITIONS positions.
///
/// A page holds keys `[kv_heads][key_dim][position]`, then values `[kv_heads][position][value_dim]`. In HALITE_Q8_0 and
/// HALITE_Q4_0 these are codes, followed by scales in half precision: `[kv_heads][key_dim / 32][position]` of the keys,
/// then `[kv_heads][value_dim / 32][position]` of the values; keys and values are then whole blocks of 32. Each 32 codes of HALITE_Q4_0 in this order take 16 bytes:
/// the first 16 codes are the low halves, the others the high halves.
#[repr(C)]
pub struct HaliteState {
    pub struct_bytes: u32,
    pub kv_heads: u32,
    pub key_dim: u32,
    pub value_dim: u32,
    /// HALITE_F32, HALITE_F16, HALITE_Q8_0 or HALITE_Q4_0.
    pub format: HaliteFormat,
    /// How many positions up to its own, which counts, a token sees; 0: all.
    pub window: u32,
    /// How many positions after its own a token sees, up to the end of its span; 0: attention is causal.
    pub after: u32,
    /// Which of HaliteSpan::tables has the pages.
    pub table: u32,
    pub page_bytes: u64,
    pub name: *const c_char,
    /// HALITE_STATE_CACHE, HALITE_STATE_RECURRENT or HALITE_STATE_LATENT.
    pub kind: u32,
    /// Whether windows lie side by side, the first at position 0: a token sees its own window up to its own position, and
    /// nothing of those before.
    pub aligned: u32,
}
/// A KV cache.
pub const HALITE_STATE_CACHE: u32 = 0;
/// A recurrent state: a page holds `[kv_heads][key_dim][value_dim]` in HALITE_F32, after the last position of the page that was
/// computed. Before position 0 it is zero. In a step, the page of the position before the first token and that of the last token
/// are there. Others may be HALITE_NONE: what a position in such a page computes goes to the next page that is there. Only
/// kinds of ops from HALITE_OP_CONV on use such states.
pub const HALITE_STATE_RECURRENT: u32 = 1;
/// A KV cache of one head whose pages have keys alone: the first `value_dim` elements of a key are the value. Only
/// HALITE_OP_LATENT_WRITE and HALITE_OP_LATENT_ATTEND use such states.
pub const HALITE_STATE_LATENT: u32 = 2;

/// An activation of a gated linear unit: `act(gate) * up`.
pub type HaliteGateKind = u32;
/// `gate * sigmoid(gate)`.
pub const HALITE_GATE_SILU: u32 = 0;
/// The tanh approximation of GELU, from and to half precision.
pub const HALITE_GATE_GELU: u32 = 1;
/// GELU by the error function.
pub const HALITE_GATE_GELU_ERF: u32 = 2;
/// `max(gate, 0)`.
pub const HALITE_GATE_RELU: u32 = 3;
/// `g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + 1)` with `g = min(gate, limit)`.
pub const HALITE_GATE_SILU_CLAMPED: u32 = 4;
/// `sigmoid(gate)`.
pub const HALITE_GATE_SIGMOID: u32 = 5;
/// `gate`.
pub const HALITE_GATE_IDENTITY: u32 = 6;
/// `(1 + erf(gate / sqrt(2))) / 2`, the normal distribution function.
pub const HALITE_GATE_NORMAL: u32 = 7;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteGate {
    pub kind: HaliteGateKind,
    /// For HALITE_GATE_SILU_CLAMPED.
    pub alpha: f32,
    /// For HALITE_GATE_SILU_CLAMPED.
    pub limit: f32,
}

/// A rotation of the first `2 * pairs` elements of each head.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRotation {
    pub head_dim: u32,
    pub pairs: u32,
    /// HALITE_ROPE_ADJACENT or HALITE_ROPE_HALVES.
    pub pairing: u32,
    /// Tensor `[1, pairs]` of divisors of the frequencies, or HALITE_NONE.
    pub factors: u32,
    /// A factor on sine and cosine.
    pub magnitude: f32,
    /// Radians per position, one for each pair.
    pub frequencies: *const f32,
}
/// Pairs are `(2i, 2i + 1)`.
pub const HALITE_ROPE_ADJACENT: u32 = 0;
/// Pairs are `(i, i + pairs)`.
pub const HALITE_ROPE_HALVES: u32 = 1;

/// The kind of an op. `supports` refuses kinds that it does not know. An op's meaning never changes: what is added to an op
/// gets a new kind.
pub type HaliteOpKind = u32;
pub const HALITE_OP_EMBED: u32 = 0;
pub const HALITE_OP_GATHER: u32 = 1;
pub const HALITE_OP_NORM: u32 = 2;
pub const HALITE_OP_MATMUL: u32 = 3;
pub const HALITE_OP_ROPE: u32 = 4;
pub const HALITE_OP_KV_WRITE: u32 = 5;
pub const HALITE_OP_ROPE_KV: u32 = 6;
pub const HALITE_OP_ATTEND: u32 = 7;
pub const HALITE_OP_GLU: u32 = 8;
pub const HALITE_OP_ADD: u32 = 9;
pub const HALITE_OP_UNARY: u32 = 10;
pub const HALITE_OP_ROUTE: u32 = 11;
pub const HALITE_OP_EXPERTS: u32 = 12;
pub const HALITE_OP_ARG_MAX: u32 = 13;
pub const HALITE_OP_TOP_K: u32 = 14;
pub const HALITE_OP_CONV: u32 = 15;
pub const HALITE_OP_RECUR: u32 = 16;
pub const HALITE_OP_SLICE: u32 = 17;
pub const HALITE_OP_MUL: u32 = 18;
pub const HALITE_OP_ROUTE_AMONG: u32 = 19;
pub const HALITE_OP_JOIN: u32 = 20;
pub const HALITE_OP_BLOCK_MATMUL: u32 = 21;
/// HaliteKvWrite to a state of HALITE_STATE_LATENT: `k` has the `key_dim - value_dim` elements behind the value.
pub const HALITE_OP_LATENT_WRITE: u32 = 22;
/// HaliteAttend to a state of HALITE_STATE_LATENT.
pub const HALITE_OP_LATENT_ATTEND: u32 = 23;
pub const HALITE_OP_ROUTE_SCALED: u32 = 24;
pub const HALITE_OP_SPREAD: u32 = 25;
pub const HALITE_OP_MIX: u32 = 26;

/// `out[t] = scale * table[row of t]`. A row beyond the table is HALITE_ARGUMENT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteEmbed {
    pub table: u32,
    /// Which row: HALITE_INDEX_TOKEN, HALITE_INDEX_POSITION, HALITE_INDEX_FIRST or HALITE_INDEX_PART.
    pub index: u32,
    pub out: u32,
    pub scale: f32,
    /// For HALITE_INDEX_PART: the id of the token that ends a part of a text, and belongs to it.
    pub separator: u32,
}
/// The token's id.
pub const HALITE_INDEX_TOKEN: u32 = 0;
/// The token's position in its sequence.
pub const HALITE_INDEX_POSITION: u32 = 1;
/// Row 0 for every token.
pub const HALITE_INDEX_FIRST: u32 = 2;
/// The number of tokens `separator` before the token in its span, at most the table's last row. A span that does not start at position
/// 0 is HALITE_ARGUMENT.
pub const HALITE_INDEX_PART: u32 = 3;

/// Copies the rows of the tokens in HaliteStep::outputs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteGather {
    pub x: u32,
    pub out: u32,
}

/// Normalises each `group` elements of a row: `out = norm(x + add) * weight + bias`, and `sum = x + add`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteNorm {
    pub x: u32,
    /// Or HALITE_NONE: zeros. `sum` is HALITE_NONE if this is.
    pub add: u32,
    pub sum: u32,
    /// `[1, group]`, or HALITE_NONE: ones.
    pub weight: u32,
    /// `[1, group]`, or HALITE_NONE: zeros.
    pub bias: u32,
    pub out: u32,
    /// HALITE_NORM_RMS or HALITE_NORM_LAYER.
    pub kind: u32,
    pub group: u32,
    pub eps: f32,
}
/// `x / sqrt(mean(x^2) + eps)`.
pub const HALITE_NORM_RMS: u32 = 0;
/// `(x - mean(x)) / sqrt(var(x) + eps)`.
pub const HALITE_NORM_LAYER: u32 = 1;

/// Products of the rows of `x` with the rows of each weight, plus its bias.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteMatMul {
    pub x: u32,
    /// Number of weights.
    pub parts: u32,
    /// Each `[rows, cols of x]`.
    pub weights: [u32; HALITE_MAX_PARTS],
    /// Each `[1, rows]`, or HALITE_NONE.
    pub biases: [u32; HALITE_MAX_PARTS],
    /// One for each weight under HALITE_EPILOGUE_NONE, else only the first.
    pub outs: [u32; HALITE_MAX_PARTS],
    pub epilogue: u32,
    /// For HALITE_EPILOGUE_ADD.
    pub residual: u32,
    /// For HALITE_EPILOGUE_GLU.
    pub act: HaliteGate,
}
/// Each product is an output.
pub const HALITE_EPILOGUE_NONE: u32 = 0;
/// Two weights of the output's rows: `out = act(product 0) * product 1`.
pub const HALITE_EPILOGUE_GLU: u32 = 1;
/// One weight: `out = residual + product 0`.
pub const HALITE_EPILOGUE_ADD: u32 = 2;

/// Rotary position embedding of each head.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRope {
    pub x: u32,
    pub out: u32,
    pub rotation: HaliteRotation,
}

/// Stores keys `[tokens, kv_heads * key_dim]` and values `[tokens, kv_heads * value_dim]` of the step's tokens.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteKvWrite {
    pub k: u32,
    pub v: u32,
    pub state: u32,
}

/// HALITE_OP_ROPE of `q` to `out` and of `k`, then HALITE_OP_KV_WRITE of the rotated keys. Only for formats of single
/// elements.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRopeKv {
    pub q: u32,
    pub k: u32,
    pub v: u32,
    pub out: u32,
    pub state: u32,
    pub rotation: HaliteRotation,
}

/// Attention over the KV cache; query head h uses KV head `h * kv_heads / heads`, and `heads` is a multiple of `kv_heads`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteAttend {
    pub q: u32,
    pub state: u32,
    pub out: u32,
    pub heads: u32,
    /// `[1, heads]`: an extra logit in each head's softmax denominator; or HALITE_NONE.
    pub sinks: u32,
    /// Whether scores become `softcap * tanh(score / softcap)`.
    pub has_softcap: u32,
    pub softcap: f32,
    /// A factor on the scores, before the soft-cap.
    pub scale: f32,
    /// For each head a factor on the distance between the token's position and that of the key, which is taken off the score after
    /// the soft-cap; or NULL.
    pub slopes: *const f32,
    /// Factors on the scale by the token's position, or NULL: number `(position + growth_ahead) / growth_period`, and the last one
    /// beyond.
    pub growth: *const f32,
    pub growth_count: u32,
    pub growth_period: u32,
    pub growth_ahead: u32,
    /// 0.
    pub reserved: u32,
}

/// `out = act(gate) * up`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteGlu {
    pub gate: u32,
    pub up: u32,
    pub out: u32,
    pub act: HaliteGate,
}

/// `out = a + b`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteAdd {
    pub a: u32,
    pub b: u32,
    pub out: u32,
}

/// A function of each element.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteUnary {
    pub x: u32,
    pub out: u32,
    pub function: u32,
    /// For HALITE_UNARY_SCALE, HALITE_UNARY_SOFT_CAP, HALITE_UNARY_CLAMP and HALITE_UNARY_SHIFT.
    pub parameter: f32,
}
/// `x * sigmoid(x)`.
pub const HALITE_UNARY_SILU: u32 = 0;
/// The tanh approximation of GELU, from and to half precision.
pub const HALITE_UNARY_GELU: u32 = 1;
/// GELU by the error function.
pub const HALITE_UNARY_GELU_ERF: u32 = 2;
/// `max(x, 0)`.
pub const HALITE_UNARY_RELU: u32 = 3;
/// `max(x, 0)^2`.
pub const HALITE_UNARY_RELU_SQUARED: u32 = 4;
/// `x * parameter`.
pub const HALITE_UNARY_SCALE: u32 = 5;
/// `parameter * tanh(x / parameter)`.
pub const HALITE_UNARY_SOFT_CAP: u32 = 6;
/// `max(-parameter, min(x, parameter))`; NaN stays.
pub const HALITE_UNARY_CLAMP: u32 = 7;
/// `x + parameter`.
pub const HALITE_UNARY_SHIFT: u32 = 8;

/// Chooses experts for each token in order of decreasing gated value (for HALITE_GATING_SOFTMAX_OF_TOP, of the logit); the
/// lower index comes first on ties, and NaN before all other values.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRoute {
    /// `[tokens, experts]`.
    pub logits: u32,
    /// `[tokens, used]` of HALITE_I32.
    pub ids: u32,
    /// `[tokens, used]`.
    pub weights: u32,
    pub gating: u32,
    /// Whether the chosen weights are divided by their sum.
    pub normalise: u32,
    /// A factor on the weights, last.
    pub scale: f32,
}
/// Softmax over all experts, then the largest.
pub const HALITE_GATING_SOFTMAX: u32 = 0;
/// The largest, then softmax over their logits.
pub const HALITE_GATING_SOFTMAX_OF_TOP: u32 = 1;
/// Sigmoid of each logit, then the largest.
pub const HALITE_GATING_SIGMOID: u32 = 2;

/// Gated feed-forward experts: `out = sum of weight * down(act(gate x) * (up x))` in the order of `ids`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteExperts {
    pub x: u32,
    pub ids: u32,
    pub weights: u32,
    /// Experts of `[hidden, cols]`.
    pub gate: u32,
    /// Experts of `[hidden, cols]`.
    pub up: u32,
    /// Experts of `[cols, hidden]`.
    pub down: u32,
    /// `[experts, hidden]`, or HALITE_NONE; so are the other two if this is.
    pub gate_bias: u32,
    pub up_bias: u32,
    /// `[experts, cols]`.
    pub down_bias: u32,
    pub out: u32,
    pub act: HaliteGate,
}

/// The index of each row's largest element, the lowest on ties; -1 if that element is not finite or the row has a NaN.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteArgMax {
    pub x: u32,
    /// `[rows, 1]` of HALITE_I32.
    pub out: u32,
}

/// Each row's k largest elements, largest first, in IEEE 754's total order with NaN above all; the lower index first on
/// ties.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteTopK {
    pub x: u32,
    /// `[rows, k]` of HALITE_I32.
    pub ids: u32,
    /// `[rows, k]`.
    pub values: u32,
}

/// A causal convolution of each channel over the last `taps` tokens of its sequence, zeros before its first:
/// `out[t][c] = bias[c] + sum of weight[c][j] * x[t - taps + 1 + j][c]`, taps in order.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteConv {
    /// `[tokens, channels]`.
    pub x: u32,
    /// `[channels, taps]`; 2 to 8 taps.
    pub weight: u32,
    /// `[1, channels]`, or HALITE_NONE: zeros.
    pub bias: u32,
    /// The last `taps - 1` inputs of each channel, oldest first: a recurrent state of `channels` heads of 1 by `taps - 1`.
    pub state: u32,
    pub out: u32,
}

/// A linear recurrence, token by token. For each head, with a recurrent state S of `key_dim` by `value_dim` and
/// `rate = softplus(decay)`: `S = exp(a * rate) * S`, then `S = S + k u^T` with the update u of the rule, then the result of the rule.
/// Each row of S has a decay or an `a` of its own where these tensors have `heads * key_dim` columns.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRecur {
    /// `[tokens, key_heads * key_dim]`; so is `k`.
    pub q: u32,
    pub k: u32,
    /// `[tokens, heads * value_dim]`.
    pub v: u32,
    /// `[tokens, heads]`, or with the delta rules `[tokens, heads * key_dim]`.
    pub decay: u32,
    /// `[1, heads]` or `[1, heads * key_dim]`.
    pub a: u32,
    /// HALITE_RULE_DELTA, HALITE_RULE_SCAN or HALITE_RULE_DELTA_OF_NEIGHBOURS.
    pub rule: u32,
    /// For the delta rules: `[tokens, heads]`.
    pub beta: u32,
    /// For HALITE_RULE_SCAN: `[1, heads]`.
    pub d: u32,
    pub state: u32,
    pub out: u32,
    /// For the delta rules.
    pub scale: f32,
}
/// `u = sigmoid(beta) * (v - S^T k)` and `out = scale * S^T q`. Head h has the query and key `h mod key_heads`.
pub const HALITE_RULE_DELTA: u32 = 0;
/// `u = rate * v` and `out = S^T q + d * v`. Head h has the query and key `h * key_heads / heads`.
pub const HALITE_RULE_SCAN: u32 = 1;
/// HALITE_RULE_DELTA, but head h has the query and key `h * key_heads / heads`.
pub const HALITE_RULE_DELTA_OF_NEIGHBOURS: u32 = 2;

/// Elements `first` to `first + len` of each `group` columns of `x`; `len` is what makes the columns of `out`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteSlice {
    pub x: u32,
    pub out: u32,
    pub group: u32,
    pub first: u32,
}

/// Each `group` columns of `out` are the next `first` columns of `a`, and then the next `group - first` of `b`, or all of them if `b`
/// has only so many.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteJoin {
    pub a: u32,
    pub b: u32,
    pub out: u32,
    pub group: u32,
    pub first: u32,
}

/// The product of each block of columns with a matrix of its own: columns `n * cols` to `(n + 1) * cols` of `x` with matrix n of
/// the weight, to columns `n * rows` to `(n + 1) * rows` of `out`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteBlockMatMul {
    pub x: u32,
    /// HaliteTensor::experts matrices of `[rows, cols]`.
    pub weight: u32,
    pub out: u32,
}

/// The product with a weight, element by element: column c with element `c mod n`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteMul {
    pub x: u32,
    /// `[1, n]`; n divides the columns of `x`.
    pub weight: u32,
    pub out: u32,
}

/// HALITE_OP_ROUTE by other values: the gated values plus a bias, and only of experts in the groups whose two largest values have the
/// largest sums. Groups are of equal numbers of consecutive experts. Weights are the gated values.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRouteAmong {
    pub route: HaliteRoute,
    /// `[1, experts]`, or HALITE_NONE: zeros.
    pub bias: u32,
    /// 1: all experts may be chosen.
    pub group_count: u32,
    pub groups_used: u32,
}

/// HALITE_OP_ROUTE_AMONG, whose weights are at last multiplied by a factor of their expert.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteRouteScaled {
    pub route_among: HaliteRouteAmong,
    /// `[1, experts]`.
    pub scales: u32,
}

/// What HALITE_OP_NORM divides each group by: `sqrt(mean(x^2) + eps)`, or `sqrt(var(x) + eps)`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteSpread {
    pub x: u32,
    /// `[rows, cols / group]`.
    pub out: u32,
    /// HALITE_NORM_RMS or HALITE_NORM_LAYER.
    pub kind: u32,
    pub eps: f32,
    pub group: u32,
}

/// Weighted sums of the `parts` of each row, with factors of its own: part i of the result is the sum of
/// `factors[i * parts + j]` times part j, in order of j.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteMix {
    pub x: u32,
    pub factors: u32,
    pub out: u32,
    pub parts: u32,
}

/// The operands of an op, by its kind. Operands are numbers in HaliteProgram::tensors; `state` is one in
/// HaliteProgram::states.
#[repr(C)]
#[derive(Clone, Copy)]
pub union HaliteOperands {
    pub embed: HaliteEmbed,
    pub gather: HaliteGather,
    pub norm: HaliteNorm,
    pub matmul: HaliteMatMul,
    pub rope: HaliteRope,
    pub kv_write: HaliteKvWrite,
    pub rope_kv: HaliteRopeKv,
    pub attend: HaliteAttend,
    pub glu: HaliteGlu,
    pub add: HaliteAdd,
    pub unary: HaliteUnary,
    pub route: HaliteRoute,
    pub experts: HaliteExperts,
    pub arg_max: HaliteArgMax,
    pub top_k: HaliteTopK,
    pub conv: HaliteConv,
    pub recur: HaliteRecur,
    pub slice: HaliteSlice,
    pub mul: HaliteMul,
    pub route_among: HaliteRouteAmong,
    pub join: HaliteJoin,
    pub block_matmul: HaliteBlockMatMul,
    pub route_scaled: HaliteRouteScaled,
    pub spread: HaliteSpread,
    pub mix: HaliteMix,
}

#[repr(C)]
pub struct HaliteOp {
    pub struct_bytes: u32,
    pub kind: HaliteOpKind,
    /// The kind's name, for messages.
    pub name: *const c_char,
    pub operands: HaliteOperands,
}

/// Consecutive ops: usually a layer.
#[repr(C)]
pub struct HaliteSegment {
    pub struct_bytes: u32,
    pub op_count: u32,
    pub name: *const c_char,
    pub ops: *const *const HaliteOp,
}

/// A model as data. Lists are arrays of pointers, because later versions may append fields to the structs. A program is valid:
/// shapes match, and each tensor is written once before it is read.
#[repr(C)]
pub struct HaliteProgram {
    pub struct_bytes: u32,
    pub tensor_count: u32,
    pub state_count: u32,
    pub place_count: u32,
    pub segment_count: u32,
    pub weight_count: u32,
    pub io_count: u32,
    /// Page tables of each span.
    pub table_count: u32,
    pub name: *const c_char,
    pub tensors: *const *const HaliteTensor,
    pub states: *const *const HaliteState,
    pub places: *const *const HalitePlace,
    pub segments: *const *const HaliteSegment,
}

/// Largest sizes of a plan's steps.
#[repr(C)]
pub struct HaliteLimits {
    pub struct_bytes: u32,
    pub tokens: u32,
    pub outputs: u32,
}

/// Consecutive tokens of one sequence in a step.
#[repr(C)]
pub struct HaliteSpan {
    pub struct_bytes: u32,
    /// Position of the first token.
    pub start: u32,
    pub len: u32,
    pub reserved: u32,
    /// Page tables: the pages in order, which cover `start + len` positions. Pages entirely before the first token's window
    /// may be HALITE_NONE.
    pub tables: *const *const u32,
    /// Pages of each table.
    pub table_lengths: *const u32,
}

/// A batch of tokens of one or more sequences. The host has checked it against the program and the limits.
#[repr(C)]
pub struct HaliteStep {
    pub struct_bytes: u32,
    pub token_count: u32,
    pub span_count: u32,
    pub output_count: u32,
    /// In the order of `tokens`.
    pub spans: *const *const HaliteSpan,
    /// Token ids, span after span.
    pub tokens: *const u32,
    /// Tokens that have outputs: indices into `tokens`, in increasing order.
    pub outputs: *const u32,
    /// Call it before each op: if it does not return 0, `submit` returns HALITE_CANCELLED.
    pub is_cancelled: Option<unsafe extern "C" fn(context: *const c_void) -> u32>,
    pub context: *const c_void,
}

/// The buffers of a submission, in the order of slots.
#[repr(C)]
pub struct HaliteBindings {
    pub struct_bytes: u32,
    pub weight_count: u32,
    pub state_count: u32,
    pub io_count: u32,
    pub weights: *const *mut HaliteBuffer,
    /// Whole pages of HaliteState::page_bytes.
    pub states: *const *mut HaliteBuffer,
    pub io: *const *mut HaliteBuffer,
}

/// The time of a step so far: submissions add up, from the last one that began at segment 0.
#[repr(C)]
pub struct HaliteTiming {
    pub struct_bytes: u32,
    /// HALITE_CLOCK_HOST, HALITE_CLOCK_DEVICE or HALITE_CLOCK_SIMULATED.
    pub clock: u32,
    pub nanoseconds: u64,
    /// Energy of the step so far, if the device knows it. It is NaN when `wait` is called.
    pub joules: f64,
}
pub const HALITE_CLOCK_HOST: u32 = 0;
/// The device's own timestamps.
pub const HALITE_CLOCK_DEVICE: u32 = 1;
/// A timing model of the device.
pub const HALITE_CLOCK_SIMULATED: u32 = 2;

/// What a device promises about its results.
pub type HaliteContract = u32;
/// The bits of the reference, as docs/numeric-contract.md defines them.
pub const HALITE_CONTRACT_EXACT: u32 = 0;
/// Close to the reference: sums may be reordered.
pub const HALITE_CONTRACT_CLOSE: u32 = 1;
/// Close to the reference up to the rounding of the device's own number formats.
pub const HALITE_CONTRACT_NATIVE: u32 = 2;

/// Fusions that a device asks for, added up. A device that asks for none gets only the simple forms of the ops.
pub type HaliteFusions = u32;
/// HALITE_OP_MATMUL with several weights.
pub const HALITE_FUSE_SHARED_INPUT: u32 = 1;
/// HALITE_OP_NORM with `add`.
pub const HALITE_FUSE_ADD_NORM: u32 = 2;
/// HALITE_EPILOGUE_GLU.
pub const HALITE_FUSE_GLU: u32 = 4;
/// HALITE_EPILOGUE_ADD.
pub const HALITE_FUSE_RESIDUAL: u32 = 8;
/// HALITE_OP_ROPE_KV.
pub const HALITE_FUSE_ROPE_KV: u32 = 16;

/// A device's fixed properties. The host sets `struct_bytes` and zeroes the rest; the plug-in fills it.
#[repr(C)]
pub struct HaliteCaps {
    pub struct_bytes: u32,
    pub contract: HaliteContract,
    pub fusions: HaliteFusions,
    pub reserved: u32,
    /// Bytes of memory available to buffers; 0: no limit.
    pub memory_bytes: u64,
    /// A line for people. It stays valid until `close`.
    pub device: *const c_char,
}

/// The use of a buffer.
pub type HaliteUsage = u32;
/// Written once, read by every step.
pub const HALITE_USAGE_WEIGHT: u32 = 0;
/// Read and written by steps.
pub const HALITE_USAGE_STATE: u32 = 1;
/// Exchanged between the host and steps.
pub const HALITE_USAGE_IO: u32 = 2;

/// A device that the plug-in opened. The plug-in defines what is behind it.
pub enum HaliteDevice {}
/// Memory of a device.
pub enum HaliteBuffer {}
/// A prepared program.
pub enum HalitePlan {}

/// What the host offers to plug-ins.
#[repr(C)]
pub struct HaliteHost {
    pub struct_bytes: u32,
    pub abi_version: u32,
    /// Decodes `count` elements, which are whole blocks, of any weight format.
    pub dequantize: Option<
        unsafe extern "C" fn(
            format: HaliteFormat,
            blocks: *const u8,
            out: *mut f32,
            count: u64,
        ) -> HaliteStatus,
    >,
    /// Returns the bytes of `count` elements of a format; 0 if they are not whole blocks or the format is unknown.
    pub row_bytes: Option<unsafe extern "C" fn(format: HaliteFormat, count: u64) -> u64>,
    /// Returns the elements of a block of a format; 1 for plain numbers, 0 if the format is unknown.
    pub block_len: Option<unsafe extern "C" fn(format: HaliteFormat) -> u32>,
    /// Returns the format to which the reference quantises the activations of products with this weight format: 8 (Q8_0),
    /// 15 (Q8_K), or HALITE_F32 for none. docs/numeric-contract.md has the formulas.
    pub activation_format: Option<unsafe extern "C" fn(format: HaliteFormat) -> HaliteFormat>,
}

/// The calls of a plug-in. Calls on one device and on its plans and buffers come one at a time, from any thread. Nothing that
/// one side allocates is freed by the other. During `submit`, the thread rounds to nearest even and keeps subnormal numbers. `explain` and `import_pages` may be NULL; all others are required.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteBackend {
    pub struct_bytes: u32,
    /// HALITE_ABI_VERSION.
    pub abi_version: u32,
    /// A short name for reports, of at most 63 bytes.
    pub name: *const c_char,
    /// The plug-in's own version, for reports, of at most 63 bytes.
    pub version: *const c_char,
    /// Opens a device. `options` is the text behind the plug-in's path, or empty.
    pub open: Option<
        unsafe extern "C" fn(
            options: *const c_char,
            device: *mut *mut HaliteDevice,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Closes a device, which has no buffers and no plans any more.
    pub close: Option<unsafe extern "C" fn(device: *mut HaliteDevice)>,
    pub caps: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            caps: *mut HaliteCaps,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Whether the device runs an op: HALITE_OK, HALITE_NOT_YET or HALITE_NEVER with the reason as message. The answer
    /// depends on formats and shapes alone. `program` holds what the op refers to and no other op.
    pub supports: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            program: *const HaliteProgram,
            op: *const HaliteOp,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Describes in a line, as message, which kernel runs an op for so many tokens. Without a message, there is nothing to say.
    pub explain: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            program: *const HaliteProgram,
            op: *const HaliteOp,
            tokens: u32,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Allocates zeroed memory.
    pub alloc: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            bytes: u64,
            usage: HaliteUsage,
            buffer: *mut *mut HaliteBuffer,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Wraps read-only pages of the host, which stay valid until `release`; sets `buffer` to NULL if the device cannot read
    /// them.
    pub import_pages: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            bytes: *const u8,
            count: u64,
            buffer: *mut *mut HaliteBuffer,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Frees a buffer.
    pub release: Option<unsafe extern "C" fn(device: *mut HaliteDevice, buffer: *mut HaliteBuffer)>,
    /// Copies from the host. The host has checked that the bytes are inside the buffer.
    pub write: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            buffer: *mut HaliteBuffer,
            offset: u64,
            bytes: *const u8,
            count: u64,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Copies to the host.
    pub read: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            buffer: *mut HaliteBuffer,
            offset: u64,
            bytes: *mut u8,
            count: u64,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Prepares a program, all of whose ops `supports` accepted, and reserves all memory of its steps. The program stays valid
    /// until `free_plan`.
    pub prepare: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            program: *const HaliteProgram,
            limits: *const HaliteLimits,
            plan: *mut *mut HalitePlan,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    pub free_plan: Option<unsafe extern "C" fn(device: *mut HaliteDevice, plan: *mut HalitePlan)>,
    /// Returns the bytes that a plan needs besides its buffers.
    pub scratch_bytes: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            program: *const HaliteProgram,
            limits: *const HaliteLimits,
        ) -> u64,
    >,
    /// Starts segments `first_segment` to `first_segment + segment_count - 1` of a step. Scratch tensors keep their values
    /// until the next submission that begins at segment 0. `step` and `bindings` are valid until the call returns; buffers
    /// stay valid until `wait`.
    pub submit: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            plan: *mut HalitePlan,
            step: *const HaliteStep,
            first_segment: u32,
            segment_count: u32,
            bindings: *const HaliteBindings,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
    /// Waits for all submissions of a plan. The host sets `struct_bytes` of `timing` and zeroes the rest.
    pub wait: Option<
        unsafe extern "C" fn(
            device: *mut HaliteDevice,
            plan: *mut HalitePlan,
            timing: *mut HaliteTiming,
            message: *mut HaliteMessage,
        ) -> HaliteStatus,
    >,
}

/// The one function that a plug-in exports, as `halite_backend`. It returns the plug-in's calls, which stay valid, and touches no
/// device. It returns NULL if it cannot work with this host.
pub type HaliteBackendEntry = unsafe extern "C" fn(host: *const HaliteHost) -> *const HaliteBackend;
