//! The vocabulary between models and backends: a flat list of fused, LLM-shaped ops over named tensors.
//!
//! A model records a [`Program`] once with the [`Builder`]; a backend prepares it once and runs it per step.
//! Tensors are row-major and contiguous, one row per token unless said otherwise. `reference.rs` defines what
//! each op computes.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;
pub use halite_kernels::attention::Sight;
pub use halite_kernels::formats::Layout;
use halite_kernels::formats::{self, Format};
pub use halite_kernels::rows::{Gate, Unary};

use crate::error::{Error, Result};

/// Positions in one page of the KV cache, and in one chunk of the attention's online softmax.
pub const PAGE_POSITIONS: u32 = halite_kernels::attention::CHUNK as u32;

/// A tensor of a [`Program`].
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub u32);

/// A state (a layer's KV cache) of a [`Program`].
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StateId(pub u32);

/// How many rows a tensor has.
// Exhaustive: a backend must size every tensor.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dim {
    /// A fixed number.
    Fixed(u32),
    /// One per token of the step.
    Tokens,
    /// One per output of the step.
    Outputs,
}

/// Where a tensor lives.
// Exhaustive: a backend must find every tensor.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// Weight number n of the program: read-only, bound by the caller.
    Weight(u32),
    /// Input or output number n: a buffer bound by the caller, readable after the step.
    Io(u32),
    /// The backend's own memory, undefined between steps.
    Scratch,
}

/// A tensor: `experts` matrices (1 except in mixtures of experts) of `rows` × `cols`.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Tensor {
    /// Name for messages and taps; for a weight, its name in the file.
    pub name: String,
    /// Number of matrices, stored one after the other.
    pub experts: u32,
    /// Rows of each matrix.
    pub rows: Dim,
    /// Elements of a row.
    pub cols: u32,
    /// Element format: any format for weights, `F32` or `I32` for the rest.
    pub format: Format,
    /// Row layout of each matrix: [`Layout::Rows`] for all tensors except weights.
    pub layout: Layout,
    /// Where the tensor lives.
    pub slot: Slot,
    /// For a weight that is part of a file's tensor, that part; `None`: the whole tensor.
    pub part: Option<FilePart>,
}

impl Tensor {
    /// Returns a weight's name without its layer: `ffn_up` of `blk.3.ffn_up.weight`.
    pub fn name_in_layer(&self) -> String {
        let parts = self.name.split('.').filter(|part| !part.bytes().all(|b| b.is_ascii_digit()));
        parts.filter(|part| !matches!(*part, "blk" | "weight")).collect::<Vec<_>>().join(".")
    }
}

/// Consecutive elements of a tensor in the model file: rows of a matrix, or elements of a vector. A weight of as many
/// matrices as the tensor, but with fewer rows, has these rows of each matrix.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePart {
    /// The tensor's name in the file.
    pub of: String,
    /// Index of the first element, in each matrix.
    pub first_element: u64,
}

/// Whether rows `range` of a matrix of `rows` are contiguous: interleaved rows can be split only between
/// groups.
pub(crate) fn part_as_stored(layout: Layout, range: Range<u32>, rows: u32) -> bool {
    let between = |row: u32| row.is_multiple_of(formats::ROWS as u32) || row == rows;
    layout == Layout::Rows || (between(range.start) && between(range.end))
}

/// What a page of a [`State`] holds.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum StateKind {
    /// Keys and values of [`PAGE_POSITIONS`] positions.
    #[default]
    Cache,
    /// Keys alone: the first `value_dim` elements of a key are the value. There is one KV head, and keys are longer than
    /// values.
    Latent,
    /// A recurrent state after the last position of the page that was computed: `[kv_heads][key_dim][value_dim]` in
    /// `F32`. Before position 0 it is zero. A page may be absent ([`NO_PAGE`](crate::backend::NO_PAGE)) if a later one
    /// is present: what a position in it computes is in the next page that is present.
    Recurrent,
}

/// One layer's KV cache: per position, `kv_heads` keys of `key_dim` and values of `value_dim` elements. Or the state of
/// a recurrent layer.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct State {
    /// Name for messages.
    pub name: String,
    /// Number of KV heads.
    pub kv_heads: u32,
    /// Elements of a key.
    pub key_dim: u32,
    /// Elements of a value.
    pub value_dim: u32,
    /// Element format, one of [`formats`](halite_kernels::kv::formats). Keys and values are whole blocks of
    /// it.
    pub format: Format,
    /// Sliding window: how many positions up to its own, which counts, a token sees; `None`: all.
    pub window: Option<u32>,
    /// How many positions after its own a token sees, up to the end of its span; 0: attention is causal, [`u32::MAX`]: all.
    /// If it is not causal, a step must contain all tokens that attend to each other.
    pub after: u32,
    /// Whether windows lie side by side, the first at position 0 (chunks of attention, Llama 4): a token sees its own window up to
    /// its own position, and nothing of those before. Attention is then causal.
    #[cfg_attr(feature = "replay", serde(default))]
    pub aligned: bool,
    /// What its pages hold.
    #[cfg_attr(feature = "replay", serde(default))]
    pub kind: StateKind,
}

crate::setters!(const State { window: Option<u32>, after: u32, aligned: bool });

impl State {
    /// A cache for causal attention without a window.
    pub fn new(
        name: impl Into<String>,
        kv_heads: u32,
        key_dim: u32,
        value_dim: u32,
        format: Format,
    ) -> State {
        let (window, after, aligned, kind) = (None, 0, false, StateKind::Cache);
        State { name: name.into(), kv_heads, key_dim, value_dim, format, window, after, aligned, kind }
    }

    /// Whether no token sees a later one.
    pub fn is_causal(&self) -> bool {
        self.after == 0
    }

    /// Which positions a token sees.
    pub fn sight(&self) -> Sight {
        Sight { window: self.window, after: self.after, aligned: self.aligned }
    }

    /// A latent cache (DeepSeek-AI 2024): a key of `key_dim` elements, of which the first `value_dim` are the value.
    pub fn latent(name: impl Into<String>, key_dim: u32, value_dim: u32, format: Format) -> State {
        State { kind: StateKind::Latent, ..State::new(name, 1, key_dim, value_dim, format) }
    }

    /// Elements that are stored as a key besides the value.
    pub fn key_only(&self) -> u32 {
        let in_value = if self.kind == StateKind::Latent { self.value_dim } else { 0 };
        self.key_dim.saturating_sub(in_value)
    }

    /// A recurrent state of `heads` matrices of `rows` by `cols`.
    pub fn recurrent(name: impl Into<String>, heads: u32, rows: u32, cols: u32) -> State {
        let state = State::new(name, heads, rows, cols, Format::F32);
        State { window: State::RECURRENT_WINDOW, kind: StateKind::Recurrent, ..state }
    }

    /// The window of recurrent states, which form a KV group of their own: a token needs the page of the position
    /// before it, and its own.
    pub const RECURRENT_WINDOW: Option<u32> = Some(2);

    /// Returns the bytes of one page of [`PAGE_POSITIONS`] positions; see [`StateKind`].
    ///
    /// A page of a cache holds keys `[kv_heads][key_dim][position]`, then values `[kv_heads][position][value_dim]`. In
    /// `Q8_0` and `Q4_0` these are codes, followed by scales in half precision:
    /// `[kv_heads][key_dim / 32][position]` of the keys, then `[kv_heads][value_dim / 32][position]` of the
    /// values. A page of a latent cache has no values of its own.
    pub fn page_bytes(&self) -> u64 {
        let [heads, key_dim, value_dim] = [self.kv_heads, self.key_dim, self.value_dim].map(u64::from);
        let elements = match self.kind {
            StateKind::Cache => heads * (key_dim + value_dim) * u64::from(PAGE_POSITIONS),
            StateKind::Latent => heads * key_dim * u64::from(PAGE_POSITIONS),
            StateKind::Recurrent => heads * key_dim * value_dim,
        };
        elements / self.format.block_len() as u64 * self.format.block_bytes() as u64
    }
}

