//! Attention split over chunks is the whole attention, bit for bit.
#![cfg(feature = "std")]

use halite_kernels::attention::{
    Attend, AttendChunks, CHUNK, Merge, PageShape, Pages, PagesMut, Sight, write,
};
use halite_kernels::formats::Format;
use halite_kernels::isa::Cpu;

/// Numbers from -1 to 1.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect()
}

#[test]
fn chunks_merged_a_few_at_a_time_are_the_whole() {
    const HEADS: usize = 3;
    let shape = PageShape { kv_heads: 2, key_dim: 40, value_dim: 80, latent: false };
    let head = shape.value_dim + 2;
    let (q, sinks) = (values(HEADS * shape.key_dim), values(HEADS));
    let table = [4, 0, 3, 1, 2];
    let pages = values(table.len() * shape.elements());
    for (position, window, after, aligned, sinks) in [
        (4 * CHUNK + 9, None, 0, false, None),
        (4 * CHUNK + 9, Some(200), 0, false, Some(&sinks[..])),
        (5, None, 0, false, Some(&sinks[..])),
        (5, None, u32::MAX, false, None),
        (CHUNK + 9, Some(30), 150, false, None),
        (4 * CHUNK + 9, Some(100), 0, true, None),
    ] {
        let (end, sight) = (4 * CHUNK + 10, Sight { window, after, aligned });
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
                pages: Pages { format: Format::F32, bytes: bytemuck::cast_slice(&pages) },
                shape,
                table: &table,
                kv_head: 1,
                position,
                end,
                sight,
                scale: 0.2,
                growth: None,
                softcap: None,
                slopes: None,
                sinks,
            };
            let mut expected = vec![0.0; HEADS * shape.value_dim];
            isa.run(attend(&whole, &mut expected));

            let mut got = vec![f32::NAN; HEADS * shape.value_dim];
            let (mut max, mut sum) = ([f32::NAN; HEADS], [f32::NAN; HEADS]);
            let all = sight.chunks(position, end);
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

/// What a page in Q4_0 holds are the blocks of the weight format, whose bytes are ggml's, with codes and scales where the page
/// has them; positions beside the written ones stay as they were.
#[test]
fn a_page_in_q4_0_holds_its_blocks() {
    let shape = PageShape { kv_heads: 2, key_dim: 64, value_dim: 32, latent: false };
    let (keys, values_of) = (shape.kv_heads * shape.key_dim, shape.kv_heads * shape.value_dim);
    let mut data = vec![0xa5; 3 * shape.bytes(Format::Q4_0)];
    let before = data.clone();
    let mut x: Vec<f32> = values((keys + values_of) * CHUNK);
    x[5] = f32::NAN;
    x[40..72].fill(0.0);
    let slots = [0, 1, 15, 16, 17, 40, 63];
    for slot in slots {
        let (k, v) = x[slot * (keys + values_of)..][..keys + values_of].split_at(keys);
        write(&mut PagesMut { format: Format::Q4_0, bytes: &mut data }, shape, 1, slot, k, v);
    }
    let (written, rest) = data.split_at(2 * shape.bytes(Format::Q4_0));
    let (first, page) = written.split_at(shape.bytes(Format::Q4_0));
    assert!(first == &before[..first.len()] && rest == &before[..rest.len()], "other pages stay");
    let (codes, scales) = page.split_at(shape.elements() / 2);
    let code = |at: usize| (codes[at / 32 * 16 + at % 16] >> (at % 32 / 16 * 4)) & 15;
    for slot in 0..CHUNK {
        for d in 0..keys + values_of {
            let block = d / 32;
            let at = match d.checked_sub(keys) {
                None => d * CHUNK + slot,
                Some(d) => {
                    (keys + d / shape.value_dim * shape.value_dim) * CHUNK
                        + slot * shape.value_dim
                        + d % shape.value_dim
                }
            };
            let scale = [scales[2 * (block * CHUNK + slot)], scales[2 * (block * CHUNK + slot) + 1]];
            if !slots.contains(&slot) {
                assert_eq!((code(at), scale), (if at % 32 < 16 { 5 } else { 10 }, [0xa5; 2]), "{slot} {d}");
                continue;
            }
            let x = &x[slot * (keys + values_of) + 32 * block..][..32];
            if x.iter().any(|x| x.is_nan()) {
                assert_eq!(u16::from_le_bytes(scale) & 0x7c00, 0x7c00);
                assert_ne!(u16::from_le_bytes(scale) & 0x03ff, 0);
                continue;
            }
            let mut want = [0; 18];
            Format::Q4_0.quantize(x, &mut want).unwrap();
            let byte = want[2 + d % 16];
            assert_eq!(
                (code(at), scale),
                (if d % 32 < 16 { byte & 15 } else { byte >> 4 }, [want[0], want[1]]),
                "{slot} {d}"
            );
        }
    }
}

/// Rows that share a pass, for which codes are turned to f32 once, find what each finds alone.
#[test]
fn codes_are_read_alike_for_few_rows_and_for_many() {
    let shape = PageShape { kv_heads: 1, key_dim: 96, value_dim: 96, latent: false };
    let mut codes = vec![0u8; 2 * shape.bytes(Format::Q4_0)];
    for position in 0..2 * CHUNK {
        let x = &values(shape.key_dim * (position + 1))[shape.key_dim * position..];
        write(
            &mut PagesMut { format: Format::Q4_0, bytes: &mut codes },
            shape,
            position / CHUNK,
            position % CHUNK,
            x,
            x,
        );
    }
    const TOKENS: usize = 40;
    let q = values(TOKENS * shape.key_dim);
    for isa in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
        let attend = |out: &mut [f32], first: usize, tokens: usize| {
            isa.run(Attend {
                q: &q[first * shape.key_dim..][..tokens * shape.key_dim],
                q_stride: shape.key_dim,
                out,
                out_stride: shape.value_dim,
                tokens,
                heads: 1,
                pages: Pages { format: Format::Q4_0, bytes: &codes },
                shape,
                table: &[0, 1],
                kv_head: 0,
                position: CHUNK + 10 + first,
                end: CHUNK + 10 + TOKENS,
                sight: Sight { window: None, after: 0, aligned: false },
                scale: 0.1,
                growth: None,
                softcap: None,
                slopes: None,
                sinks: None,
            });
        };
        let (mut all, mut each) = (vec![0.0; TOKENS * 96], vec![0.0; TOKENS * 96]);
        attend(&mut all, 0, TOKENS);
        each.chunks_exact_mut(96).enumerate().for_each(|(t, out)| attend(out, t, 1));
        assert!(all.iter().all(|x| x.is_finite() && *x != 0.0));
        assert_eq!(all, each, "{}", isa.name());
    }
}
