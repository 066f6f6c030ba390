//! The number formats of chips against vectors that `tests/scripts/numerics.py` wrote with `ml_dtypes`.

use halite_profiles::numerics::element::E4M3;
use halite_profiles::numerics::{
    BlockFormat, Dtype, Element, Format, Overflow, Rounding, Rules, Scale, ScaleRule,
};

const VECTORS: &str = include_str!("data/numerics.txt");

/// The fields of the lines of one kind.
fn vectors(kind: &str) -> Vec<Vec<&'static str>> {
    let lines = VECTORS.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let lines: Vec<_> = lines.filter(|fields| fields[0] == kind).map(|fields| fields[1..].to_vec()).collect();
    assert!(!lines.is_empty(), "no {kind}");
    lines
}

fn dtype(name: &str) -> Dtype {
    *Dtype::ALL.iter().find(|d| d.name() == name).unwrap_or_else(|| panic!("{name}"))
}

fn element(name: &str) -> Element {
    let Format::Element(element) = dtype(name).format() else { panic!("{name} is a block format") };
    element
}

fn block(name: &str) -> BlockFormat {
    let Format::Block(block) = dtype(name).format() else { panic!("{name} is no block format") };
    block
}

fn number<T: std::str::FromStr>(field: &str) -> T {
    field.parse().unwrap_or_else(|_| panic!("{field}"))
}

fn fnv(words: impl IntoIterator<Item = u32>) -> String {
    let step = |state: u64, word| (state ^ u64::from(word)).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", words.into_iter().fold(0xcbf2_9ce4_8422_2325, step))
}

/// The random values that the script describes.
fn values(low: i32, span: u64, count: usize, zeros: bool) -> Vec<f32> {
    let mut state = 1u64;
    let mut word = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let value = |_| {
        let w = word();
        if zeros && w >> 56 & 63 == 1 {
            return 0.0;
        }
        let field = (low + 127) as u32 + ((w >> 24 & 0xffff_ffff) % span) as u32;
        let cut = if w >> 56 & 7 == 0 { 23 - (w >> 59 & 7) } else { 0 };
        let fraction = (w & 0x7f_ffff) as u32 >> cut << cut;
        f32::from_bits(((w >> 23 & 1) as u32) << 31 | field << 23 | fraction)
    };
    (0..count).map(value).collect()
}

/// Bits, with one NaN for all.
fn bits(value: f32) -> u32 {
    if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }
}

#[test]
fn every_code_has_its_value() {
    for fields in vectors("codes") {
        let expected = fields[1..].iter().map(|v| u32::from_str_radix(v, 16).unwrap());
        for (code, expected) in expected.enumerate() {
            let got = match fields[0] {
                "e8m0" => Scale { exponent: code as u8, shifts: 0 }.value(0) as f32,
                name => element(name).decode(code as u32),
            };
            assert_eq!(bits(got), expected, "{} code {code:#x}: {got}", fields[0]);
        }
        let count = fields.len() - 1;
        assert_eq!(count, if fields[0] == "e8m0" { 256 } else { 1 << element(fields[0]).bits() });
    }
    for fields in vectors("codes_hash") {
        let element = element(fields[0]);
        assert_eq!(fnv((0..1 << 16).map(|code| bits(element.decode(code)))), fields[1], "{}", fields[0]);
    }
}

#[test]
fn every_number_encodes_to_its_code() {
    for &dtype in Dtype::ALL {
        let Format::Element(element) = dtype.format() else { continue };
        // Wider formats: every code would take long, and each 4099th meets all exponents.
        let step = if element.bits() > 16 { 4099 } else { 1 };
        let fixed = matches!(element, Element::Fixed { .. });
        for code in (0..1u64 << element.bits()).step_by(step) {
            let code = code as u32;
            let value = element.decode(code);
            // Beyond 24 bits an f32 does not hold an integer; the most negative one is not produced.
            let lowest = fixed && code == 1 << (element.bits() - 1);
            if value.is_nan() || lowest || (fixed && value.abs() >= 16_777_216.0) {
                continue;
            }
            for rounding in [Rounding::NearestEven, Rounding::NearestAway, Rounding::TowardZero] {
                let again = element.encode(value, rounding, Overflow::Special);
                assert_eq!(again, code, "{dtype} {value} {rounding:?}");
            }
        }
    }
}

