//! The matrix of cases: op, format, shape, tokens.

use std::sync::Arc;

use halite_kernels::formats::{Format, Kind, Layout};
use halite_kernels::kv;
use halite_kernels::rows::{Gate, Unary};

use super::{Case, Inputs};
use crate::program::{
    Builder, Dim, Epilogue, Gating, Groups, Growth, Index, NormKind, Op, Part, Program, RopePairs, Rotation,
    Rule, State, TensorId, WeightInfo,
};

/// Collects cases.
struct Cases(Vec<Case>);

/// Weights of any shape; those named `packed…` have their rows interleaved.
fn lookup<'a>(shapes: &'a [(&'a str, Format, Vec<u64>)]) -> impl Fn(&str) -> Option<WeightInfo> + 'a {
    move |name| {
        let (_, format, dims) = shapes.iter().find(|(n, ..)| *n == name)?;
        let layout = if name.starts_with("packed") { Layout::Interleaved } else { Layout::Rows };
        Some(WeightInfo { dims: dims.clone(), format: *format, layout })
    }
}

impl Cases {
    fn add(
        &mut self,
        name: String,
        weights: &[(&str, Format, Vec<u64>)],
        steps: &[&[(u32, u32)]],
        bound: f64,
        record: impl FnOnce(&mut Builder<'_>),
    ) {
        let find = lookup(weights);
        let mut builder = Builder::new(&name, &find);
        record(&mut builder);
        let program = builder.finish().map(Arc::new).map_err(|e| e.to_string());
        let steps = steps.iter().map(|s| s.to_vec()).collect();
        self.0.push(Case { name, program, steps, bound, inputs: Inputs::Random });
    }

    /// Adds a case of one step of one sequence.
    fn row(
        &mut self,
        name: String,
        weights: &[(&str, Format, Vec<u64>)],
        n: u32,
        record: impl FnOnce(&mut Builder<'_>),
    ) {
        self.add(name, weights, &[&[(0, n)]], ROW_BOUND, record);
    }
}

/// Error bound of row ops in f32.
const ROW_BOUND: f64 = 1e-10;

/// Error bound of attention.
const ATTEND_BOUND: f64 = 1e-6;

/// Error bound of products that are single elements. Devices may hold weights in half precision.
pub(crate) const PROBE_BOUND: f64 = 1e-6;

/// Error bound of functions that round to half precision, as GELU does: a difference in the last bit of an f32
/// may round to the next half-precision number, 2^-10 away.
const HALF_BOUND: f64 = 1.0 / (1 << 20) as f64;

/// Error bound of functions far from zero, where they subtract numbers that are nearly equal.
const TAIL_BOUND: f64 = 1e-8;

fn unary_bound(f: Unary) -> f64 {
    if f == Unary::Gelu { HALF_BOUND } else { ROW_BOUND }
}

fn gate_bound(act: Gate) -> f64 {
    if act == Gate::Gelu { HALF_BOUND } else { ROW_BOUND }
}

/// Returns the number of values that must divide a matmul's row length.
fn unit(format: Format) -> u32 {
    let activation = match format.kind() {
        Kind::Float => 1,
        Kind::Quantised { activation, .. } => activation.block_len(),
    };
    format.block_len().max(activation) as u32
}

/// Returns the error bound of products with a format on backends that are not exact. It is wide because a
/// backend may keep activations in floats, while the reference quantises them.
fn bound(format: Format) -> f64 {
    match format.kind() {
        Kind::Float => 1e-9,
        Kind::Quantised { .. } => 1e-3,
    }
}

/// Returns the error bound of an op alone, on a backend that is not exact.
pub fn op_bound(program: &Program, op: &Op) -> f64 {
    let of_weight = |id: &TensorId| bound(program.tensor(*id).format);
    match op {
        Op::MatMul { parts, epilogue, .. } => {
            let products = parts.iter().map(|part| of_weight(&part.weight)).fold(0.0, f64::max);
            if let Epilogue::Glu(act) = epilogue { products.max(gate_bound(*act)) } else { products }
        }
        Op::BlockMatMul { weight, .. } => of_weight(weight),
        Op::Experts { gate, up, down, .. } => {
            10.0 * [gate, up, down].map(of_weight).into_iter().fold(0.0, f64::max)
        }
        Op::Glu { act, .. } => gate_bound(*act),
        Op::Unary { f, .. } => unary_bound(*f),
        Op::Attend { .. } | Op::RopeKv { .. } | Op::Recur { .. } => ATTEND_BOUND,
        _ => ROW_BOUND,
    }
}

/// The whole matrix.
pub fn cases() -> Vec<Case> {
    let mut cases = ordinary();
    cases.extend(edges());
    cases
}

/// The matrix without the edges of sizes and values.
fn ordinary() -> Vec<Case> {
    let mut cases = Cases(Vec::new());
    matmuls(&mut cases);
    rows(&mut cases);
    attention(&mut cases);
    latent_attention(&mut cases);
    rotated_caches(&mut cases);
    recurrences(&mut cases);
    experts(&mut cases);
    not_finite(&mut cases);
    cases.0
}

/// One case of each op and format, for a quick look.
pub fn representative() -> Vec<Case> {
    let kind = |case: &Case| {
        let mut words = case.name.split(' ');
        (words.next().map(str::to_owned), words.next().map(str::to_owned))
    };
    // The last case of a kind represents it: ordinary ones, where there are any.
    let mut all = edges();
    all.extend(ordinary());
    let last = |n: &usize| {
        // Probes find most mistakes of products.
        all[*n].name.ends_with("tokens=12") && all[*n].name.contains(" probes ")
            || all[n + 1..].iter().all(|later| kind(later) != kind(&all[*n]))
    };
    let chosen: Vec<usize> = (0..all.len()).filter(last).collect();
    chosen.into_iter().map(|n| all[n].clone()).collect()
}

/// Cases of sizes beyond those of [`cases`]: several tiles in each direction, with remainders, and long rows.
pub fn larger() -> Vec<Case> {
    let mut cases = Cases(Vec::new());
    for &format in Format::ALL {
        for (rows, units, tokens) in [(523, 2, 3), (37, 17, 1), (130, 5, 131)] {
            let k = if unit(format) == 1 { 131 * units } else { units * unit(format) };
            let name = format!("MatMul {} {rows}x{k} tokens={tokens}", format.name());
            let weights = [("w", format, vec![k.into(), rows.into()])];
            cases.add(name, &weights, &[&[(0, tokens)]], bound(format), |b| {
                let x = b.input("x", Dim::Tokens, k);
                let w = b.weight("w", rows, k);
                let y = b.linear("y", x, w, None);
                b.output(y);
            });
        }
    }
    for tokens in [1, 67] {
        let cols = 16_411;
        cases.row(format!("Norm Rms {cols}/{cols} tokens={tokens}"), &[], tokens, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let y = b.norm("y", x, NormKind::Rms, None, None, 1e-5, cols);
            b.output(y);
        });
        cases.row(format!("TopK 300 of {cols} tokens={tokens}"), &[], tokens, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let (ids, values) = b.top_k(x, 300);
            b.output(ids);
            b.output(values);
        });
        cases.row(format!("ArgMax {cols} tokens={tokens}"), &[], tokens, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let best = b.arg_max(x);
            b.output(best);
        });
    }
    cases.add("Attend F16 of 4300 positions".into(), &[], &[&[(0, 4297)], &[(4297, 3)]], ATTEND_BOUND, |b| {
        attended(b, State::new("kv", 1, 16, 16, Format::F16), 1, 0.25, None, false);
    });
    for format in kv::formats() {
        let name = format!("Attend {} 2/1 128/128 of 1100 positions", format.name());
        let steps: [&[(u32, u32)]; 3] = [&[(0, 70), (0, 0)], &[(70, 1030), (0, 5)], &[(1100, 1), (5, 1)]];
        cases.add(name, &[], &steps, ATTEND_BOUND, |b| {
            attended(b, State::new("kv", 1, 128, 128, format), 2, 0.09, None, false);
        });
    }
    cases.0
}

fn matmuls(cases: &mut Cases) {
    for &format in Format::ALL {
        // Rows, units of k, tokens: single, few and many tokens; whole and partial tiles; rows longer than a
        // chunk.
        let shapes = [(1, 1, 1), (17, 2, 1), (16, 9, 2), (5, 3, 4), (33, 9, 5), (16, 1, 9), (3, 2, 17)];
        // Several tiles.
        let large =
            matches!(format, Format::F32 | Format::F16 | Format::Q4_0 | Format::Q6_K).then_some((70, 2, 67));
        for (rows, units, tokens) in shapes.into_iter().chain(large) {
            let k = if unit(format) == 1 {
                [0, 1, 16, 100, 0, 0, 0, 0, 0, 300][units as usize]
            } else {
                units * unit(format)
            };
            let name = format!("MatMul {} {rows}x{k} tokens={tokens}", format.name());
            let weights = [("w", format, vec![k.into(), rows.into()])];
            // A single number may be near zero, so its relative error says little: take several.
            let step = [(0, tokens)];
            let steps = [&step[..]; 8];
            let steps = if rows * tokens == 1 { &steps } else { &steps[..1] };
            cases.add(name, &weights, steps, bound(format), |b| {
                let x = b.input("x", Dim::Tokens, k);
                let w = b.weight("w", rows, k);
                let y = b.linear("y", x, w, None);
                b.output(y);
            });
        }
        // More tokens than a tile has.
        let name = format!("MatMul {} 19x{} tokens=67", format.name(), unit(format).max(3));
        let weights = [("w", format, vec![unit(format).max(3).into(), 19])];
        cases.add(name, &weights, &[&[(0, 67)]], bound(format), |b| {
            let x = b.input("x", Dim::Tokens, unit(format).max(3));
            let w = b.weight("w", 19, unit(format).max(3));
            let y = b.linear("y", x, w, None);
            b.output(y);
        });
        // Scales that are subnormal in half precision.
        if let Kind::Quantised { .. } = format.kind() {
            let k = 2 * unit(format);
            let weights = [("tiny.w", format, vec![k.into(), 19])];
            let name = format!("MatMul {} tiny scales 19x{k} tokens=3", format.name());
            cases.add(name, &weights, &[&[(0, 3)]], bound(format), |b| {
                let x = b.input("x", Dim::Tokens, k);
                let w = b.weight("tiny.w", 19, k);
                let y = b.linear("y", x, w, None);
                b.output(y);
            });
        }
        // Infinities among the activations.
        let infinite: &[u32] = match format {
            Format::Q4_0 | Format::Q4_K => &[1, 2, 17],
            Format::Q8_0 | Format::Q6_K | Format::IQ4_XS | Format::MXFP4 => &[1, 3],
            _ => &[],
        };
        for &tokens in infinite {
            let name = format!("MatMul {} infinite 16x256 tokens={tokens}", format.name());
            let weights = [("w", format, vec![256, 16])];
            cases.add(name, &weights, &[&[(0, tokens)]], bound(format), |b| {
                let x = b.input("x", Dim::Tokens, 256);
                let large = b.unary("large", x, Unary::Scale(1e38));
                let infinite = b.unary("infinite", large, Unary::Scale(10.0));
                let w = b.weight("w", 16, 256);
                let y = b.linear("y", infinite, w, None);
                b.output(y);
            });
        }
        // Whole groups of rows, and a remainder.
        let packed: &[(u32, u32)] =
            if format.interleaves() { &[(1, 1), (9, 2), (2, 4), (10, 5)] } else { &[] };
        for &(units, tokens) in packed {
            let (rows, k) = (53, units * unit(format));
            let name = format!("MatMul {} packed {rows}x{k} tokens={tokens}", format.name());
            let weights = [("packed.w", format, vec![k.into(), rows.into()])];
            cases.add(name, &weights, &[&[(0, tokens)]], bound(format), |b| {
                let x = b.input("x", Dim::Tokens, k);
                let w = b.weight("packed.w", rows, k);
                let y = b.linear("y", x, w, None);
                b.output(y);
            });
        }
        // Single elements: each row of inputs selects one. What is left is the rounding of a device's own formats.
        for (tokens, steps) in [(1, 12), (12, 1)] {
            let (rows, k) = (19, if unit(format) == 1 { 333 } else { 3 * unit(format) });
            let name = format!("MatMul {} probes {rows}x{k} tokens={tokens}", format.name());
            let weights = [("w", format, vec![k.into(), rows.into()])];
            let step = [(0, tokens)];
            cases.add(name, &weights, &vec![&step[..]; steps], PROBE_BOUND, |b| {
                let x = b.input("x", Dim::Tokens, k);
                let w = b.weight("w", rows, k);
                let y = b.linear("y", x, w, None);
                b.output(y);
            });
            if let Some(case) = cases.0.last_mut() {
                case.inputs = Inputs::Probes;
            }
        }
        let cols = 3 * format.block_len() as u32;
        if format.interleaves() {
            let name = format!("Embed {} packed", format.name());
            cases.row(name, &[("packed.table", format, vec![cols.into(), 43])], 5, |b| {
                let table = b.weight("packed.table", 43, cols);
                let y = b.embed(table, Index::Token, 1.5);
                b.output(y);
            });
        }
        let name = format!("Embed {}", format.name());
        cases.row(name, &[("table", format, vec![cols.into(), 11])], 5, |b| {
            let table = b.weight("table", 11, cols);
            let y = b.embed(table, Index::Token, 1.5);
            b.output(y);
        });
    }
    // Two sequences that start at different positions.
    for format in [Format::F32, Format::Q8_0] {
        let name = format!("Embed {} by position", format.name());
        let weights = [("table", format, vec![96, 70])];
        let weights_of_parts = [("table", format, vec![96, 3])];
        cases.add(name, &weights, &[&[(0, 3), (66, 4)]], 1e-10, |b| {
            let table = b.weight("table", 70, 96);
            let y = b.embed(table, Index::Position, 1.0);
            b.output(y);
        });
        let name = format!("Embed {} of one row", format.name());
        cases.add(name, &weights, &[&[(0, 3), (66, 4)]], 1e-10, |b| {
            let table = b.weight("table", 70, 96);
            let y = b.embed(table, Index::First, 1.0);
            b.output(y);
        });
        // Texts of several parts, more than the table has rows among them.
        let name = format!("Embed {} by part", format.name());
        cases.add(name, &weights_of_parts, &[&[(0, 40), (0, 24)], &[(0, 3)]], 1e-10, |b| {
            let table = b.weight("table", 3, 96);
            let y = b.embed(table, Index::Part { separator: 1 }, 1.0);
            b.output(y);
        });
    }
    // More rows than 16 bits count.
    for (format, k) in [(Format::F32, 3), (Format::Q8_0, 32)] {
        let rows = 131_100;
        let name = format!("MatMul {} {rows}x{k} tokens=1", format.name());
        cases.add(name, &[("w", format, vec![k.into(), rows.into()])], &[&[(0, 1)]], bound(format), |b| {
            let x = b.input("x", Dim::Tokens, k);
            let w = b.weight("w", rows, k);
            let y = b.linear("y", x, w, None);
            b.output(y);
        });
        let name = format!("Embed {} of {rows} rows", format.name());
        cases.row(name, &[("table", format, vec![k.into(), rows.into()])], 24, |b| {
            let table = b.weight("table", rows, k);
            let y = b.embed(table, Index::Token, 1.0);
            b.output(y);
        });
    }
    // As many parts as there may be, each with a bias.
    for (format, tokens) in [(Format::F32, 1), (Format::Q8_0, 1), (Format::Q8_0, 6)] {
        let names = [("a", "a.b", 24), ("b", "b.b", 9), ("c", "c.b", 33), ("d", "d.b", 16)];
        let weights: Vec<(&str, Format, Vec<u64>)> = names
            .iter()
            .flat_map(|&(w, bias, rows)| {
                [(w, format, vec![64, u64::from(rows)]), (bias, Format::F32, vec![u64::from(rows)])]
            })
            .collect();
        let name = format!("MatMul parts 4 of {} with biases tokens={tokens}", format.name());
        cases.add(name, &weights, &[&[(0, tokens)]], bound(format), |b| {
            let x = b.input("x", Dim::Tokens, 64);
            let parts = names.iter().map(|&(w, bias, rows)| {
                let weight = b.weight(w, rows, 64);
                Part { weight, bias: Some(b.weight(bias, 1, rows)) }
            });
            let parts = parts.collect();
            let outs = names.iter().map(|&(w, _, rows)| b.input(&format!("y{w}"), Dim::Tokens, rows));
            let outs = outs.collect();
            b.op(Op::MatMul { x, parts, epilogue: Epilogue::None, outs });
        });
    }
    // Each gate as an epilogue, with biases, and rows that are no whole group.
    for act in GATES {
        for format in [Format::F32, Format::Q8_0] {
            let weights = [
                ("a", format, vec![64, 21]),
                ("b", format, vec![64, 21]),
                ("a.b", Format::F32, vec![21]),
                ("b.b", Format::F32, vec![21]),
            ];
            let name = format!("MatMul epilogue Glu {act:?} {} with biases", format.name());
            cases.add(name, &weights, &[&[(0, 3)]], bound(format).max(gate_bound(act)), |b| {
                let x = b.input("x", Dim::Tokens, 64);
                let parts = [("a", "a.b"), ("b", "b.b")].map(|(w, bias)| {
                    let weight = b.weight(w, 21, 64);
                    Part { weight, bias: Some(b.weight(bias, 1, 21)) }
                });
                let out = b.input("y", Dim::Tokens, 21);
                let (parts, outs) = (parts.into_iter().collect(), [out].into_iter().collect());
                b.op(Op::MatMul { x, parts, epilogue: Epilogue::Glu(act), outs });
            });
        }
    }
    // Parts with one input, of formats with different activations, with and without biases.
    let weights = [
        ("a", Format::Q4_0, vec![512, 24]),
        ("b", Format::Q6_K, vec![512, 40]),
        ("c", Format::F16, vec![512, 7]),
        ("bias", Format::F32, vec![40]),
    ];
    for tokens in [1, 6] {
        cases.add(
            format!("MatMul parts Q4_0+Q6_K+F16 tokens={tokens}"),
            &weights,
            &[&[(0, tokens)]],
            1e-3,
            |b| {
                let x = b.input("x", Dim::Tokens, 512);
                let ws = [b.weight("a", 24, 512), b.weight("b", 40, 512), b.weight("c", 7, 512)];
                let bias = b.weight("bias", 1, 40);
                let outs = [
                    b.input("ya", Dim::Tokens, 24),
                    b.input("yb", Dim::Tokens, 40),
                    b.input("yc", Dim::Tokens, 7),
                ];
                let biases = [None, Some(bias), None];
                let parts = (0..3).map(|i| Part { weight: ws[i], bias: biases[i] }).collect();
                b.op(Op::MatMul { x, parts, epilogue: Epilogue::None, outs: outs.into_iter().collect() });
            },
        );
        let pair = [("a", Format::Q8_0, vec![64, 24]), ("b", Format::Q8_0, vec![64, 24])];
        for (name, epilogue) in [("Glu", Epilogue::Glu(Gate::Silu)), ("Add", Epilogue::Add(TensorId(0)))] {
            cases.add(
                format!("MatMul epilogue {name} tokens={tokens}"),
                &pair,
                &[&[(0, tokens)]],
                1e-3,
                |b| {
                    let residual = b.input("residual", Dim::Tokens, 24);
                    let x = b.input("x", Dim::Tokens, 64);
                    let (wa, wb) = (b.weight("a", 24, 64), b.weight("b", 24, 64));
                    let out = b.input("y", Dim::Tokens, 24);
                    let (weights, epilogue) = match epilogue {
                        Epilogue::Glu(_) => (&[wa, wb][..], epilogue),
                        _ => (&[wa][..], Epilogue::Add(residual)),
                    };
                    let parts = weights.iter().map(|&weight| Part { weight, bias: None }).collect();
                    b.op(Op::MatMul { x, parts, epilogue, outs: [out].into_iter().collect() });
                },
            );
        }
    }
}

/// Adds an input; some elements of the one called `which` become NaN.
fn input_or_nan(b: &mut Builder<'_>, which: &str, name: &str, cols: u32) -> TensorId {
    if name == which { with_nan(b, name, cols) } else { b.input(name, Dim::Tokens, cols) }
}

/// Adds an input in which some elements become NaN.
fn with_nan(b: &mut Builder<'_>, name: &str, cols: u32) -> TensorId {
    let x = b.input(name, Dim::Tokens, cols);
    let infinite = infinities(b, x, 10.0);
    let opposite = infinities(b, x, -10.0);
    // Zero for elements that did not overflow.
    let nan = b.add("nan", infinite, opposite);
    b.add("with nan", x, nan)
}

/// Multiplies an input by 1e38 and a factor, so that some elements become infinite.
fn infinities(b: &mut Builder<'_>, x: TensorId, factor: f32) -> TensorId {
    let large = b.unary("large", x, Unary::Scale(1e38));
    b.unary("infinite", large, Unary::Scale(factor))
}

/// Cases with NaN: element-wise ops pass it on, and ops that choose elements detect it.
fn not_finite(cases: &mut Cases) {
    let cols = 100;
    for f in UNARY {
        cases.add(format!("Unary {f:?} of NaN"), &[], &[&[(0, 3)]], unary_bound(f), |b| {
            let x = with_nan(b, "x", cols);
            let y = b.unary("y", x, f);
            b.output(y);
        });
    }
    for act in GATES {
        for nan in ["gate", "up"] {
            cases.add(format!("Glu {act:?} of NaN {nan}"), &[], &[&[(0, 3)]], gate_bound(act), |b| {
                let (gate, up) = (input_or_nan(b, nan, "gate", cols), input_or_nan(b, nan, "up", cols));
                let y = b.glu(gate, up, act);
                b.output(y);
            });
        }
    }
    for cols in [100, 4100] {
        cases.row(format!("ArgMax {cols} of NaN"), &[], 3, |b| {
            let x = with_nan(b, "x", cols);
            let best = b.arg_max(x);
            b.output(best);
        });
        // Infinities of both signs, and only negative ones.
        for negative in [false, true] {
            cases.row(format!("ArgMax {cols} of infinities negative={negative}"), &[], 3, |b| {
                let x = b.input("x", Dim::Tokens, cols);
                let mut x = infinities(b, x, 10.0);
                if negative {
                    let up = b.unary("up", x, Unary::Relu);
                    let down = b.unary("down", up, Unary::Scale(-1.0));
                    x = b.unary("infinite", down, Unary::Scale(1e38));
                }
                let best = b.arg_max(x);
                b.output(best);
            });
        }
    }
    cases.row("Norm of NaN".into(), &[], 3, |b| {
        let x = with_nan(b, "x", cols);
        let y = b.norm("y", x, NormKind::Rms, None, None, 1e-5, cols);
        b.output(y);
    });
    for gating in [Gating::Softmax, Gating::SoftmaxOfTop, Gating::Sigmoid] {
        cases.row(format!("Route {gating:?} of NaN"), &[], 5, |b| {
            let logits = with_nan(b, "logits", 16);
            let (ids, weights) = b.route(logits, 3, gating, false, 1.0);
            b.output(ids);
            b.output(weights);
        });
    }
    for (biased, groups, scaled) in [
        (true, None, false),
        (true, Some(Groups { count: 4, used: 2 }), false),
        (false, Some(Groups { count: 8, used: 3 }), false),
        (false, None, true),
        (true, Some(Groups { count: 4, used: 2 }), true),
    ] {
        let name = format!("Route 4 of 32 bias={biased} {groups:?} scales={scaled}");
        let weights: Vec<_> = [(biased, "bias"), (scaled, "scales")]
            .into_iter()
            .filter(|(is_there, _)| *is_there)
            .map(|(_, name)| (name, Format::F32, vec![32]))
            .collect();
        cases.row(name, &weights, 7, |b| {
            let logits = b.input("logits", Dim::Tokens, 32);
            let bias = biased.then(|| b.weight("bias", 1, 32));
            let scales = scaled.then(|| b.weight("scales", 1, 32));
            let (ids, weights) = b.route_among(logits, bias, groups, 4, Gating::Sigmoid, true, 2.5, scales);
            b.output(ids);
            b.output(weights);
        });
    }
    // Few of them, so that other experts are chosen after them.
    for gating in [Gating::Softmax, Gating::SoftmaxOfTop, Gating::Sigmoid] {
        cases.row(format!("Route {gating:?} of a few NaN"), &[], 7, |b| {
            let x = b.input("logits", Dim::Tokens, 64);
            let small = b.unary("small", x, Unary::Scale(0.17));
            let (infinite, opposite) = (infinities(b, small, 10.0), infinities(b, small, -10.0));
            let nan = b.add("nan", infinite, opposite);
            let logits = b.add("with nan", x, nan);
            let (ids, weights) = b.route(logits, 8, gating, false, 1.0);
            b.output(ids);
            b.output(weights);
        });
    }
    for (which, softcap) in [("q", None), ("q", Some(2.0)), ("k", Some(2.0)), ("v", None)] {
        let name = format!("Attend F32 of NaN {which} softcap={softcap:?}");
        // One token at a time: with later tokens in the step, a device may multiply their values by zero.
        cases.add(name, &[], &[&[(0, 1)], &[(1, 1)], &[(2, 1)]], ATTEND_BOUND, |b| {
            let q = input_or_nan(b, which, "q", 2 * 32);
            let (k, v) = (input_or_nan(b, which, "k", 32), input_or_nan(b, which, "v", 32));
            let kv = b.state(State::new("kv", 1, 32, 32, Format::F32));
            b.kv_write(k, v, kv);
            let y = b.attend(q, kv, 2, 0.2, softcap, None);
            b.output(y);
        });
    }
}

/// Steps of recurrent layers: over pages, in the middle of a page, and of two sequences.
const RECURRENCES: [&[(u32, u32)]; 5] = [
    &[(0, 70), (0, 1)],
    &[(70, 1), (1, 63)],
    &[(71, 0), (64, 1)],
    &[(71, 122), (65, 2)],
    &[(193, 3), (67, 0)],
];

/// Ops with a recurrent state.
fn recurrences(cases: &mut Cases) {
    for (channels, taps, biased) in [(64, 4, false), (40, 3, true), (16, 2, true), (8, 8, false)] {
        let mut weights = vec![("conv", Format::F32, vec![u64::from(taps), u64::from(channels)])];
        weights.extend(biased.then(|| ("bias", Format::F32, vec![u64::from(channels)])));
        let name = format!("Conv {channels}x{taps} bias={biased}");
        cases.add(name, &weights, &RECURRENCES, ROW_BOUND, |b| {
            let x = b.input("x", Dim::Tokens, channels);
            let weight = b.weight("conv", channels, taps);
            let bias = biased.then(|| b.weight("bias", 1, channels));
            let state = b.state(State::recurrent("kept", channels, 1, taps - 1));
            let y = b.conv("y", x, weight, bias, state);
            b.output(y);
        });
    }
    for (heads, key_heads, key_dim, value_dim) in
        [(4, 2, 16, 24), (2, 2, 128, 128), (3, 1, 40, 72), (70, 1, 16, 1), (6, 2, 5, 1)]
    {
        // Decays and factors of heads, or of each row of their states.
        for (rule, delta, neighbours, rates, factors) in [
            ("Delta", true, false, 1, 1),
            ("Delta of neighbours", true, true, 1, 1),
            ("Scan", false, false, 1, 1),
            ("Delta by row", true, true, key_dim, 1),
            ("Delta by row twice", true, false, key_dim, key_dim),
            ("Scan by row", false, false, 1, key_dim),
        ] {
            let name = format!("Recur {rule} {heads}/{key_heads}x{key_dim}/{value_dim}");
            let weights = [("a", heads * factors), ("d", heads)];
            let weights = weights.map(|(name, len)| (name, Format::F32, vec![u64::from(len)]));
            cases.add(name, &weights[..2 - usize::from(delta)], &RECURRENCES, ATTEND_BOUND, |b| {
                let [q, k] = ["q", "k"].map(|name| {
                    let x = b.input(name, Dim::Tokens, key_heads * key_dim);
                    b.norm("unit", x, NormKind::Rms, None, None, 1e-6, key_dim)
                });
                // Of length 1.
                let k = b.unary("k unit", k, Unary::Scale(1.0 / (key_dim as f32).sqrt()));
                let v = b.input("v", Dim::Tokens, heads * value_dim);
                // A state that grows would hide all differences but those of its largest elements.
                let decay = b.input("decay", Dim::Tokens, heads * rates);
                let decay = shifted(b, decay, -4.0);
                let rule = if delta {
                    Rule::Delta { beta: b.input("beta", Dim::Tokens, heads), scale: 0.1, neighbours }
                } else {
                    Rule::Scan { d: b.weight("d", 1, heads) }
                };
                let a = b.weight("a", 1, heads * factors);
                let state = b.state(State::recurrent("kept", heads, key_dim, value_dim));
                let y = b.recur([q, k, v], decay, a, rule, state);
                b.output(y);
            });
        }
    }
    for (cols, n) in [(96, 1), (96, 96), (130, 13), (4200, 4200), (7, 1)] {
        cases.row(format!("Mul {cols} by {n}"), &[("factors", Format::F32, vec![u64::from(n)])], 5, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let weight = b.weight("factors", 1, n);
            let y = b.mul("y", x, weight);
            b.output(y);
        });
    }
    for (cols, group) in [(1, 1), (100, 100), (64, 16), (257, 257), (2048, 2048)] {
        for kind in [NormKind::Rms, NormKind::Layer] {
            cases.row(format!("Spread {kind:?} {cols}/{group}"), &[], 3, |b| {
                let x = b.input("x", Dim::Tokens, cols);
                let y = b.spread("y", x, kind, 1e-5, group);
                b.output(y);
            });
        }
    }
    for (parts, len, sums) in [(1, 1, 1), (1, 40, 4), (3, 24, 4), (4, 130, 1), (3, 7, 2)] {
        cases.row(format!("Mix {sums} of {parts}x{len}"), &[], 5, |b| {
            let x = b.input("x", Dim::Tokens, parts * len);
            let factors = b.input("factors", Dim::Tokens, sums * parts);
            let y = b.mix("y", x, factors, parts);
            b.output(y);
        });
    }
    for (cols, group, first, len) in [(96, 48, 0, 24), (96, 48, 24, 24), (130, 13, 5, 3), (7, 7, 6, 1)] {
        cases.row(format!("Slice {first}+{len} of {group} of {cols}"), &[], 5, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let y = b.slice("y", x, group, first, len);
            b.output(y);
        });
    }
}

