//! Quantisers of weights against the blocks of `tests/scripts/quantize.cpp`, which describes the values.
#![cfg(feature = "quantize")]

use std::path::Path;

use halite_kernels::formats::*;

const ROWS: usize = 16;
const COLS: usize = 768;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 16_777_216.0
    }
}

fn value(kind: &str, row: usize, col: usize, random: &mut Random) -> f32 {
    if kind == "bell" {
        let sum = (0..4).fold(0.0, |sum, _| sum + random.unit());
        return (sum - 2.0) * 0.05;
    }
    let u = 2.0 * random.unit() - 1.0;
    if kind == "tails" {
        return u * u * u * 2.0;
    }
    match row % 8 {
        0 => 0.0,
        1 => 0.5,
        2 => -0.25,
        3 => u * u,
        4 => u * 1e-17,
        5 if col % 128 == 77 => u,
        5 => 0.0,
        6 => (u * 8.0).trunc(),
        _ if col % 2 == 1 => 1.0,
        _ => -1.0,
    }
}

fn values(kind: &str) -> Vec<f32> {
    let mut random = Random(kind.len() as u64);
    (0..ROWS * COLS).map(|i| value(kind, i / COLS, i % COLS, &mut random)).collect()
}

fn importance() -> Vec<f32> {
    let mut random = Random(42);
    let mut weight = || random.unit();
    (0..COLS).map(|_| weight()).map(|u| u * u + 0.001).collect()
}

fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |state, &byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Quantises row by row.
fn quantize(format: Format, values: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut blocks = vec![0xa5; format.row_bytes(values.len()).unwrap()];
    let row_bytes = format.row_bytes(COLS).unwrap();
    for (values, blocks) in values.chunks(COLS).zip(blocks.chunks_mut(row_bytes)) {
        format.quantize_weights(values, importance, blocks).unwrap();
    }
    blocks
}

/// The root of the mean square of the error, relative to that of the values.
fn error(format: Format, values: &[f32], blocks: &[u8]) -> f64 {
    let mut got = vec![0.0; values.len()];
    format.dequantize(blocks, &mut got).unwrap();
    let square = |x: f64| x * x;
    let errors: f64 = values.iter().zip(&got).map(|(x, y)| square(f64::from(x - y))).sum();
    (errors / values.iter().map(|&x| square(x.into())).sum::<f64>()).sqrt()
}

#[test]
fn blocks_are_the_published_ones() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/quantize/blocks.txt");
    let text = std::fs::read_to_string(path).unwrap();
    let importance = importance();
    let mut wrong = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let format = Format::from_name(words[0]).unwrap();
        let weights = (words[1] == "weighted").then_some(&importance[..]);
        let values = values(words[2]);
        let blocks = quantize(format, &values, weights);
        let got = blocks.chunks(format.row_bytes(256).unwrap()).map(|bytes| format!("{:08x}", hash(bytes)));
        // GGML puts what follows a group of zeros in its place, if the format is IQ3_S (see below).
        let own = |at: usize| format == Format::IQ3_S && words[2] == "edges" && at / 3 % 8 == 5;
        let equal =
            got.zip(&words[3..]).enumerate().filter(|(at, (got, want))| got == *want || own(*at)).count();
        let all = words.len() - 3;
        println!(
            "{} {} {}: {equal} of {all} equal, error {:.5}",
            words[0],
            words[1],
            words[2],
            error(format, &values, &blocks)
        );
        if equal != all {
            wrong.push(format!("{} {} {}: {equal} of {all}", words[0], words[1], words[2]));
        }
    }
    assert!(wrong.is_empty(), "blocks that are equal:\n{}", wrong.join("\n"));
}

/// GGML's blocks of IQ3_S do not: their groups move.
#[test]
fn groups_stay_where_they_are_among_zeros() {
    let mut values = vec![0.0; 256];
    (values[77], values[205]) = (1.0, -0.5);
    for format in quantisers().filter(|format| format.block_len() == 256) {
        let mut blocks = vec![0; format.block_bytes()];
        format.quantize_weights(&values, Some(&[1.0; 256]), &mut blocks).unwrap();
        let mut out = vec![0.0; 256];
        format.dequantize(&blocks, &mut out).unwrap();
        assert!(out[77] > 0.5 && out[205] < -0.1, "{format:?}: {} and {}", out[77], out[205]);
    }
}

/// Those with a quantiser that are not plain.
fn quantisers() -> impl Iterator<Item = Format> {
    let values = [0.0; 256];
    Format::ALL.iter().copied().filter(move |&format| {
        let mut blocks = vec![0; format.row_bytes(256).unwrap()];
        format.block_len() > 1 && format.quantize_weights(&values, Some(&[1.0; 256]), &mut blocks).is_ok()
    })
}

