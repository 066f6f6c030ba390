//! Matrix products where integer sums are largest.
#![cfg(feature = "std")]

use halite_kernels::activation::{Activation, PADDING, Quantise, Quantised, QuantisedMut, SUMS, padded};
use halite_kernels::formats::{Format, Kind, Layout};
use halite_kernels::isa::Cpu;
use halite_kernels::matmul::{MatMul, X, matmul};
use halite_kernels::panel::PanelMut;

const K: usize = 512;
const ROWS: usize = 16;

/// The products of `tokens` rows of one value with rows of one byte.
fn products(cpu: Cpu, format: Format, to: Activation, byte: u8, value: f32, tokens: usize) -> Vec<u32> {
    let mut w = vec![byte; ROWS * format.row_bytes(K).unwrap()];
    format.set_scale(&mut w, 0.5);
    let width = tokens * padded(K);
    let (mut codes, mut scales) = (vec![0; width], vec![0.0; width / to.block_len()]);
    let mut sums = vec![0; width / PADDING * SUMS];
    let out = QuantisedMut { codes: &mut codes, scales: &mut scales, sums: &mut sums };
    cpu.run(Quantise { to, k: K, x: &vec![value; tokens * K], out });
    let x = X::Quantised(Quantised { k: K, codes: &codes, scales: &scales, sums: &sums });
    let mut y = vec![0.0f32; tokens * ROWS];
    matmul(cpu, format, MatMul { w: &w, layout: Layout::Rows, k: K, x, out: PanelMut::new(&mut y, ROWS) });
    y.iter().map(|y| y.to_bits()).collect()
}

#[test]
fn the_largest_sums_are_exact_on_every_instruction_set() {
    let scalar = Cpu::from_name("scalar").unwrap();
    for &format in Format::ALL {
        let Kind::Quantised { activation, .. } = format.kind() else { continue };
        for (byte, value) in [(0xff, 1.0), (0xff, -1.0), (0x80, 1.0), (0x80, -1.0), (0x7f, 1.0), (0, -1.0)] {
            for tokens in [1, 5] {
                let want = products(scalar, format, activation, byte, value, tokens);
                for cpu in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
                    let got = products(cpu, format, activation, byte, value, tokens);
                    assert_eq!(got, want, "{format:?} {} {byte:#x} {value} {tokens}", cpu.name());
                }
            }
        }
    }
}

/// Every power of two that a scale byte of MXFP4 stands for, in plain and in interleaved rows.
#[test]
fn scales_of_mxfp4_are_powers_of_two() {
    // A row is one block of codes 2, which stand for 1: 127 times the scale for one activation of 127.
    let rows: Vec<u8> = (0..=255).flat_map(|e| [&[e][..], &[0x22; 16]].concat()).collect();
    let mut codes = [0; PADDING];
    codes[0] = 127;
    let (mut sums, scales) = ([0; SUMS], [1.0; PADDING / 32]);
    (sums[0], sums[16]) = (127, 127);
    let x = Quantised { k: 32, codes: &codes, scales: &scales, sums: &sums };
    let mut want = vec![0.0; 256];
    for (e, want) in want.iter_mut().enumerate() {
        let mut values = [0.0f32; 32];
        Format::MXFP4.dequantize(&rows[17 * e..][..17], &mut values).unwrap();
        *want = values[0] * 127.0;
    }
    let mut interleaved = vec![0; rows.len()];
    Format::MXFP4.interleave(32, &rows, &mut interleaved).unwrap();
    for cpu in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
        for (layout, w) in [(Layout::Rows, &rows), (Layout::Interleaved, &interleaved)] {
            let mut y = vec![0.0f32; 256];
            let out = PanelMut::new(&mut y, 256);
            matmul(cpu, Format::MXFP4, MatMul { w, layout, k: 32, x: X::Quantised(x), out });
            for (e, (y, want)) in y.iter().zip(&want).enumerate() {
                assert_eq!(y.to_bits(), want.to_bits(), "{} {layout:?} exponent {e}", cpu.name());
            }
        }
    }
}

/// Whatever the lengths say, nothing panics, and what is there is computed.
#[test]
fn wrong_lengths_leave_rows_and_tokens_alone() {
    let mut state = 1u64;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let codes = vec![1i8; 4 * 1024];
    let (scales, sums) = (vec![1.0f32; 256], vec![0i32; 4 * 4 * SUMS]);
    let floats = vec![1.0f32; 4 * 1024];
    for &format in Format::ALL {
        for round in 0..300 {
            let cpu = Cpu::from_name(Cpu::NAMES[draw(Cpu::NAMES.len())]).unwrap_or(Cpu::detect());
            let k = [draw(1100), 32 * draw(33), 256 * draw(5), usize::MAX - draw(300)][draw(4)];
            let w = vec![0; draw(40 * format.block_bytes())];
            let layout = if draw(2) == 0 { Layout::Rows } else { Layout::Interleaved };
            let x = if round % 3 == 0 {
                X::F32(&floats[..draw(floats.len())])
            } else {
                X::Quantised(Quantised {
                    k: if draw(8) == 0 { draw(600) } else { k },
                    codes: &codes[..draw(codes.len())],
                    scales: &scales[..draw(scales.len())],
                    sums: &sums[..draw(sums.len())],
                })
            };
            let mut y = vec![7.0f32; draw(200)];
            let cols = draw(40);
            matmul(cpu, format, MatMul { w: &w, layout, k, x, out: PanelMut::new(&mut y, cols) });
            let block_at = [draw(9), usize::MAX - draw(40)];
            let mut block = vec![0; [format.block_bytes(), draw(64)][draw(2)]];
            let blocks = [draw(9), usize::MAX - draw(9)][draw(2)];
            let _ = format.copy_block(layout, &w, blocks, block_at[draw(2)], block_at[draw(2)], &mut block);
        }
    }
}