/// Adds a number to every element.
fn shifted(b: &mut Builder<'_>, x: TensorId, by: f32) -> TensorId {
    let sign = b.norm("sign", x, NormKind::Rms, None, None, 1e-20, 1);
    let magnitude = magnitude(b, sign);
    let constant = b.unary("constant", magnitude, Unary::Scale(by));
    b.add("shifted", x, constant)
}

/// The magnitude of every element.
fn magnitude(b: &mut Builder<'_>, x: TensorId) -> TensorId {
    let negative = b.unary("negative", x, Unary::Scale(-1.0));
    let (up, down) = (b.unary("up", x, Unary::Relu), b.unary("down", negative, Unary::Relu));
    b.add("magnitude", up, down)
}

/// Makes every element zero, and keeps its sign.
fn zeros(b: &mut Builder<'_>, x: TensorId) -> TensorId {
    let tiny = b.unary("tiny", x, Unary::Scale(1e-30));
    b.unary("zeros", tiny, Unary::Scale(1e-30))
}

/// Cases at the edges: large numbers, zeros of both signs, indices beyond 16 bits, many experts, steps that differ in
/// nothing but their content.
fn edges() -> Vec<Case> {
    let mut collected = Cases(Vec::new());
    let cases = &mut collected;
    for f in UNARY {
        for (what, scale, by) in [("large", 90.0, 0.0), ("around -3", 0.3, -3.0)] {
            cases.add(
                format!("Unary {f:?} {what}"),
                &[],
                &[&[(0, 3)]],
                unary_bound(f).max(TAIL_BOUND),
                |b| {
                    let x = b.input("x", Dim::Tokens, 200);
                    let scaled = b.unary("scaled", x, Unary::Scale(scale));
                    let x = if by == 0.0 { scaled } else { shifted(b, scaled, by) };
                    let y = b.unary("y", x, f);
                    b.output(y);
                },
            );
        }
    }
    for act in GATES {
        for (what, scale, by) in [("large", 90.0, 0.0), ("around -3", 0.3, -3.0)] {
            cases.add(
                format!("Glu {act:?} {what}"),
                &[],
                &[&[(0, 3)]],
                gate_bound(act).max(TAIL_BOUND),
                |b| {
                    let (x, up) = (b.input("gate", Dim::Tokens, 200), b.input("up", Dim::Tokens, 200));
                    let scaled = b.unary("scaled", x, Unary::Scale(scale));
                    let gate = if by == 0.0 { scaled } else { shifted(b, scaled, by) };
                    let y = b.glu(gate, up, act);
                    b.output(y);
                },
            );
        }
    }
    // More elements than 16 bits can count.
    let cols = 140_001;
    cases.row(format!("Unary Scale {cols}"), &[], 1, |b| {
        let x = b.input("x", Dim::Tokens, cols);
        let y = b.unary("y", x, Unary::Scale(0.7));
        b.output(y);
    });
    cases.row(format!("ArgMax {cols}"), &[], 16, |b| {
        let x = b.input("x", Dim::Tokens, cols);
        let best = b.arg_max(x);
        b.output(best);
    });
    cases.row("Norm Rms 4200/4200".into(), &[], 2, |b| {
        let x = b.input("x", Dim::Tokens, 4200);
        let y = b.norm("y", x, NormKind::Rms, None, None, 1e-5, 4200);
        b.output(y);
    });
    cases.row("TopK 40 of NaN".into(), &[], 2, |b| {
        let x = with_nan(b, "x", 100);
        let (ids, values) = b.top_k(x, 40);
        b.output(ids);
        b.output(values);
    });
    cases.row("TopK 40 of zeros".into(), &[], 2, |b| {
        let x = b.input("x", Dim::Tokens, 100);
        let x = zeros(b, x);
        let (ids, values) = b.top_k(x, 40);
        b.output(ids);
        b.output(values);
    });
    for gating in [Gating::Softmax, Gating::SoftmaxOfTop, Gating::Sigmoid] {
        let mut route = |name: String, experts: u32, change: fn(&mut Builder<'_>, TensorId) -> TensorId| {
            cases.row(name, &[], 5, |b| {
                let x = b.input("logits", Dim::Tokens, experts);
                let logits = change(b, x);
                let (ids, weights) = b.route(logits, 4, gating, false, 1.0);
                b.output(ids);
                b.output(weights);
            });
        };
        route(format!("Route {gating:?} 4 of 200"), 200, |_, x| x);
        route(format!("Route {gating:?} of large"), 16, |b, x| shifted(b, x, 200.0));
        route(format!("Route {gating:?} of zeros"), 16, zeros);
    }
    // Six of eight experts, and outputs that are not whole tiles.
    for act in GATES {
        let format = Format::F32;
        let name = format!("Experts {} 6 of 8 {act:?}", format.name());
        mixture(cases, name, [96, 160, 8], format, 5, gate_bound(act).max(1e-8), 6, act, false);
    }
    // Scores of which only the differences count.
    for (what, factor) in [("large", 40.0), ("negative", -40.0)] {
        let name = format!("Attend F32 of {what} scores");
        cases.add(name, &[], &[&[(0, 70)], &[(70, 1)]], ATTEND_BOUND, |b| {
            let (q, k) = (b.input("q", Dim::Tokens, 2 * 32), b.input("k", Dim::Tokens, 32));
            let v = b.input("v", Dim::Tokens, 32);
            let (q, k) = (magnitude(b, q), magnitude(b, k));
            let k = b.unary("scaled", k, Unary::Scale(factor));
            let kv = b.state(State::new("kv", 1, 32, 32, Format::F32));
            b.kv_write(k, v, kv);
            let y = b.attend(q, kv, 2, 0.2, None, None);
            b.output(y);
        });
    }
    // Scores that are all zero: the mean of each text, as a classification head reads it.
    cases.add(
        "Attend F32 of a mean".into(),
        &[],
        &[&[(0, 67), (0, 3)], &[(0, 1), (0, 130)]],
        ATTEND_BOUND,
        |b| {
            let x = b.input("x", Dim::Tokens, 3 * 32);
            let kv = b.state(State::new("kv", 3, 32, 32, Format::F32).after(u32::MAX));
            b.kv_write(x, x, kv);
            let y = b.attend(x, kv, 3, 0.0, None, None);
            b.output(y);
        },
    );
    // More positions than a device may have room for at a time.
    cases.add("Attend F16 of 1100 positions".into(), &[], &[&[(0, 1097)], &[(1097, 3)]], ATTEND_BOUND, |b| {
        attended(b, State::new("kv", 1, 16, 16, Format::F16), 1, 0.25, None, false);
    });
    // Steps of two sequences in turn, of the same length.
    let turns: [&[(u32, u32)]; 4] =
        [&[(0, 3), (0, 0)], &[(0, 0), (0, 3)], &[(3, 2), (0, 0)], &[(0, 0), (3, 2)]];
    cases.add("Attend F32 of two sequences in turn".into(), &[], &turns, ATTEND_BOUND, |b| {
        attended(b, State::new("kv", 1, 32, 32, Format::F32), 2, 0.2, None, false);
    });
    cases.add("Gather 64 of two sequences in turn".into(), &[], &turns, ROW_BOUND, |b| {
        let x = b.input("x", Dim::Tokens, 64);
        let y = b.gather(x);
        b.output(y);
    });
    collected.0
}

