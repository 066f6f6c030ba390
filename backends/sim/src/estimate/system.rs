//! Programs divided over several chips, for times: tensor parallelism inside a stage, a pipeline of stages, and replicas.

use super::collective::{Collective, collective};
use super::workload::Choices;
use crate::chip::stored_bits;
use crate::places::{Amounts, Data};
use halite::backend::Limits;
use halite::backend::host::scratch_bytes;
use halite::cost::{self, Extent};
use halite::passes;
use halite::program::{Dim, Op, Outputs, PAGE_POSITIONS, Program, StateKind, TensorId};
use halite::shard::{Division, Sums, share};
use halite::{Error, Result};
use halite_profiles::numerics::Dtype;

/// Short names of the ways to divide a model: tensor, expert, context, pipeline and data parallelism.
pub const WAYS: [&str; 5] = ["tp", "ep", "cp", "pp", "dp"];

/// How a model is divided over chips.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Layout {
    /// Chips that share each layer (tensor parallelism).
    pub tensor: u32,
    /// Groups of those that hold different experts (expert parallelism); divides `tensor`.
    pub expert: u32,
    /// Chips that hold different positions of each sequence (context parallelism).
    pub context: u32,
    /// Stages of consecutive layers (pipeline parallelism).
    pub pipeline: u32,
    /// Copies of the model, each with its share of the sequences (data parallelism).
    pub data: u32,
    /// The order of sums over chips.
    pub sums: Sums,
    /// Whether a part of the batch computes while another one exchanges.
    pub overlap: bool,
}

impl Default for Layout {
    fn default() -> Layout {
        Layout { tensor: 1, expert: 1, context: 1, pipeline: 1, data: 1, sums: Sums::Divided, overlap: false }
    }
}

halite::setters!(const Layout { tensor: u32, expert: u32, context: u32, pipeline: u32, data: u32, sums: Sums, overlap: bool });

impl Layout {
    /// The layout that is asked for, with 0 for what is free: with a number of chips, all that is not given.
    pub fn asked(chips: Option<u32>, ways: [Option<u32>; WAYS.len()], sums: Sums) -> Layout {
        let free = if chips.is_some() { 0 } else { 1 };
        let [tensor, expert, context, pipeline, data] = ways.map(|n| n.unwrap_or(free));
        Layout { tensor, expert, context, pipeline, data, sums, overlap: false }
    }

    /// Returns the number of chips of each way, by its short name.
    pub fn ways(&self) -> [(&'static str, u32); WAYS.len()] {
        let Layout { tensor, expert, context, pipeline, data, .. } = *self;
        std::array::from_fn(|i| (WAYS[i], [tensor, expert, context, pipeline, data][i]))
    }

    /// Returns the number of chips.
    pub fn chips(&self) -> u32 {
        self.of_copy().saturating_mul(self.data)
    }

    /// Returns the number of chips that have one copy of the model.
    pub fn of_copy(&self) -> u32 {
        self.of_stage().saturating_mul(self.pipeline)
    }

    /// Returns the number of chips of a stage.
    pub fn of_stage(&self) -> u32 {
        self.tensor.saturating_mul(self.context)
    }
}

/// An exchange in a step of a stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exchanged {
    /// What is exchanged.
    pub collective: Collective,
    /// Rows of the tensor.
    pub rows: Dim,
    /// Columns of the whole tensor.
    pub cols: u32,
}

/// Consecutive layers on chips that share them.
#[derive(Debug, Clone)]
pub struct Stage {
    /// What one of the chips runs.
    pub program: Program,
    /// What they exchange.
    pub exchanges: Vec<Exchanged>,
    /// Columns of the hidden state that goes to the next stage; 0 for the last.
    pub sent_cols: u32,
    /// What every chip does alike because it cannot be divided.
    pub repeated: Vec<String>,
}

impl Stage {
    /// Returns the bytes of weights on one chip, with those of products as they are stored there.
    pub fn weight_bytes(&self, choices: Choices) -> u64 {
        let all = self.program.weight_bytes();
        if choices.stored.is_none() && !choices.sparse {
            return all;
        }
        let mut weights: Vec<TensorId> = Vec::new();
        for (_, op) in self.program.ops() {
            match op {
                Op::MatMul { parts, .. } => weights.extend(parts.iter().map(|part| part.weight)),
                Op::BlockMatMul { weight, .. } => weights.push(*weight),
                Op::Experts { gate, up, down, .. } => weights.extend([gate, up, down]),
                _ => {}
            }
        }
        weights.sort_unstable();
        weights.dedup();
        let packed = weights.iter().map(|&id| {
            let t = self.program.tensor(id);
            let elements = u64::from(t.experts) * passes::rows(t.rows, 0, 0) * u64::from(t.cols);
            (stored_bits(t.format, choices.stored, choices.sparse) * elements as f64 / 8.0).ceil() as u64
        });
        let as_filed: u64 = weights.iter().filter_map(|&id| self.program.fixed_bytes(id)).sum();
        (all - as_filed.min(all)).saturating_add(packed.sum())
    }

