//! Sizes of an op in a step, the input of lowering ([`super::lower`]).

use halite_kernels::formats::Format;
use halite_kernels::rows::Unary;

use super::places::Data;
use super::tile::{Operand, VectorWork};
use halite::backend::{Span, Step};
use halite::passes;
use halite::program::{
    self, Dim, Gating, Index, NormKind, Op, PAGE_POSITIONS, Program, Sight, State, StateKind, TensorId,
};
use halite::{Error, Result};

/// An op in a step.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Shape {
    /// Element-wise or row-wise work.
    Units(Units),
    /// Norms of rows.
    Norm(Norm),
    /// Products with weights.
    Product(Product),
    /// Products of blocks of columns, each with a matrix of its own.
    Blocks(Blocks),
    /// Attention.
    Attend(Attend),
    /// A mixture of experts.
    Experts(Experts),
    /// The largest element of rows.
    ArgMax { rows: u32, cols: u32 },
    /// The `k` largest elements of rows.
    TopK { rows: u32, cols: u32, k: u32 },
}

/// Independent units of work.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Units {
    /// Number of units.
    pub count: u32,
    /// Consecutive units that one tile computes in order: the pieces of a row. Each adds to what the vector unit keeps of those before
    /// it.
    pub pieces: u32,
    /// Operands to read.
    pub reads: Vec<Rows>,
    /// Operands to write.
    pub writes: Vec<Rows>,
    /// Work of a unit: see [`VectorWork`], in the order of its fields.
    pub work: [u64; 5],
}

/// Norms of rows, which a tile may compute in pieces.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Norm {
    /// Norms of whole rows.
    pub rows: Units,
    /// Elements of a row.
    pub elements: u32,
    /// Whether the mean is subtracted.
    pub centred: bool,
    /// Whether something is added to the rows first.
    pub adds: bool,
}

/// The rows of an operand that units access.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rows {
    /// The operand.
    pub operand: Operand,
    /// Bytes of a row.
    pub bytes: u32,
    /// The rows.
    pub index: RowIndex,
    /// What they are.
    pub data: Data,
}

/// The row of an operand that a unit accesses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RowIndex {
    /// Unit i accesses row i.
    Own,
    /// Every unit accesses the only row.
    Broadcast,
    /// Unit i accesses row number i of a list.
    Gather(Vec<u32>),
}

/// Products of rows of activations with one or more weights.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of activations.
    pub m: u32,
    /// Elements of a row.
    pub k: u32,
    /// Activations, `[m][k]` floats.
    pub x: Rows,
    /// Weights.
    pub parts: Vec<Part>,
    /// The epilogue.
    pub epilogue: Epilogue,
    /// Output row of each row of `x`; absent: the same row.
    pub out_rows: Option<Vec<u32>>,
}

/// Products of blocks of columns, each with a matrix of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Blocks {
    /// Rows of activations.
    pub m: u32,
    /// Blocks of each.
    pub blocks: u32,
    /// Elements of a block.
    pub k: u32,
    /// Rows of a matrix.
    pub n: u32,
    /// Format of the matrices.
    pub format: Format,
}

/// One weight of a [`Product`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Part {
    /// Rows of the weight.
    pub n: u32,
    /// Format of the weight.
    pub format: Format,
    /// Operand of the weight, and its first byte.
    pub weight: (Operand, u64),
    /// Operand of the bias, and its first byte.
    pub bias: Option<(Operand, u64)>,
    /// Operand of the result.
    pub out: Operand,
}

/// The epilogue of products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// A gated linear unit; the first product is the gate.
    Glu,
    /// An addition.
    Add(Operand),
}

/// Attention of tokens to a paged cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Attend {
    /// Query heads.
    pub heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of a key.
    pub key_dim: u32,
    /// Elements of a value.
    pub value_dim: u32,
    /// Format of the cache.
    pub format: Format,
    /// Whether the first elements of a key are the value.
    pub latent: bool,
    /// What a token sees.
    pub sight: Sight,
    /// Whether scores have a bias by distance.
    pub slopes: bool,
    /// Whether each head has a sink logit.
    pub sinks: bool,
    /// For each sequence: its pages, first position and number of tokens.
    pub spans: Vec<(Vec<u32>, u32, u32)>,
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Experts {
    /// Tokens.
    pub tokens: u32,
    /// Experts of each.
    pub used: u32,
    /// Experts.
    pub experts: u32,
    /// Elements of a token.
    pub cols: u32,
    /// Rows of the gate.
    pub hidden: u32,
    /// Of gate, up and down.
    pub formats: [Format; 3],
    /// Whether there are biases.
    pub biases: bool,
    /// The experts of each token, `[tokens][used]`.
    pub ids: Vec<u32>,
}