/// The kind of a norm.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps)` (Zhang & Sennrich 2019).
    Rms,
    /// `(x - mean(x)) / sqrt(var(x) + eps)` (Ba et al. 2016).
    Layer,
}

/// Which elements a rotary embedding pairs.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RopePairs {
    /// `(2i, 2i + 1)`, as in the RoFormer paper and in GGUF files of the llama family.
    Adjacent,
    /// `(i, i + dims / 2)`, as in GPT-NeoX.
    Halves,
}

/// A rotation of the first `2 * frequencies.len()` elements of each head.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation<T = TensorId> {
    /// Elements of a head.
    pub head_dim: u32,
    /// Radians per position for each pair, with base, scaling and interpolation applied.
    pub frequencies: Arc<[f32]>,
    /// Divisors of the frequencies, `[1, frequencies.len()]`, if the file has them.
    pub factors: Option<T>,
    /// A factor on sine and cosine (YaRN's attention factor).
    pub magnitude: f32,
    /// Which elements form pairs.
    pub pairs: RopePairs,
}

impl<T> Rotation<T> {
    /// Returns the same rotation with other factors.
    pub fn with_factors<U>(&self, factors: Option<U>) -> Rotation<U> {
        let Rotation { head_dim, magnitude, pairs, .. } = *self;
        Rotation { head_dim, frequencies: self.frequencies.clone(), factors, magnitude, pairs }
    }
}

/// Factors on the scores of a token by its position: `factors[(position + ahead) / period]`, and the last one beyond.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq)]
pub struct Growth {
    /// One for each `period` positions.
    pub factors: Arc<[f32]>,
    /// Positions that have the same factor.
    pub period: u32,
    /// Added to positions.
    pub ahead: u32,
}

impl Growth {
    /// Returns them as kernels take them.
    pub fn factors(&self) -> halite_kernels::attention::Growth<'_> {
        let Growth { factors, period, ahead } = self;
        halite_kernels::attention::Growth { factors, period: *period, ahead: *ahead }
    }
}

/// Maximum number of weights of an [`Op::MatMul`].
pub const MAX_PARTS: usize = 4;

/// One weight of an [`Op::MatMul`].
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Part<T = TensorId> {
    /// `[rows, cols]`; element r of a product is the dot product of an input row with row r.
    pub weight: T,
    /// Added to each row of the product, `[1, rows]`.
    pub bias: Option<T>,
}

/// The weights of an [`Op::MatMul`].
pub type Parts<T = TensorId> = ArrayVec<Part<T>, MAX_PARTS>;

/// What a matmul does with its products before storing them.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Epilogue<T = TensorId> {
    /// Nothing: each product is an output.
    None,
    /// Two products become one output: `out = act(product 0) * product 1`.
    Glu(Gate),
    /// `out = residual + product 0`.
    Add(T),
}

/// How an op accesses an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The op reads it.
    Read,
    /// The op writes it. Of a state, it may read what was there.
    Write,
}

/// The index into an embedding table.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Index {
    /// The token's id.
    Token,
    /// The token's position in its sequence.
    Position,
    /// Row 0 for every token.
    First,
    /// The number of tokens `separator` before the token in its span, at most the table's last row: the part of a text of several
    /// parts, such as a query and a document (BERT's token types). A span that does not start at position 0 is an error.
    Part {
        /// The id of the token that ends a part, and belongs to it.
        separator: u32,
    },
}

/// Groups of experts, each of consecutive ones (DeepSeek-AI 2024): a token chooses from the groups whose two largest values have
/// the largest sums.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Groups {
    /// Number of groups.
    pub count: u32,
    /// How many of them a token chooses from.
    pub used: u32,
}

/// How router logits become expert weights.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Gating {
    /// Softmax over all experts, then top-k.
    Softmax,
    /// Top-k, then softmax over their logits.
    SoftmaxOfTop,
    /// Sigmoid of each expert, then top-k.
    Sigmoid,
}

/// The rule of an [`Op::Recur`].
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Rule<T = TensorId> {
    /// The gated delta rule (Yang, Kautz & Hatamizadeh 2024): `u = σ(beta) · (v - Sᵀk)` and `out = scale · Sᵀq`. Head h has
    /// the query and key `h mod key_heads`, or `h · key_heads / heads` if neighbours share.
    Delta {
        /// `[tokens, heads]`.
        beta: T,
        /// A factor on the result.
        scale: f32,
        /// Whether neighbouring heads share a query and key.
        #[cfg_attr(feature = "replay", serde(default))]
        neighbours: bool,
    },
    /// Mamba 2's state-space duality (Dao & Gu 2024), where `v`, `k` and `q` are its x, B and C: `u = rate · v` and
    /// `out = Sᵀq + d · v`. Head h has the query and key `h · key_heads / heads`.
    Scan {
        /// `[1, heads]`.
        d: T,
    },
}

impl<T> Rule<T> {
    /// Returns the key head of a head.
    pub fn key_head(&self, head: usize, heads: usize, key_heads: usize) -> usize {
        match self {
            Rule::Delta { neighbours: false, .. } => head % key_heads.max(1),
            Rule::Delta { .. } | Rule::Scan { .. } => head * key_heads / heads.max(1),
        }
    }
}

