//! Attention split over chunks is the whole attention, bit for bit.
#![cfg(feature = "std")]

use halite_kernels::attention::{Attend, AttendChunks, CHUNK, Merge, PageShape, Pages, chunks};
use halite_kernels::isa::Cpu;

/// Numbers from -1 to 1.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect()
}

#[test]
fn chunks_merged_a_few_at_a_time_are_the_whole() {
    const HEADS: usize = 3;
    let shape = PageShape { kv_heads: 2, key_dim: 40, value_dim: 80 };
    let head = shape.value_dim + 2;
    let (q, sinks) = (values(HEADS * shape.key_dim), values(HEADS));
    let table = [4, 0, 3, 1, 2];
    let pages = values(table.len() * shape.elements());
    for (position, window, sinks) in [
        (4 * CHUNK + 9, None, None),
        (4 * CHUNK + 9, Some(200), Some(&sinks[..])),
        (5, None, Some(&sinks[..])),
    ] {
        for isa in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
            fn attend<'a>(whole: &Attend<'a>, out: &'a mut [f32]) -> Attend<'a> {
                Attend { out, ..*whole }
            }
            let whole = Attend {
                q: &q,
                q_stride: q.len(),
                out: &mut [],
                out_stride: HEADS * shape.value_dim,
                tokens: 1,
                heads: HEADS,
                pages: Pages::F32(&pages),
                shape,
                table: &table,
                kv_head: 1,
                position,
                causal: true,
                window,
                scale: 0.2,
                softcap: None,
                sinks,
            };
            let mut expected = vec![0.0; HEADS * shape.value_dim];
            isa.run(attend(&whole, &mut expected));

            let mut got = vec![f32::NAN; HEADS * shape.value_dim];
            let (mut max, mut sum) = ([f32::NAN; HEADS], [f32::NAN; HEADS]);
            let all = chunks(position, window);
            for first in all.clone().step_by(2) {
                let some = first..(first + 2).min(all.end);
                let mut found = vec![f32::NAN; some.len() * HEADS * head];
                for (chunk, out) in some.clone().zip(found.chunks_exact_mut(HEADS * head)) {
                    isa.run(AttendChunks { attend: attend(&whole, out), chunks: chunk..chunk + 1 });
                }
                for (h, out) in got.chunks_exact_mut(shape.value_dim).enumerate() {
                    isa.run(Merge {
                        chunks: &found[h * head..],
                        stride: HEADS * head,
                        out,
                        max: &mut max[h],
                        sum: &mut sum[h],
                        fresh: first == all.start,
                        last: some.end == all.end,
                        sink: sinks.map(|s| s[h]),
                    });
                }
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&expected), "{} at {position}", isa.name());
        }
    }
}