/// All gates.
const GATES: [Gate; 8] = [
    Gate::Silu,
    Gate::Gelu,
    Gate::GeluErf,
    Gate::Relu,
    Gate::Sigmoid,
    Gate::Identity,
    Gate::Normal,
    Gate::SiluClamped { alpha: 1.702, limit: 1.5 },
];

/// All functions of one element.
const UNARY: [Unary; 9] = [
    Unary::Silu,
    Unary::Gelu,
    Unary::GeluErf,
    Unary::Relu,
    Unary::ReluSquared,
    Unary::Scale(0.7),
    Unary::SoftCap(1.3),
    Unary::Clamp(0.9),
    Unary::Shift(0.4),
];

fn rows(cases: &mut Cases) {
    for (cols, group) in [(1, 1), (100, 100), (64, 16), (257, 257), (2048, 2048)] {
        for kind in [NormKind::Rms, NormKind::Layer] {
            for (weighted, biased) in [(true, false), (false, false), (true, true), (false, true)] {
                let name = format!("Norm {kind:?} {cols}/{group} weight={weighted} bias={biased}");
                let weights =
                    [("w", Format::F32, vec![group.into()]), ("b", Format::F32, vec![group.into()])];
                cases.row(name, &weights, 3, |b| {
                    let x = b.input("x", Dim::Tokens, cols);
                    let weight = weighted.then(|| b.weight("w", 1, group));
                    let bias = biased.then(|| b.weight("b", 1, group));
                    let y = b.norm("y", x, kind, weight, bias, 1e-5, group);
                    b.output(y);
                });
            }
        }
        cases.row(format!("Norm add {cols}"), &[], 3, |b| {
            let (x, add) = (b.input("x", Dim::Tokens, cols), b.input("add", Dim::Tokens, cols));
            let (sum, out) = (b.input("sum", Dim::Tokens, cols), b.input("y", Dim::Tokens, cols));
            let (kind, eps, group) = (NormKind::Rms, 1e-6, cols);
            b.op(Op::Norm {
                x,
                add: Some(add),
                sum: Some(sum),
                weight: None,
                bias: None,
                out,
                kind,
                eps,
                group,
            });
        });
        for act in GATES {
            cases.add(format!("Glu {act:?} {cols}"), &[], &[&[(0, 3)]], gate_bound(act), |b| {
                let (gate, up) = (b.input("gate", Dim::Tokens, cols), b.input("up", Dim::Tokens, cols));
                let y = b.glu(gate, up, act);
                b.output(y);
            });
        }
        for f in UNARY {
            cases.add(format!("Unary {f:?} {cols}"), &[], &[&[(0, 3)]], unary_bound(f), |b| {
                let x = b.input("x", Dim::Tokens, cols);
                let y = b.unary("y", x, f);
                b.output(y);
            });
        }
        cases.row(format!("Add {cols}"), &[], 3, |b| {
            let (x, y) = (b.input("x", Dim::Tokens, cols), b.input("other", Dim::Tokens, cols));
            let y = b.add("y", x, y);
            b.output(y);
        });
        cases.row(format!("ArgMax {cols}"), &[], 3, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            // About half of the elements tie for the maximum: minus zero.
            let x = b.unary("relu", x, Unary::Relu);
            let x = b.unary("negative", x, Unary::Scale(-1.0));
            let best = b.arg_max(x);
            b.output(best);
        });
        cases.row(format!("TopK {cols}"), &[], 3, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let (ids, values) = b.top_k(x, cols.div_ceil(3).min(300));
            b.output(ids);
            b.output(values);
        });
        cases.row(format!("TopK {cols} of equals"), &[], 2, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let x = b.unary("relu", x, Unary::Relu);
            let (ids, values) = b.top_k(x, cols.min(300));
            b.output(ids);
            b.output(values);
        });
        cases.row(format!("Gather {cols}"), &[], 5, |b| {
            let x = b.input("x", Dim::Tokens, cols);
            let y = b.gather(x);
            b.output(y);
        });
    }
    for kind in [NormKind::Rms, NormKind::Layer] {
        // An eps that matters.
        cases.row(format!("Norm {kind:?} 100/100 eps=0.3"), &[], 3, |b| {
            let x = b.input("x", Dim::Tokens, 100);
            let y = b.norm("y", x, kind, None, None, 0.3, 100);
            b.output(y);
        });
    }
    // A mean that is large beside the deviation. The bound leaves room for other orders of the sum.
    cases.add("Norm Layer 100/100 around 100".into(), &[], &[&[(0, 3)]], 1e-8, |b| {
        let x = b.input("x", Dim::Tokens, 100);
        let x = shifted(b, x, 100.0);
        let y = b.norm("y", x, NormKind::Layer, None, None, 1e-5, 100);
        b.output(y);
    });
    let weights = [("w", Format::F32, vec![100]), ("b", Format::F32, vec![100])];
    cases.row("Norm add 100 weight=true bias=true".into(), &weights, 3, |b| {
        let (x, add) = (b.input("x", Dim::Tokens, 100), b.input("add", Dim::Tokens, 100));
        let (sum, out) = (b.input("sum", Dim::Tokens, 100), b.input("y", Dim::Tokens, 100));
        let (weight, bias) = (Some(b.weight("w", 1, 100)), Some(b.weight("b", 1, 100)));
        let (add, sum, kind, eps, group) = (Some(add), Some(sum), NormKind::Rms, 1e-6, 100);
        b.op(Op::Norm { x, add, sum, weight, bias, out, kind, eps, group });
    });
    // Long rows, which devices may reduce in several stages.
    cases.row("TopK 100 of 12288".into(), &[], 2, |b| {
        let x = b.input("x", Dim::Tokens, 12288);
        let (ids, values) = b.top_k(x, 100);
        b.output(ids);
        b.output(values);
    });
    for pairs in [RopePairs::Adjacent, RopePairs::Halves] {
        // Two sequences, far positions, and two rotations of the same shape.
        let steps: [&[(u32, u32)]; 2] = [&[(5, 3), (40, 2)], &[(12_000, 2), (0, 1)]];
        cases.add(format!("Rope {pairs:?} of two sequences and bases"), &[], &steps, ROW_BOUND, |b| {
            let x = b.input("x", Dim::Tokens, 2 * 64);
            for base in [1e4f32, 3e5] {
                let frequencies: Arc<[f32]> = (0..32).map(|i| base.powf(-(i as f32) / 32.0)).collect();
                let rotation = Rotation { head_dim: 64, frequencies, factors: None, magnitude: 1.0, pairs };
                let y = b.rope(&format!("y{base}"), x, &rotation);
                b.output(y);
            }
        });
        for (heads, head_dim, dims) in [(1, 2, 2), (3, 64, 64), (2, 80, 32), (1, 128, 100)] {
            for factored in [false, true] {
                let name = format!("Rope {pairs:?} {heads}x{head_dim} dims={dims} factors={factored}");
                let weights = [("factors", Format::F32, vec![u64::from(dims) / 2])];
                cases.add(name, &weights, &[&[(0, 3)], &[(4000, 2)]], 1e-10, |b| {
                    let x = b.input("x", Dim::Tokens, heads * head_dim);
                    let frequencies: Arc<[f32]> =
                        (0..dims / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dims as f32)).collect();
                    let factors = factored.then(|| b.weight("factors", 1, dims / 2));
                    let y =
                        b.rope("y", x, &Rotation { head_dim, frequencies, factors, magnitude: 1.1, pairs });
                    b.output(y);
                });
            }
        }
    }
}