/// An op on operands `T` and KV caches `S`.
///
/// A program has ops on ids. [`Op::try_map`] turns them into ops on something else, such as bound memory or
/// shapes.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Op<T = TensorId, S = StateId> {
    /// `out[t] = scale * table[index of t]`.
    Embed {
        /// `[vocab, cols]` or `[positions, cols]`, any format.
        table: T,
        /// What selects the row. A step with an index beyond the table is an error.
        index: Index,
        /// `[tokens, cols]`.
        out: T,
        /// A factor on every element.
        scale: f32,
    },
    /// Copies the rows of the tokens that have outputs.
    Gather {
        /// `[tokens, cols]`.
        x: T,
        /// `[outputs, cols]`.
        out: T,
    },
    /// Normalises each group of `group` elements: `out = norm(x + add) * weight + bias`, and `sum = x + add`.
    Norm {
        /// `[rows, cols]`.
        x: T,
        /// Added to `x` first.
        add: Option<T>,
        /// Receives `x + add`; present if and only if `add` is.
        sum: Option<T>,
        /// `[1, group]`; absent: ones.
        weight: Option<T>,
        /// `[1, group]`; absent: zeros.
        bias: Option<T>,
        /// `[rows, cols]`.
        out: T,
        /// The kind of norm.
        kind: NormKind,
        /// Added under the square root.
        eps: f32,
        /// Group size in elements; divides `cols`.
        group: u32,
    },
    /// Products of the same input with one or more weights.
    MatMul {
        /// `[rows, cols]`.
        x: T,
        /// The weights: at least one, two under [`Epilogue::Glu`], one under [`Epilogue::Add`].
        parts: Parts<T>,
        /// Applied to the products.
        epilogue: Epilogue<T>,
        /// `[rows, rows of the weight]`: one per part, or a single one under an epilogue.
        outs: ArrayVec<T, MAX_PARTS>,
    },
    /// Rotary position embedding (Su et al. 2021) of each head.
    Rope {
        /// `[tokens, heads * head_dim]`.
        x: T,
        /// The same shape.
        out: T,
        /// How heads are rotated.
        rotation: Rotation<T>,
    },
    /// Stores keys and values of the step's tokens in the KV cache.
    KvWrite {
        /// `[tokens, kv_heads * key_dim]`; of a latent cache, the elements of keys behind the values.
        k: T,
        /// `[tokens, kv_heads * value_dim]`.
        v: T,
        /// The cache.
        state: S,
    },
    /// Rotates queries and keys alike, and stores the keys and the values: [`Op::Rope`] of `q` and of `k`,
    /// then [`Op::KvWrite`].
    RopeKv {
        /// `[tokens, heads * head_dim]`.
        q: T,
        /// `[tokens, kv_heads * head_dim]`, not rotated yet.
        k: T,
        /// `[tokens, kv_heads * value_dim]`.
        v: T,
        /// The rotated queries, in the shape of `q`.
        out: T,
        /// The cache. Its keys have `head_dim` elements, and its format no blocks.
        state: S,
        /// How heads are rotated.
        rotation: Rotation<T>,
    },
    /// Attention over the KV cache; query head h uses KV head `h * kv_heads / heads`.
    Attend {
        /// `[tokens, heads * key_dim]`.
        q: T,
        /// The cache, which says what a token sees.
        state: S,
        /// `[tokens, heads * value_dim]`.
        out: T,
        /// Query heads.
        heads: u32,
        /// A factor on the scores.
        scale: f32,
        /// One more, by the token's position (Llama 4's temperature tuning).
        #[cfg_attr(feature = "replay", serde(default))]
        growth: Option<Growth>,
        /// `cap * tanh(score / cap)` before the softmax.
        softcap: Option<f32>,
        /// For each head a factor on the distance between the token's position and that of the key, which is taken off the score
        /// after the soft cap (ALiBi, Press et al. 2022).
        #[cfg_attr(feature = "replay", serde(default))]
        slopes: Option<Arc<[f32]>>,
        /// `[1, heads]`: an extra logit in each head's softmax denominator.
        sinks: Option<T>,
    },
    /// A causal convolution of each channel over the last `taps` tokens of its sequence, zeros before its first:
    /// `out[t][c] = bias[c] + Σ weight[c][j] · x[t - taps + 1 + j][c]`, taps in order.
    Conv {
        /// `[tokens, channels]`.
        x: T,
        /// `[channels, taps]`.
        weight: T,
        /// `[1, channels]`; absent: zeros.
        bias: Option<T>,
        /// The last `taps - 1` inputs of each channel, oldest first: a recurrent state of `channels` heads of
        /// 1 by `taps - 1`.
        state: S,
        /// `[tokens, channels]`.
        out: T,
    },
    /// A linear recurrence, token by token. For each head, with a state `S` of `key_dim` by `value_dim` and
    /// `rate = softplus(decay)`: `S ← exp(a · rate) · S`, where each row of `S` may have a decay or an `a` of its own, then
    /// `S ← S + k uᵀ` with the update `u` of the rule, then `out` of the rule.
    Recur {
        /// `[tokens, key_heads * key_dim]`.
        q: T,
        /// `[tokens, key_heads * key_dim]`.
        k: T,
        /// `[tokens, heads * value_dim]`.
        v: T,
        /// `[tokens, heads]`, or with the delta rule `[tokens, heads * key_dim]` (Kimi Team 2025).
        decay: T,
        /// `[1, heads]` or `[1, heads * key_dim]` (Gu & Dao 2023).
        a: T,
        /// What a token adds to the state, and what its result is.
        rule: Rule<T>,
        /// A recurrent state.
        state: S,
        /// `[tokens, heads * value_dim]`.
        out: T,
    },
    /// Some elements of each group of columns: elements `first..first + len` of each `group` elements of a row, where
    /// `len` is as much as makes the columns of `out`.
    Slice {
        /// `[rows, groups * group]`.
        x: T,
        /// `[rows, groups * len]`.
        out: T,
        /// Elements of a group of `x`.
        group: u32,
        /// The first element.
        first: u32,
    },
    /// The reverse of [`Op::Slice`]: each `group` elements of a row of `out` are the next `first` elements of `a`, and then the next
    /// of `b`, or all of them if it has as many columns as one group takes.
    Join {
        /// `[rows, groups * first]`.
        a: T,
        /// `[rows, groups * (group - first)]` or `[rows, group - first]`.
        b: T,
        /// `[rows, groups * group]`.
        out: T,
        /// Elements of a group of `out`.
        group: u32,
        /// Those of them that are of `a`.
        first: u32,
    },
    /// The product of each block of columns with a matrix of its own, such as one for each head.
    BlockMatMul {
        /// `[rows, blocks * cols]`.
        x: T,
        /// Blocks × `[outputs, cols]`.
        weight: T,
        /// `[rows, blocks * outputs]`.
        out: T,
    },
    /// The product with a weight, element by element: column c with element `c mod n` of `n`.
    Mul {
        /// `[rows, cols]`.
        x: T,
        /// `[1, n]`; n divides `cols`.
        weight: T,
        /// `[rows, cols]`.
        out: T,
    },
    /// What [`Op::Norm`] divides each group by: `sqrt(mean(x²) + eps)`, or `sqrt(var(x) + eps)`.
    Spread {
        /// `[rows, cols]`.
        x: T,
        /// `[rows, cols / group]`.
        out: T,
        /// The kind of norm.
        kind: NormKind,
        /// Added under the square root.
        eps: f32,
        /// Group size in elements; divides `cols`.
        group: u32,
    },
    /// Weighted sums of the parts of each row, with factors of its own: part i of the result is
    /// `Σ factors[i · parts + j] · part j`, in order of j.
    Mix {
        /// `[rows, parts * len]`.
        x: T,
        /// `[rows, sums * parts]`.
        factors: T,
        /// `[rows, sums * len]`.
        out: T,
        /// Parts of a row of `x`.
        parts: u32,
    },
    /// `out = act(gate) * up`.
    Glu {
        /// `[rows, cols]`.
        gate: T,
        /// `[rows, cols]`.
        up: T,
        /// `[rows, cols]`.
        out: T,
        /// The activation.
        act: Gate,
    },
    /// `out = a + b`.
    Add {
        /// `[rows, cols]`.
        a: T,
        /// `[rows, cols]`.
        b: T,
        /// `[rows, cols]`.
        out: T,
    },
    /// An element-wise function.
    Unary {
        /// `[rows, cols]`.
        x: T,
        /// `[rows, cols]`.
        out: T,
        /// The function.
        f: Unary,
    },
    /// Chooses experts for each token, in order of decreasing gated value (for [`Gating::SoftmaxOfTop`], of the logit);
    /// the lower index comes first on ties, and NaN before all other values. Weights are the gated values, also where something
    /// else was added to choose.
    Route {
        /// `[tokens, experts]`.
        logits: T,
        /// Added to the gated values to choose, `[1, experts]` (DeepSeek-AI 2024).
        bias: Option<T>,
        /// Which experts a token may choose; `None`: all.
        groups: Option<Groups>,
        /// `[tokens, used]`, `I32`.
        ids: T,
        /// `[tokens, used]`.
        weights: T,
        /// How logits become weights.
        gating: Gating,
        /// Whether the chosen weights are divided by their sum.
        normalise: bool,
        /// A factor on the weights.
        scale: f32,
        /// One more factor for each expert, `[1, experts]`, after all else (Gemma 4); absent: ones.
        scales: Option<T>,
    },
    /// Gated feed-forward experts: `out = Σ weight · down(act(gate x) * (up x))` in the order of `ids`.
    Experts {
        /// `[tokens, cols]`.
        x: T,
        /// `[tokens, used]`, `I32`.
        ids: T,
        /// `[tokens, used]`.
        weights: T,
        /// Experts × `[hidden, cols]`.
        gate: T,
        /// Experts × `[hidden, cols]`.
        up: T,
        /// Experts × `[cols, hidden]`.
        down: T,
        /// Biases `[experts, rows]` of gate, up and down.
        biases: Option<[T; 3]>,
        /// `[tokens, cols]`.
        out: T,
        /// The activation.
        act: Gate,
    },
    /// The index of each row's largest element, the lowest on ties; [`NOT_FINITE`] if that element is not
    /// finite or the row contains NaN.
    ArgMax {
        /// `[rows, cols]`.
        x: T,
        /// `[rows, 1]`, `I32`.
        out: T,
    },
    /// Each row's `k` largest elements, largest first, in IEEE 754's total order with NaN above all other
    /// values; the lower index comes first on ties.
    TopK {
        /// `[rows, cols]`.
        x: T,
        /// Their indices, `[rows, k]`, `I32`.
        ids: T,
        /// `[rows, k]`.
        values: T,
    },
}

