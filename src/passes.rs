//! Pure functions on programs: fusion, unfusion, taps, and scratch memory assignment.

use crate::backend::{Caps, Fusions, Rows};
use crate::program::{
    Dim, Epilogue, Layout as RowLayout, Op, Outputs, Part, Program, Segment, Slot, State, StateId, StateKind,
    TensorId,
};

/// Prepares a model's program for a backend: fuses ops and sets the row layout of weights.
pub fn for_backend(program: &Program, caps: &Caps) -> Program {
    let mut out = fuse(program, caps.fusions);
    lay_out(&mut out, caps);
    out
}

/// Sets the row layout of weights to the one that a backend reads.
pub fn lay_out(program: &mut Program, caps: &Caps) {
    for t in &mut program.tensors {
        t.layout = match caps.rows {
            Rows::AsStored => t.layout,
            Rows::Interleaved if matches!(t.slot, Slot::Weight(_)) && t.format.interleaves() => {
                RowLayout::Interleaved
            }
            _ => RowLayout::Rows,
        };
    }
}

/// Applies the fusions that a backend requests. Results never change; only tensors without other readers
/// disappear.
pub fn fuse(program: &Program, fusions: Fusions) -> Program {
    let mut out = program.clone();
    let uses = uses(&out);
    let internal = |id: TensorId| {
        matches!(out.tensors.get(id.0 as usize), Some(t) if t.slot == Slot::Scratch)
            && uses.get(id.0 as usize) == Some(&1)
    };
    let segments: Vec<Vec<Op>> = out
        .segments
        .iter()
        .map(|segment| {
            let mut ops = segment.ops.clone();
            if fusions.shared_input {
                ops = share_inputs(ops);
            }
            if fusions.glu {
                ops = fuse_pairs(ops, |a, b| glu(a, b, &internal));
            }
            if fusions.add_norm {
                ops = fuse_pairs(ops, add_norm);
            }
            if fusions.residual {
                ops = fuse_pairs(ops, |a, b| residual(a, b, &internal));
            }
            if fusions.rope_kv {
                ops = rope_kv(ops, &program.states, &internal);
            }
            ops
        })
        .collect();
    for (segment, ops) in out.segments.iter_mut().zip(segments) {
        segment.ops = ops;
    }
    out
}

/// Counts the ops that read each tensor.
pub fn uses(program: &Program) -> Vec<u32> {
    let mut uses = vec![0u32; program.tensors.len()];
    for (_, op) in program.ops() {
        op.inputs(&mut |id| {
            if let Some(n) = uses.get_mut(id.0 as usize) {
                *n += 1;
            }
        });
    }
    uses
}

/// Merges consecutive matmuls of the same input.
fn share_inputs(ops: Vec<Op>) -> Vec<Op> {
    let mut out: Vec<Op> = Vec::new();
    for op in ops {
        if let Op::MatMul { x, parts, epilogue: Epilogue::None, outs } = &op
            && let Some(Op::MatMul { x: last, parts: joined, epilogue: Epilogue::None, outs: all }) =
                out.last_mut()
            && last == x
            && joined.try_extend_from_slice(parts).is_ok()
            && all.try_extend_from_slice(outs).is_ok()
        {
            continue;
        }
        out.push(op);
    }
    out
}

/// Replaces two adjacent ops by one, where `f` returns one.
fn fuse_pairs(ops: Vec<Op>, f: impl Fn(&Op, &Op) -> Option<Op>) -> Vec<Op> {
    let mut out: Vec<Op> = Vec::new();
    for op in ops {
        match out.last().and_then(|last| f(last, &op)) {
            Some(both) => {
                out.pop();
                out.push(both);
            }
            None => out.push(op),
        }
    }
    out
}

fn glu(a: &Op, b: &Op, internal: &dyn Fn(TensorId) -> bool) -> Option<Op> {
    let (Op::MatMul { x, parts, epilogue: Epilogue::None, outs }, Op::Glu { gate, up, out, act }) = (a, b)
    else {
        return None;
    };
    let mut parts = parts.clone();
    match outs.as_slice() {
        [first, second] if (first, second) == (gate, up) => {}
        [first, second] if (first, second) == (up, gate) => parts.reverse(),
        _ => return None,
    }
    (internal(*gate) && internal(*up)).then(|| Op::MatMul {
        x: *x,
        parts,
        epilogue: Epilogue::Glu(*act),
        outs: [*out].into_iter().collect(),
    })
}

fn add_norm(a: &Op, b: &Op) -> Option<Op> {
    let Op::Add { a: left, b: right, out: added } = a else { return None };
    let Op::Norm { x, add: None, sum: None, weight, bias, out, kind, eps, group } = b else { return None };
    (x == added).then_some(Op::Norm {
        x: *left,
        add: Some(*right),
        sum: Some(*added),
        weight: *weight,
        bias: *bias,
        out: *out,
        kind: *kind,
        eps: *eps,
        group: *group,
    })
}