    /// Returns the bytes of the KV cache of sequences of `positions` positions on one chip.
    pub fn cache_bytes(&self, positions: u64, sequences: u64) -> u64 {
        // A window may begin and end in the middle of a page.
        let page = u64::from(PAGE_POSITIONS);
        let kept = |window: Option<u32>| window.map_or(positions, |w| positions.min(u64::from(w) + page));
        let each = self.program.kv_bytes(|window| kept(window).div_ceil(page));
        each.saturating_mul(sequences)
    }

    /// Returns the bytes of each kind of data on one chip, for steps of up to `tokens` tokens and `outputs` outputs.
    pub fn amounts(&self, choices: Choices, cache_bytes: u64, tokens: u32, outputs: u32) -> Amounts {
        let activations = scratch_bytes(&self.program, Limits { tokens, outputs }) as f64;
        let narrowed = choices.activations.bits() / Dtype::Fp32.bits();
        Amounts::default()
            .with(Data::Weights, self.weight_bytes(choices) as f64)
            .with(Data::Cache, cache_bytes as f64 * choices.cache_fraction(&self.program))
            .with(Data::Activations, activations * narrowed)
    }
}

/// Divides a program into stages. The first chip of each has the most work.
///
/// # Errors
/// [`Error::Argument`] if the program generates no text, a number of the layout is 0, there are more stages than layers, or groups
/// of experts do not divide the chips that share a layer, or if a recurrent model's positions are divided.
pub fn stages(program: &Program, layout: Layout) -> Result<Vec<Stage>> {
    if program.outputs.logits.is_none() {
        let got = format!("{}, which computes no logits", program.name);
        return Err(Error::argument("model", "one that generates text", got));
    }
    for (name, number) in layout.ways() {
        if number == 0 {
            return Err(Error::argument(name, "at least 1 chip", 0));
        }
    }
    if layout.expert > 1 && !has_experts(program) {
        return Err(Error::argument("ep", "1, as the model has no experts", layout.expert));
    }
    if layout.context > 1 && program.states.iter().any(|state| state.kind == StateKind::Recurrent) {
        let expected = "1, as layers of the model are recurrent: a position needs those before it";
        return Err(Error::argument("cp", expected, layout.context));
    }
    if layout.tensor == 1 && layout.pipeline == 1 && layout.expert == 1 {
        let program = passes::fuse(program, crate::FUSIONS);
        return Ok(vec![Stage { program, exchanges: Vec::new(), sent_cols: 0, repeated: copied(layout) }]);
    }
    let division = Division::over(layout.tensor).sums(layout.sums).expert_groups(layout.expert);
    let shared = share(program, division, 0)?;
    let whole = passes::fuse(program, crate::FUSIONS);
    let fused = passes::fuse(&shared.program, crate::FUSIONS);
    let needed: Vec<usize> = whole.greedy_segments().into_iter().flatten().collect();
    let borders = borders(&whole, &needed, layout.pipeline)?;
    let mut all = Vec::new();
    for (n, segments) in borders.iter().enumerate() {
        let own: Vec<usize> =
            segments.iter().filter_map(|&segment| shared.segments.get(segment).cloned()).flatten().collect();
        let mut program = fused.clone();
        let mut at = 0..program.segments.len();
        program.segments.retain(|_| at.next().is_some_and(|segment| own.contains(&segment)));
        program.outputs = Outputs::default();
        keep_used(&mut program);
        let exchanges =
            shared.exchanges.iter().filter(|exchange| own.contains(&exchange.before)).filter_map(|e| {
                let t = shared.program.tensor(e.to);
                Some(Exchanged { collective: collective(e.kind)?, rows: t.rows, cols: t.cols })
            });
        let exchanges = exchanges.collect();
        let is_last = n + 1 == borders.len();
        let sent_cols = if is_last { 0 } else { hidden_cols(&whole) };
        let mut repeated = if layout.tensor > 1 { shared.repeated.clone() } else { Vec::new() };
        repeated.extend(copied(layout));
        all.push(Stage { program, exchanges, sent_cols, repeated });
    }
    Ok(all)
}

