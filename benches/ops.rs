//! The ops beside matrix products, on one thread: attention at several depths, and what runs on rows.
//!
//! `cargo bench --bench ops -- attend` runs one; throughput is in bytes of cache for attention and in elements for the rest.
//! `HALITE_ISA` narrows the instruction set.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use halite::kernels::activation::{Activation, PADDING, Quantise, QuantisedMut, SUMS, padded};
use halite::kernels::attention::{Attend, Sight};
use halite::kernels::formats::Format;
use halite::kernels::isa::Cpu;
use halite::kernels::kv::{self, CHUNK, PageShape, Pages};
use halite::kernels::rows::{Add, ArgMax, Gate, Glu, Norm, Rope, Softmax};

/// Elements of a row: the embedding of a model of a billion parameters.
const COLS: usize = 2048;
const HEAD: usize = 128;

fn cpu() -> Cpu {
    std::env::var("HALITE_ISA").ok().and_then(|name| Cpu::from_name(&name)).unwrap_or_else(Cpu::detect)
}

/// Numbers from -1 to 1.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect()
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(20).warm_up_time(std::time::Duration::from_millis(300));
    group.measurement_time(std::time::Duration::from_millis(1000));
    group
}

/// One KV head with the query heads that share it.
fn attention(c: &mut Criterion) {
    let cpu = cpu();
    let shape = PageShape { kv_heads: 1, key_dim: HEAD, value_dim: HEAD, latent: false };
    for heads in [1, 4, 8] {
        let mut group = group(c, &format!("attend/query heads {heads}"));
        for depth in [64, 512, 4096, 32768] {
            let pages = depth / CHUNK;
            // One, with changing fractions, in half precision.
            let half: Vec<u16> = (0..pages * shape.elements()).map(|i| 0x3c00 | (i % 1024) as u16).collect();
            let single: Vec<f32> = values(half.len());
            let table: Vec<u32> = (0..pages as u32).collect();
            let (q, mut out) = (values(heads * HEAD), vec![0.0; heads * HEAD]);
            let codes: Vec<u8> = (0..pages * shape.bytes(Format::Q8_0)).map(|i| (i % 60) as u8).collect();
            for format in kv::formats() {
                let bytes = match format {
                    Format::F32 => bytemuck::cast_slice(&single),
                    Format::F16 => bytemuck::cast_slice(&half),
                    format => &codes[..pages * shape.bytes(format)],
                };
                let (name, pages, bytes) = (format.name(), Pages { format, bytes }, bytes.len());
                group.throughput(Throughput::Bytes(bytes as u64));
                group.bench_function(format!("{name}/{depth}"), |b| {
                    b.iter(|| {
                        cpu.run(Attend {
                            q: &q,
                            q_stride: q.len(),
                            out: &mut out,
                            out_stride: heads * HEAD,
                            tokens: 1,
                            heads,
                            pages,
                            shape,
                            table: &table,
                            kv_head: 0,
                            position: depth - 1,
                            end: depth,
                            sight: Sight { window: None, after: 0, aligned: false },
                            scale: 0.09,
                            growth: None,
                            softcap: None,
                            slopes: None,
                            sinks: None,
                        });
                    });
                });
            }
        }
        group.finish();
    }
}

fn rows(c: &mut Criterion) {
    let cpu = cpu();
    let (a, b, mut out) = (values(COLS), values(COLS), vec![0.0; COLS]);
    let frequencies: Vec<f32> = (0..HEAD / 2).map(|i| 1.0 / (1 + i) as f32).collect();
    let mut group = group(c, "rows");
    group.throughput(Throughput::Elements(COLS as u64));
    for (name, centred) in [("norm/rms", false), ("norm/layer", true)] {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                cpu.run(Norm { x: &a, weight: Some(&b), bias: None, eps: 1e-5, centred, out: &mut out });
            });
        });
    }
    for (name, f) in [("glu/silu", Gate::Silu), ("glu/gelu", Gate::Gelu)] {
        group.bench_function(name, |bench| {
            bench.iter(|| cpu.run(Glu { f, gate: &a, up: &b, out: &mut out }));
        });
    }
    for (name, adjacent) in [("rope/adjacent", true), ("rope/halves", false)] {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                cpu.run(Rope {
                    x: &a,
                    out: &mut out,
                    head_dim: HEAD,
                    position: 1000,
                    frequencies: &frequencies,
                    factors: None,
                    magnitude: 1.0,
                    adjacent,
                });
            });
        });
    }
    group.bench_function("add", |bench| bench.iter(|| cpu.run(Add { a: &a, b: &b, out: &mut out })));
    group.bench_function("softmax", |bench| bench.iter(|| cpu.run(Softmax { x: &mut out })));
    group.bench_function("arg max", |bench| bench.iter(|| cpu.run(ArgMax { x: &a })));
    let (mut codes, mut sums) = (vec![0; padded(COLS)], vec![0; padded(COLS) / PADDING * SUMS]);
    for (name, to) in [("quantise/Q8_0", Activation::Q8_0), ("quantise/Q8_K", Activation::Q8_K)] {
        let mut scales = vec![0.0; padded(COLS) / to.block_len()];
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let out = QuantisedMut { codes: &mut codes, scales: &mut scales, sums: &mut sums };
                cpu.run(Quantise { to, k: COLS, x: &a, out });
            });
        });
    }
    group.finish();
}

criterion_group!(benches, attention, rows);
criterion_main!(benches);