fn residual(a: &Op, b: &Op, internal: &dyn Fn(TensorId) -> bool) -> Option<Op> {
    let (Op::MatMul { x, parts, epilogue: Epilogue::None, outs }, Op::Add { a: left, b: right, out }) =
        (a, b)
    else {
        return None;
    };
    let [product] = outs.as_slice() else { return None };
    // Addition commutes exactly, so either operand may be the product.
    let other = if left == product {
        right
    } else if right == product {
        left
    } else {
        return None;
    };
    (internal(*product) && other != product).then(|| Op::MatMul {
        x: *x,
        parts: parts.clone(),
        epilogue: Epilogue::Add(*other),
        outs: [*out].into_iter().collect(),
    })
}

/// Joins the rotations of queries and keys with the write to the cache. Formats of blocks are left alone: a
/// block of keys is rotated by several pairs.
fn rope_kv(ops: Vec<Op>, states: &[State], internal: &dyn Fn(TensorId) -> bool) -> Vec<Op> {
    let mut out: Vec<Op> = Vec::new();
    for op in ops {
        let joined = match (out.as_slice(), &op) {
            ([.., q, key], Op::KvWrite { k, v, state }) => {
                rotated_write(q, key, *k, *v, *state, states, internal)
            }
            _ => None,
        };
        match joined {
            Some(joined) => {
                out.truncate(out.len() - 2);
                out.push(joined);
            }
            None => out.push(op),
        }
    }
    out
}

fn rotated_write(
    q: &Op,
    key: &Op,
    written: TensorId,
    v: TensorId,
    state: StateId,
    states: &[State],
    internal: &dyn Fn(TensorId) -> bool,
) -> Option<Op> {
    let Op::Rope { x: q, out, rotation } = q else { return None };
    let Op::Rope { x: k, out: rotated, rotation: of_keys } = key else { return None };
    let s = states.get(state.0 as usize)?;
    let is_whole = s.kind == StateKind::Cache && rotation.head_dim == s.key_dim;
    let fits = is_whole && s.format.block_len() == 1 && out != k;
    let joined = Op::RopeKv { q: *q, k: *k, v, out: *out, state, rotation: rotation.clone() };
    (rotation == of_keys && fits && *rotated == written && internal(written)).then_some(joined)
}

/// Undoes every fusion. This defines the meaning of fused ops.
pub fn decompose(program: &Program) -> Program {
    let mut out = program.clone();
    for s in 0..out.segments.len() {
        let ops = std::mem::take(&mut out.segments[s].ops);
        for op in ops {
            let ops = decompose_op(&mut out, op);
            out.segments[s].ops.extend(ops);
        }
    }
    out
}

fn decompose_op(program: &mut Program, op: Op) -> Vec<Op> {
    let mut temporary = |like: TensorId| {
        let tensor = program.tensor(like).clone();
        let name = format!("{}.unfused{}", tensor.name, program.tensors.len());
        program.tensors.push(crate::program::Tensor { name, slot: Slot::Scratch, ..tensor });
        TensorId(program.tensors.len() as u32 - 1)
    };
    match op {
        Op::MatMul { x, parts, epilogue, outs } => {
            let product = |(part, &out): (&Part, &TensorId)| Op::product(x, part.weight, part.bias, out);
            let (Epilogue::Glu(_) | Epilogue::Add(_), &[out]) = (epilogue, outs.as_slice()) else {
                return parts.iter().zip(&outs).map(product).collect();
            };
            let products: Vec<TensorId> = parts.iter().map(|_| temporary(out)).collect();
            let mut ops: Vec<Op> = parts.iter().zip(&products).map(product).collect();
            match (epilogue, products.as_slice()) {
                (Epilogue::Glu(act), &[gate, up]) => ops.push(Op::Glu { gate, up, out, act }),
                (Epilogue::Add(a), &[b]) => ops.push(Op::Add { a, b, out }),
                _ => {}
            }
            ops
        }
        Op::RopeKv { q, k, v, out, state, rotation } => {
            let rotated = temporary(k);
            vec![
                Op::Rope { x: q, out, rotation: rotation.clone() },
                Op::Rope { x: k, out: rotated, rotation },
                Op::KvWrite { k: rotated, v, state },
            ]
        }
        Op::Norm { x, add: Some(add), sum: Some(sum), weight, bias, out, kind, eps, group } => vec![
            Op::Add { a: x, b: add, out: sum },
            Op::Norm { x: sum, add: None, sum: None, weight, bias, out, kind, eps, group },
        ],
        op => vec![op],
    }
}

/// Makes tensors readable by name after a step (taps): appends an output slot for each. Call it before
/// [`fuse`], which keeps outputs. Returns the tensors in the order of `names`, `None` for an unknown name.
pub fn expose(program: &Program, names: &[&str]) -> (Program, Vec<Option<TensorId>>) {
    let mut out = program.clone();
    let mut found = Vec::new();
    for name in names {
        let id = out.find(name);
        if let Some(t) = id.and_then(|id| out.tensors.get_mut(id.0 as usize))
            && t.slot == Slot::Scratch
        {
            t.slot = Slot::Io(out.io.len() as u32);
            out.io.extend(id);
        }
        found.push(id);
    }
    (out, found)
}

