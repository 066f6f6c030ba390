//! Formats against the vectors of `tests/scripts/formats.py`, which describes the cases, and against
//! themselves.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use halite_kernels::formats::*;

/// Values in a row of the vectors: whole blocks of any format.
const ROW: usize = 256;

fn splitmix64(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

fn random_bytes(seed: u64, count: usize) -> Vec<u8> {
    splitmix64(seed).flat_map(u64::to_le_bytes).take(count).collect()
}

fn random_words(seed: u64, count: usize) -> impl Iterator<Item = u32> {
    splitmix64(seed).flat_map(|word| [word as u32, (word >> 32) as u32]).take(count)
}

/// Rows of values in [-2^6, 2^6), by row of growing magnitude.
fn values(seed: u64, rows: usize) -> Vec<f32> {
    let value = |(i, word): (usize, u32)| {
        ((word & 0xff_ffff) as i32 - (1 << 23)) as f32 * 2f32.powi(-23) * 2f32.powi((i / ROW % 13) as i32 - 6)
    };
    random_words(seed, rows * ROW).enumerate().map(value).collect()
}

/// Rows whose blocks of 32 have the largest magnitude 127 and no value near half an integer, times a power of
/// two.
fn centred(seed: u64, rows: usize) -> Vec<f32> {
    let value = |(i, word): (usize, u32)| {
        let whole = (word % 253) as f32 - 126.0;
        let value = if i % 32 == 0 { 127.0 } else { whole + ((word >> 16) % 7) as f32 / 8.0 - 0.375 };
        value * 2f32.powi((i / ROW % 13) as i32 - 6)
    };
    random_words(seed, rows * ROW).enumerate().map(value).collect()
}

fn fnv(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325, |state, word| (state ^ word).wrapping_mul(0x100_0000_01b3))
}

fn canonical_bits(value: f32) -> u32 {
    if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }
}

fn hash_values(values: &[f32]) -> u64 {
    fnv(values.chunks(ROW).map(|row| fnv(row.iter().map(|&value| canonical_bits(value).into()))))
}

fn hash_bytes(bytes: &[u8], row_bytes: usize) -> u64 {
    fnv(bytes.chunks(row_bytes).map(|row| fnv(row.iter().map(|&byte| byte.into()))))
}

fn row_bytes(format: Format) -> usize {
    format.row_bytes(ROW).unwrap()
}

fn dequantize(format: Format, blocks: &[u8]) -> Vec<f32> {
    let mut values = vec![f32::NAN; blocks.len() / format.block_bytes() * format.block_len()];
    format.dequantize(blocks, &mut values).unwrap();
    values
}

fn quantize(format: Format, values: &[f32]) -> Vec<u8> {
    let mut blocks = vec![0xa5; format.row_bytes(values.len()).unwrap()];
    format.quantize(values, &mut blocks).unwrap();
    blocks
}

/// Rows of random codes under scales near 2^-6.
fn sane_blocks(format: Format, seed: u64, rows: usize) -> Vec<u8> {
    let mut blocks = random_bytes(seed, rows * row_bytes(format));
    format.set_scale(&mut blocks, 0.017);
    blocks
}

fn quantised() -> impl Iterator<Item = (Format, Activation, usize, bool)> {
    Format::ALL.iter().filter_map(|&format| match format.kind() {
        Kind::Float => None,
        Kind::Quantised { activation, group, has_min } => Some((format, activation, group, has_min)),
    })
}

