//! The time of a whole step, from shapes alone: no weights, no tokens.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::chip::Chip;
use super::engine::{Busy, OpTime};
use super::lower::{Closed, Tiling, lower};
use super::measured;
use super::shape::{Shape, shape};
use super::{Report, name};
use halite::backend::{Cancel, Span, Step};
use halite::error::Result;
use halite::program::{PAGE_POSITIONS, Program};

/// An op of a traced step.
#[derive(Debug, Clone)]
pub struct Traced {
    /// The op, as in reports.
    pub name: String,
    /// Its segment.
    pub segment: String,
    /// Seconds from the start of the step.
    pub start_s: f64,
    /// Its time.
    pub time: OpTime,
    /// The work of its queues.
    pub busy: Vec<Busy>,
}

/// Calls `f` with each op of a step. `spans` has the first position and number of tokens of each sequence;
/// `outputs`: whether the last token of each sequence has an output.
fn each_op(
    program: &Program,
    spans: &[(u32, u32)],
    outputs: bool,
    f: &mut dyn FnMut(&str, String, &Shape) -> Result<()>,
) -> Result<()> {
    let mut tables = Vec::new();
    let mut next = 0;
    for (start, len) in spans {
        let count = (start + len).div_ceil(PAGE_POSITIONS);
        tables.push(vec![(next..next + count).collect::<Vec<u32>>(); program.windows.len()]);
        next += count;
    }
    let views: Vec<Span<'_>> =
        spans.iter().zip(&tables).map(|(&(start, len), tables)| Span { tables, start, len }).collect();
    let tokens = vec![0; spans.iter().map(|(_, len)| *len as usize).sum()];
    let ends = spans.iter().scan(0, |sum, (_, len)| {
        *sum += len;
        Some(*sum - 1)
    });
    let outputs: Vec<u32> = if outputs { ends.collect() } else { Vec::new() };
    let cancel = Cancel::default();
    let step = Step { spans: &views, tokens: &tokens, outputs: &outputs, cancel: &cancel };
    for (segment, op) in program.greedy_ops() {
        let segment = program.segments.get(segment).map_or("", |s| &s.name);
        f(segment, name(program, op), &shape(program, op, &step, None)?)?;
    }
    Ok(())
}

/// Whether an op has no work, such as ops on outputs in a step without outputs.
fn is_empty(shape: &Shape) -> bool {
    match shape {
        Shape::Units(units) => units.count == 0,
        Shape::Norm(norm) => norm.rows.count == 0,
        Shape::Product(product) => product.m == 0,
        Shape::Blocks(blocks) => blocks.m == 0,
        Shape::Attend(attend) => attend.spans.is_empty(),
        Shape::Experts(experts) => experts.tokens == 0,
        Shape::ArgMax { rows, .. } | Shape::TopK { rows, .. } => *rows == 0,
    }
}

/// Simulates a step with the event engine, and returns the time of each op. `spans` has the first position
/// and number of tokens of each sequence.
///
/// # Errors
/// As the backend's `prepare`.
pub fn time(chip: &Chip, program: &Program, spans: &[(u32, u32)], outputs: bool) -> Result<Report> {
    let mut report = Report::default();
    // All layers of a kind take the same time.
    let mut known: HashMap<Shape, (OpTime, Option<Closed>)> = HashMap::new();
    let mut before = None;
    each_op(program, spans, outputs, &mut |_, name, shape| {
        if is_empty(shape) {
            return Ok(());
        }
        let (time, closed) = match known.get(shape) {
            Some(known) => *known,
            None => {
                let time = measured::time(chip, shape, &lower(chip, shape)?, None);
                let closed =
                    chip.loads_ahead().then(|| measured::closed(chip, shape, &mut None)).transpose()?;
                known.insert(shape.clone(), (time, closed));
                (time, closed)
            }
        };
        report.add(&name, OpTime { seconds: time.seconds - saved_s(&mut before, closed), ..time });
        Ok(())
    })?;
    Ok(report)
}

/// Returns the seconds that an op takes less because some of its weights are loaded while the op before it runs.
pub(crate) fn saved_s(before: &mut Option<Closed>, op: Option<Closed>) -> f64 {
    let saved_s = before.zip(op).map_or(0.0, |(before, op)| before.saves_s(&op));
    *before = op;
    saved_s
}

/// An op by number, behind that of the op before it.
type Pair = (Option<usize>, usize);

/// The distinct ops of some steps. They do not depend on the chip.
#[derive(Debug, Clone, Default)]
pub struct Distinct {
    shapes: Vec<Shape>,
    /// For each step, its ops by number, each with the one before it, and how many times each runs.
    steps: Vec<Vec<(Pair, u32)>>,
    /// Tilings of the products on the last chip: the next one may be similar.
    tilings: Arc<Mutex<Vec<Option<Tiling>>>>,
}