/// Adds rotations that go straight to the cache, with the attention that reads it.
fn rotated_caches(cases: &mut Cases) {
    for format in kv::formats().filter(|format| format.block_len() == 1) {
        for (heads, kv_heads, dim, dims, pairs) in [
            (4, 2, 64, 64, RopePairs::Halves),
            (3, 1, 80, 32, RopePairs::Adjacent),
            (2, 2, 10, 4, RopePairs::Halves),
        ] {
            for factored in [false, true] {
                let name =
                    format!("RopeKv {} {pairs:?} {heads}/{kv_heads}x{dim} factors={factored}", format.name());
                let weights = [("factors", Format::F32, vec![u64::from(dims) / 2])];
                cases.add(name, &weights, &[&[(0, 70)], &[(70, 3)]], ATTEND_BOUND, |b| {
                    let q = b.input("q", Dim::Tokens, heads * dim);
                    let k = b.input("k", Dim::Tokens, kv_heads * dim);
                    let v = b.input("v", Dim::Tokens, kv_heads * 24);
                    let out = b.input("rotated", Dim::Tokens, heads * dim);
                    let state = b.state(State::new("kv", kv_heads, dim, 24, format));
                    let frequencies =
                        (0..dims / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dims as f32)).collect();
                    let factors = factored.then(|| b.weight("factors", 1, dims / 2));
                    let rotation = Rotation { head_dim: dim, frequencies, factors, magnitude: 1.1, pairs };
                    b.op(Op::RopeKv { q, k, v, out, state, rotation });
                    let y = b.attend(out, state, heads, 0.3, None, None);
                    b.output(y);
                });
            }
        }
    }
}