/// What chips with different positions do alike.
fn copied(layout: Layout) -> Vec<String> {
    let line =
        "all but attention, for generated tokens: each of the chips that share positions has the weights";
    (layout.context > 1).then(|| line.to_owned()).into_iter().collect()
}

/// The columns of the hidden state: those of the first op's result.
fn hidden_cols(program: &Program) -> u32 {
    let mut cols = 0;
    if let Some((_, op)) = program.ops().next() {
        op.outputs(&mut |id| cols = program.tensor(id).cols);
    }
    cols
}

/// Drops weights and caches that no op uses.
fn keep_used(program: &mut Program) {
    let mut weights = Vec::new();
    let mut states = Vec::new();
    for (_, op) in program.ops() {
        op.inputs(&mut |id| weights.push(id));
        let Ok(_) = op.try_map(
            |_, _| Ok::<_, std::convert::Infallible>(()),
            |id, _| {
                states.push(id.0);
                Ok(())
            },
        );
    }
    program.weights.retain(|id| weights.contains(id));
    // Ops name caches by their number, so those of others stay, without a size.
    for (n, state) in (0..).zip(&mut program.states) {
        if !states.contains(&n) {
            state.kv_heads = 0;
        }
    }
}

/// Divides segments into consecutive groups whose largest number of weight bytes is as small as possible.
fn borders(program: &Program, segments: &[usize], count: u32) -> Result<Vec<Vec<usize>>> {
    let step = [Extent { start: 0, tokens: 1, outputs: 1 }];
    let bytes: Vec<u64> = segments
        .iter()
        .map(|&n| {
            let ops = program.segments.get(n).map_or(&[][..], |segment| &segment.ops);
            ops.iter().map(|op| cost::op(program, op, &step).weight_bytes).sum()
        })
        .collect();
    let layers = bytes.iter().filter(|&&bytes| bytes > 0).count();
    if count as usize > layers {
        return Err(Error::argument(
            "pipeline",
            format!("at most {layers}: a stage needs a layer, or another segment with weights"),
            count,
        ));
    }
    let groups = |most: u64| -> Vec<Vec<usize>> {
        let mut all: Vec<Vec<usize>> = vec![Vec::new()];
        let mut sum = 0;
        for (&segment, &bytes) in segments.iter().zip(&bytes) {
            if sum + bytes > most && sum > 0 {
                all.push(Vec::new());
                sum = 0;
            }
            sum += bytes;
            if let Some(last) = all.last_mut() {
                last.push(segment);
            }
        }
        all
    };
    let (mut low, mut high) = (bytes.iter().copied().max().unwrap_or(0), bytes.iter().sum::<u64>());
    while low < high {
        let middle = low + (high - low) / 2;
        if groups(middle).len() > count as usize {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let mut found = groups(low);
    // Fewer groups than stages: the largest that can be divided are.
    while found.len() < count as usize {
        let Some(largest) = (0..found.len()).filter(|&n| found[n].len() > 1).max_by_key(|&n| found[n].len())
        else {
            break;
        };
        let half = found[largest].len() / 2;
        let rest = found[largest].split_off(half);
        found.insert(largest + 1, rest);
    }
    Ok(found)
}

fn has_experts(program: &Program) -> bool {
    program.ops().any(|(_, op)| matches!(op, Op::Experts { .. }))
}

/// Returns the ways to divide a model over `chips` chips. `like` fixes the numbers that are not 0.
pub fn layouts(program: &Program, chips: u32, like: Layout) -> Vec<Layout> {
    let divisors = |n: u32| (1..=n).filter(move |d| n.is_multiple_of(*d));
    let may = |fixed: u32, value: u32| fixed == 0 || fixed == value;
    let has_experts = has_experts(program);
    let mut all = Vec::new();
    for tensor in divisors(chips).filter(|&n| may(like.tensor, n)) {
        for context in divisors(chips / tensor).filter(|&n| may(like.context, n)) {
            for pipeline in divisors(chips / tensor / context).filter(|&n| may(like.pipeline, n)) {
                let data = chips / tensor / context / pipeline;
                let groups = divisors(tensor)
                    .filter(|&n| may(like.expert, n) && (has_experts || n == 1 || like.expert == n));
                for expert in groups.filter(|_| may(like.data, data)) {
                    all.push(Layout { tensor, expert, context, pipeline, data, ..like });
                }
            }
        }
    }
    all
}