/// Some ops of a program, as a program of their own.
#[derive(Debug, Clone, PartialEq)]
pub struct Fragment {
    /// The ops, in one segment. It has the KV groups of the whole program, so a step of one is a step of the other.
    pub program: Program,
    /// For each of its tensors, the one of the whole program.
    pub tensors: Vec<TensorId>,
    /// For each of its states, the one of the whole program.
    pub states: Vec<StateId>,
}

/// Makes a program of some consecutive ops. A scratch tensor remains scratch if it is `internal`: written by these ops,
/// and not needed by others. All other results and operands get input and output slots.
pub fn fragment(program: &Program, name: &str, ops: &[Op], internal: impl Fn(TensorId) -> bool) -> Fragment {
    let (mut tensors, mut states): (Vec<TensorId>, Vec<StateId>) = (Vec::new(), Vec::new());
    fn place<T: PartialEq>(all: &mut Vec<T>, item: T) -> u32 {
        let at = all.iter().position(|known| *known == item).unwrap_or(all.len());
        if at == all.len() {
            all.push(item);
        }
        at as u32
    }
    let renumbered = ops.iter().map(|op| {
        let op: std::result::Result<Op, std::convert::Infallible> = op.try_map(
            |&id, _| Ok(TensorId(place(&mut tensors, id))),
            |&id, _| Ok(StateId(place(&mut states, id))),
        );
        let Ok(op) = op;
        op
    });
    let renumbered: Vec<Op> = renumbered.collect();
    let mut out = Program {
        name: name.into(),
        tensors: Vec::new(),
        states: states.iter().filter_map(|id| program.states.get(id.0 as usize)).cloned().collect(),
        windows: program.windows.clone(),
        segments: vec![Segment { name: name.into(), ops: renumbered }],
        weights: Vec::new(),
        io: Vec::new(),
        outputs: Outputs::default(),
    };
    for (n, &id) in tensors.iter().enumerate() {
        let mut t = program.tensor(id).clone();
        let list = match t.slot {
            Slot::Weight(_) => Some((&mut out.weights, Slot::Weight as fn(u32) -> Slot)),
            Slot::Scratch if internal(id) => None,
            _ => Some((&mut out.io, Slot::Io as fn(u32) -> Slot)),
        };
        if let Some((list, slot)) = list {
            t.slot = slot(list.len() as u32);
            list.push(TensorId(n as u32));
        }
        out.tensors.push(t);
    }
    Fragment { program: out, tensors, states }
}

/// The places of scratch tensors: tensors share a place if their lifetimes do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The place of each tensor; `None` for a tensor that is not scratch or is never written.
    pub place: Vec<Option<usize>>,
    /// The rows and the maximum columns of each place.
    pub places: Vec<(Dim, u32)>,
}

impl Layout {
    /// Returns the bytes of all places for a step of at most `tokens` tokens and `outputs` outputs.
    pub fn bytes(&self, tokens: u32, outputs: u32) -> u64 {
        self.places.iter().map(|&(dim, cols)| 4 * rows(dim, tokens, outputs) * u64::from(cols)).sum()
    }
}

/// Returns the rows of a tensor in a step.
pub fn rows(dim: Dim, tokens: u32, outputs: u32) -> u64 {
    u64::from(match dim {
        Dim::Fixed(rows) => rows,
        Dim::Tokens => tokens,
        Dim::Outputs => outputs,
    })
}

/// Assigns scratch tensors to places. A tensor lives from the op that writes it to the last op that reads it.
/// An op's outputs never share a place with its inputs.
pub fn liveness(program: &Program) -> Layout {
    let mut last_use = vec![0usize; program.tensors.len()];
    for (at, (_, op)) in program.ops().enumerate() {
        let mut touch = |id: TensorId| {
            if let Some(last) = last_use.get_mut(id.0 as usize) {
                *last = at;
            }
        };
        op.inputs(&mut touch);
        op.outputs(&mut touch);
    }
    let mut layout = Layout { place: vec![None; program.tensors.len()], places: Vec::new() };
    // The op after which each place is free.
    let mut busy_until: Vec<usize> = Vec::new();
    for (at, (_, op)) in program.ops().enumerate() {
        op.outputs(&mut |id| {
            let t = program.tensor(id);
            if t.slot != Slot::Scratch {
                return;
            }
            let free = (0..layout.places.len())
                .filter(|&p| busy_until[p] < at && layout.places[p].0 == t.rows)
                // Best fit: the place that grows least, then the smallest.
                .min_by_key(|&p| (t.cols.saturating_sub(layout.places[p].1), layout.places[p].1));
            let place = free.unwrap_or_else(|| {
                layout.places.push((t.rows, 0));
                busy_until.push(0);
                layout.places.len() - 1
            });
            layout.places[place].1 = layout.places[place].1.max(t.cols);
            let until = last_use.get(id.0 as usize).copied().unwrap_or(at).max(at);
            busy_until[place] = until;
            if let Some(p) = layout.place.get_mut(id.0 as usize) {
                *p = Some(place);
            }
        });
    }
    layout
}