/// Adds attention of one input to a state with keys and values of two others.
fn attended(b: &mut Builder<'_>, kv: State, heads: u32, scale: f32, softcap: Option<f32>, sinks: bool) {
    let q = b.input("q", Dim::Tokens, heads * kv.key_dim);
    let k = b.input("k", Dim::Tokens, kv.kv_heads * kv.key_only());
    let v = b.input("v", Dim::Tokens, kv.kv_heads * kv.value_dim);
    let kv = b.state(kv);
    let sinks = sinks.then(|| b.weight("sinks", 1, heads));
    b.kv_write(k, v, kv);
    let y = b.attend(q, kv, heads, scale, softcap, sinks);
    b.output(y);
}

/// What latent attention has besides: caches of latent vectors, products by heads, and heads joined of two parts.
fn latent_attention(cases: &mut Cases) {
    let steps: [&[(u32, u32)]; 5] = [
        &[(0, 67), (0, 0)],
        &[(67, 1), (0, 3)],
        &[(68, 61), (3, 70)],
        &[(129, 130), (73, 0)],
        &[(259, 1), (73, 1)],
    ];
    for format in kv::formats() {
        for (heads, key_dim, value_dim) in [(5, 44, 37), (3, 96, 64), (16, 160, 128), (70, 96, 32)] {
            let block = format.block_len() as u32;
            if key_dim % block != 0 || value_dim % block != 0 {
                continue;
            }
            let name = format!("Attend {} latent {heads}/1 {key_dim}/{value_dim}", format.name());
            // More heads than a workgroup has invocations take long.
            let steps = if heads > 64 { &steps[..2] } else { &steps[..] };
            cases.add(name, &[], steps, ATTEND_BOUND, |b| {
                let kv = State::latent("kv", key_dim, value_dim, format);
                attended(b, kv, heads, 1.0 / (key_dim as f32).sqrt(), None, false);
            });
        }
    }
    for (cols, groups, first, last, shared) in [
        (96, 4, 24, 8, true),
        (96, 4, 24, 8, false),
        (10, 5, 2, 3, false),
        (7, 1, 7, 1, true),
        (640, 5, 128, 64, true),
    ] {
        cases.row(format!("Join {groups}x{first}+{last} shared={shared}"), &[], 5, |b| {
            let a = b.input("a", Dim::Tokens, cols);
            let other = b.input("b", Dim::Tokens, if shared { last } else { groups * last });
            let y = b.join("y", a, other, first, last);
            b.output(y);
        });
    }
    for format in [Format::F32, Format::BF16, Format::Q8_0, Format::Q4_0, Format::Q4_K, Format::Q6_K] {
        for (blocks, outputs, tokens) in [(3, 40, 1), (5, 16, 3), (2, 33, 11), (1, 24, 2), (16, 48, 67)] {
            let cols = if unit(format) == 1 { 20 } else { unit(format) };
            let name = format!("BlockMatMul {} {blocks}x{outputs}x{cols} tokens={tokens}", format.name());
            let weights = [("w", format, vec![cols.into(), outputs.into(), blocks.into()])];
            cases.add(name, &weights, &[&[(0, tokens)]], bound(format), |b| {
                let x = b.input("x", Dim::Tokens, blocks * cols);
                let w = b.expert_weight("w", blocks, outputs, cols);
                let y = b.block_linear("y", x, w);
                b.output(y);
            });
        }
    }
}