/// Checks every case of a format's vector file; returns the number of rows.
fn check_vectors(format: Format, path: &Path) -> usize {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut rows_checked = 0;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    for (number, line) in lines.enumerate() {
        let words: Vec<&str> = line.split(' ').collect();
        let count = |i: usize| words[i].parse::<usize>().unwrap();
        let bytes_of = |rows: usize| rows * row_bytes(format);
        if number == 0 {
            let facts = [format.id() as usize, format.block_len(), format.block_bytes()];
            assert_eq!(facts, [count(1), count(2), count(3)], "{format:?}: id, block length, block bytes");
            continue;
        }
        let expected = u64::from_str_radix(words[words.len() - 1], 16).unwrap();
        let (rows, hash) = match words[0] {
            "quantize" => {
                let blocks = quantize(format, &values(count(1) as u64, count(2)));
                (count(2), hash_bytes(&blocks, row_bytes(format)))
            }
            "centred" => {
                let blocks = quantize(format, &centred(count(1) as u64, count(2)));
                (count(2), hash_bytes(&blocks, row_bytes(format)))
            }
            case => {
                let blocks: Vec<u8> = match case {
                    "bytes" => {
                        let digits = words[1].as_bytes().chunks(2);
                        digits
                            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
                            .collect()
                    }
                    "fill" => (0..count(1)).flat_map(|v| vec![v as u8; row_bytes(format)]).collect(),
                    "counting" => {
                        (0..=u16::MAX).cycle().flat_map(u16::to_le_bytes).take(bytes_of(count(1))).collect()
                    }
                    "random" => random_bytes(count(1) as u64, bytes_of(count(2))),
                    other => panic!("{format:?}: unknown case {other}"),
                };
                (blocks.len() / row_bytes(format), hash_values(&dequantize(format, &blocks)))
            }
        };
        assert_eq!(hash, expected, "{format:?}: `{}`", &line[..line.len().min(40)]);
        rows_checked += rows;
    }
    rows_checked
}

#[test]
fn dequantisation_and_quantisation_match_the_vectors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/formats");
    for &format in Format::ALL {
        let rows = check_vectors(format, &folder.join(format!("{}.txt", format.name())));
        assert!(rows >= 1024, "{format:?}: only {rows} rows");
    }
    let files = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(files, Format::ALL.len(), "a vector file without a format");
}

/// `formats.py --count N --out DIR`, then `HALITE_FORMAT_VECTORS=DIR cargo test -- --ignored
/// many_random_rows`.
#[test]
#[ignore = "needs a folder of vectors in HALITE_FORMAT_VECTORS"]
fn many_random_rows() {
    let folder = PathBuf::from(std::env::var_os("HALITE_FORMAT_VECTORS").expect("HALITE_FORMAT_VECTORS"));
    let check = |&format: &Format| check_vectors(format, &folder.join(format!("{}.txt", format.name())));
    let rows: usize = Format::ALL.iter().map(check).sum();
    println!("{rows} rows, {} values", rows * ROW);
}

#[test]
fn the_normal_form_says_the_same_as_dequantisation() {
    for (format, _, group, has_min) in quantised() {
        let blocks = sane_blocks(format, 3, 64);
        for (index, block) in blocks.chunks(format.block_bytes()).enumerate() {
            // Entries that the format does not use stay as they were.
            let mut unpacked = Unpacked {
                codes: [0x55; 256],
                sub: [0x5555; 16],
                mins: [0x5555; 16],
                d: [f32::NAN; 16],
                m: [f32::NAN; 16],
            };
            format.unpack(block, &mut unpacked).unwrap();
            for (i, value) in dequantize(format, block).into_iter().enumerate() {
                let scale = f64::from(unpacked.d[i / group]) * f64::from(unpacked.sub[i / 16]);
                let mut exact = scale * f64::from(unpacked.codes[i]);
                let mut magnitude = exact.abs();
                if has_min {
                    let min = f64::from(unpacked.m[i / group]) * f64::from(unpacked.mins[i / 16]);
                    exact += min;
                    magnitude += min.abs();
                }
                let error = (f64::from(value) - exact).abs();
                // Half a unit in the last place of the largest term, since products are exact or round once.
                assert!(
                    error <= magnitude * 2f64.powi(-24),
                    "{format:?} block {index} value {i}: {value} for {exact}"
                );
            }
            let len = format.block_len();
            assert!(
                unpacked.codes[len..].iter().all(|&code| code == 0x55),
                "{format:?}: codes after the last"
            );
            assert!(
                unpacked.sub[len / 16..].iter().all(|&sub| sub == 0x5555),
                "{format:?}: sub-scales after the last"
            );
            assert!(
                unpacked.d[len / group..].iter().all(|d| d.is_nan()),
                "{format:?}: scales after the last"
            );
            let used = if has_min { len } else { 0 };
            assert!(
                unpacked.mins[used / 16..].iter().all(|&min| min == 0x5555),
                "{format:?}: factors of minimums"
            );
            assert!(unpacked.m[used / group..].iter().all(|m| m.is_nan()), "{format:?}: minimums");
        }
    }
}

