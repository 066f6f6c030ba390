//! Programs as the C interface describes them.

use std::ffi::CString;
use std::ptr;
use std::sync::Arc;

use halite::passes::{self, Fragment};
use halite::program::{
    Dim, Epilogue, Gate, Gating, Groups, Index, NormKind, Op, Program, RopePairs, Rotation, Rule, Slot,
    StateId, StateKind, TensorId, Unary,
};

use crate::abi::*;

/// A program in C's structs, and everything that they point to.
pub struct Encoded {
    program: Box<HaliteProgram>,
    ops: Vec<HaliteOp>,
    _lists: Lists,
}

/// What the structs point to. Vectors keep their memory when they are moved.
#[derive(Default)]
struct Lists {
    _texts: Vec<CString>,
    _numbers: Vec<Arc<[f32]>>,
    _tensors: List<HaliteTensor>,
    _states: List<HaliteState>,
    _places: List<HalitePlace>,
    _segments: List<HaliteSegment>,
    _ops: Vec<*const HaliteOp>,
}

/// Structs, and pointers to them.
struct List<T> {
    _items: Vec<T>,
    pointers: Vec<*const T>,
}

impl<T> Default for List<T> {
    fn default() -> List<T> {
        List { _items: Vec::new(), pointers: Vec::new() }
    }
}

impl<T> From<Vec<T>> for List<T> {
    fn from(items: Vec<T>) -> List<T> {
        let pointers = items.iter().map(ptr::from_ref).collect();
        List { _items: items, pointers }
    }
}

// SAFETY: the pointers lead to memory that this owns and that nothing changes.
unsafe impl Send for Encoded {}
// SAFETY: as above.
unsafe impl Sync for Encoded {}

/// The size of a struct, for its first field.
pub const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// Texts for C, without the zeros that would end them early.
#[derive(Default)]
struct Texts(Vec<CString>);

impl Texts {
    fn add(&mut self, text: &str) -> *const std::ffi::c_char {
        let text = CString::new(text.replace('\0', "")).unwrap_or_default();
        let pointer = text.as_ptr();
        self.0.push(text);
        pointer
    }
}

/// An op that this version of the interface has no number for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotInAbi(pub String);

impl Encoded {
    /// Encodes a program.
    pub fn program(program: &Program) -> Result<Encoded, NotInAbi> {
        let mut texts = Texts::default();
        let layout = passes::liveness(program);
        let tensors = program.tensors.iter().zip(&layout.place).map(|(t, place)| {
            let (rows, fixed_rows) = rows(t.rows);
            let (slot, slot_index) = match t.slot {
                Slot::Weight(n) => (HALITE_SLOT_WEIGHT, n),
                Slot::Io(n) => (HALITE_SLOT_IO, n),
                Slot::Scratch => (HALITE_SLOT_SCRATCH, 0),
            };
            HaliteTensor {
                struct_bytes: size::<HaliteTensor>(),
                experts: t.experts,
                rows,
                fixed_rows,
                cols: t.cols,
                format: t.format.id(),
                slot,
                slot_index,
                place: place.map_or(HALITE_NONE, |place| place as u32),
                name: texts.add(&t.name),
            }
        });
        let tensors = List::from(tensors.collect::<Vec<_>>());
        let states = program.states.iter().map(|s| {
            Ok(HaliteState {
                struct_bytes: size::<HaliteState>(),
                kv_heads: s.kv_heads,
                key_dim: s.key_dim,
                value_dim: s.value_dim,
                format: s.format.id(),
                window: s.window.unwrap_or(0),
                after: s.after,
                table: program.kv_group(s) as u32,
                page_bytes: s.page_bytes(),
                name: texts.add(&s.name),
                kind: match s.kind {
                    StateKind::Cache => Ok(HALITE_STATE_CACHE),
                    StateKind::Recurrent => Ok(HALITE_STATE_RECURRENT),
                    StateKind::Latent => Ok(HALITE_STATE_LATENT),
                    other => Err(NotInAbi(format!("a state of kind {other:?}"))),
                }?,
                aligned: s.aligned.into(),
            })
        });
        let states = List::from(states.collect::<Result<Vec<_>, NotInAbi>>()?);
        let places = layout.places.iter().map(|&(dim, cols)| {
            let (rows, fixed_rows) = rows(dim);
            HalitePlace { struct_bytes: size::<HalitePlace>(), rows, fixed_rows, cols }
        });
        let places = List::from(places.collect::<Vec<_>>());
        let mut numbers = Vec::new();
        let ops = program.ops().map(|(_, op)| encode(program, op, &mut texts, &mut numbers));
        let ops = ops.collect::<Result<Vec<_>, _>>()?;
        let op_pointers: Vec<*const HaliteOp> = ops.iter().map(ptr::from_ref).collect();
        let mut rest = &op_pointers[..];
        let segments = program.segments.iter().map(|segment| {
            let (these, later) = rest.split_at(segment.ops.len());
            rest = later;
            HaliteSegment {
                struct_bytes: size::<HaliteSegment>(),
                op_count: these.len() as u32,
                name: texts.add(&segment.name),
                ops: these.as_ptr(),
            }
        });
        let segments = List::from(segments.collect::<Vec<_>>());
        let header = HaliteProgram {
            struct_bytes: size::<HaliteProgram>(),
            tensor_count: program.tensors.len() as u32,
            state_count: program.states.len() as u32,
            place_count: layout.places.len() as u32,
            segment_count: program.segments.len() as u32,
            weight_count: program.weights.len() as u32,
            io_count: program.io.len() as u32,
            table_count: program.windows.len() as u32,
            name: texts.add(&program.name),
            tensors: tensors.pointers.as_ptr(),
            states: states.pointers.as_ptr(),
            places: places.pointers.as_ptr(),
            segments: segments.pointers.as_ptr(),
        };
        let lists = Lists {
            _texts: texts.0,
            _numbers: numbers,
            _tensors: tensors,
            _states: states,
            _places: places,
            _segments: segments,
            _ops: op_pointers,
        };
        Ok(Encoded { program: Box::new(header), ops, _lists: lists })
    }

