//! Validation of programs. Backends rely on it: in a valid program, all shapes match.

use halite_kernels::formats::{Format, Kind};
use halite_kernels::kv;
use halite_kernels::recurrent::{MAX_KEY, MAX_TAPS};

use crate::error::{Error, Result};
use crate::program::{
    Dim, Epilogue, Groups, Op, Program, Rotation, Rule, Slot, State, StateId, StateKind, Tensor, TensorId,
};

/// Largest accepted number of columns, rows, experts or heads of one tensor.
const MAX_EXTENT: u32 = 1 << 27;

pub(crate) fn validate(program: &Program) -> Result<()> {
    for (i, t) in program.tensors.iter().enumerate() {
        let fixed_rows = if let Dim::Fixed(rows) = t.rows { rows } else { 1 };
        if [t.cols, fixed_rows, t.experts].iter().any(|&n| n == 0 || n > MAX_EXTENT) {
            return Err(Error::Program(format!(
                "tensor `{}`: every extent must be 1 to {MAX_EXTENT}",
                t.name
            )));
        }
        let (list, n) = match t.slot {
            Slot::Weight(n) => (&program.weights, n),
            Slot::Io(n) => (&program.io, n),
            Slot::Scratch => continue,
        };
        if list.get(n as usize) != Some(&TensorId(i as u32)) {
            return Err(Error::Program(format!("tensor `{}` is not the one in its slot", t.name)));
        }
        if matches!(t.slot, Slot::Weight(_)) && program.fixed_bytes(TensorId(i as u32)).is_none() {
            let message = format!(
                "weight `{}`: rows of {} elements are not whole blocks of {}",
                t.name,
                t.cols,
                t.format.name()
            );
            return Err(Error::Program(message));
        }
    }
    for s in &program.states {
        if !program.windows.contains(&s.window) {
            return Err(Error::Program(format!("state `{}` is in no KV group", s.name)));
        }
        if [s.kv_heads, s.key_dim, s.value_dim].iter().any(|&n| n == 0 || n > 1 << 16) || s.window == Some(0)
        {
            return Err(Error::Program(format!(
                "state `{}`: heads, dimensions or window out of range",
                s.name
            )));
        }
        if s.kind == StateKind::Latent && (s.kv_heads != 1 || s.key_dim <= s.value_dim) {
            return Err(Error::Program(format!(
                "state `{}`: a latent cache has one KV head, and keys longer than values; got {} and {} and {} elements",
                s.name, s.kv_heads, s.key_dim, s.value_dim
            )));
        }
        if s.aligned && (s.window.is_none() || !s.is_causal()) {
            return Err(Error::Program(format!(
                "state `{}`: windows side by side have a length, and are causal",
                s.name
            )));
        }
        let recurrent = s.kind == StateKind::Recurrent;
        if recurrent && (s.format != Format::F32 || !s.is_causal()) {
            return Err(Error::Program(format!("state `{}`: a recurrent state is causal, in F32", s.name)));
        }
        // They share a page table with their KV group, which holds other pages than a cache's.
        if recurrent != (s.window == State::RECURRENT_WINDOW) && program.has_recurrent_states() {
            return Err(Error::Program(format!(
                "state `{}`: beside recurrent states, a window of 2 positions is for them alone",
                s.name
            )));
        }
        if !kv::formats().any(|format| format == s.format) {
            let known: Vec<&str> = kv::formats().map(Format::name).collect();
            return Err(Error::Program(format!(
                "state `{}`: KV format {} is not supported ({})",
                s.name,
                s.format.name(),
                known.join(", ")
            )));
        }
        let block = s.format.block_len() as u32;
        if !s.key_dim.is_multiple_of(block) || !s.value_dim.is_multiple_of(block) {
            return Err(Error::Program(format!(
                "state `{}`: a KV cache in {} needs keys and values of whole blocks of {block} elements, got {} and {}",
                s.name,
                s.format.name(),
                s.key_dim,
                s.value_dim
            )));
        }
    }
    let mut defined: Vec<bool> = program.tensors.iter().map(|t| !matches!(t.slot, Slot::Scratch)).collect();
    let mut written = vec![false; program.tensors.len()];
    for (segment, op) in program.ops() {
        let at = |message: String| {
            let segment = program.segments.get(segment).map_or("?", |s| &s.name);
            Error::Program(format!("{} in segment `{segment}`: {message}", op.name()))
        };
        let mut problem = None;
        op.inputs(&mut |id| match defined.get(id.0 as usize) {
            Some(true) => {}
            _ => problem = Some(format!("tensor `{}` is read before it is written", program.tensor(id).name)),
        });
        op.outputs(&mut |id| {
            match written.get_mut(id.0 as usize) {
                Some(done @ false) if !matches!(program.tensor(id).slot, Slot::Weight(_)) => *done = true,
                _ => problem = Some(format!("tensor `{}` cannot be written here", program.tensor(id).name)),
            }
            if let Some(d) = defined.get_mut(id.0 as usize) {
                *d = true;
            }
        });
        if let Some(problem) = problem {
            return Err(at(problem));
        }
        Check { program, op }.shapes().map_err(at)?;
    }
    Ok(())
}