/// Operand numbers of a product: activations, addend, weight and bias of part i.
pub const X: Operand = Operand::In(0);
/// See [`X`].
pub const RESIDUAL: Operand = Operand::In(1);
/// See [`X`].
pub const fn weight(part: usize) -> Operand {
    Operand::In(2 + 2 * part)
}
/// See [`X`].
pub const fn bias(part: usize) -> Operand {
    Operand::In(3 + 2 * part)
}

const SIMPLE: VectorWork = VectorWork { simple: 1, exp: 0, rsqrt: 0, divide: 0, quantize: 0 };

fn work(w: VectorWork) -> [u64; 5] {
    [w.simple, w.exp, w.rsqrt, w.divide, w.quantize]
}

impl Units {
    /// Returns the work of `units` units.
    pub fn work(&self, units: u32) -> VectorWork {
        let [simple, exp, rsqrt, divide, quantize] = self.work;
        VectorWork { simple, exp, rsqrt, divide, quantize }.times(units.into())
    }
}

impl Rows {
    /// Each unit's own row.
    pub fn own(operand: Operand, elements: u32) -> Rows {
        Rows { operand, bytes: 4 * elements, index: RowIndex::Own, data: Data::Activations }
    }

    fn only(operand: Operand, elements: u32) -> Rows {
        Rows { operand, bytes: 4 * elements, index: RowIndex::Broadcast, data: Data::Weights }
    }
}

fn unsupported(op: &Op, what: impl std::fmt::Debug) -> Error {
    Error::Program(format!("{} with {what:?} is not simulated", op.name()))
}