/// The result of [`Op::ArgMax`] for a row without a largest finite number.
pub const NOT_FINITE: i32 = -1;

impl<T, S> Op<T, S> {
    /// The op's name.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "Embed",
            Op::Gather { .. } => "Gather",
            Op::Norm { .. } => "Norm",
            Op::MatMul { .. } => "MatMul",
            Op::Rope { .. } => "Rope",
            Op::KvWrite { .. } => "KvWrite",
            Op::RopeKv { .. } => "RopeKv",
            Op::Attend { .. } => "Attend",
            Op::Conv { .. } => "Conv",
            Op::Recur { .. } => "Recur",
            Op::Slice { .. } => "Slice",
            Op::Join { .. } => "Join",
            Op::BlockMatMul { .. } => "BlockMatMul",
            Op::Mul { .. } => "Mul",
            Op::Spread { .. } => "Spread",
            Op::Mix { .. } => "Mix",
            Op::Glu { .. } => "Glu",
            Op::Add { .. } => "Add",
            Op::Unary { .. } => "Unary",
            Op::Route { .. } => "Route",
            Op::Experts { .. } => "Experts",
            Op::ArgMax { .. } => "ArgMax",
            Op::TopK { .. } => "TopK",
        }
    }

    /// Returns the same op on other operands: `t` maps tensors, `s` maps caches. This is the only list of
    /// every op's operands. It visits the operands that an op reads before those that it writes.
    ///
    /// # Errors
    /// The errors of `t` and `s`.
    pub fn try_map<'a, U, V, E>(
        &'a self,
        mut t: impl FnMut(&'a T, Access) -> std::result::Result<U, E>,
        mut s: impl FnMut(&'a S, Access) -> std::result::Result<V, E>,
    ) -> std::result::Result<Op<U, V>, E> {
        use Access::{Read, Write};
        Ok(match self {
            Op::Embed { table, index, out, scale } => {
                Op::Embed { table: t(table, Read)?, index: *index, out: t(out, Write)?, scale: *scale }
            }
            Op::Gather { x, out } => Op::Gather { x: t(x, Read)?, out: t(out, Write)? },
            Op::Norm { x, add, sum, weight, bias, out, kind, eps, group } => Op::Norm {
                x: t(x, Read)?,
                add: add.as_ref().map(|x| t(x, Read)).transpose()?,
                weight: weight.as_ref().map(|x| t(x, Read)).transpose()?,
                bias: bias.as_ref().map(|x| t(x, Read)).transpose()?,
                out: t(out, Write)?,
                sum: sum.as_ref().map(|x| t(x, Write)).transpose()?,
                kind: *kind,
                eps: *eps,
                group: *group,
            },
            Op::MatMul { x, parts, epilogue, outs } => {
                let x = t(x, Read)?;
                let epilogue = match epilogue {
                    Epilogue::None => Epilogue::None,
                    Epilogue::Glu(act) => Epilogue::Glu(*act),
                    Epilogue::Add(residual) => Epilogue::Add(t(residual, Read)?),
                };
                let mut to = (Parts::new(), ArrayVec::new());
                for Part { weight, bias } in parts {
                    let weight = t(weight, Read)?;
                    to.0.push(Part { weight, bias: bias.as_ref().map(|x| t(x, Read)).transpose()? });
                }
                for out in outs {
                    to.1.push(t(out, Write)?);
                }
                Op::MatMul { x, parts: to.0, epilogue, outs: to.1 }
            }
            Op::Rope { x, out, rotation } => {
                let x = t(x, Read)?;
                let factors = rotation.factors.as_ref().map(|x| t(x, Read)).transpose()?;
                Op::Rope { x, out: t(out, Write)?, rotation: rotation.with_factors(factors) }
            }
            Op::KvWrite { k, v, state } => {
                Op::KvWrite { k: t(k, Read)?, v: t(v, Read)?, state: s(state, Write)? }
            }
            Op::RopeKv { q, k, v, out, state, rotation } => {
                let (q, k, v) = (t(q, Read)?, t(k, Read)?, t(v, Read)?);
                let factors = rotation.factors.as_ref().map(|x| t(x, Read)).transpose()?;
                let rotation = rotation.with_factors(factors);
                Op::RopeKv { q, k, v, out: t(out, Write)?, state: s(state, Write)?, rotation }
            }
            Op::Attend { q, state, out, heads, scale, growth, softcap, slopes, sinks } => Op::Attend {
                growth: growth.clone(),
                slopes: slopes.clone(),
                q: t(q, Read)?,
                state: s(state, Read)?,
                sinks: sinks.as_ref().map(|x| t(x, Read)).transpose()?,
                out: t(out, Write)?,
                heads: *heads,
                scale: *scale,
                softcap: *softcap,
            },
            Op::Conv { x, weight, bias, state, out } => Op::Conv {
                x: t(x, Read)?,
                weight: t(weight, Read)?,
                bias: bias.as_ref().map(|x| t(x, Read)).transpose()?,
                state: s(state, Write)?,
                out: t(out, Write)?,
            },
            Op::Recur { q, k, v, decay, a, rule, state, out } => Op::Recur {
                q: t(q, Read)?,
                k: t(k, Read)?,
                v: t(v, Read)?,
                decay: t(decay, Read)?,
                a: t(a, Read)?,
                rule: match rule {
                    Rule::Delta { beta, scale, neighbours } => {
                        Rule::Delta { beta: t(beta, Read)?, scale: *scale, neighbours: *neighbours }
                    }
                    Rule::Scan { d } => Rule::Scan { d: t(d, Read)? },
                },
                state: s(state, Write)?,
                out: t(out, Write)?,
            },
            Op::Slice { x, out, group, first } => {
                Op::Slice { x: t(x, Read)?, out: t(out, Write)?, group: *group, first: *first }
            }
            Op::Join { a, b, out, group, first } => {
                let (a, b) = (t(a, Read)?, t(b, Read)?);
                Op::Join { a, b, out: t(out, Write)?, group: *group, first: *first }
            }
            Op::BlockMatMul { x, weight, out } => {
                Op::BlockMatMul { x: t(x, Read)?, weight: t(weight, Read)?, out: t(out, Write)? }
            }
            Op::Mul { x, weight, out } => {
                Op::Mul { x: t(x, Read)?, weight: t(weight, Read)?, out: t(out, Write)? }
            }
            Op::Spread { x, out, kind, eps, group } => {
                Op::Spread { x: t(x, Read)?, out: t(out, Write)?, kind: *kind, eps: *eps, group: *group }
            }
            Op::Mix { x, factors, out, parts } => {
                Op::Mix { x: t(x, Read)?, factors: t(factors, Read)?, out: t(out, Write)?, parts: *parts }
            }
            Op::Glu { gate, up, out, act } => {
                Op::Glu { gate: t(gate, Read)?, up: t(up, Read)?, out: t(out, Write)?, act: *act }
            }
            Op::Add { a, b, out } => Op::Add { a: t(a, Read)?, b: t(b, Read)?, out: t(out, Write)? },
            Op::Unary { x, out, f } => Op::Unary { x: t(x, Read)?, out: t(out, Write)?, f: *f },
            Op::Route { logits, bias, groups, ids, weights, gating, normalise, scale, scales } => Op::Route {
                logits: t(logits, Read)?,
                bias: bias.as_ref().map(|x| t(x, Read)).transpose()?,
                scales: scales.as_ref().map(|x| t(x, Read)).transpose()?,
                groups: *groups,
                ids: t(ids, Write)?,
                weights: t(weights, Write)?,
                gating: *gating,
                normalise: *normalise,
                scale: *scale,
            },
            Op::Experts { x, ids, weights, gate, up, down, biases, out, act } => Op::Experts {
                x: t(x, Read)?,
                ids: t(ids, Read)?,
                weights: t(weights, Read)?,
                gate: t(gate, Read)?,
                up: t(up, Read)?,
                down: t(down, Read)?,
                biases: match biases {
                    Some([gate, up, down]) => Some([t(gate, Read)?, t(up, Read)?, t(down, Read)?]),
                    None => None,
                },
                out: t(out, Write)?,
                act: *act,
            },
            Op::ArgMax { x, out } => Op::ArgMax { x: t(x, Read)?, out: t(out, Write)? },
            Op::TopK { x, ids, values } => {
                Op::TopK { x: t(x, Read)?, ids: t(ids, Write)?, values: t(values, Write)? }
            }
        })
    }

    /// Calls `f` with every tensor that the op uses.
    pub fn tensors<'a>(&'a self, mut f: impl FnMut(&'a T, Access)) {
        let nothing: std::result::Result<Op<(), ()>, std::convert::Infallible> = self.try_map(
            |id, access| {
                f(id, access);
                Ok(())
            },
            |_, _| Ok(()),
        );
        let Ok(_) = nothing;
    }
}