    /// Encodes an op with what it refers to.
    pub fn op(program: &Program, op: &Op) -> Result<Encoded, NotInAbi> {
        let Fragment { program, .. } =
            passes::fragment(program, op.name(), std::slice::from_ref(op), |_| false);
        Encoded::program(&program)
    }

    /// The program, valid while this lives.
    pub fn as_ptr(&self) -> *const HaliteProgram {
        &*self.program
    }

    /// The first op, valid while this lives.
    pub fn first_op(&self) -> *const HaliteOp {
        self.ops.first().map_or(ptr::null(), ptr::from_ref)
    }
}

fn rows(dim: Dim) -> (HaliteRows, u32) {
    match dim {
        Dim::Fixed(rows) => (HALITE_ROWS_FIXED, rows),
        Dim::Tokens => (HALITE_ROWS_TOKENS, 0),
        Dim::Outputs => (HALITE_ROWS_OUTPUTS, 0),
    }
}

fn norm_kind(kind: NormKind) -> Result<u32, NotInAbi> {
    match kind {
        NormKind::Rms => Ok(HALITE_NORM_RMS),
        NormKind::Layer => Ok(HALITE_NORM_LAYER),
        other => Err(NotInAbi(format!("the norm {other:?}"))),
    }
}

fn gate(act: Gate) -> Result<HaliteGate, NotInAbi> {
    let (kind, alpha, limit) = match act {
        Gate::Silu => (HALITE_GATE_SILU, 0.0, 0.0),
        Gate::Gelu => (HALITE_GATE_GELU, 0.0, 0.0),
        Gate::GeluErf => (HALITE_GATE_GELU_ERF, 0.0, 0.0),
        Gate::Relu => (HALITE_GATE_RELU, 0.0, 0.0),
        Gate::Sigmoid => (HALITE_GATE_SIGMOID, 0.0, 0.0),
        Gate::Identity => (HALITE_GATE_IDENTITY, 0.0, 0.0),
        Gate::Normal => (HALITE_GATE_NORMAL, 0.0, 0.0),
        Gate::SiluClamped { alpha, limit } => (HALITE_GATE_SILU_CLAMPED, alpha, limit),
        other => return Err(NotInAbi(format!("the gate {other:?}"))),
    };
    Ok(HaliteGate { kind, alpha, limit })
}