fn attention(cases: &mut Cases) {
    for format in kv::formats() {
        for (heads, kv_heads, key_dim, value_dim) in
            [(1, 1, 16, 16), (4, 1, 64, 64), (6, 2, 80, 48), (2, 2, 7, 130), (6, 3, 96, 32), (10, 1, 32, 160)]
        {
            let block = format.block_len() as u32;
            if key_dim % block != 0 || value_dim % block != 0 {
                continue;
            }
            for (window, softcap, sinks) in
                [(None, None, false), (Some(5), None, false), (Some(150), Some(2.0), true)]
            {
                let name = format!(
                    "Attend {} {heads}/{kv_heads} {key_dim}/{value_dim} window={window:?} softcap={softcap:?} sinks={sinks}",
                    format.name()
                );
                // A prefill across a page's end, then single tokens beside a second sequence that starts
                // later; last, a token that sees enough pages to be split between threads.
                let steps: [&[(u32, u32)]; 6] = [
                    &[(0, 67), (0, 0)],
                    &[(67, 1), (0, 3)],
                    &[(68, 61), (3, 1)],
                    &[(129, 1), (4, 70)],
                    &[(130, 70), (74, 0)],
                    &[(200, 1), (74, 1)],
                ];
                let weights = [("sinks", Format::F32, vec![heads.into()])];
                cases.add(name, &weights, &steps, ATTEND_BOUND, |b| {
                    let kv = State::new("kv", kv_heads, key_dim, value_dim, format).window(window);
                    attended(b, kv, heads, 1.0 / (key_dim as f32).sqrt(), softcap, sinks);
                });
            }
        }
        // Attention that is not causal: whole sequences, across the ends of pages; then tokens that also see
        // earlier positions, and a single token with a cache long enough to be split. Windows end within a page, and at and
        // after its end.
        for (heads, kv_heads, key_dim, value_dim, window, after, sinks) in [
            (3, 3, 32, 32, None, u32::MAX, false),
            (4, 2, 64, 96, None, u32::MAX, true),
            (4, 2, 32, 64, Some(5), 4, true),
            (3, 3, 64, 32, Some(65), 64, false),
            (2, 1, 32, 32, Some(1), 150, false),
            (2, 1, 32, 32, None, 3, false),
        ] {
            let bounds = match (window, after) {
                (None, u32::MAX) => String::new(),
                _ => format!(" window={window:?} after={after}"),
            };
            let name = format!(
                "Attend {} {heads}/{kv_heads} {key_dim}/{value_dim} both directions{bounds} sinks={sinks}",
                format.name()
            );
            let steps: [&[(u32, u32)]; 5] = [
                &[(0, 67), (0, 3)],
                &[(0, 1), (0, 130)],
                &[(0, 64), (130, 9)],
                &[(64, 540), (0, 2)],
                &[(604, 1), (0, 0)],
            ];
            cases.add(name, &[("sinks", Format::F32, vec![heads.into()])], &steps, ATTEND_BOUND, |b| {
                let kv = State::new("kv", kv_heads, key_dim, value_dim, format).window(window).after(after);
                attended(b, kv, heads, 0.3, None, sinks);
            });
        }
        // Biases by distance: causal with a window and a soft cap, split, and in both directions; heads in one, two and three
        // groups, whose slopes differ.
        for (heads, kv_heads, window, after, softcap) in [
            (4, 1, None, 0, None),
            (6, 2, Some(70), 0, Some(2.0)),
            (3, 3, None, u32::MAX, None),
            (12, 3, Some(33), 32, None),
        ] {
            let name = format!(
                "Attend {} {heads}/{kv_heads} 32/64 slopes window={window:?} after={after} softcap={softcap:?}",
                format.name()
            );
            let whole: [&[(u32, u32)]; 3] = [&[(0, 67), (0, 3)], &[(0, 1), (0, 130)], &[(130, 530), (3, 2)]];
            let more: [&[(u32, u32)]; 4] =
                [&[(0, 130), (0, 67)], &[(130, 400), (67, 1)], &[(530, 1), (68, 3)], &[(531, 1)]];
            let steps = if after == 0 { &more[..] } else { &whole[..] };
            cases.add(name, &[], steps, ATTEND_BOUND, |b| {
                let slopes = (0..heads).map(|head| 0.5 / (head + 1) as f32).collect();
                let kv = State::new("kv", kv_heads, 32, 64, format).window(window).after(after);
                let q = b.input("q", Dim::Tokens, heads * 32);
                let k = b.input("k", Dim::Tokens, kv_heads * 32);
                let v = b.input("v", Dim::Tokens, kv_heads * 64);
                let kv = b.state(kv);
                b.kv_write(k, v, kv);
                let y = b.attend_with(q, kv, heads, 0.3, None, softcap, Some(slopes), None);
                b.output(y);
            });
        }
        // Windows side by side, whose borders are in a page, at its end, and in the middle of a step; and scales by position, of
        // which the last one goes on.
        for (heads, kv_heads, window, grows) in
            [(4, 1, Some(64), true), (6, 2, Some(100), false), (3, 3, Some(1), false), (4, 2, None, true)]
        {
            let name = format!(
                "Attend {} {heads}/{kv_heads} 32/64 side by side window={window:?} growth={grows}",
                format.name()
            );
            let steps: [&[(u32, u32)]; 4] =
                [&[(0, 130), (0, 64)], &[(130, 400), (64, 1)], &[(530, 1), (65, 63)], &[(531, 69), (128, 1)]];
            cases.add(name, &[], &steps, ATTEND_BOUND, |b| {
                let kv = State::new("kv", kv_heads, 32, 64, format).window(window).aligned(window.is_some());
                let growth = Growth { factors: [0.5, 2.0, 1.0, 3.0].into(), period: 50, ahead: 1 };
                let q = b.input("q", Dim::Tokens, heads * 32);
                let k = b.input("k", Dim::Tokens, kv_heads * 32);
                let v = b.input("v", Dim::Tokens, kv_heads * 64);
                let kv = b.state(kv);
                b.kv_write(k, v, kv);
                let y = b.attend_with(q, kv, heads, 0.3, grows.then_some(growth), None, None, None);
                b.output(y);
            });
        }
        // Infinities, for formats whose blocks have a scale.
        let infinite = if format.kind() == Kind::Float { &[][..] } else { &["keys", "values"] };
        for &which in infinite {
            let name = format!("Attend {} infinite {which}", format.name());
            cases.add(name, &[], &[&[(0, 3)], &[(3, 1)]], ATTEND_BOUND, |b| {
                let (q, k) = (b.input("q", Dim::Tokens, 2 * 32), b.input("k", Dim::Tokens, 32));
                let v = b.input("v", Dim::Tokens, 32);
                let large = b.unary("large", if which == "keys" { k } else { v }, Unary::Scale(1e38));
                let infinite = b.unary("infinite", large, Unary::Scale(10.0));
                let (k, v) = if which == "keys" { (infinite, v) } else { (k, infinite) };
                let kv = b.state(State::new("kv", 1, 32, 32, format));
                b.kv_write(k, v, kv);
                let y = b.attend(q, kv, 2, 0.2, None, None);
                b.output(y);
            });
        }
        // Layers with different windows: each KV group has its own page tables.
        let steps: [&[(u32, u32)]; 4] =
            [&[(0, 130), (0, 3)], &[(130, 1), (3, 1)], &[(131, 70), (4, 0)], &[(201, 2), (4, 61)]];
        cases.add(format!("Attend {} in KV groups", format.name()), &[], &steps, ATTEND_BOUND, |b| {
            let (q, k) = (b.input("q", Dim::Tokens, 2 * 32), b.input("k", Dim::Tokens, 32));
            let v = b.input("v", Dim::Tokens, 32);
            for (name, window) in [("a", Some(20)), ("b", None), ("c", Some(70)), ("d", Some(20))] {
                let kv = b.state(State::new(name, 1, 32, 32, format).window(window));
                b.kv_write(k, v, kv);
                let y = b.attend(q, kv, 2, 0.2, None, None);
                b.output(y);
            }
        });
        // One token, and tokens of two sequences, with caches long enough for devices to split between
        // workgroups.
        for (window, sinks) in [(None, false), (Some(520), true)] {
            let name = format!("Attend {} long window={window:?} sinks={sinks}", format.name());
            let steps: [&[(u32, u32)]; 4] =
                [&[(0, 530), (0, 0)], &[(530, 1), (0, 0)], &[(531, 1), (0, 2)], &[(532, 3), (2, 1)]];
            cases.add(name, &[("sinks", Format::F32, vec![2])], &steps, ATTEND_BOUND, |b| {
                let kv = State::new("kv", 1, 32, 96, format).window(window);
                attended(b, kv, 2, 0.2, None, sinks);
            });
        }
    }
}