/// Integer kernels rely on these ranges: products of codes and sub-scales must not overflow their
/// accumulators.
#[test]
fn codes_and_sub_scales_stay_in_their_ranges() {
    for (format, activation, group, _) in quantised() {
        let (mut code, mut sub, mut min) = (0, 0, 0);
        for block in random_bytes(5, 512 * row_bytes(format)).chunks(format.block_bytes()) {
            let mut unpacked = Unpacked::ZERO;
            format.unpack(block, &mut unpacked).unwrap();
            code = unpacked.codes.iter().fold(code, |most: i32, &c| most.max(i32::from(c).abs()));
            sub = unpacked.sub.iter().fold(sub, |most: i32, &s| most.max(i32::from(s).abs()));
            min = unpacked.mins.iter().fold(min, |most: i32, &m| most.max(i32::from(m).abs()));
        }
        let expected = match format {
            Format::Q1_0 => (1, 1, 0),
            Format::Q2_0 => (2, 1, 0),
            Format::Q4_0 => (8, 1, 0),
            Format::Q4_1 => (15, 1, 1),
            Format::Q5_0 => (16, 1, 0),
            Format::Q5_1 => (31, 1, 1),
            Format::Q8_0 | Format::Q8_1 | Format::Q8_K => (128, 1, 0),
            Format::Q2_K => (3, 15, 15),
            Format::Q3_K => (4, 32, 0),
            Format::Q4_K => (15, 63, 63),
            Format::Q5_K => (31, 63, 63),
            Format::Q6_K => (32, 128, 0),
            Format::IQ1_S | Format::IQ1_M => (9, 15, 0),
            Format::IQ2_XXS | Format::IQ2_XS | Format::IQ2_S => (43, 31, 0),
            Format::IQ3_XXS => (62, 31, 0),
            Format::IQ3_S => (15, 31, 0),
            Format::IQ4_NL => (127, 1, 0),
            Format::IQ4_XS => (127, 32, 0),
            Format::TQ1_0 => (1, 1, 0),
            Format::TQ2_0 => (2, 1, 0),
            Format::MXFP4 | Format::NVFP4 => (12, 1, 0),
            other => panic!("{other:?}: no range is given"),
        };
        assert_eq!(
            (code, sub, min),
            expected,
            "{format:?}: largest code, sub-scale and factor of the minimum"
        );
        let blocks =
            if activation == Activation::Q8_K { (256, 256) } else { (format.block_len(), group.max(16)) };
        assert_eq!((format.block_len(), group), blocks, "{format:?}: block and group");
        assert!(
            activation == Activation::Q8_K || group <= 32,
            "{format:?}: a group within a block of activations"
        );
    }
}

#[test]
fn the_table_is_consistent() {
    assert_eq!(Format::ALL.len(), 35);
    assert!(Format::ALL.is_sorted(), "in the order of ids");
    let names: BTreeSet<&str> = Format::ALL.iter().map(|format| format.name()).collect();
    assert_eq!(names.len(), Format::ALL.len(), "names are unique");
    for &format in Format::ALL {
        assert_eq!(Format::from_id(format.id()), Ok(format));
        assert_eq!(Format::from_name(format.name()), Some(format));
        assert_eq!(format!("{format:?}"), format.name());
        assert_eq!(ROW % format.block_len(), 0, "{format:?}");
        assert_eq!(format.row_bytes(3 * format.block_len()), Some(3 * format.block_bytes()));
        assert_eq!(format.row_bytes(0), Some(0));
        if format.block_len() > 1 {
            assert_eq!(format.row_bytes(format.block_len() + 1), None, "{format:?}: a partial block");
            assert_eq!(format.row_bytes(format.block_len() / 2), None, "{format:?}: a partial block");
        }
    }
    assert_eq!(Format::F32.row_bytes(usize::MAX), None, "more bytes than a usize");
    assert_eq!(Format::from_name("q4_0"), None);
    assert_eq!(Format::from_name(""), None);
}