fn rotation(r: &Rotation, numbers: &mut Vec<Arc<[f32]>>) -> Result<HaliteRotation, NotInAbi> {
    numbers.push(r.frequencies.clone());
    Ok(HaliteRotation {
        head_dim: r.head_dim,
        pairs: r.frequencies.len() as u32,
        pairing: match r.pairs {
            RopePairs::Adjacent => HALITE_ROPE_ADJACENT,
            RopePairs::Halves => HALITE_ROPE_HALVES,
            other => return Err(NotInAbi(format!("the pairs {other:?} of a rotation"))),
        },
        factors: or_none(r.factors),
        magnitude: r.magnitude,
        frequencies: r.frequencies.as_ptr(),
    })
}

fn or_none(id: Option<TensorId>) -> u32 {
    id.map_or(HALITE_NONE, |id| id.0)
}

/// Numbers of tensors, filled up with [`HALITE_NONE`].
fn array(ids: impl Iterator<Item = u32>) -> [u32; HALITE_MAX_PARTS] {
    let mut all = [HALITE_NONE; HALITE_MAX_PARTS];
    all.iter_mut().zip(ids).for_each(|(to, id)| *to = id);
    all
}

fn encode(
    program: &Program,
    op: &Op,
    texts: &mut Texts,
    numbers: &mut Vec<Arc<[f32]>>,
) -> Result<HaliteOp, NotInAbi> {
    // Older plug-ins know no latent caches, and refuse kinds of ops that they do not know.
    let of_cache = |state: &StateId, plain: u32, latent: u32| {
        let kind = program.states.get(state.0 as usize).map(|s| s.kind);
        if kind == Some(StateKind::Latent) { latent } else { plain }
    };
    let (kind, operands) = match op {
        Op::Embed { table, index, out, scale } => {
            let (index, separator) = match *index {
                Index::Token => (HALITE_INDEX_TOKEN, 0),
                Index::Position => (HALITE_INDEX_POSITION, 0),
                Index::First => (HALITE_INDEX_FIRST, 0),
                Index::Part { separator } => (HALITE_INDEX_PART, separator),
                other => return Err(NotInAbi(format!("the index {other:?}"))),
            };
            let embed = HaliteEmbed { table: table.0, index, out: out.0, scale: *scale, separator };
            (HALITE_OP_EMBED, HaliteOperands { embed })
        }
        Op::Gather { x, out } => {
            (HALITE_OP_GATHER, HaliteOperands { gather: HaliteGather { x: x.0, out: out.0 } })
        }
        Op::Norm { x, add, sum, weight, bias, out, kind, eps, group } => {
            let kind = norm_kind(*kind)?;
            let norm = HaliteNorm {
                x: x.0,
                add: or_none(*add),
                sum: or_none(*sum),
                weight: or_none(*weight),
                bias: or_none(*bias),
                out: out.0,
                kind,
                group: *group,
                eps: *eps,
            };
            (HALITE_OP_NORM, HaliteOperands { norm })
        }
        Op::MatMul { x, parts, epilogue, outs } => {
            let none = HaliteGate { kind: HALITE_GATE_SILU, alpha: 0.0, limit: 0.0 };
            let (epilogue, residual, act) = match epilogue {
                Epilogue::None => (HALITE_EPILOGUE_NONE, HALITE_NONE, none),
                Epilogue::Glu(act) => (HALITE_EPILOGUE_GLU, HALITE_NONE, gate(*act)?),
                Epilogue::Add(residual) => (HALITE_EPILOGUE_ADD, residual.0, none),
                other => return Err(NotInAbi(format!("the epilogue {other:?}"))),
            };
            let matmul = HaliteMatMul {
                x: x.0,
                parts: parts.len() as u32,
                weights: array(parts.iter().map(|part| part.weight.0)),
                biases: array(parts.iter().map(|part| or_none(part.bias))),
                outs: array(outs.iter().map(|out| out.0)),
                epilogue,
                residual,
                act,
            };
            (HALITE_OP_MATMUL, HaliteOperands { matmul })
        }
        Op::Rope { x, out, rotation: r } => {
            let rope = HaliteRope { x: x.0, out: out.0, rotation: rotation(r, numbers)? };
            (HALITE_OP_ROPE, HaliteOperands { rope })
        }
        Op::KvWrite { k, v, state } => {
            let kv_write = HaliteKvWrite { k: k.0, v: v.0, state: state.0 };
            let kind = of_cache(state, HALITE_OP_KV_WRITE, HALITE_OP_LATENT_WRITE);
            (kind, HaliteOperands { kv_write })
        }
        Op::RopeKv { q, k, v, out, state, rotation: r } => {
            let rotation = rotation(r, numbers)?;
            let rope_kv = HaliteRopeKv { q: q.0, k: k.0, v: v.0, out: out.0, state: state.0, rotation };
            (HALITE_OP_ROPE_KV, HaliteOperands { rope_kv })
        }
        Op::Attend { q, state, out, heads, scale, growth, softcap, slopes, sinks } => {
            numbers.extend(slopes.clone());
            numbers.extend(growth.as_ref().map(|growth| growth.factors.clone()));
            let attend = HaliteAttend {
                q: q.0,
                state: state.0,
                out: out.0,
                heads: *heads,
                sinks: or_none(*sinks),
                has_softcap: softcap.is_some().into(),
                softcap: softcap.unwrap_or(0.0),
                scale: *scale,
                slopes: slopes.as_ref().map_or(std::ptr::null(), |slopes| slopes.as_ptr()),
                growth: growth.as_ref().map_or(std::ptr::null(), |growth| growth.factors.as_ptr()),
                growth_count: growth.as_ref().map_or(0, |growth| growth.factors.len() as u32),
                growth_period: growth.as_ref().map_or(0, |growth| growth.period),
                growth_ahead: growth.as_ref().map_or(0, |growth| growth.ahead),
                reserved: 0,
            };
            let kind = of_cache(state, HALITE_OP_ATTEND, HALITE_OP_LATENT_ATTEND);
            (kind, HaliteOperands { attend })
        }
        Op::Glu { gate: g, up, out, act } => {
            let glu = HaliteGlu { gate: g.0, up: up.0, out: out.0, act: gate(*act)? };
            (HALITE_OP_GLU, HaliteOperands { glu })
        }
        Op::Add { a, b, out } => {
            (HALITE_OP_ADD, HaliteOperands { add: HaliteAdd { a: a.0, b: b.0, out: out.0 } })
        }
        Op::Unary { x, out, f } => {
            let (function, parameter) = match *f {
                Unary::Silu => (HALITE_UNARY_SILU, 0.0),
                Unary::Gelu => (HALITE_UNARY_GELU, 0.0),
                Unary::GeluErf => (HALITE_UNARY_GELU_ERF, 0.0),
                Unary::Relu => (HALITE_UNARY_RELU, 0.0),
                Unary::ReluSquared => (HALITE_UNARY_RELU_SQUARED, 0.0),
                Unary::Scale(factor) => (HALITE_UNARY_SCALE, factor),
                Unary::SoftCap(cap) => (HALITE_UNARY_SOFT_CAP, cap),
                Unary::Clamp(limit) => (HALITE_UNARY_CLAMP, limit),
                Unary::Shift(term) => (HALITE_UNARY_SHIFT, term),
                other => return Err(NotInAbi(format!("the function {other:?}"))),
            };
            let unary = HaliteUnary { x: x.0, out: out.0, function, parameter };
            (HALITE_OP_UNARY, HaliteOperands { unary })
        }
        Op::Route { logits, bias, groups, ids, weights, gating, normalise, scale, scales } => {
            let gating = match gating {
                Gating::Softmax => HALITE_GATING_SOFTMAX,
                Gating::SoftmaxOfTop => HALITE_GATING_SOFTMAX_OF_TOP,
                Gating::Sigmoid => HALITE_GATING_SIGMOID,
                other => return Err(NotInAbi(format!("the gating {other:?}"))),
            };
            let route = HaliteRoute {
                logits: logits.0,
                ids: ids.0,
                weights: weights.0,
                gating,
                normalise: (*normalise).into(),
                scale: *scale,
            };
            match (bias, groups, scales) {
                (None, None, None) => (HALITE_OP_ROUTE, HaliteOperands { route }),
                _ => {
                    let groups = groups.unwrap_or(Groups { count: 1, used: 1 });
                    let (bias, group_count, groups_used) = (or_none(*bias), groups.count, groups.used);
                    let route_among = HaliteRouteAmong { route, bias, group_count, groups_used };
                    match scales {
                        None => (HALITE_OP_ROUTE_AMONG, HaliteOperands { route_among }),
                        Some(scales) => {
                            let route_scaled = HaliteRouteScaled { route_among, scales: scales.0 };
                            (HALITE_OP_ROUTE_SCALED, HaliteOperands { route_scaled })
                        }
                    }
                }
            }
        }
        Op::Experts { x, ids, weights, gate: g, up, down, biases, out, act } => {
            let [gate_bias, up_bias, down_bias] = biases.map_or([HALITE_NONE; 3], |ids| ids.map(|id| id.0));
            let experts = HaliteExperts {
                x: x.0,
                ids: ids.0,
                weights: weights.0,
                gate: g.0,
                up: up.0,
                down: down.0,
                gate_bias,
                up_bias,
                down_bias,
                out: out.0,
                act: gate(*act)?,
            };
            (HALITE_OP_EXPERTS, HaliteOperands { experts })
        }
        Op::ArgMax { x, out } => {
            (HALITE_OP_ARG_MAX, HaliteOperands { arg_max: HaliteArgMax { x: x.0, out: out.0 } })
        }
        Op::TopK { x, ids, values } => {
            let top_k = HaliteTopK { x: x.0, ids: ids.0, values: values.0 };
            (HALITE_OP_TOP_K, HaliteOperands { top_k })
        }
        Op::Conv { x, weight, bias, state, out } => {
            let conv =
                HaliteConv { x: x.0, weight: weight.0, bias: or_none(*bias), state: state.0, out: out.0 };
            (HALITE_OP_CONV, HaliteOperands { conv })
        }
        Op::Recur { q, k, v, decay, a, rule, state, out } => {
            let (rule, beta, d, scale) = match *rule {
                Rule::Delta { beta, scale, neighbours } => {
                    let rule = if neighbours { HALITE_RULE_DELTA_OF_NEIGHBOURS } else { HALITE_RULE_DELTA };
                    (rule, beta.0, HALITE_NONE, scale)
                }
                Rule::Scan { d } => (HALITE_RULE_SCAN, HALITE_NONE, d.0, 1.0),
                other => return Err(NotInAbi(format!("the rule {other:?}"))),
            };
            let [q, k, v, decay, a] = [q, k, v, decay, a].map(|id| id.0);
            let (state, out) = (state.0, out.0);
            let recur = HaliteRecur { q, k, v, decay, a, rule, beta, d, state, out, scale };
            (HALITE_OP_RECUR, HaliteOperands { recur })
        }
        Op::Slice { x, out, group, first } => {
            let slice = HaliteSlice { x: x.0, out: out.0, group: *group, first: *first };
            (HALITE_OP_SLICE, HaliteOperands { slice })
        }
        Op::Join { a, b, out, group, first } => {
            let join = HaliteJoin { a: a.0, b: b.0, out: out.0, group: *group, first: *first };
            (HALITE_OP_JOIN, HaliteOperands { join })
        }
        Op::BlockMatMul { x, weight, out } => {
            let block_matmul = HaliteBlockMatMul { x: x.0, weight: weight.0, out: out.0 };
            (HALITE_OP_BLOCK_MATMUL, HaliteOperands { block_matmul })
        }
        Op::Spread { x, out, kind, eps, group } => {
            let kind = norm_kind(*kind)?;
            let spread = HaliteSpread { x: x.0, out: out.0, kind, eps: *eps, group: *group };
            (HALITE_OP_SPREAD, HaliteOperands { spread })
        }
        Op::Mix { x, factors, out, parts } => {
            let mix = HaliteMix { x: x.0, factors: factors.0, out: out.0, parts: *parts };
            (HALITE_OP_MIX, HaliteOperands { mix })
        }
        Op::Mul { x, weight, out } => {
            (HALITE_OP_MUL, HaliteOperands { mul: HaliteMul { x: x.0, weight: weight.0, out: out.0 } })
        }
        other => return Err(NotInAbi(format!("the op {}", other.name()))),
    };
    Ok(HaliteOp { struct_bytes: size::<HaliteOp>(), kind, name: texts.add(op.name()), operands })
}