/// Returns the shape of an op in a step. `ids` are the experts of the tokens, `[tokens][used]`; without them,
/// tokens are spread evenly over the experts of all chips, of which this one may have the first.
///
/// # Errors
/// [`Error::Program`] for an unsupported op.
pub fn shape(program: &Program, op: &Op, step: &Step<'_>, ids: Option<&[i32]>) -> Result<Shape> {
    let tokens = step.tokens.len() as u32;
    let rows = |id: TensorId| passes::rows(program.tensor(id).rows, tokens, step.outputs.len() as u32) as u32;
    let cols = |id: TensorId| program.tensor(id).cols;
    // Runs of elements that need not be rows.
    let elementwise = |x: TensorId, reads: usize, each: VectorWork| {
        let run = 1 << cols(x).trailing_zeros().min(6);
        Shape::Units(Units {
            count: rows(x) * (cols(x) / run),
            pieces: 1,
            reads: (0..reads).map(|i| Rows::own(Operand::In(i), run)).collect(),
            writes: vec![Rows::own(Operand::Out(0), run)],
            work: work(each.times(run.into())),
        })
    };
    Ok(match op {
        Op::Embed { table, index, out, .. } => {
            let t = program.tensor(*table);
            let indices: Vec<u32> = match index {
                Index::Token => step.tokens.to_vec(),
                Index::Position => step.spans.iter().flat_map(|s| s.start..s.start + s.len).collect(),
                Index::First => vec![0; step.tokens.len()],
                Index::Part { separator } => {
                    step.parts(*separator, passes::rows(t.rows, 0, 0) as usize)?.collect()
                }
                _ => return Err(unsupported(op, index)),
            };
            let run = run(t.cols, t.format.block_len() as u32);
            let bytes = t.format.row_bytes(run as usize).unwrap_or(0) as u32;
            Shape::Units(Units {
                count: rows(*out) * (t.cols / run),
                pieces: 1,
                reads: vec![Rows {
                    operand: Operand::In(0),
                    bytes,
                    index: RowIndex::Gather(runs(&indices, t.cols / run)),
                    data: Data::Weights,
                }],
                writes: vec![Rows::own(Operand::Out(0), run)],
                work: work(SIMPLE.times(2 * u64::from(run))),
            })
        }
        Op::Gather { x, out } => {
            let run = run(cols(*x), 1);
            let pieces = cols(*x) / run;
            Shape::Units(Units {
                count: rows(*out) * pieces,
                pieces: 1,
                reads: vec![Rows {
                    operand: Operand::In(0),
                    bytes: 4 * run,
                    index: RowIndex::Gather(runs(step.outputs, pieces)),
                    data: Data::Activations,
                }],
                writes: vec![Rows::own(Operand::Out(0), run)],
                work: work(SIMPLE.times(run.into())),
            })
        }
        Op::Norm { x, add, sum, weight, bias, out, group, kind, .. } => {
            let mut reads = vec![Rows::own(Operand::In(0), *group)];
            reads.extend(add.map(|_| Rows::own(Operand::In(1), *group)));
            reads.extend(weight.map(|_| Rows::only(Operand::In(2), *group)));
            reads.extend(bias.map(|_| Rows::only(Operand::In(3), *group)));
            let mut writes = vec![Rows::own(Operand::Out(0), *group)];
            writes.extend(sum.map(|_| Rows::own(Operand::Out(1), *group)));
            let passes = 2 + [add, weight, bias].iter().filter(|x| x.is_some()).count() as u64;
            let simple = passes * u64::from(*group);
            let rows = Units {
                count: rows(*out) * (cols(*x) / group),
                pieces: 1,
                reads,
                writes,
                work: work(VectorWork { simple, rsqrt: 1, ..Default::default() }),
            };
            let centred = *kind == NormKind::Layer;
            Shape::Norm(Norm { rows, elements: *group, centred, adds: add.is_some() })
        }
        Op::MatMul { x, parts, epilogue, .. } => {
            let epilogue = match epilogue {
                program::Epilogue::None => Epilogue::None,
                program::Epilogue::Glu(_) => Epilogue::Glu,
                program::Epilogue::Add(_) => Epilogue::Add(RESIDUAL),
                _ => return Err(unsupported(op, epilogue)),
            };
            let part = |(i, p): (usize, &halite::program::Part)| Part {
                n: fixed(program, p.weight),
                format: program.tensor(p.weight).format,
                weight: (weight(i), 0),
                bias: p.bias.map(|_| (bias(i), 0)),
                out: Operand::Out(if epilogue == Epilogue::None { i } else { 0 }),
            };
            Shape::Product(Product {
                m: rows(*x),
                k: cols(*x),
                x: Rows::own(X, cols(*x)),
                parts: parts.iter().enumerate().map(part).collect(),
                epilogue,
                out_rows: None,
            })
        }
        Op::Rope { x, rotation, .. } => {
            let (head_dim, pairs) = (rotation.head_dim, rotation.frequencies.len() as u32);
            let mut reads = vec![Rows::own(Operand::In(0), head_dim)];
            reads.extend(rotation.factors.map(|_| Rows::only(Operand::In(1), pairs)));
            Shape::Units(Units {
                count: rows(*x) * (cols(*x) / head_dim),
                pieces: 1,
                reads,
                writes: vec![Rows::own(Operand::Out(0), head_dim)],
                work: work(turned(pairs.into())),
            })
        }
        Op::RopeKv { q, k, v, state, rotation, .. } => {
            let s = state_of(program, state.0)?;
            let pairs = rotation.frequencies.len() as u32;
            let of_head = |id: TensorId| cols(id) / s.kv_heads.max(1);
            let heads = (of_head(*q) + of_head(*k)) / rotation.head_dim;
            let mut reads: Vec<Rows> =
                (0..).zip([q, k, v]).map(|(i, id)| Rows::own(Operand::In(i), of_head(*id))).collect();
            reads.extend(rotation.factors.map(|_| Rows::only(Operand::In(3), pairs)));
            let elements = u64::from(of_head(*k)) + u64::from(of_head(*v));
            let turned = turned(u64::from(pairs) * u64::from(heads));
            Shape::Units(Units {
                count: tokens * s.kv_heads,
                pieces: 1,
                reads,
                writes: vec![
                    Rows::own(Operand::Out(0), of_head(*q)),
                    stored(s, Operand::Out(1), of_head(*k)),
                    stored(s, Operand::Out(2), of_head(*v)),
                ],
                work: work(VectorWork { quantize: elements, ..turned }),
            })
        }
        Op::KvWrite { k, v, state } => {
            let s = state_of(program, state.0)?;
            let of_head = |id: TensorId| cols(id) / s.kv_heads.max(1);
            let elements = u64::from(of_head(*k)) + u64::from(of_head(*v));
            Shape::Units(Units {
                count: tokens * s.kv_heads,
                pieces: 1,
                reads: vec![Rows::own(Operand::In(0), of_head(*k)), Rows::own(Operand::In(1), of_head(*v))],
                writes: vec![
                    stored(s, Operand::Out(0), of_head(*k)),
                    stored(s, Operand::Out(1), of_head(*v)),
                ],
                work: work(VectorWork { quantize: elements, ..Default::default() }),
            })
        }
        Op::Attend { state, heads, slopes, sinks, .. } => {
            let s = state_of(program, state.0)?;
            let group = program.kv_group(s);
            let pages = |span: &Span<'_>| span.tables.get(group).cloned().unwrap_or_default();
            Shape::Attend(Attend {
                heads: *heads,
                kv_heads: s.kv_heads,
                key_dim: s.key_dim,
                value_dim: s.value_dim,
                format: s.format,
                latent: s.kind == StateKind::Latent,
                sight: s.sight(),
                slopes: slopes.is_some(),
                sinks: sinks.is_some(),
                spans: step.spans.iter().map(|s| (pages(s), s.start, s.len)).collect(),
            })
        }
        Op::Conv { x, weight, bias, .. } => {
            let (channels, taps) = (cols(*x), cols(*weight));
            let run = run(channels, 1);
            let parts = channels / run;
            let kept = amortised(step, u64::from(taps - 1) * u64::from(run));
            let mut reads = vec![
                Rows::own(Operand::In(0), run),
                Rows::only(Operand::In(1), run * taps),
                stateful(Operand::In(3), kept),
            ];
            reads.extend(bias.map(|_| Rows::only(Operand::In(2), run)));
            Shape::Units(Units {
                count: tokens * parts,
                pieces: 1,
                reads,
                writes: vec![Rows::own(Operand::Out(0), run), stateful(Operand::Out(1), kept)],
                work: work(VectorWork { simple: u64::from(taps) * u64::from(run), ..Default::default() }),
            })
        }
        Op::Recur { decay, a, state, .. } => {
            let s = state_of(program, state.0)?;
            let (rates, factors) = (cols(*decay) / s.kv_heads, cols(*a) / s.kv_heads);
            // What remains of each row of the state is computed for a head, or for each.
            let exps = if rates.max(factors) > 1 { 1 + 2 * u64::from(s.key_dim) } else { 3 };
            // Some columns of a head's state: they depend on no others.
            let fits = |columns: &u32| s.value_dim.is_multiple_of(*columns) && columns * s.key_dim <= RUN;
            let columns = (1..=s.value_dim).rev().find(fits).unwrap_or(1);
            let elements = u64::from(s.key_dim) * u64::from(columns);
            let kept = amortised(step, elements);
            let own = [s.key_dim, s.key_dim, columns, rates + factors];
            let mut reads: Vec<Rows> =
                (0..).zip(own).map(|(i, cols)| Rows::own(Operand::In(i), cols)).collect();
            reads.push(stateful(Operand::In(4), kept));
            Shape::Units(Units {
                count: tokens * s.kv_heads * (s.value_dim / columns),
                // The tokens of a span are computed in order, on one tile.
                pieces: step.spans.iter().fold(0, |a, span| common_divisor(a, span.len)).max(1),
                reads,
                writes: vec![Rows::own(Operand::Out(0), columns), stateful(Operand::Out(1), kept)],
                work: work(VectorWork { simple: 4 * elements, exp: exps, divide: 2, ..Default::default() }),
            })
        }
        Op::Slice { x, out, group, .. } => Shape::Units(Units {
            count: rows(*x) * (cols(*x) / group),
            pieces: 1,
            reads: vec![Rows::own(Operand::In(0), *group)],
            writes: vec![Rows::own(Operand::Out(0), cols(*out) / (cols(*x) / group))],
            work: work(SIMPLE),
        }),
        Op::Join { a, b, out, group, first } => {
            let (groups, last) = (cols(*a) / first, group - first);
            let count = rows(*out) * groups;
            let index = match cols(*b) / last {
                1 => RowIndex::Gather((0..count).map(|unit| unit / groups).collect()),
                _ => RowIndex::Own,
            };
            Shape::Units(Units {
                count,
                pieces: 1,
                reads: vec![
                    Rows::own(Operand::In(0), *first),
                    Rows { index, ..Rows::own(Operand::In(1), last) },
                ],
                writes: vec![Rows::own(Operand::Out(0), *group)],
                work: work(SIMPLE),
            })
        }
        Op::BlockMatMul { x, weight, .. } => {
            let t = program.tensor(*weight);
            let (m, n) = (rows(*x), fixed(program, *weight));
            Shape::Blocks(Blocks { m, blocks: t.experts, k: t.cols, n, format: t.format })
        }
        Op::Spread { x, group, .. } => Shape::Units(Units {
            count: rows(*x) * (cols(*x) / group),
            pieces: 1,
            reads: vec![Rows::own(Operand::In(0), *group)],
            writes: vec![Rows::own(Operand::Out(0), 1)],
            work: work(VectorWork { simple: 2 * u64::from(*group), rsqrt: 1, ..Default::default() }),
        }),
        Op::Mix { x, factors, out, parts } => Shape::Units(Units {
            count: rows(*x),
            pieces: 1,
            reads: vec![Rows::own(Operand::In(0), cols(*x)), Rows::own(Operand::In(1), cols(*factors))],
            writes: vec![Rows::own(Operand::Out(0), cols(*out))],
            work: work(SIMPLE.times(u64::from(*parts) * u64::from(cols(*out)))),
        }),
        Op::Mul { x, weight, .. } => {
            let n = cols(*weight);
            // Runs of elements with one factor, or with as many factors.
            let run = if n == 1 { 1 << cols(*x).trailing_zeros().min(6) } else { run(n, 1) };
            let count = rows(*x) * (cols(*x) / run);
            let factors = match n {
                1 => Rows::only(Operand::In(1), 1),
                _ => {
                    let index = RowIndex::Gather((0..count).map(|unit| unit % (n / run)).collect());
                    Rows { index, ..Rows::only(Operand::In(1), run) }
                }
            };
            Shape::Units(Units {
                count,
                pieces: 1,
                reads: vec![Rows::own(Operand::In(0), run), factors],
                writes: vec![Rows::own(Operand::Out(0), run)],
                work: work(SIMPLE.times(run.into())),
            })
        }
        Op::Glu { gate, .. } => {
            elementwise(*gate, 2, VectorWork { simple: 2, exp: 1, divide: 1, ..Default::default() })
        }
        Op::Add { a, .. } => elementwise(*a, 2, SIMPLE),
        Op::Unary { x, f, .. } => elementwise(
            *x,
            1,
            match f {
                Unary::Scale(_) | Unary::Relu | Unary::ReluSquared | Unary::Clamp(_) | Unary::Shift(_) => {
                    SIMPLE
                }
                _ => VectorWork { simple: 2, exp: 1, divide: 1, ..Default::default() },
            },
        ),
        Op::Route { logits, bias, ids, gating, scales, .. } => {
            let (experts, used) = (u64::from(cols(*logits)), u64::from(cols(*ids)));
            let exp = if *gating == Gating::SoftmaxOfTop { used } else { experts };
            Shape::Units(Units {
                count: rows(*logits),
                pieces: 1,
                reads: [Rows::own(Operand::In(0), cols(*logits))]
                    .into_iter()
                    .chain(bias.map(|bias| Rows::only(Operand::In(1), cols(bias))))
                    .chain(scales.map(|scales| Rows::only(Operand::In(2), cols(scales))))
                    .collect(),
                writes: vec![Rows::own(Operand::Out(0), cols(*ids)), Rows::own(Operand::Out(1), cols(*ids))],
                // The maximum of the remaining experts, `used` times.
                work: work(VectorWork { simple: experts * used, exp, divide: exp, ..Default::default() }),
            })
        }
        Op::Experts { x, ids: chosen, gate, up, down, biases, .. } => {
            let (used, experts) = (cols(*chosen), program.tensor(*gate).experts);
            let pairs = rows(*x) * used;
            let all = routed(program, *chosen).unwrap_or(experts).max(1);
            Shape::Experts(Experts {
                tokens: rows(*x),
                used,
                experts,
                cols: cols(*x),
                hidden: fixed(program, *gate),
                formats: [gate, up, down].map(|id| program.tensor(*id).format),
                biases: biases.is_some(),
                ids: match ids {
                    Some(ids) => ids.iter().map(|&id| id as u32).collect(),
                    None => (0..pairs).map(|i| i % all).collect(),
                },
            })
        }
        Op::TopK { x, ids, .. } => Shape::TopK { rows: rows(*x), cols: cols(*x), k: cols(*ids) },
        Op::ArgMax { x, .. } => Shape::ArgMax { rows: rows(*x), cols: cols(*x) },
        unknown => return Err(Error::argument("op", "one that can be simulated", unknown.name())),
    })
}