#[test]
fn other_ids_are_refused_by_name() {
    let message = |id| Format::from_id(id).unwrap_err().to_string();
    let removed = [
        (4, "Q4_2"),
        (5, "Q4_3"),
        (31, "Q4_0_4_4"),
        (32, "Q4_0_4_8"),
        (33, "Q4_0_8_8"),
        (36, "IQ4_NL_4_4"),
        (37, "IQ4_NL_4_8"),
        (38, "IQ4_NL_8_8"),
    ];
    for (id, expected) in removed {
        assert!(
            matches!(Format::from_id(id).unwrap_err().why, Why::Removed { name, .. } if name == expected)
        );
        assert!(message(id).starts_with(&format!("tensor type {id} is {expected}, which GGML removed; ")));
    }
    for (id, expected) in
        [(133, "Q6_0"), (137, "IQ2_K"), (144, "IQ4_KS"), (158, "IQ1_KT"), (202, "row-interleaved")]
    {
        assert!(matches!(Format::from_id(id).unwrap_err().why, Why::Fork { name, .. } if name == expected));
        assert_eq!(
            message(id),
            format!("tensor type {id} is a format of the fork ik_llama.cpp ({expected})")
        );
    }
    for id in [43, 132, 159, 201, 400, u32::MAX] {
        assert_eq!(Format::from_id(id), Err(UnknownFormat { id, why: Why::Unknown }));
        assert_eq!(message(id), format!("tensor type {id} is not known"));
    }
    let live = (0..500).filter(|&id| Format::from_id(id).is_ok()).count();
    assert_eq!(live, Format::ALL.len());
}

#[test]
fn wrong_lengths_are_errors() {
    let mut unpacked = Unpacked::ZERO;
    for &format in Format::ALL {
        let (len, bytes) = (format.block_len(), format.block_bytes());
        let mismatch = |bytes, values| LengthMismatch { format, bytes, values };
        for (wrong_bytes, wrong_len) in
            [(2 * bytes, len), (bytes, 2 * len), (bytes + 1, len), (0, len), (bytes, 0)]
        {
            let expected = mismatch(wrong_bytes, wrong_len);
            let mut blocks = vec![0; wrong_bytes];
            let mut values = vec![1.0; wrong_len];
            assert_eq!(format.dequantize(&blocks, &mut values), Err(expected), "{format:?}");
            assert!(values.iter().all(|&value| value == 1.0), "{format:?}: written in spite of the error");
            assert_eq!(format.quantize(&values, &mut blocks), Err(expected.into()), "{format:?}");
        }
        assert_eq!(format.dequantize(&[], &mut []), Ok(()));
        let result = format.unpack(&vec![0; 2 * bytes], &mut unpacked);
        match format.kind() {
            Kind::Float => assert_eq!(result, Err(FormatError::NotQuantised(format))),
            Kind::Quantised { .. } => assert_eq!(result, Err(mismatch(2 * bytes, len).into())),
        }
    }
    let message = Format::Q4_0.dequantize(&[0; 35], &mut [0.0; 64]).unwrap_err().to_string();
    let expected =
        "Q4_0: 35 bytes and 64 values are not the same whole number of blocks (of 18 bytes and 32 values)";
    assert_eq!(message, expected);
}