fn experts(cases: &mut Cases) {
    for gating in [Gating::Softmax, Gating::SoftmaxOfTop, Gating::Sigmoid] {
        for (experts, used, normalise) in [(8, 2, true), (4, 4, false), (60, 6, true)] {
            let name = format!("Route {gating:?} {used} of {experts} normalise={normalise}");
            cases.row(name, &[], 5, |b| {
                let logits = b.input("logits", Dim::Tokens, experts);
                let (ids, weights) = b.route(logits, used, gating, normalise, 1.25);
                b.output(ids);
                b.output(weights);
            });
        }
    }
    for format in [Format::F32, Format::Q4_0, Format::Q4_K, Format::MXFP4, Format::IQ2_XS] {
        for (tokens, biased) in [(1, false), (3, true), (20, false)] {
            let name = format!("Experts {} tokens={tokens} biases={biased}", format.name());
            mixture(cases, name, [256, 512, 4], format, tokens, 1e-2, 2, Gate::Silu, biased);
        }
    }
}

/// Adds a case of `used` experts of each token. The sizes are: elements of a row, hidden elements, experts.
#[allow(clippy::too_many_arguments)]
fn mixture(
    cases: &mut Cases,
    name: String,
    [cols, hidden, n]: [u64; 3],
    format: Format,
    tokens: u32,
    bound: f64,
    used: u32,
    act: Gate,
    biased: bool,
) {
    let weights = [
        ("gate", format, vec![cols, hidden, n]),
        ("up", format, vec![cols, hidden, n]),
        ("down", format, vec![hidden, cols, n]),
        ("gate.b", Format::F32, vec![hidden, n]),
        ("up.b", Format::F32, vec![hidden, n]),
        ("down.b", Format::F32, vec![cols, n]),
    ];
    let (cols, hidden, n) = (cols as u32, hidden as u32, n as u32);
    cases.add(name, &weights, &[&[(0, tokens)]], bound, |b| {
        let x = b.input("x", Dim::Tokens, cols);
        let logits = b.input("logits", Dim::Tokens, n);
        let routes = b.route(logits, used, Gating::Softmax, true, 1.0);
        let mats = [
            b.expert_weight("gate", n, hidden, cols),
            b.expert_weight("up", n, hidden, cols),
            b.expert_weight("down", n, cols, hidden),
        ];
        let biases = biased.then(|| {
            [b.weight("gate.b", n, hidden), b.weight("up.b", n, hidden), b.weight("down.b", n, cols)]
        });
        let y = b.experts(x, routes, mats, biases, act);
        b.output(y);
    });
}