impl<T, S> Op<T, S> {
    /// [`Op::MatMul`] with one weight and no epilogue.
    pub fn product(x: T, weight: T, bias: Option<T>, out: T) -> Self {
        let (mut parts, mut outs) = (Parts::new(), ArrayVec::new());
        parts.push(Part { weight, bias });
        outs.push(out);
        Op::MatMul { x, parts, epilogue: Epilogue::None, outs }
    }
}

impl<T, S> Op<T, S> {
    /// Whether the op writes a state.
    pub fn writes_state(&self) -> bool {
        let mut writes = false;
        let nothing: std::result::Result<Op<(), ()>, std::convert::Infallible> = self.try_map(
            |_, _| Ok(()),
            |_, access| {
                writes |= access == Access::Write;
                Ok(())
            },
        );
        let Ok(_) = nothing;
        writes
    }
}

impl Op {
    /// Calls `f` with every tensor that the op reads, weights included.
    pub fn inputs(&self, f: &mut dyn FnMut(TensorId)) {
        self.tensors(|&id, access| {
            if access == Access::Read {
                f(id)
            }
        });
    }

    /// Calls `f` with every tensor that the op writes.
    pub fn outputs(&self, f: &mut dyn FnMut(TensorId)) {
        self.tensors(|&id, access| {
            if access == Access::Write {
                f(id)
            }
        });
    }
}

/// Consecutive ops that share a set of weights: usually one layer. The unit of weight streaming.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Segment {
    /// Name for messages and profiles.
    pub name: String,
    /// In order of execution.
    pub ops: Vec<Op>,
}

/// The results of a program for the outputs of a step. Each is in an output slot.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Outputs {
    /// Logits, `[outputs, vocab]`.
    pub logits: Option<TensorId>,
    /// Each row's most likely token, `[outputs, 1]` of `I32`.
    pub arg_max: Option<TensorId>,
    /// Each row's most likely tokens, `[outputs, k]` of `I32`, and their logits, `[outputs, k]`.
    pub top: Option<[TensorId; 2]>,
    /// An encoder's hidden state, `[outputs, embedding]`.
    pub hidden: Option<TensorId>,
}

/// A model as data: tensors, KV caches and a flat list of ops.
#[cfg_attr(feature = "replay", derive(serde::Serialize, serde::Deserialize))]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Program {
    /// The model's name.
    pub name: String,
    /// Every tensor, by [`TensorId`].
    pub tensors: Vec<Tensor>,
    /// Every state, by [`StateId`].
    pub states: Vec<State>,
    /// Distinct window sizes of the states. States of the same window form a *KV group*: a sequence keeps
    /// pages for the same positions of each, so they share a page table; see
    /// [`Span::tables`](crate::backend::Span::tables).
    pub windows: Vec<Option<u32>>,
    /// In order of execution.
    pub segments: Vec<Segment>,
    /// Tensors in weight slots, in slot order.
    pub weights: Vec<TensorId>,
    /// Tensors in input and output slots, in slot order.
    pub io: Vec<TensorId>,
    /// The tensors that are results.
    pub outputs: Outputs,
}

impl Program {
    /// Returns a tensor's description. For an id of another program, returns an empty description.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        static NOTHING: Tensor = Tensor {
            name: String::new(),
            experts: 0,
            rows: Dim::Fixed(0),
            cols: 0,
            format: Format::F32,
            layout: Layout::Rows,
            slot: Slot::Scratch,
            part: None,
        };
        self.tensors.get(id.0 as usize).unwrap_or(&NOTHING)
    }

    /// Finds a tensor by name.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.tensors.iter().position(|t| t.name == name).map(|i| TensorId(i as u32))
    }

    /// Returns all ops with their segment's index, in order of execution.
    pub fn ops(&self) -> impl Iterator<Item = (usize, &Op)> {
        self.segments.iter().enumerate().flat_map(|(i, s)| s.ops.iter().map(move |op| (i, op)))
    }

    /// Returns the segments that compute `outputs` and fill the KV cache, as few contiguous ranges.
    pub fn segments_for(&self, outputs: &[TensorId]) -> Vec<Range<usize>> {
        let mut needed: HashSet<TensorId> = outputs.iter().copied().collect();
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (i, segment) in self.segments.iter().enumerate().rev() {
            let mut used = false;
            for op in &segment.ops {
                used |= op.writes_state();
                op.outputs(&mut |id| used |= needed.contains(&id));
            }
            if !used {
                continue;
            }
            for op in &segment.ops {
                op.inputs(&mut |id| _ = needed.insert(id));
            }
            match runs.last_mut().filter(|run| run.start == i + 1) {
                Some(run) => run.start = i,
                None => runs.push(i..i + 1),
            }
        }
        runs.reverse();
        runs
    }

    /// Returns the segments of a step that computes the most likely token, or an encoder's hidden state.
    pub fn greedy_segments(&self) -> Vec<Range<usize>> {
        let Outputs { arg_max, hidden, .. } = self.outputs;
        let outputs: Vec<TensorId> = [arg_max, hidden].into_iter().flatten().collect();
        // A program without named outputs, such as a single op, runs all of its segments.
        let all = 0..self.segments.len();
        if outputs.is_empty() { vec![all] } else { self.segments_for(&outputs) }
    }

    /// Returns the ops of [`Program::greedy_segments`].
    pub fn greedy_ops(&self) -> impl Iterator<Item = (usize, &Op)> {
        let segments = self.greedy_segments();
        self.ops().filter(move |(i, _)| segments.iter().any(|run| run.contains(i)))
    }

    /// Returns the bytes of a fixed-size tensor (a weight).
    pub fn fixed_bytes(&self, id: TensorId) -> Option<u64> {
        let t = self.tensor(id);
        let Dim::Fixed(rows) = t.rows else { return None };
        crate::gguf::tensor_bytes(t.format, t.cols.into(), u64::from(rows) * u64::from(t.experts))
    }

    /// Returns the bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.iter().filter_map(|&id| self.fixed_bytes(id)).sum()
    }

    /// Whether a layer is recurrent.
    pub fn has_recurrent_states(&self) -> bool {
        self.states.iter().any(|s| s.kind == StateKind::Recurrent)
    }

    /// Whether the KV group with this window is that of recurrent states.
    pub fn is_recurrent(&self, window: Option<u32>) -> bool {
        window == State::RECURRENT_WINDOW && self.has_recurrent_states()
    }

    /// Returns the KV group of a state: its index in [`Program::windows`].
    pub fn kv_group(&self, state: &State) -> usize {
        self.windows.iter().position(|&window| window == state.window).unwrap_or(usize::MAX)
    }

    /// Returns the bytes of a KV cache in which a state has `pages(window)` pages.
    pub fn kv_bytes(&self, pages: impl Fn(Option<u32>) -> u64) -> u64 {
        self.states
            .iter()
            .map(|s| pages(s.window).saturating_mul(s.page_bytes()))
            .fold(0, u64::saturating_add)
    }

    /// Checks shapes, formats and the order of definitions.
    ///
    /// # Errors
    /// [`Error::Program`] that names the op and tensor at fault.
    pub fn validate(&self) -> Result<()> {
        crate::validate::validate(self)
    }
}