#[test]
fn scales_that_are_not_finite_are_found() {
    for &format in Format::ALL {
        let mut blocks = sane_blocks(format, 8, 4);
        assert!(format.is_finite(&blocks), "{format:?}: sane");
        assert!(dequantize(format, &blocks).iter().all(|value| value.is_finite()), "{format:?}: sane");
        let last = blocks.len() - format.block_bytes();
        for scale in [f32::INFINITY, f32::NAN] {
            format.set_scale(&mut blocks[last..], scale);
            let always =
                matches!(format, Format::I8 | Format::I16 | Format::I32 | Format::I64 | Format::NVFP4);
            assert_eq!(format.is_finite(&blocks), always, "{format:?}: the last scale is {scale}");
        }
    }
    // Each scale of a block by itself.
    for (format, at) in
        [(Format::Q4_1, 2), (Format::Q5_1, 2), (Format::Q4_K, 2), (Format::Q5_K, 2), (Format::Q2_K, 82)]
    {
        for at in [at - 2, at] {
            let mut block = sane_blocks(format, 9, 1);
            block[at..at + 2].copy_from_slice(&0x7c00u16.to_le_bytes());
            assert!(!format.is_finite(&block), "{format:?}: scale at byte {at}");
        }
    }
}

#[test]
fn setting_a_scale_leaves_codes_and_sub_scales() {
    for (format, _, group, has_min) in quantised() {
        for block in random_bytes(10, 16 * row_bytes(format)).chunks(format.block_bytes()) {
            let (mut before, mut after) = (Unpacked::ZERO, Unpacked::ZERO);
            let mut scaled = block.to_vec();
            format.set_scale(&mut scaled, 0.25);
            format.unpack(block, &mut before).unwrap();
            format.unpack(&scaled, &mut after).unwrap();
            assert_eq!(before.codes, after.codes, "{format:?}");
            assert_eq!(before.sub, after.sub, "{format:?}");
            assert_eq!(before.mins, after.mins, "{format:?}");
            let unit = match format {
                Format::MXFP4 | Format::NVFP4 => 0.125,
                Format::IQ3_XXS => 0.0625,
                _ if format.name().starts_with("IQ2") || format.name().starts_with("IQ1") => 0.03125,
                _ => 0.25,
            };
            assert!(
                after.d[..format.block_len() / group].iter().all(|&d| d == unit),
                "{format:?}: {:?}",
                after.d
            );
            assert!(!has_min || after.m[0].abs() == 0.25, "{format:?}: {:?}", after.m);
        }
    }
    let blocks = sane_blocks(Format::Q8_1, 13, 2);
    for block in Q8_1::cast(&blocks) {
        let sum: i32 = block.qs.iter().map(|&q| i32::from(q)).sum();
        let expected = F16::from_f32(block.d.value() * sum as f32);
        assert_eq!(block.s.to_bits(), expected.to_bits(), "Q8_1: the stored sum follows the scale");
    }
}

#[test]
fn quantisation_errs_by_at_most_half_a_step() {
    let input = values(11, 65);
    // What rounding a scale, or a scale and a minimum, to f16 adds.
    let (scale, scale_and_min) = (1.0 / 2048.0, 3.0 / 2048.0);
    for &format in Format::ALL {
        // The error as a fraction of the largest magnitude of the block.
        let fraction = match format {
            Format::F32 | Format::F64 => 0.0,
            Format::F16 => 1.0 / 2048.0,
            Format::BF16 => 1.0 / 256.0,
            // These cut one end of the range by a step.
            Format::Q4_0 => 1.0 / 8.0 + scale,
            Format::Q5_0 => 1.0 / 16.0 + scale,
            // These divide twice the largest magnitude.
            Format::Q4_1 => 1.0 / 15.0 + scale_and_min,
            Format::Q5_1 => 1.0 / 31.0 + scale_and_min,
            Format::Q8_0 | Format::Q8_1 => 0.5 / 127.0 + scale,
            Format::Q8_K => 0.5 / 127.0,
            // `quantize.rs` checks these, by their blocks.
            Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => continue,
            Format::IQ4_NL
            | Format::IQ4_XS
            | Format::MXFP4
            | Format::NVFP4
            | Format::TQ1_0
            | Format::TQ2_0 => continue,
            Format::IQ1_S | Format::IQ1_M | Format::IQ2_XXS | Format::IQ2_XS | Format::IQ2_S => continue,
            Format::IQ3_XXS | Format::IQ3_S | Format::Q1_0 | Format::Q2_0 => continue,
            _ => {
                let mut blocks = vec![0; format.row_bytes(input.len()).unwrap()];
                assert_eq!(format.quantize(&input, &mut blocks), Err(FormatError::NoQuantiser(format)));
                continue;
            }
        };
        // Half the step of f16 denormals.
        let least = if format == Format::F16 { 2f32.powi(-25) } else { 0.0 };
        let blocks = quantize(format, &input);
        assert!(format.is_finite(&blocks), "{format:?}");
        let output = dequantize(format, &blocks);
        for (input, output) in input.chunks(format.block_len()).zip(output.chunks(format.block_len())) {
            let largest = input.iter().fold(0f32, |most, x| most.max(x.abs()));
            let bound = (largest * fraction * 1.0001).max(least);
            for (x, y) in input.iter().zip(output) {
                assert!((x - y).abs() <= bound, "{format:?}: {x} became {y}, bound {bound}");
            }
        }
    }
}

