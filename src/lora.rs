//! Low-rank adapters (Hu et al. 2022) in llama.cpp's layout: for a matrix W of the model, a file has A
//! (`NAME.lora_a`, `[rank, cols]`) and B (`NAME.lora_b`, `[rows, rank]`), and `W x` becomes
//! `W x + scale · B (A x)`. Adapters are ordinary ops, so every backend runs them, and mapped weights stay
//! unchanged.

use halite_kernels::formats::{Format, Layout};
use halite_kernels::rows::Unary;

use crate::error::{Error, Result};
use crate::gguf::{Gguf, printable};
use crate::program::{Dim, Epilogue, FilePart, Op, Part, Program, Slot, Tensor, TensorId};

/// An adapter. Its tensors are added to the model's, with a prefix.
#[derive(Debug, Clone)]
pub(crate) struct Adapter {
    /// Its file, for errors.
    file: String,
    /// Prefix of its tensors' names.
    pub prefix: String,
    /// User scale, before alpha / rank.
    pub scale: f32,
    /// LoRA alpha; 0: unset.
    alpha: f32,
}

impl Adapter {
    /// Checks an adapter's metadata. `prefix` is the prefix of its tensors' names.
    pub fn read(gguf: &Gguf, architecture: &str, prefix: String, scale: f32) -> Result<Adapter> {
        let file = gguf.path().display().to_string();
        let wrong = |why: String| Err(Error::Model(format!("adapter {file}: {why}")));
        for (key, expected) in
            [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", architecture)]
        {
            let got = gguf.str(key)?;
            if got != expected {
                let got = printable(got.as_bytes());
                return wrong(format!("key `{key}`: expected {expected}, got {got}"));
            }
        }
        if let Some((key, _)) = gguf.metadata().iter().find(|(key, _)| key.starts_with("adapter.alora.")) {
            return wrong(format!("key `{key}`: activated adapters are not supported"));
        }
        if gguf.tensors().next().is_none() {
            return wrong("expected tensors, got none".into());
        }
        if !scale.is_finite() {
            return Err(Error::argument("adapter scale", "a finite number", scale));
        }
        Ok(Adapter { file, prefix, scale, alpha: gguf.f32("adapter.lora.alpha")? })
    }

    fn wrong(&self, tensor: &str, why: impl std::fmt::Display) -> Error {
        Error::Model(format!("adapter {}: tensor `{tensor}`{why}", self.file))
    }

    /// Says that the model has no use for one of its tensors.
    pub fn unused(&self, tensor: &str) -> Error {
        self.wrong(
            tensor.strip_prefix(&self.prefix).unwrap_or(tensor),
            " adapts no matrix of the model, or has no other half",
        )
    }

    /// Adds the adapter to every product with a matrix that it adapts. `gguf` has the tensors.
    pub fn apply(&self, program: &mut Program, gguf: &Gguf) -> Result<()> {
        for s in 0..program.segments.len() {
            let ops = std::mem::take(&mut program.segments[s].ops);
            for op in ops {
                let ops = self.apply_to(program, gguf, op)?;
                program.segments[s].ops.extend(ops);
            }
        }
        Ok(())
    }

    /// Adds the adapter to an op. Adapters apply before fusion, so a product has one part.
    fn apply_to(&self, program: &mut Program, gguf: &Gguf, op: Op) -> Result<Vec<Op>> {
        let has = |program: &Program, id: TensorId| {
            let t = program.tensor(id);
            let name = t.part.as_ref().map_or(&t.name, |part| &part.of);
            gguf.tensor(&format!("{}{name}.lora_a", self.prefix)).is_some().then(|| name.clone())
        };
        if let Op::MatMul { x, parts, epilogue: Epilogue::None, outs } = &op
            && let ([part], [out]) = (parts.as_slice(), outs.as_slice())
        {
            let Some(name) = has(program, part.weight) else { return Ok(vec![op]) };
            return self.low_rank(program, gguf, &name, *x, part, *out);
        }
        let mut other = None;
        op.inputs(&mut |id| other = other.take().or_else(|| has(program, id)));
        match other {
            None => Ok(vec![op]),
            Some(name) => {
                let op = op.name();
                let why = format!(" is an input of {op}: only matrices of plain products can be adapted");
                Err(self.wrong(&name, why))
            }
        }
    }

    /// `W x + B (scale · A x)` instead of `W x`.
    fn low_rank(
        &self,
        program: &mut Program,
        gguf: &Gguf,
        name: &str,
        x: TensorId,
        part: &Part,
        to: TensorId,
    ) -> Result<Vec<Op>> {
        let (weight, out) = (program.tensor(part.weight).clone(), program.tensor(to).clone());
        let Dim::Fixed(rows) = weight.rows else {
            return Err(Error::Program(format!("`{}` is not a weight", weight.name)));
        };
        let stored = |suffix: &str| {
            let name = format!("{}{name}.{suffix}", self.prefix);
            let found = gguf.tensor(&name).map(|t| (t.record.dims.clone(), t.record.format, t.record.layout));
            found
                .map(|found| (name, found))
                .ok_or_else(|| self.wrong(&format!("{}.{suffix}", weight.name), " is missing"))
        };
        let ((a_name, a), (b_name, b)) = (stored("lora_a")?, stored("lora_b")?);
        let rank = a.0.get(1).copied().unwrap_or(1);
        // If the matrix is a range of a tensor's rows, use the same rows of B.
        let first_row =
            weight.part.as_ref().map_or(0, |part| part.first_element / u64::from(weight.cols.max(1)));
        let whole = gguf.tensor(name).and_then(|t| t.record.dims.get(1).copied()).unwrap_or(1);
        let fits = a.0.first() == Some(&weight.cols.into()) && b.0 == [rank, whole];
        if a.0.len() != 2 || !fits {
            let (cols, a, b) = (weight.cols, a.0, b.0);
            let why = format!(": expected A [{cols}, rank] and B [rank, {whole}], got {a:?} and {b:?}");
            return Err(self.wrong(name, why));
        }
        if [a.2, b.2] != [Layout::Rows; 2] {
            return Err(self.wrong(name, ": interleaved rows are not supported"));
        }
        let rank_cols = u32::try_from(rank).map_err(|_| Error::argument("adapter rank", "32 bits", rank))?;
        let a = add_weight(program, &a_name, rank_cols, weight.cols, a.1, None);
        let b = match &weight.part {
            None => add_weight(program, &b_name, rows, rank_cols, b.1, None),
            Some(_) => {
                let range = format!("{b_name}[{first_row}..{}]", first_row + u64::from(rows));
                let part = FilePart { of: b_name, first_element: first_row * rank };
                add_weight(program, &range, rows, rank_cols, b.1, Some(part))
            }
        };
        // Without alpha, the scale applies alone.
        let scale = if self.alpha == 0.0 { self.scale } else { self.scale * self.alpha / rank as f32 };
        let mut result = |what: &str, cols: u32| {
            let name = format!("{}.{}{what}", out.name, self.prefix);
            add_tensor(program, Tensor { name, cols, slot: Slot::Scratch, ..out.clone() })
        };
        let (low, scaled) = (result("a", rank_cols), result("scaled", rank_cols));
        let (base, added) = (result("base", rows), result("b", rows));
        // The product with B comes right before the addition, so that the two can be fused.
        Ok(vec![
            Op::product(x, part.weight, part.bias, base),
            Op::product(x, a, None, low),
            Op::Unary { x: low, out: scaled, f: Unary::Scale(scale) },
            Op::product(scaled, b, None, added),
            Op::Add { a: base, b: added, out: to },
        ])
    }
}

fn add_tensor(program: &mut Program, tensor: Tensor) -> TensorId {
    program.tensors.push(tensor);
    TensorId(program.tensors.len() as u32 - 1)
}

/// Adds a weight in the next slot, or returns the existing one.
fn add_weight(
    program: &mut Program,
    name: &str,
    rows: u32,
    cols: u32,
    format: Format,
    part: Option<FilePart>,
) -> TensorId {
    if let Some(id) = program.find(name) {
        return id;
    }
    let slot = Slot::Weight(program.weights.len() as u32);
    let rows = Dim::Fixed(rows);
    let id = add_tensor(
        program,
        Tensor { name: name.into(), experts: 1, rows, cols, format, layout: Layout::Rows, slot, part },
    );
    program.weights.push(id);
    id
}
