//! Matrix products by format, on one thread: a token at a time (decode) and many (prefill).
//!
//! `cargo bench --bench matmul -- Q4_0` runs one format; throughput is in bytes of weights for decode and in multiply-adds for
//! prefill. `HALITE_ISA` narrows the instruction set.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use halite::kernels::activation::{Activation, PADDING, Quantise, Quantised, QuantisedMut, SUMS, padded};
use halite::kernels::formats::{Format, Kind, Layout};
use halite::kernels::isa::Cpu;
use halite::kernels::matmul::{MatMul, X, matmul};
use halite::kernels::panel::PanelMut;

const K: usize = 2048;

fn products(c: &mut Criterion) {
    let cpu =
        std::env::var("HALITE_ISA").ok().and_then(|name| Cpu::from_name(&name)).unwrap_or_else(Cpu::detect);
    for (name, tokens, rows) in
        [("decode", 1usize, 16384usize), ("decode in cache", 1, 256), ("prefill", 128, 256)]
    {
        let mut group = c.benchmark_group(name);
        group.sample_size(20).warm_up_time(std::time::Duration::from_millis(300));
        group.measurement_time(std::time::Duration::from_millis(1000));
        for &format in Format::ALL {
            let Some(row_bytes) = format.row_bytes(K) else { continue };
            let mut w: Vec<u8> = (0..rows * row_bytes).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
            format.set_scale(&mut w, 0.01);
            let x: Vec<f32> = (0..tokens * K).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
            let to = match format.kind() {
                Kind::Quantised { activation, .. } => activation,
                Kind::Float => Activation::Q8_0,
            };
            let width = tokens * padded(K);
            let (mut codes, mut scales, mut sums) =
                (vec![0; width], vec![0.0; width / to.block_len()], vec![0; width / PADDING * SUMS]);
            let out = QuantisedMut { codes: &mut codes, scales: &mut scales, sums: &mut sums };
            cpu.run(Quantise { to, k: K, x: &x, out });
            let x = match format.kind() {
                Kind::Float => X::F32(&x),
                Kind::Quantised { .. } => {
                    X::Quantised(Quantised { k: K, codes: &codes, scales: &scales, sums: &sums })
                }
            };
            let mut y = vec![0.0; tokens * rows];
            group.throughput(match name {
                "decode" | "decode in cache" => Throughput::Bytes(w.len() as u64),
                _ => Throughput::Elements((tokens * rows * K) as u64),
            });
            group.bench_function(BenchmarkId::from_parameter(format.name()), |b| {
                b.iter(|| {
                    matmul(
                        cpu,
                        format,
                        MatMul { w: &w, layout: Layout::Rows, k: K, x, out: PanelMut::new(&mut y, rows) },
                    )
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