struct Check<'a> {
    program: &'a Program,
    op: &'a Op,
}

type Checked = std::result::Result<(), String>;

impl Check<'_> {
    fn t(&self, id: TensorId) -> &Tensor {
        self.program.tensor(id)
    }

    /// An activation of the given shape.
    fn is(&self, id: TensorId, rows: Dim, cols: u32) -> Checked {
        self.is_of(id, rows, cols, Format::F32)
    }

    fn is_of(&self, id: TensorId, rows: Dim, cols: u32, format: Format) -> Checked {
        let t = self.t(id);
        if (t.experts, t.rows, t.cols, t.format) == (1, rows, cols, format)
            && !matches!(t.slot, Slot::Weight(_))
        {
            return Ok(());
        }
        Err(format!(
            "tensor `{}`: expected {rows:?} × {cols} of {}, got {:?} × {} of {}",
            t.name,
            format.name(),
            t.rows,
            t.cols,
            t.format.name()
        ))
    }

    fn like(&self, id: TensorId, x: TensorId) -> Checked {
        self.is(id, self.t(x).rows, self.t(x).cols)
    }

    /// A weight of the given shape; `plain` requires F32 (norms, biases and other vectors).
    fn weight(&self, id: TensorId, experts: u32, rows: u32, cols: u32, plain: bool) -> Checked {
        let t = self.t(id);
        if !matches!(t.slot, Slot::Weight(_))
            || (t.experts, t.rows, t.cols) != (experts, Dim::Fixed(rows), cols)
        {
            return Err(format!(
                "weight `{}`: expected {experts} × {rows} × {cols}, got {} × {:?} × {}",
                t.name, t.experts, t.rows, t.cols
            ));
        }
        if plain && t.format != Format::F32 {
            return Err(format!("weight `{}`: expected F32, got {}", t.name, t.format.name()));
        }
        Ok(())
    }

    fn optional_vector(&self, id: Option<TensorId>, cols: u32) -> Checked {
        id.map_or(Ok(()), |id| self.weight(id, 1, 1, cols, true))
    }

    fn fixed_rows(&self, id: TensorId) -> u32 {
        if let Dim::Fixed(rows) = self.t(id).rows { rows } else { 0 }
    }

    fn state(&self, id: StateId) -> std::result::Result<&State, String> {
        self.program.states.get(id.0 as usize).ok_or_else(|| format!("state {} does not exist", id.0))
    }

    /// A KV cache.
    fn cache(&self, id: StateId) -> std::result::Result<&State, String> {
        let s = self.state(id)?;
        if s.kind == StateKind::Recurrent {
            return Err(format!("state `{}` is not a KV cache", s.name));
        }
        Ok(s)
    }

    /// A recurrent state of this shape.
    fn recurrent(&self, id: StateId, heads: u32, rows: u32, cols: u32) -> Checked {
        let s = self.state(id)?;
        if s.kind == StateKind::Recurrent && (s.kv_heads, s.key_dim, s.value_dim) == (heads, rows, cols) {
            return Ok(());
        }
        Err(format!(
            "state `{}`: expected {heads} × {rows} × {cols}, recurrent, got {:?} of {} × {} × {}",
            s.name, s.kind, s.kv_heads, s.key_dim, s.value_dim
        ))
    }

    /// A weight for a matmul with rows of `cols` elements.
    fn matrix(&self, id: TensorId, experts: u32, rows: u32, cols: u32) -> Checked {
        self.weight(id, experts, rows, cols, false)?;
        let format = self.t(id).format;
        if let Kind::Quantised { activation, .. } = format.kind()
            && !(cols as usize).is_multiple_of(activation.block_len())
        {
            return Err(format!(
                "weight `{}` of {}: rows of {cols} elements are not whole activation blocks of {}",
                self.t(id).name,
                format.name(),
                activation.block_len()
            ));
        }
        Ok(())
    }

    /// A rotary embedding of `x`.
    fn rotated(&self, x: TensorId, out: TensorId, rotation: &Rotation) -> Checked {
        let (cols, head_dim, pairs) = (self.t(x).cols, rotation.head_dim, rotation.frequencies.len());
        self.is(x, Dim::Tokens, cols)?;
        self.like(out, x)?;
        if head_dim == 0 || !cols.is_multiple_of(head_dim) || pairs as u64 * 2 > u64::from(head_dim) {
            return Err(format!("{pairs} pairs do not fit heads of {head_dim} in {cols} columns"));
        }
        self.optional_vector(rotation.factors, pairs as u32)
    }

    /// The keys and values of a cache.
    fn keys_and_values(&self, k: TensorId, v: TensorId, s: &State) -> Checked {
        self.is(k, Dim::Tokens, s.kv_heads.saturating_mul(s.key_only()))?;
        self.is(v, Dim::Tokens, s.kv_heads.saturating_mul(s.value_dim))
    }

    fn shapes(&self) -> Checked {
        let t = |id| self.t(id);
        match self.op {
            Op::Embed { table, out, .. } => {
                self.weight(*table, 1, self.fixed_rows(*table), t(*table).cols, false)?;
                self.is(*out, Dim::Tokens, t(*table).cols)
            }
            Op::Gather { x, out } => {
                self.is(*x, Dim::Tokens, t(*x).cols)?;
                self.is(*out, Dim::Outputs, t(*x).cols)
            }
            Op::Norm { x, add, sum, weight, bias, out, group, .. } => {
                for id in [Some(*x), *add, *sum, Some(*out)].into_iter().flatten() {
                    self.like(id, *x)?;
                }
                if add.is_some() != sum.is_some() {
                    return Err("`add` and `sum` must both be present or absent".into());
                }
                if *group == 0 || t(*x).cols % group != 0 {
                    return Err(format!("group {group} does not divide the {} columns", t(*x).cols));
                }
                self.optional_vector(*weight, *group)?;
                self.optional_vector(*bias, *group)
            }
            Op::MatMul { x, parts, epilogue, outs } => {
                self.like(*x, *x)?;
                let wrong =
                    || format!("{epilogue:?} does not fit {} parts and {} outputs", parts.len(), outs.len());
                match (epilogue, parts.len(), outs.len()) {
                    (Epilogue::None, 1.., n) if n == parts.len() => {}
                    (Epilogue::Glu(_), 2, 1) | (Epilogue::Add(_), 1, 1) => {}
                    _ => return Err(wrong()),
                }
                // Under an epilogue, all products have the shape of the one output.
                for (part, &out) in parts.iter().zip(outs.iter().cycle()) {
                    let rows = self.fixed_rows(part.weight);
                    self.matrix(part.weight, 1, rows, t(*x).cols)?;
                    self.optional_vector(part.bias, rows)?;
                    self.is(out, t(*x).rows, rows)?;
                }
                if let (Epilogue::Add(residual), Some(&out)) = (epilogue, outs.first()) {
                    self.like(*residual, out)?;
                }
                Ok(())
            }
            Op::Rope { x, out, rotation } => self.rotated(*x, *out, rotation),
            Op::RopeKv { q, k, v, out, state, rotation } => {
                let s = self.cache(*state)?;
                if s.kind != StateKind::Cache || rotation.head_dim != s.key_dim {
                    return Err(format!("heads of {} for keys of {} elements", rotation.head_dim, s.key_dim));
                }
                if s.format.block_len() > 1 {
                    return Err(format!("a cache in {} takes whole blocks of rotated keys", s.format.name()));
                }
                self.rotated(*q, *out, rotation)?;
                self.keys_and_values(*k, *v, s)
            }
            Op::KvWrite { k, v, state } => self.keys_and_values(*k, *v, self.cache(*state)?),
            Op::Attend { q, state, out, heads, growth, slopes, sinks, .. } => {
                let s = self.cache(*state)?;
                if *heads == 0 || *heads > 1 << 16 || heads % s.kv_heads != 0 {
                    return Err(format!("{heads} heads are not a multiple of {} KV heads", s.kv_heads));
                }
                if let Some(slopes) = slopes
                    && (slopes.len() != *heads as usize || slopes.iter().any(|slope| !slope.is_finite()))
                {
                    return Err(format!("{} slopes for {heads} heads, which must be finite", slopes.len()));
                }
                if let Some(growth) = growth
                    && (growth.period == 0
                        || growth.factors.is_empty()
                        || growth.factors.iter().any(|factor| !factor.is_finite()))
                {
                    return Err(format!(
                        "{} factors, each of {} positions: expected some, which are finite",
                        growth.factors.len(),
                        growth.period
                    ));
                }
                let extent = |dim: u32| heads.checked_mul(dim).ok_or("heads out of range");
                self.is(*q, Dim::Tokens, extent(s.key_dim)?)?;
                self.is(*out, Dim::Tokens, extent(s.value_dim)?)?;
                self.optional_vector(*sinks, *heads)
            }
            Op::Conv { x, weight, bias, state, out } => {
                let (channels, taps) = (t(*x).cols, t(*weight).cols);
                if !(2..=MAX_TAPS as u32).contains(&taps) {
                    return Err(format!("{taps} taps: expected 2 to {MAX_TAPS}"));
                }
                self.is(*x, Dim::Tokens, channels)?;
                self.is(*out, Dim::Tokens, channels)?;
                self.weight(*weight, 1, channels, taps, true)?;
                self.optional_vector(*bias, channels)?;
                self.recurrent(*state, channels, 1, taps - 1)
            }
            Op::Recur { q, k, v, decay, a, rule, state, out } => {
                let s = self.state(*state)?;
                let (heads, keys) = (s.kv_heads, t(*k).cols);
                if s.key_dim > MAX_KEY as u32 {
                    return Err(format!("keys of {} elements: at most {MAX_KEY}", s.key_dim));
                }
                if !keys.is_multiple_of(s.key_dim) || !heads.is_multiple_of((keys / s.key_dim).max(1)) {
                    return Err(format!("{keys} elements of keys for {heads} heads of {}", s.key_dim));
                }
                self.is(*q, Dim::Tokens, keys)?;
                self.is(*k, Dim::Tokens, keys)?;
                self.is(*v, Dim::Tokens, heads.saturating_mul(s.value_dim))?;
                // One for each head, or for each row of its state.
                let rows = heads.saturating_mul(s.key_dim);
                let one_or_all = |cols: u32| if cols == rows { rows } else { heads };
                match rule {
                    Rule::Delta { beta, .. } => {
                        self.is(*beta, Dim::Tokens, heads)?;
                        self.is(*decay, Dim::Tokens, one_or_all(t(*decay).cols))?;
                    }
                    Rule::Scan { d } => {
                        self.weight(*d, 1, 1, heads, true)?;
                        self.is(*decay, Dim::Tokens, heads)?;
                    }
                }
                self.weight(*a, 1, 1, one_or_all(t(*a).cols), true)?;
                self.recurrent(*state, heads, s.key_dim, s.value_dim)?;
                self.like(*out, *v)
            }
            Op::Slice { x, out, group, first } => {
                let (cols, out_cols) = (t(*x).cols, t(*out).cols);
                self.like(*x, *x)?;
                self.is(*out, t(*x).rows, out_cols)?;
                let groups = cols.checked_div(*group).unwrap_or(0);
                let fits = |len: u32| u64::from(*first) + u64::from(len) <= u64::from(*group);
                let is_whole = groups > 0 && cols == groups * group && out_cols.is_multiple_of(groups);
                if !is_whole || !fits(out_cols / groups) {
                    return Err(format!("{out_cols} of {cols} columns from element {first} of each {group}"));
                }
                Ok(())
            }
            Op::Join { a, b, out, group, first } => {
                let (a_cols, b_cols, cols) = (t(*a).cols, t(*b).cols, t(*out).cols);
                self.like(*a, *a)?;
                self.is(*b, t(*a).rows, b_cols)?;
                self.is(*out, t(*a).rows, cols)?;
                let groups = cols.checked_div(*group).unwrap_or(0);
                let of = |each: u32| u64::from(groups) * u64::from(each);
                let last = group.saturating_sub(*first);
                let is_whole = of(*group) == u64::from(cols) && of(*first) == u64::from(a_cols);
                if last == 0 || !is_whole || (b_cols != last && u64::from(b_cols) != of(last)) {
                    return Err(format!(
                        "{cols} columns in groups of {group}: {first} of {a_cols}, then of {b_cols}"
                    ));
                }
                Ok(())
            }
            Op::BlockMatMul { x, weight, out } => {
                let (blocks, outputs) = (t(*weight).experts, self.fixed_rows(*weight));
                if blocks as usize > halite_kernels::rows::MAX_EXPERTS {
                    return Err(format!("{blocks} blocks: at most {}", halite_kernels::rows::MAX_EXPERTS));
                }
                let cols = t(*x).cols / blocks.max(1);
                self.is(*x, t(*x).rows, blocks.saturating_mul(cols))?;
                self.matrix(*weight, blocks, outputs, cols)?;
                self.is(*out, t(*x).rows, blocks.saturating_mul(outputs))
            }
            Op::Mul { x, weight, out } => {
                let (cols, n) = (t(*x).cols, t(*weight).cols);
                self.like(*x, *x)?;
                self.like(*out, *x)?;
                self.weight(*weight, 1, 1, n, true)?;
                if !cols.is_multiple_of(n) {
                    return Err(format!("{n} factors do not divide {cols} columns"));
                }
                Ok(())
            }
            Op::Spread { x, out, group, .. } => {
                self.like(*x, *x)?;
                if *group == 0 || t(*x).cols % group != 0 {
                    return Err(format!("group {group} does not divide the {} columns", t(*x).cols));
                }
                self.is(*out, t(*x).rows, t(*x).cols / group)
            }
            Op::Mix { x, factors, out, parts } => {
                let (cols, factor_cols) = (t(*x).cols, t(*factors).cols);
                self.like(*x, *x)?;
                self.is(*factors, t(*x).rows, factor_cols)?;
                if *parts == 0 || cols % parts != 0 || factor_cols % parts != 0 {
                    return Err(format!("{parts} parts of {cols} columns with {factor_cols} factors"));
                }
                self.is(*out, t(*x).rows, (cols / parts).saturating_mul(factor_cols / parts))
            }
            Op::Glu { gate, up, out, .. } => {
                self.like(*gate, *gate)?;
                self.like(*up, *gate)?;
                self.like(*out, *gate)
            }
            Op::Add { a, b, out } => {
                self.like(*a, *a)?;
                self.like(*b, *a)?;
                self.like(*out, *a)
            }
            Op::Unary { x, out, .. } => {
                self.like(*x, *x)?;
                self.like(*out, *x)
            }
            Op::Route { logits, bias, groups, ids, weights, scales, .. } => {
                self.is(*logits, Dim::Tokens, t(*logits).cols)?;
                self.optional_vector(*bias, t(*logits).cols)?;
                self.optional_vector(*scales, t(*logits).cols)?;
                if let Some(Groups { count, used }) = *groups {
                    let each = t(*logits).cols.checked_div(count).unwrap_or(0);
                    let is_whole = each >= 2 && each * count == t(*logits).cols;
                    if !is_whole || !(1..=count).contains(&used) || used * each < t(*ids).cols {
                        return Err(format!(
                            "{} experts of {used} of {count} groups, of {}",
                            t(*ids).cols,
                            t(*logits).cols
                        ));
                    }
                }
                let (used, experts) = (t(*ids).cols, t(*logits).cols as usize);
                if experts > halite_kernels::rows::MAX_EXPERTS {
                    return Err(format!("{experts} experts: at most {}", halite_kernels::rows::MAX_EXPERTS));
                }
                if used > t(*logits).cols || used > 64 {
                    return Err(format!("{used} experts used of {} (at most 64)", t(*logits).cols));
                }
                self.is_of(*ids, Dim::Tokens, used, Format::I32)?;
                self.is(*weights, Dim::Tokens, used)
            }
            Op::Experts { x, ids, weights, gate, up, down, biases, out, .. } => {
                let (cols, hidden, experts) = (t(*x).cols, self.fixed_rows(*gate), t(*gate).experts);
                self.is(*x, Dim::Tokens, cols)?;
                self.is_of(*ids, Dim::Tokens, t(*ids).cols, Format::I32)?;
                self.is(*weights, Dim::Tokens, t(*ids).cols)?;
                self.matrix(*gate, experts, hidden, cols)?;
                self.matrix(*up, experts, hidden, cols)?;
                self.matrix(*down, experts, cols, hidden)?;
                if let Some([g, u, d]) = *biases {
                    self.weight(g, 1, experts, hidden, true)?;
                    self.weight(u, 1, experts, hidden, true)?;
                    self.weight(d, 1, experts, cols, true)?;
                }
                self.is(*out, Dim::Tokens, cols)
            }
            Op::TopK { x, ids, values } => {
                let (k, cols) = (t(*ids).cols, t(*x).cols);
                self.like(*x, *x)?;
                if k > cols {
                    return Err(format!("the {k} largest of {cols}"));
                }
                self.is_of(*ids, t(*x).rows, k, Format::I32)?;
                self.is(*values, t(*x).rows, k)
            }
            Op::ArgMax { x, out } => {
                self.like(*x, *x)?;
                self.is_of(*out, t(*x).rows, 1, Format::I32)
            }
        }
    }
}