const NEED_IMPORTANCE: [Format; 3] = [Format::IQ2_XXS, Format::IQ2_XS, Format::IQ1_S];

#[test]
fn hostile_values_become_some_blocks() {
    const WORST: [f32; 12] = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        1e-45,
        -1e-45,
        0.0,
        -0.0,
        1.0,
        65_520.0,
    ];
    assert_eq!(quantisers().count(), 27);
    let mut random = Random(5);
    let mut pick = |_| WORST[random.next() as usize % WORST.len()];
    for round in 0..200 {
        // Rows of one value, of two, and of all.
        let mut values: Vec<f32> = (0..256).map(&mut pick).collect();
        let mut weights: Vec<f32> = (0..256).map(&mut pick).collect();
        if round < 24 {
            values = vec![WORST[round % 12]; 256];
            weights[round..].fill(0.0);
            values[200] = if round < 12 { values[0] } else { 1.0 };
        }
        for format in quantisers() {
            let mut blocks = vec![0; format.row_bytes(256).unwrap()];
            let mut out = vec![0.0; 256];
            for importance in [None, Some(&weights[..])] {
                if importance.is_some() || !NEED_IMPORTANCE.contains(&format) {
                    format.quantize_weights(&values, importance, &mut blocks).unwrap();
                    format.dequantize(&blocks, &mut out).unwrap();
                }
            }
        }
    }
}

#[test]
fn zeros_stay_zeros_and_signs_stay() {
    for format in quantisers() {
        let mut blocks = vec![0xff; format.row_bytes(256).unwrap()];
        let mut out = vec![1.0; 256];
        for importance in [None, Some(&[0.0; 256][..]), Some(&[1.0; 256][..])] {
            if importance.is_none() && NEED_IMPORTANCE.contains(&format) {
                continue;
            }
            format.quantize_weights(&[0.0; 256], importance, &mut blocks).unwrap();
            assert!(format.is_finite(&blocks), "{format:?}");
            format.dequantize(&blocks, &mut out).unwrap();
            assert!(out.iter().all(|&value| value == 0.0), "{format:?}");
        }
        // An even number of values of each eight is negative, as some formats have it.
        let values: Vec<f32> = (0..256).map(|i| if i % 4 == 0 { -1.0 } else { 1.0 }).collect();
        format.quantize_weights(&values, Some(&[1.0; 256]), &mut blocks).unwrap();
        format.dequantize(&blocks, &mut out).unwrap();
        if ["IQ1", "IQ2", "IQ3"].iter().any(|name| format.name().starts_with(name)) {
            // Such values are far from all points.
            assert!(error(format, &values, &blocks) < 0.6, "{format:?}");
            continue;
        }
        for (x, y) in values.iter().zip(&out) {
            assert!((x - y).abs() < 0.2, "{format:?}: {x} became {y}");
        }
    }
}

#[test]
fn importance_of_another_length_is_an_error() {
    let mut blocks = [0; 144];
    let got = Format::Q4_K.quantize_weights(&[0.0; 256], Some(&[1.0; 255]), &mut blocks);
    assert_eq!(got, Err(FormatError::Columns { expected: 256, got: 255 }));
    assert_eq!(got.unwrap_err().to_string(), "importance of columns: expected 256, got 255");
    for format in NEED_IMPORTANCE {
        let mut blocks = vec![0; format.block_bytes()];
        let got = format.quantize_weights(&[0.0; 256], None, &mut blocks);
        assert_eq!(got, Err(FormatError::NoImportance(format)));
    }
    let got = Format::IQ2_XS.quantize_weights(&[0.0; 256], None, &mut [0; 74]).unwrap_err();
    assert_eq!(got.to_string(), "IQ2_XS: it needs the importance of columns");
    let got = Format::I64.quantize_weights(&[0.0], None, &mut [0; 8]);
    assert_eq!(got, Err(FormatError::NoQuantiser(Format::I64)));
}

/// Where sums overflow, no point of a grid is nearer than another one.
#[test]
fn what_is_too_large_gives_no_number() {
    for &format in Format::ALL {
        if !["IQ1", "IQ2", "IQ3"].iter().any(|name| format.name().starts_with(name)) {
            continue;
        }
        let values: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut blocks = vec![0; format.block_bytes()];
        for (scale, weight) in [(1e19, 1.0), (3e38, 1.0), (1.0, 1e38), (1e10, 1e30)] {
            let values: Vec<f32> = values.iter().map(|value| value * scale).collect();
            format.quantize_weights(&values, Some(&[weight; 256]), &mut blocks).unwrap();
            assert!(!format.is_finite(&blocks), "{format:?} {scale} {weight}");
        }
    }
}