#[test]
fn activation_formats_follow_their_formulas() {
    let input = values(12, 13);
    let mut with_zeros = input.clone();
    with_zeros[..512].fill(0.0);
    with_zeros[512] = f32::NAN;
    for input in [&input, &with_zeros] {
        let (q8_0, q8_1, q8_k) =
            (quantize(Format::Q8_0, input), quantize(Format::Q8_1, input), quantize(Format::Q8_K, input));
        let code = |x: f32, largest: f32| {
            if largest == 0.0 || x.is_nan() { 0 } else { (x * (127.0 / largest)).round_ties_even() as i8 }
        };
        let largest = |values: &[f32]| values.iter().fold(0f32, |most, x| most.max(x.abs()));
        let by_32 = Q8_0::cast(&q8_0).iter().zip(Q8_1::cast(&q8_1));
        for ((a, b), values) in by_32.zip(input.chunks(32)) {
            let most = largest(values);
            let codes: Vec<i8> = values.iter().map(|&x| code(x, most)).collect();
            let sum: i32 = codes.iter().map(|&q| i32::from(q)).sum();
            assert_eq!(a.qs.as_slice(), codes);
            assert_eq!(b.qs.as_slice(), codes);
            assert_eq!(a.d.to_bits(), F16::from_f32(most / 127.0).to_bits());
            assert_eq!(b.d.to_bits(), a.d.to_bits());
            assert_eq!(b.s.to_bits(), F16::from_f32(most / 127.0 * sum as f32).to_bits());
        }
        for (a, values) in Q8_K::cast(&q8_k).iter().zip(input.chunks(256)) {
            let most = largest(values);
            let codes: Vec<i8> = values.iter().map(|&x| code(x, most)).collect();
            assert_eq!(a.qs.as_slice(), codes);
            assert_eq!(a.d.value(), if most == 0.0 { 0.0 } else { 1.0 / (127.0 / most) });
            for (sum, codes) in a.bsums.iter().zip(codes.chunks(16)) {
                assert_eq!(i16::from_le_bytes(*sum), codes.iter().map(|&q| i16::from(q)).sum::<i16>());
            }
        }
    }
}

