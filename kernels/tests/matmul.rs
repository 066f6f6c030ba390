//! Matrix products: of every format, of every scale byte, where integer sums are largest, and of odd lengths.
#![cfg(feature = "std")]

use halite_kernels::activation::{Activation, PADDING, Quantise, Quantised, QuantisedMut, SUMS, padded};
use halite_kernels::formats::{Format, Kind, Layout, Unpacked};
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

/// All values of a scale byte, in plain and in interleaved rows.
#[test]
fn every_scale_byte_has_its_value() {
    // A row is one block of codes 2, which stand for 1: 127 times the scale for one activation of 127.
    let mut codes = [0; PADDING];
    codes[0] = 127;
    let (mut sums, scales) = ([0; SUMS], [1.0; PADDING / 32]);
    (sums[0], sums[16]) = (127, 127);
    for (format, scale_bytes) in [(Format::MXFP4, 1), (Format::NVFP4, 4)] {
        let k = format.block_len();
        let x = Quantised { k, codes: &codes, scales: &scales, sums: &sums };
        let mut rows = vec![0x22; 256 * format.block_bytes()];
        for (block, byte) in rows.chunks_mut(format.block_bytes()).zip(0..) {
            block[..scale_bytes].fill(byte);
        }
        let mut values = vec![0.0; 256 * k];
        format.dequantize(&rows, &mut values).unwrap();
        let mut interleaved = vec![0; rows.len()];
        format.interleave(k, &rows, &mut interleaved).unwrap();
        for cpu in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
            for (layout, w) in [(Layout::Rows, &rows), (Layout::Interleaved, &interleaved)] {
                let mut y = vec![0.0f32; 256];
                let out = PanelMut::new(&mut y, 256);
                matmul(cpu, format, MatMul { w, layout, k, x: X::Quantised(x), out });
                for (byte, y) in y.iter().enumerate() {
                    let want = values[byte * k] * 127.0;
                    assert_eq!(y.to_bits(), want.to_bits(), "{format:?} {} {layout:?} {byte:#x}", cpu.name());
                }
            }
        }
    }
}

/// The dot of a row with a token as the contract has it, from the normal form.
fn dot(format: Format, row: &[u8], x: Quantised<'_>) -> f32 {
    let Kind::Quantised { activation, group, has_min } = format.kind() else { return f32::NAN };
    let (mut block, mut acc) = (Unpacked::ZERO, 0.0f32);
    for (b, bytes) in row.chunks_exact(format.block_bytes()).enumerate() {
        format.unpack(bytes, &mut block).unwrap();
        for g in 0..format.block_len() / group {
            let (mut sum, mut min) = (0i32, 0i32);
            for i in group * g..group * (g + 1) {
                let code = i32::from(x.codes[format.block_len() * b + i]);
                sum += code * i32::from(block.codes[i]) * i32::from(block.sub[i / 16]);
                min += code * i32::from(block.mins[i / 16]);
            }
            let scale = x.scales[(format.block_len() * b + group * g) / activation.block_len()];
            acc = (sum as f32).mul_add(block.d[g] * scale, acc);
            if has_min {
                acc = (min as f32).mul_add(block.m[g] * scale, acc);
            }
        }
    }
    acc
}

#[test]
fn products_are_those_of_the_normal_form() {
    let mut state = 1u64;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let (k, rows, tokens) = (3 * 256, 21, 5);
    for &format in Format::ALL {
        let Kind::Quantised { activation: to, .. } = format.kind() else { continue };
        let row_bytes = format.row_bytes(k).unwrap();
        let mut w: Vec<u8> = (0..rows * row_bytes).map(|_| byte()).collect();
        if format != Format::NVFP4 {
            format.set_scale(&mut w, 0.01);
        }
        let mut interleaved = vec![0; w.len()];
        format.interleave(k, &w, &mut interleaved).unwrap();
        let x: Vec<f32> = (0..tokens * k).map(|_| f32::from(byte()) - 127.0).collect();
        let width = tokens * padded(k);
        let (mut codes, mut scales) = (vec![0; width], vec![0.0; width / to.block_len()]);
        let mut sums = vec![0; width / PADDING * SUMS];
        let out = QuantisedMut { codes: &mut codes, scales: &mut scales, sums: &mut sums };
        Cpu::detect().run(Quantise { to, k, x: &x, out });
        for cpu in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
            for (layout, w_here) in [(Layout::Rows, &w), (Layout::Interleaved, &interleaved)] {
                for tokens in [1, 3, 5] {
                    let x = Quantised {
                        k,
                        codes: &codes[..tokens * padded(k)],
                        scales: &scales[..tokens * padded(k) / to.block_len()],
                        sums: &sums[..tokens * padded(k) / PADDING * SUMS],
                    };
                    let mut y = vec![0.0f32; tokens * rows];
                    let out = PanelMut::new(&mut y, rows);
                    matmul(cpu, format, MatMul { w: w_here, layout, k, x: X::Quantised(x), out });
                    for (i, y) in y.iter().enumerate() {
                        let (t, r) = (i / rows, i % rows);
                        let x = Quantised {
                            codes: &codes[t * k..],
                            scales: &scales[t * k / to.block_len()..],
                            ..x
                        };
                        let want = dot(format, &w[r * row_bytes..][..row_bytes], x);
                        let what =
                            format_args!("{} {layout:?} {tokens} tokens, row {r}, token {t}", cpu.name());
                        assert_eq!(y.to_bits(), want.to_bits(), "{format:?} {what}");
                    }
                }
            }
        }
    }
}

#[test]
fn products_of_plain_formats_are_sums_of_sixteen_lanes() {
    let mut state = 1u64;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let (k, rows, tokens) = (37, 19, 5);
    for &format in Format::ALL.iter().filter(|format| format.kind() == Kind::Float) {
        let mut w: Vec<u8> = (0..rows * format.row_bytes(k).unwrap()).map(|_| byte()).collect();
        format.set_scale(&mut w, 0.5);
        let mut values = vec![0.0; rows * k];
        format.dequantize(&w, &mut values).unwrap();
        let x: Vec<f32> = (0..tokens * k).map(|_| f32::from(byte()) - 127.0).collect();
        let want = |r: usize, t: usize| {
            let mut lanes = [0.0f32; 16];
            for i in 0..k {
                lanes[i % 16] = values[r * k + i].mul_add(x[t * k + i], lanes[i % 16]);
            }
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    lanes[i] += lanes[i + half];
                }
            }
            lanes[0]
        };
        for cpu in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
            for tokens in [1, 2, 3, 5] {
                let mut y = vec![f32::NAN; tokens * rows];
                let (x, out) = (X::F32(&x[..tokens * k]), PanelMut::new(&mut y, rows));
                matmul(cpu, format, MatMul { w: &w, layout: Layout::Rows, k, x, out });
                for (i, y) in y.iter().enumerate() {
                    let (t, r) = (i / rows, i % rows);
                    let what = format_args!("{} {tokens} tokens, row {r}, token {t}", cpu.name());
                    assert_eq!(y.to_bits(), want(r, t).to_bits(), "{format:?} {what}");
                }
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