#[test]
fn a_million_values_round_to_nearest_even() {
    for fields in vectors("encode") {
        let values = values(number(fields[1]), number(fields[2]), number(fields[3]), false);
        let element = element(fields[0]);
        let codes = values.iter().map(|&v| element.encode(v, Rounding::NearestEven, Overflow::Special));
        assert_eq!(fnv(codes), fields[4], "{}", fields[0]);
    }
}

/// Against a search through all codes.
#[test]
fn other_roundings_are_what_they_say() {
    for name in ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "int8", "int4"] {
        let element = element(name);
        let numbers: Vec<f64> = (0..=element.max_code()).map(|code| element.decode(code).into()).collect();
        for value in values(-12, 16, 20_000, true) {
            let size = f64::from(value.abs()).min(element.max().into());
            let below = numbers.iter().rposition(|&n| n <= size).unwrap();
            let above = (below + 1).min(numbers.len() - 1);
            let nearer = if numbers[above] - size <= size - numbers[below] { above } else { below };
            for (rounding, expected) in [(Rounding::TowardZero, below), (Rounding::NearestAway, nearer)] {
                let got = element.decode(element.encode(value, rounding, Overflow::Saturate));
                let expected = numbers[expected].copysign(value.into());
                assert_eq!(f64::from(got), expected, "{name} {value} {rounding:?}");
            }
        }
    }
}

#[test]
fn what_is_no_number_and_what_is_too_large() {
    let saturated = |name: &str, v| element(name).encode(v, Rounding::NearestEven, Overflow::Saturate);
    let special = |name: &str, v| element(name).encode(v, Rounding::NearestEven, Overflow::Special);
    // 464 lies half way between 448 and what would be 480, and 448 is even.
    assert_eq!((special("fp8_e4m3", 464.0), special("fp8_e4m3", 465.0)), (0x7e, 0x7f));
    assert_eq!((saturated("fp8_e4m3", -1e9), special("fp8_e4m3", f32::NEG_INFINITY)), (0xfe, 0xff));
    assert_eq!((saturated("fp8_e5m2", 1e9), special("fp8_e5m2", 1e9)), (0x7b, 0x7c));
    assert_eq!((special("fp8_e4m3fnuz", -0.0), special("fp8_e4m3fnuz", 1e9)), (0, 0x80));
    assert_eq!((special("fp4_e2m1", f32::NEG_INFINITY), special("fp4_e2m1", f32::NAN)), (0xf, 0));
    assert_eq!((special("int8", -1e9), special("int8", f32::NAN)), (0x81, 0));
    for &dtype in Dtype::ALL {
        let Format::Element(element) = dtype.format() else { continue };
        let nan = element.decode(element.encode(f32::NAN, Rounding::NearestEven, Overflow::Saturate));
        assert!(nan.is_nan() || nan == 0.0, "{dtype}");
    }
    assert!(E4M3.decode(0xff).is_nan());
}

fn rule(name: &str) -> ScaleRule {
    match name {
        "floor" => ScaleRule::Floor,
        "ceil" => ScaleRule::Ceil,
        "even" => ScaleRule::Even,
        "rceil" => ScaleRule::Rceil,
        _ => panic!("{name}"),
    }
}

fn quantize(format: BlockFormat, values: &[f32], scale: ScaleRule) -> (Vec<Scale>, Vec<u8>) {
    let mut scales = vec![Scale::default(); values.len() / format.len];
    let mut codes = vec![0; values.len()];
    let rules = Rules { scale, rounding: Rounding::NearestEven };
    format.quantize(values, rules, &mut scales, &mut codes).unwrap();
    (scales, codes)
}

#[test]
fn blocks_are_quantised_by_every_scale_rule() {
    let cases = vectors("block");
    assert_eq!(cases.len(), 9 * 4 * 4);
    for fields in cases {
        let format = block(fields[0]);
        let count: usize = number(fields[4]);
        let values = values(number(fields[2]), number(fields[3]), count * format.len, true);
        let (scales, codes) = quantize(format, &values, rule(fields[1]));
        let blocks = scales.iter().zip(codes.chunks(format.len));
        let words =
            blocks.flat_map(|(s, codes)| [s.exponent, s.shifts].into_iter().chain(codes.iter().copied()));
        assert_eq!(fnv(words.map(u32::from)), fields[5], "{fields:?}");
    }
}