/// Elements of a row that are moved together, at most.
const RUN: u32 = 2048;

/// Returns the elements of the parts in which a row of blocks can be moved.
fn run(cols: u32, block_len: u32) -> u32 {
    let fits = |run: &u32| cols.is_multiple_of(*run) && run.is_multiple_of(block_len);
    (64..=RUN.min(cols)).rev().find(fits).unwrap_or(cols)
}

/// Returns a token's share of the elements of a state that each span reads once, or writes once.
fn amortised(step: &Step<'_>, elements: u64) -> u32 {
    (elements * step.spans.len() as u64).div_ceil(step.tokens.len().max(1) as u64) as u32
}

fn common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// Returns the numbers of the parts of some rows.
fn runs(rows: &[u32], parts: u32) -> Vec<u32> {
    rows.iter().flat_map(|row| (0..parts).map(move |part| row * parts + part)).collect()
}

/// Returns the number of experts that a router chooses from.
pub fn routed(program: &Program, chosen: TensorId) -> Option<u32> {
    program.ops().find_map(|(_, op)| match op {
        Op::Route { logits, ids, .. } if *ids == chosen => Some(program.tensor(*logits).cols),
        _ => None,
    })
}

/// Each unit's part of a state of a recurrent layer.
fn stateful(operand: Operand, elements: u32) -> Rows {
    Rows { data: Data::States, ..Rows::own(operand, elements) }
}