/// A weight in a model file.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct WeightInfo {
    /// One to four dimensions, the row length first.
    pub dims: Vec<u64>,
    /// Element format.
    pub format: Format,
    /// Row layout of each matrix.
    pub layout: Layout,
}

impl WeightInfo {
    /// A weight with plain rows.
    pub fn new(dims: Vec<u64>, format: Format) -> WeightInfo {
        WeightInfo { dims, format, layout: Layout::Rows }
    }
}

crate::setters!(WeightInfo { layout: Layout });

/// Records a [`Program`]. Infers and checks shapes as ops are added. [`Builder::finish`] returns the first
/// error, so that a model's code needs no `?` on every line.
pub struct Builder<'a> {
    program: Program,
    lookup: &'a dyn Fn(&str) -> Option<WeightInfo>,
    by_name: HashMap<String, TensorId>,
    prefix: String,
    error: Option<Error>,
}

impl<'a> Builder<'a> {
    /// Starts an empty program whose weights are found with `lookup`.
    pub fn new(name: &str, lookup: &'a dyn Fn(&str) -> Option<WeightInfo>) -> Self {
        let program = Program {
            name: name.into(),
            tensors: Vec::new(),
            states: Vec::new(),
            windows: Vec::new(),
            segments: Vec::new(),
            weights: Vec::new(),
            io: Vec::new(),
            outputs: Outputs::default(),
        };
        Builder { program, lookup, by_name: HashMap::new(), prefix: String::new(), error: None }
    }

    /// Starts a segment. Names of later tensors get the prefix `name.`.
    pub fn segment(&mut self, name: &str) {
        self.program.segments.push(Segment { name: name.into(), ops: Vec::new() });
        self.prefix = format!("{name}.");
    }

    /// The program's results, for the caller to set. [`Builder::output`] makes a tensor readable.
    pub fn outputs(&mut self) -> &mut Outputs {
        &mut self.program.outputs
    }

    /// Records an error; [`Builder::finish`] returns the first one.
    pub fn fail(&mut self, message: String) {
        self.error.get_or_insert(Error::Model(message));
    }

    /// Appends an op unchanged; the typed methods below build the unfused forms.
    pub fn op(&mut self, op: Op) {
        self.push(op);
    }

    fn push(&mut self, op: Op) {
        if self.program.segments.is_empty() {
            self.segment("main");
        }
        if let Some(segment) = self.program.segments.last_mut() {
            segment.ops.push(op);
        }
    }

    fn add_tensor(&mut self, tensor: Tensor) -> TensorId {
        let id = TensorId(self.program.tensors.len() as u32);
        match tensor.slot {
            Slot::Weight(_) => self.program.weights.push(id),
            Slot::Io(_) => self.program.io.push(id),
            Slot::Scratch => {}
        }
        self.by_name.insert(tensor.name.clone(), id);
        self.program.tensors.push(tensor);
        id
    }

    /// Adds the result tensor of an op.
    fn result(&mut self, name: &str, rows: Dim, cols: u32, format: Format) -> TensorId {
        let mut full = format!("{}{name}", self.prefix);
        let mut n = 1;
        while self.by_name.contains_key(&full) {
            n += 1;
            full = format!("{}{name}_{n}", self.prefix);
        }
        self.add_tensor(Tensor {
            name: full,
            experts: 1,
            rows,
            cols,
            format,
            layout: Layout::Rows,
            slot: Slot::Scratch,
            part: None,
        })
    }

    fn like(&mut self, name: &str, x: TensorId) -> TensorId {
        let (rows, cols) = self.shape(x);
        self.result(name, rows, cols, Format::F32)
    }

    /// Returns the rows and columns of a tensor.
    pub fn shape(&self, id: TensorId) -> (Dim, u32) {
        let t = self.program.tensor(id);
        (t.rows, t.cols)
    }

    /// Whether the file has a weight of this name.
    pub fn has(&self, name: &str) -> bool {
        (self.lookup)(name).is_some()
    }

    /// Adds an optional weight `[rows, cols]`; a wrong shape is an error, absence is not.
    pub fn optional(&mut self, name: &str, rows: u32, cols: u32) -> Option<TensorId> {
        self.has(name).then(|| self.weight(name, rows, cols))
    }

    /// Adds a required weight `[rows, cols]`.
    pub fn weight(&mut self, name: &str, rows: u32, cols: u32) -> TensorId {
        self.expert_weight(name, 1, rows, cols)
    }

    /// Adds a required matrix `[rows, cols]` of a file as a vector, row after row.
    pub fn flat(&mut self, name: &str, rows: u32, cols: u32) -> TensorId {
        let (format, layout) = self.look_up(name, [cols, rows, 1]);
        self.add_weight(Tensor {
            name: name.into(),
            experts: 1,
            rows: Dim::Fixed(1),
            cols: rows.saturating_mul(cols),
            format,
            layout,
            slot: Slot::Scratch,
            part: Some(FilePart { of: name.into(), first_element: 0 }),
        })
    }

    /// Adds a required weight of `experts` matrices `[rows, cols]`.
    pub fn expert_weight(&mut self, name: &str, experts: u32, rows: u32, cols: u32) -> TensorId {
        let (format, layout) = self.look_up(name, [cols, rows, experts]);
        self.add_weight(Tensor {
            name: name.into(),
            experts,
            rows: Dim::Fixed(rows),
            cols,
            format,
            layout,
            slot: Slot::Scratch,
            part: None,
        })
    }

    /// Adds rows `range` of a required weight `[rows, cols]` as a separate weight, for files that store
    /// several matrices in one tensor. Devices that read mapped pages copy nothing.
    pub fn weight_rows(&mut self, name: &str, rows: u32, range: Range<u32>, cols: u32) -> TensorId {
        let (format, mut layout) = self.look_up(name, [cols, rows, 1]);
        if !part_as_stored(layout, range.clone(), rows) {
            layout = Layout::Rows;
        }
        let first_element = u64::from(range.start) * u64::from(cols);
        self.add_weight(Tensor {
            name: format!("{name}[{}..{}]", range.start, range.end),
            experts: 1,
            rows: Dim::Fixed(range.len() as u32),
            cols,
            format,
            layout,
            slot: Slot::Scratch,
            part: Some(FilePart { of: name.into(), first_element }),
        })
    }