impl Distinct {
    /// Adds the ops of a step, as in [`time`].
    ///
    /// # Errors
    /// [`Error::Program`](halite::Error::Program) for an op that is not simulated.
    pub fn add(&mut self, program: &Program, spans: &[(u32, u32)], outputs: bool) -> Result<()> {
        let mut step: Vec<(Pair, u32)> = Vec::new();
        let mut before = None;
        each_op(program, spans, outputs, &mut |_, _, shape| {
            if is_empty(shape) {
                return Ok(());
            }
            let known = self.shapes.iter().position(|known| known == shape);
            let at = known.unwrap_or_else(|| {
                self.shapes.push(shape.clone());
                self.shapes.len() - 1
            });
            let pair = (before.replace(at), at);
            match step.iter_mut().find(|(op, _)| *op == pair) {
                Some((_, count)) => *count += 1,
                None => step.push((pair, 1)),
            }
            Ok(())
        })?;
        self.steps.push(step);
        Ok(())
    }

    /// Returns the seconds of each step by the closed form. The chips take the steps in turns.
    ///
    /// # Errors
    /// As [`time`].
    pub fn closed_s(&self, chips: &[&Chip]) -> Result<Vec<f64>> {
        let mut known = vec![None; chips.len() * self.shapes.len()];
        let mut tilings = self.tilings.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tilings.resize(self.shapes.len(), None);
        let mut step_s = |number: usize, step: &[(Pair, u32)]| {
            let chip = number % chips.len();
            let mut closed = |op: usize| -> Result<Closed> {
                let known = &mut known[chip * self.shapes.len() + op];
                match *known {
                    Some(closed) => Ok(closed),
                    None => {
                        Ok(*known.insert(measured::closed(chips[chip], &self.shapes[op], &mut tilings[op])?))
                    }
                }
            };
            let op_s = |&((before, op), n): &(Pair, u32)| {
                let this = closed(op)?;
                let before = before.filter(|_| chips[chip].loads_ahead()).map(&mut closed).transpose()?;
                Ok(f64::from(n) * (this.seconds - before.map_or(0.0, |before| before.saves_s(&this))))
            };
            step.iter().map(op_s).sum::<Result<f64>>()
        };
        let seconds = self.steps.iter().enumerate().map(|(number, step)| step_s(number, step)).collect();
        *self.tilings.lock().unwrap_or_else(PoisonError::into_inner) = tilings;
        seconds
    }
}

/// Returns the seconds of a step by the closed form, without commands.
///
/// # Errors
/// As [`time`].
pub fn closed(chip: &Chip, program: &Program, spans: &[(u32, u32)], outputs: bool) -> Result<f64> {
    closed_ops(chip, program, spans, outputs, &|_| true)
}

fn closed_ops(
    chip: &Chip,
    program: &Program,
    spans: &[(u32, u32)],
    outputs: bool,
    counts: &dyn Fn(&Shape) -> bool,
) -> Result<f64> {
    let mut distinct = Distinct::default();
    distinct.add(program, spans, outputs)?;
    let shapes = &distinct.shapes;
    distinct.steps.iter_mut().for_each(|step| step.retain(|((_, op), _)| counts(&shapes[*op])));
    distinct.closed_s(&[chip]).map(|steps| steps.into_iter().sum())
}

/// Returns the seconds of a step's attention, or of its other ops, by the closed form.
///
/// # Errors
/// As [`time`].
pub(crate) fn closed_part(
    chip: &Chip,
    program: &Program,
    spans: &[(u32, u32)],
    is_attention: bool,
) -> Result<f64> {
    closed_ops(chip, program, spans, true, &|shape| matches!(shape, Shape::Attend(_)) == is_attention)
}

/// Returns the work of every queue of the chip in a step, op by op.
///
/// # Errors
/// As [`time`].
pub fn trace(chip: &Chip, program: &Program, spans: &[(u32, u32)], outputs: bool) -> Result<Vec<Traced>> {
    let mut traced = Vec::new();
    let mut start_s = 0.0;
    let mut before = None;
    each_op(program, spans, outputs, &mut |segment, name, shape| {
        if is_empty(shape) {
            return Ok(());
        }
        let closed = chip.loads_ahead().then(|| measured::closed(chip, shape, &mut None)).transpose()?;
        start_s -= saved_s(&mut before, closed);
        let mut busy = Vec::new();
        let time = measured::time(chip, shape, &lower(chip, shape)?, Some(&mut busy));
        traced.push(Traced { name, segment: segment.into(), start_s, time, busy });
        start_s += time.seconds;
        Ok(())
    })?;
    Ok(traced)
}
