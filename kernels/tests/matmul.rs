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