    /// Adds rows `range` of each of `experts` matrices `[rows, cols]` as a separate weight. It is a copy on all devices.
    pub fn expert_rows(
        &mut self,
        name: &str,
        experts: u32,
        rows: u32,
        range: Range<u32>,
        cols: u32,
    ) -> TensorId {
        let (format, mut layout) = self.look_up(name, [cols, rows, experts]);
        if !part_as_stored(layout, range.clone(), rows) {
            layout = Layout::Rows;
        }
        self.add_weight(Tensor {
            name: format!("{name}[{}..{}]", range.start, range.end),
            experts,
            rows: Dim::Fixed(range.len() as u32),
            cols,
            format,
            layout,
            slot: Slot::Scratch,
            part: Some(FilePart { of: name.into(), first_element: u64::from(range.start) * u64::from(cols) }),
        })
    }

    /// Adds some of the `experts` matrices `[rows, cols]` of a required weight as one matrix, one below the other.
    pub fn stacked(&mut self, name: &str, experts: u32, which: Range<u32>, rows: u32, cols: u32) -> TensorId {
        let (format, layout) = self.look_up(name, [cols, rows, experts]);
        // Groups of rows would begin in one matrix and end in the next.
        let whole = rows.is_multiple_of(formats::ROWS as u32) || which.len() == 1;
        self.add_weight(Tensor {
            name: format!("{name}[{}..{}]", which.start, which.end),
            experts: 1,
            rows: Dim::Fixed(rows.saturating_mul(which.len() as u32)),
            cols,
            format,
            layout: if whole { layout } else { Layout::Rows },
            slot: Slot::Scratch,
            part: Some(FilePart {
                of: name.into(),
                first_element: u64::from(which.start) * u64::from(rows) * u64::from(cols),
            }),
        })
    }

    /// Adds a required vector of a file as a matrix of one column.
    pub fn column(&mut self, name: &str, rows: u32) -> TensorId {
        let (format, _) = self.look_up(name, [rows, 1, 1]);
        self.add_weight(Tensor {
            name: format!("{name}[column]"),
            experts: 1,
            rows: Dim::Fixed(rows),
            cols: 1,
            format,
            layout: Layout::Rows,
            slot: Slot::Scratch,
            part: Some(FilePart { of: name.into(), first_element: 0 }),
        })
    }

    /// Adds elements `range` of an optional vector of `len`; a wrong shape is an error, absence is not.
    pub fn optional_elements(&mut self, name: &str, len: u32, range: Range<u32>) -> Option<TensorId> {
        self.has(name).then(|| {
            let (format, _) = self.look_up(name, [len, 1, 1]);
            self.add_weight(Tensor {
                name: format!("{name}[{}..{}]", range.start, range.end),
                experts: 1,
                rows: Dim::Fixed(1),
                cols: range.len() as u32,
                format,
                layout: Layout::Rows,
                slot: Slot::Scratch,
                part: Some(FilePart { of: name.into(), first_element: range.start.into() }),
            })
        })
    }

    /// Finds a tensor in the file and checks its shape.
    fn look_up(&mut self, name: &str, shape: [u32; 3]) -> (Format, Layout) {
        let mut expected = shape.to_vec();
        while expected.len() > 1 && expected.last() == Some(&1) {
            expected.pop();
        }
        let Some(info) = (self.lookup)(name) else {
            self.fail(format!("tensor `{name}` {expected:?} is missing from the file"));
            return (Format::F32, Layout::Rows);
        };
        let mut dims = [1u64; 4];
        for (to, from) in dims.iter_mut().zip(&info.dims) {
            *to = *from;
        }
        if dims != [shape[0], shape[1], shape[2], 1].map(u64::from) {
            self.fail(format!("tensor `{name}`: expected shape {expected:?}, got {:?}", info.dims));
        }
        (info.format, info.layout)
    }

    /// Adds a weight in the next slot, or returns the one of this name.
    fn add_weight(&mut self, tensor: Tensor) -> TensorId {
        if let Some(&id) = self.by_name.get(&tensor.name) {
            let t = self.program.tensor(id);
            if (t.experts, t.rows, t.cols) != (tensor.experts, tensor.rows, tensor.cols) {
                self.fail(format!("tensor `{}` is used with two different shapes", tensor.name));
            }
            return id;
        }
        let slot = Slot::Weight(self.program.weights.len() as u32);
        self.add_tensor(Tensor { slot, ..tensor })
    }

    /// Adds an input that the caller binds.
    pub fn input(&mut self, name: &str, rows: Dim, cols: u32) -> TensorId {
        let slot = Slot::Io(self.program.io.len() as u32);
        self.add_tensor(Tensor {
            name: name.into(),
            experts: 1,
            rows,
            cols,
            format: Format::F32,
            layout: Layout::Rows,
            slot,
            part: None,
        })
    }

    /// Adds a layer's KV cache, or returns the one of this name.
    pub fn state(&mut self, state: State) -> StateId {
        if let Some(i) = self.program.states.iter().position(|s| s.name == state.name) {
            if self.program.states[i] != state {
                self.fail(format!("two states of different shapes are named `{}`", state.name));
            }
            return StateId(i as u32);
        }
        if !self.program.windows.contains(&state.window) {
            self.program.windows.push(state.window);
        }
        self.program.states.push(state);
        StateId(self.program.states.len() as u32 - 1)
    }

    /// Makes a tensor readable by the caller.
    pub fn output(&mut self, x: TensorId) {
        let slot = Slot::Io(self.program.io.len() as u32);
        if let Some(t) = self.program.tensors.get_mut(x.0 as usize)
            && t.slot == Slot::Scratch
        {
            t.slot = slot;
            self.program.io.push(x);
        }
    }

    /// Renames a result.
    pub fn name(&mut self, x: TensorId, name: &str) {
        if self.by_name.insert(name.into(), x).is_some() {
            self.fail(format!("two results are named `{name}`"));
        }
        if let Some(t) = self.program.tensors.get_mut(x.0 as usize) {
            self.by_name.remove(&t.name);
            t.name = name.into();
        }
    }

    /// [`Op::Embed`].
    pub fn embed(&mut self, table: TensorId, index: Index, scale: f32) -> TensorId {
        let cols = self.shape(table).1;
        let out = self.result("embed", Dim::Tokens, cols, Format::F32);
        self.push(Op::Embed { table, index, out, scale });
        out
    }

    /// [`Op::Gather`].
    pub fn gather(&mut self, x: TensorId) -> TensorId {
        let cols = self.shape(x).1;
        let out = self.result("gather", Dim::Outputs, cols, Format::F32);
        self.push(Op::Gather { x, out });
        out
    }

    /// [`Op::Norm`] without `add`.
    #[allow(clippy::too_many_arguments)]
    pub fn norm(
        &mut self,
        name: &str,
        x: TensorId,
        kind: NormKind,
        weight: Option<TensorId>,
        bias: Option<TensorId>,
        eps: f32,
        group: u32,
    ) -> TensorId {
        let out = self.like(name, x);
        self.push(Op::Norm { x, add: None, sum: None, weight, bias, out, kind, eps, group });
        out
    }

    /// [`Op::MatMul`] with one weight.
    pub fn linear(&mut self, name: &str, x: TensorId, weight: TensorId, bias: Option<TensorId>) -> TensorId {
        let cols = match self.shape(weight).0 {
            Dim::Fixed(rows) => rows,
            _ => 0,
        };
        let rows = self.shape(x).0;
        let out = self.result(name, rows, cols, Format::F32);
        self.push(Op::product(x, weight, bias, out));
        out
    }