/// What is stored and read again is stored the same way: the values of a block are a fixed point.
#[test]
fn blocks_keep_what_they_hold() {
    for &dtype in Dtype::ALL {
        let Format::Block(format) = dtype.format() else { continue };
        let values = values(-6, 8, 320 * format.len, true);
        let (scales, codes) = quantize(format, &values, ScaleRule::Floor);
        let mut stored = vec![0.0; values.len()];
        format.dequantize(&scales, &codes, &mut stored).unwrap();
        let (scales, codes) = quantize(format, &stored, ScaleRule::Floor);
        let mut again = vec![0.0; values.len()];
        format.dequantize(&scales, &codes, &mut again).unwrap();
        assert_eq!(again, stored, "{dtype}");
        // The largest value of a block is kept to within its format's precision, or saturates.
        let worst = values.iter().zip(&stored).map(|(v, s)| (v - s).abs()).fold(0.0, f32::max);
        assert!(worst > 0.0 && worst < 1.5, "{dtype}: {worst}");
    }
}

/// A block's start (the rest is 0), its format, and the scale byte and codes that OCP MX 1.0 asks for.
#[test]
fn known_blocks() {
    let tiny = f32::from_bits(1 << 9);
    let cases: &[(&[f32], &str, u8, &[u8])] = &[
        (&[1., 2., 3., 4., 5., 6., 7., 8.], "mxfp4", 128, &[1, 2, 3, 4, 4, 5, 6, 6]),
        (&[7.9, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.], "mxfp4", 127, &[7, 0, 2, 2, 4, 4, 6, 6]),
        (
            &[448., 2f32.powi(-10), 1.5 * 2f32.powi(-9), 17., 19.],
            "mxfp8_e4m3",
            127,
            &[0x7e, 0, 2, 0x58, 0x5a],
        ),
        (&[127.99999, 1.], "mxfp8_e5m2", 118, &[0x7b, 0x60]),
        (&[0.], "mxfp8_e4m3", 0, &[0]),
        (&[f32::MIN_POSITIVE], "mxfp4", 0, &[4]),
        (&[tiny], "mxfp4", 0, &[0]),
        (&[1., f32::NAN], "mxfp4", 255, &[0, 0]),
        (&[1., f32::INFINITY], "mx9", 255, &[0, 0]),
    ];
    for &(start, name, scale, codes) in cases {
        let format = block(name);
        let mut values = vec![0.0; format.len];
        values[..start.len()].copy_from_slice(start);
        let got = quantize(format, &values, ScaleRule::Floor);

        assert_eq!((got.0[0].exponent, &got.1[..codes.len()]), (scale, codes), "{name} {start:?}");
        let mut back = vec![0.0; format.len];
        format.dequantize(&got.0, &got.1, &mut back).unwrap();
        assert_eq!(back.iter().all(|v| v.is_nan()), scale == 255);
    }
}

#[test]
fn bits_a_value() {
    let expected = [("mxfp8_e4m3", 8.25), ("mxfp6_e2m3", 6.25), ("mxfp4", 4.25), ("mxint8", 8.25)];
    for (name, bits) in expected.into_iter().chain([("mx9", 9.0), ("mx6", 6.0), ("mx4", 4.0), ("tf32", 19.0)])
    {
        assert_eq!(dtype(name).bits(), bits, "{name}");
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let format = block("mxfp4");
    let mut scales = [Scale::default(); 1];
    let quantize = |values: usize, scales: &mut [Scale], codes: usize| {
        format.quantize(&vec![0.0; values], Rules::default(), scales, &mut vec![0; codes])
    };
    assert!(quantize(32, &mut scales, 32).is_ok());
    assert!(quantize(31, &mut scales, 31).unwrap_err().to_string().contains("multiple of 32"));
    assert!(quantize(32, &mut scales, 16).is_err());
    assert!(quantize(64, &mut scales, 64).is_err());
}