#[test]
fn small_floats_round_to_nearest_even() {
    for bits in 0..0x7c00u16 {
        let (low, high) = (F16::from_bits(bits).value(), F16::from_bits(bits + 1).value());
        assert_eq!(F16::from_f32(low).to_bits(), bits);
        assert_eq!(F16::from_f32(-low).to_bits(), bits | 0x8000);
        // Above the largest finite value comes what would be 2^16.
        let middle = if high.is_infinite() { 65520.0 } else { (low + high) / 2.0 };
        let even = bits + (bits & 1);
        assert_eq!(F16::from_f32(middle).to_bits(), even, "the middle above {bits:04x}");
        assert_eq!(F16::from_f32(middle.next_down()).to_bits(), bits);
        assert_eq!(F16::from_f32(middle.next_up()).to_bits(), bits + 1);
    }
    for value in [f32::INFINITY, f32::MAX, 65536.0] {
        assert_eq!(F16::from_f32(value).to_bits(), 0x7c00);
    }
    assert!(F16::from_f32(f32::NAN).value().is_nan());
    assert!(F16::from_f32(f32::from_bits(0x7f80_0001)).value().is_nan());
    assert_eq!(UE4M3::floor(f32::NAN).half(), 0.0);
    assert_eq!(UE4M3::floor(-1.0).half(), 0.0);
    assert_eq!(UE4M3::floor(1e9).half(), 224.0);
    for bits in 0..0x7e {
        let [low, high] = [bits, bits + 1].map(|bits| 2.0 * UE4M3 { bits }.half());
        assert!(low < high);
        for value in [low, (low + high) / 2.0, high.next_down()] {
            assert_eq!(UE4M3::floor(value).bits, bits, "{value}");
        }
    }
}

#[test]
fn grids_have_distinct_points() {
    fn check<T: Ord + Copy>(name: &str, grid: &[T], magnitudes: impl Fn(T) -> [u8; 8], allowed: &[u8]) {
        assert_eq!(grid.iter().collect::<BTreeSet<_>>().len(), grid.len(), "{name}: points are distinct");
        let seen: BTreeSet<u8> = grid.iter().flat_map(|&point| magnitudes(point)).collect();
        assert_eq!(seen, allowed.iter().copied().collect(), "{name}: magnitudes");
    }
    let twice = |point: u32| (u64::from(point) * 0x1_0000_0001).to_le_bytes();
    check("IQ2_XXS", &IQ2_XXS_GRID, u64::to_le_bytes, &[8, 25, 43]);
    check("IQ2_XS", &IQ2_XS_GRID, u64::to_le_bytes, &[8, 25, 43]);
    check("IQ2_S", &IQ2_S_GRID, u64::to_le_bytes, &[8, 25, 43]);
    check("IQ3_XXS", &IQ3_XXS_GRID, twice, &[4, 12, 20, 28, 36, 44, 52, 62]);
    check("IQ3_S", &IQ3_S_GRID, twice, &[1, 3, 5, 7, 9, 11, 13, 15]);
    check("IQ1", &IQ1_GRID, u64::to_le_bytes, &[0, 8, 16]);
}

#[test]
fn interleaving_is_undone_block_by_block() {
    for format in Format::ALL.iter().copied().filter(|format| format.interleaves()) {
        // Odd and even numbers of blocks; whole groups, a rest, and less than a group.
        for (row_blocks, rows) in [(1, 16), (2, 37), (3, 48), (9, 16), (8, 33), (2, 5)] {
            let (cols, bytes) = (row_blocks * format.block_len(), format.block_bytes());
            let plain = random_bytes(17, rows * row_blocks * bytes);
            let mut lanes = vec![0; plain.len()];
            format.interleave(cols, &plain, &mut lanes).unwrap();
            assert_eq!(lanes == plain, rows < ROWS, "{format:?}: groups are moved, the rest is not");
            for (i, want) in plain.chunks(bytes).enumerate() {
                let mut got = vec![0; bytes];
                let (row, block) = (i / row_blocks, i % row_blocks);
                format.copy_block(Layout::Interleaved, &lanes, row_blocks, row, block, &mut got).unwrap();
                assert_eq!(got, want, "{format:?}: row {row}, block {block}");
            }
            let mut none = vec![0; bytes];
            assert!(format.copy_block(Layout::Interleaved, &lanes, row_blocks, rows, 0, &mut none).is_none());
        }
        let mut short = vec![0; format.block_bytes()];
        assert!(format.interleave(format.block_len(), &[0; 3], &mut short).is_err());
        assert!(format.interleave(format.block_len() + 1, &short.clone(), &mut short).is_err());
    }
}