    /// [`Op::Rope`].
    pub fn rope(&mut self, name: &str, x: TensorId, rotation: &Rotation) -> TensorId {
        let out = self.like(name, x);
        self.push(Op::Rope { x, out, rotation: rotation.clone() });
        out
    }

    /// [`Op::KvWrite`].
    pub fn kv_write(&mut self, k: TensorId, v: TensorId, state: StateId) {
        self.push(Op::KvWrite { k, v, state });
    }

    /// [`Op::Attend`] with the same scale everywhere and without slopes.
    pub fn attend(
        &mut self,
        q: TensorId,
        state: StateId,
        heads: u32,
        scale: f32,
        softcap: Option<f32>,
        sinks: Option<TensorId>,
    ) -> TensorId {
        self.attend_with(q, state, heads, scale, None, softcap, None, sinks)
    }

    /// [`Op::Attend`].
    #[allow(clippy::too_many_arguments)]
    pub fn attend_with(
        &mut self,
        q: TensorId,
        state: StateId,
        heads: u32,
        scale: f32,
        growth: Option<Growth>,
        softcap: Option<f32>,
        slopes: Option<Arc<[f32]>>,
        sinks: Option<TensorId>,
    ) -> TensorId {
        let value_dim = self.program.states.get(state.0 as usize).map_or(0, |s| s.value_dim);
        let rows = self.shape(q).0;
        let out = self.result("attend", rows, heads.saturating_mul(value_dim), Format::F32);
        self.push(Op::Attend { q, state, out, heads, scale, growth, softcap, slopes, sinks });
        out
    }

    /// [`Op::Conv`].
    pub fn conv(
        &mut self,
        name: &str,
        x: TensorId,
        weight: TensorId,
        bias: Option<TensorId>,
        state: StateId,
    ) -> TensorId {
        let out = self.like(name, x);
        self.push(Op::Conv { x, weight, bias, state, out });
        out
    }

    /// [`Op::Recur`].
    pub fn recur(
        &mut self,
        [q, k, v]: [TensorId; 3],
        decay: TensorId,
        a: TensorId,
        rule: Rule,
        state: StateId,
    ) -> TensorId {
        let out = self.like("recur", v);
        self.push(Op::Recur { q, k, v, decay, a, rule, state, out });
        out
    }

    /// [`Op::Slice`]: `len` elements from `first` on of each `group`.
    pub fn slice(&mut self, name: &str, x: TensorId, group: u32, first: u32, len: u32) -> TensorId {
        let (rows, cols) = self.shape(x);
        let out = self.result(name, rows, (cols / group.max(1)).saturating_mul(len), Format::F32);
        self.push(Op::Slice { x, out, group, first });
        out
    }

    /// [`Op::Join`] of groups of `first` elements of `a` and `last` of `b`.
    pub fn join(&mut self, name: &str, a: TensorId, b: TensorId, first: u32, last: u32) -> TensorId {
        let ((rows, cols), group) = (self.shape(a), first.saturating_add(last));
        let out = self.result(name, rows, (cols / first.max(1)).saturating_mul(group), Format::F32);
        self.push(Op::Join { a, b, out, group, first });
        out
    }

    /// [`Op::BlockMatMul`].
    pub fn block_linear(&mut self, name: &str, x: TensorId, weight: TensorId) -> TensorId {
        let t = self.program.tensor(weight);
        let outputs = match t.rows {
            Dim::Fixed(rows) => t.experts.saturating_mul(rows),
            _ => 0,
        };
        let rows = self.shape(x).0;
        let out = self.result(name, rows, outputs, Format::F32);
        self.push(Op::BlockMatMul { x, weight, out });
        out
    }

    /// [`Op::Mul`].
    pub fn mul(&mut self, name: &str, x: TensorId, weight: TensorId) -> TensorId {
        let out = self.like(name, x);
        self.push(Op::Mul { x, weight, out });
        out
    }

    /// [`Op::Spread`].
    pub fn spread(&mut self, name: &str, x: TensorId, kind: NormKind, eps: f32, group: u32) -> TensorId {
        let (rows, cols) = self.shape(x);
        let out = self.result(name, rows, cols / group.max(1), Format::F32);
        self.push(Op::Spread { x, out, kind, eps, group });
        out
    }

    /// [`Op::Mix`].
    pub fn mix(&mut self, name: &str, x: TensorId, factors: TensorId, parts: u32) -> TensorId {
        let ((rows, cols), parts_or_1) = (self.shape(x), parts.max(1));
        let sums = self.shape(factors).1 / parts_or_1;
        let out = self.result(name, rows, (cols / parts_or_1).saturating_mul(sums), Format::F32);
        self.push(Op::Mix { x, factors, out, parts });
        out
    }

    /// [`Op::Glu`].
    pub fn glu(&mut self, gate: TensorId, up: TensorId, act: Gate) -> TensorId {
        let out = self.like("glu", gate);
        self.push(Op::Glu { gate, up, out, act });
        out
    }

    /// [`Op::Add`].
    pub fn add(&mut self, name: &str, a: TensorId, b: TensorId) -> TensorId {
        let out = self.like(name, a);
        self.push(Op::Add { a, b, out });
        out
    }

    /// [`Op::Unary`].
    pub fn unary(&mut self, name: &str, x: TensorId, f: Unary) -> TensorId {
        let out = self.like(name, x);
        self.push(Op::Unary { x, out, f });
        out
    }

    /// [`Op::Route`]: ids and weights of the `used` best experts of all.
    pub fn route(
        &mut self,
        logits: TensorId,
        used: u32,
        gating: Gating,
        normalise: bool,
        scale: f32,
    ) -> (TensorId, TensorId) {
        self.route_among(logits, None, None, used, gating, normalise, scale, None)
    }

    /// [`Op::Route`]: ids and weights of the `used` best experts.
    #[allow(clippy::too_many_arguments)]
    pub fn route_among(
        &mut self,
        logits: TensorId,
        bias: Option<TensorId>,
        groups: Option<Groups>,
        used: u32,
        gating: Gating,
        normalise: bool,
        scale: f32,
        scales: Option<TensorId>,
    ) -> (TensorId, TensorId) {
        let rows = self.shape(logits).0;
        let ids = self.result("expert_ids", rows, used, Format::I32);
        let weights = self.result("expert_weights", rows, used, Format::F32);
        self.push(Op::Route { logits, bias, groups, ids, weights, gating, normalise, scale, scales });
        (ids, weights)
    }

    /// [`Op::Experts`]; `weights` holds the gate, up and down projections.
    pub fn experts(
        &mut self,
        x: TensorId,
        (ids, weights): (TensorId, TensorId),
        [gate, up, down]: [TensorId; 3],
        biases: Option<[TensorId; 3]>,
        act: Gate,
    ) -> TensorId {
        let out = self.like("experts", x);
        self.push(Op::Experts { x, ids, weights, gate, up, down, biases, out, act });
        out
    }

    /// [`Op::ArgMax`].
    pub fn arg_max(&mut self, x: TensorId) -> TensorId {
        let rows = self.shape(x).0;
        let out = self.result("argmax", rows, 1, Format::I32);
        self.push(Op::ArgMax { x, out });
        out
    }

    /// [`Op::TopK`]: indices and values.
    pub fn top_k(&mut self, x: TensorId, k: u32) -> (TensorId, TensorId) {
        let rows = self.shape(x).0;
        let ids = self.result("top_ids", rows, k, Format::I32);
        let values = self.result("top_values", rows, k, Format::F32);
        self.push(Op::TopK { x, ids, values });
        (ids, values)
    }

    /// Returns the finished program.
    ///
    /// # Errors
    /// The first error while recording, or of [`Program::validate`].
    pub fn finish(self) -> Result<Program> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.program.validate()?;
        Ok(self.program)
    }
}