/// A row of a cache's keys or values, as it is stored.
fn stored(s: &State, operand: Operand, cols: u32) -> Rows {
    let bytes = s.format.row_bytes(cols as usize).unwrap_or(0) as u32;
    Rows { operand, bytes, index: RowIndex::Own, data: Data::Cache }
}

/// Sine and cosine of each pair, and two multiply-adds for each element.
fn turned(pairs: u64) -> VectorWork {
    VectorWork { simple: 4 * pairs, exp: 2 * pairs, ..Default::default() }
}

fn fixed(program: &Program, id: TensorId) -> u32 {
    if let Dim::Fixed(rows) = program.tensor(id).rows { rows } else { 0 }
}

fn state_of(program: &Program, id: u32) -> Result<&State> {
    program.states.get(id as usize).ok_or_else(|| Error::Program(format!("state {id} does not exist")))
}

impl Attend {
    /// Returns the byte ranges of a KV head in a page, in the order of a page of one head: keys, values, and
    /// their scales.
    pub fn page(&self, page: u32, kv_head: u32) -> Vec<(u64, u32)> {
        let positions = u64::from(PAGE_POSITIONS);
        let (heads, head) = (u64::from(self.kv_heads), u64::from(kv_head));
        let dims = [u64::from(self.key_dim), u64::from(self.value_dim)];
        let dims = if self.latent { &dims[..1] } else { &dims[..] };
        let elements = heads * dims.iter().sum::<u64>() * positions;
        // Two bytes of a block are its scale.
        let (block, block_bytes) = (self.format.block_len() as u64, self.format.block_bytes() as u64);
        let scale_bytes = if block > 1 { 2 } else { 0 };
        let bytes = |elements: u64| elements / block * (block_bytes - scale_bytes);
        let base = u64::from(page) * (elements / block * block_bytes);
        let mut pieces = Vec::with_capacity(4);
        // Values come behind the keys of all heads, and so do their scales.
        let mut before = 0;
        for &dim in dims {
            let place = base + bytes((before + head * dim) * positions);
            pieces.push((place, bytes(dim * positions) as u32));
            before += heads * dim;
        }
        if scale_bytes > 0 {
            let mut before = bytes(elements);
            for &dim in dims {
                let bytes = dim / block * positions * scale_bytes;
                pieces.push((base + before + head * bytes, bytes as u32));
                before += heads * bytes;
            }
        }
        pieces
    }
}
