//! Weights as folders have them: plain, or quantised in one of the ways in which models are published. Rows are read as numbers; where a
//! GGUF format has the same codes and scales, its blocks are put together from them.
//!
//! The layouts are those of the libraries that write them: block-scaled FP8 (DeepSeek-V3), GPTQModel, AutoAWQ, compressed-tensors,
//! the MXFP4 of gpt-oss, and the ternary weights of BitNet.

use std::cell::RefCell;
use std::collections::BTreeMap;

use halite_kernels::formats::Format;
use halite_kernels::math;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::folder::Json;
use crate::error::{Error, Result};

/// Codes of four bits in a word.
const CODES: usize = 8;
/// The code of zero where codes are symmetric.
const MIDDLE: u8 = 8;
/// Columns of a block of Q4_0 and MXFP4.
const BLOCK: usize = 32;
/// Rows that are read together where columns come one after the other, because they share cache lines.
const AHEAD: usize = 32;
/// Rows whose ternary codes share a byte.
const TERNARY: usize = 4;

/// How a folder's weights are quantised, as its `quantization_config` says.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Scheme {
    #[default]
    Plain,
    /// Codes of E4M3 with a scale for all, for each row, or for each block of so many rows and columns.
    Fp8 {
        block: Option<[usize; 2]>,
    },
    /// Four bits, packed along columns. Zeros are stored less one, but by the second version.
    Gptq {
        stored_less: u8,
    },
    /// Four bits, packed along rows in an order of its own.
    Awq,
    /// Four bits, packed along columns, symmetric.
    Packed,
    Mxfp4,
    /// Minus one, zero and one, times or through a factor of the matrix.
    Ternary {
        divides: bool,
    },
    /// Numbers that the model rounds to ternary ones.
    RoundedToTernary,
}

impl Scheme {
    pub(super) fn of(config: &Json) -> Result<Scheme> {
        let Some(config) = config.object("quantization_config")? else { return Ok(Scheme::Plain) };
        let only = |key: &str, expected: u64| match config.optional_u32(key)? {
            Some(got) if u64::from(got) != expected => Err(config.wrong(key, &expected.to_string(), got)),
            _ => Ok(()),
        };
        match config.str("quant_method")? {
            "fp8" => Ok(Scheme::Fp8 { block: block(&config, "weight_block_size")? }),
            "gptq" => {
                only("bits", 4)?;
                match config.value.get("checkpoint_format").and_then(Value::as_str).unwrap_or("gptq") {
                    "gptq" => Ok(Scheme::Gptq { stored_less: 1 }),
                    "gptq_v2" => Ok(Scheme::Gptq { stored_less: 0 }),
                    other => Err(config.wrong("checkpoint_format", "gptq or gptq_v2", other)),
                }
            }
            "awq" => {
                only("bits", 4)?;
                match config.value.get("version").and_then(Value::as_str).unwrap_or("gemm") {
                    "gemm" | "GEMM" => Ok(Scheme::Awq),
                    other => Err(config.wrong("version", "gemm", other)),
                }
            }
            "compressed-tensors" => compressed(&config),
            "mxfp4" => Ok(Scheme::Mxfp4),
            "bitnet" => ternary(&config),
            other => Err(config.wrong(
                "quant_method",
                "fp8, gptq, awq, compressed-tensors, mxfp4 or bitnet",
                other,
            )),
        }
    }

    /// Puts the tensors of each weight together. Names of weights are those of plain folders.
    pub(super) fn parts<'a>(
        self,
        tensors: BTreeMap<String, TensorView<'a>>,
    ) -> Result<BTreeMap<String, Part<'a>>> {
        let mut parts = BTreeMap::new();
        for (name, view) in &tensors {
            let wrong = |why: String| {
                let name = crate::gguf::printable(name.as_bytes());
                Error::Model(format!("tensor `{}`: {why}", name.trim_matches('"')))
            };
            let part = self.part(name, view, &tensors).map_err(wrong)?;
            if let Some((name, part)) = part
                && parts.insert(name, part).is_some()
            {
                return Err(wrong("the folder also has the weight in another form".into()));
            }
        }
        Ok(parts)
    }

    /// The weight that a tensor begins, with its name; `None` for a tensor that belongs to another one.
    fn part<'a>(
        self,
        name: &str,
        view: &TensorView<'a>,
        all: &BTreeMap<String, TensorView<'a>>,
    ) -> Result<Option<(String, Part<'a>)>, String> {
        let beside = |stem: &str, end: &str| {
            let name = format!("{stem}{end}");
            all.get(&name).ok_or_else(|| format!("expected `{name}` beside it, got none"))
        };
        let has = |stem: &str, end: &str| all.contains_key(&format!("{stem}{end}"));
        let plain = || Some((name.to_owned(), Part::plain(view.clone())));
        let second = |ends: &[(&str, &str)]| {
            ends.iter().any(|(end, first)| name.strip_suffix(end).is_some_and(|stem| has(stem, first)))
        };
        match self {
            Scheme::Plain => Ok(plain()),
            Scheme::Fp8 { block } => {
                let scales = ["weight_scale_inv", "weight_scale", "input_scale", "activation_scale"];
                let of_weight = |end: &str| name.strip_suffix(end).is_some_and(|stem| has(stem, "weight"));
                if scales.iter().any(|end| of_weight(end)) {
                    return Ok(None);
                }
                if view.dtype() != Dtype::F8_E4M3 {
                    return Ok(plain());
                }
                let scales = if has(name, "_scale_inv") {
                    beside(name, "_scale_inv")?
                } else {
                    beside(name, "_scale")?
                };
                Ok(Some((name.to_owned(), fp8(view, scales, block)?)))
            }
            Scheme::Gptq { .. } | Scheme::Awq => {
                if second(&[(".qzeros", ".qweight"), (".scales", ".qweight"), (".g_idx", ".qweight")]) {
                    return Ok(None);
                }
                let Some(stem) = name.strip_suffix(".qweight") else { return Ok(plain()) };
                let (zeros, scales) = (beside(stem, ".qzeros")?, beside(stem, ".scales")?);
                let order = all.get(&format!("{stem}.g_idx"));
                let part = match self {
                    Scheme::Gptq { stored_less } => gptq(view, zeros, scales, order, stored_less)?,
                    _ => awq(view, zeros, scales)?,
                };
                Ok(Some((format!("{stem}.weight"), part)))
            }
            Scheme::Packed => {
                if second(&[("_scale", "_packed"), ("_shape", "_packed"), ("_g_idx", "_packed")]) {
                    return Ok(None);
                }
                let Some(stem) = name.strip_suffix("_packed") else { return Ok(plain()) };
                let order = all.get(&format!("{stem}_g_idx"));
                let part = packed(view, beside(stem, "_scale")?, beside(stem, "_shape")?, order)?;
                Ok(Some((stem.to_owned(), part)))
            }
            Scheme::Mxfp4 => {
                if second(&[("_scales", "_blocks")]) {
                    return Ok(None);
                }
                let Some(stem) = name.strip_suffix("_blocks") else { return Ok(plain()) };
                Ok(Some((stem.to_owned(), mxfp4(view, beside(stem, "_scales")?)?)))
            }
            Scheme::Ternary { divides } => {
                if second(&[(".weight_scale", ".weight")]) {
                    return Ok(None);
                }
                if !has(name, "_scale") {
                    return Ok(plain());
                }
                Ok(Some((name.to_owned(), packed_ternary(view, beside(name, "_scale")?, divides)?)))
            }
            // Those of the blocks: not the embeddings and the output.
            Scheme::RoundedToTernary if name.ends_with("_proj.weight") => {
                Ok(Some((name.to_owned(), rounded_to_ternary(view)?)))
            }
            Scheme::RoundedToTernary => Ok(plain()),
        }
    }
}

/// Two whole numbers above zero.
fn block(config: &Json, key: &str) -> Result<Option<[usize; 2]>> {
    let Some(value) = config.get(key) else { return Ok(None) };
    let extents: Option<Vec<usize>> = value.as_array().and_then(|list| {
        let extent = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        list.iter().map(extent).collect()
    });
    match extents.as_deref() {
        Some(&[rows, columns]) => Ok(Some([rows, columns])),
        _ => Err(config.wrong(key, "rows and columns", value)),
    }
}

/// The scheme of compressed-tensors: one group of weights, whose numbers are FP8 or symmetric integers of four bits.
fn compressed(config: &Json) -> Result<Scheme> {
    let groups = config.object("config_groups")?;
    let groups = groups.ok_or_else(|| config.missing("config_groups", "an object"))?;
    let names: Vec<&String> = groups.value.as_object().into_iter().flat_map(|groups| groups.keys()).collect();
    let [name] = names[..] else {
        return Err(config.wrong("config_groups", "one group", names.len()));
    };
    let group = groups.object(name)?.ok_or_else(|| groups.missing(name, "an object"))?;
    let weights = group.object("weights")?.ok_or_else(|| group.missing("weights", "an object"))?;
    let bits = weights.u32("num_bits")?;
    match config.str("format")? {
        "float-quantized" | "naive-quantized" if weights.str("type")? == "float" && bits == 8 => {
            Ok(Scheme::Fp8 { block: block(&weights, "block_structure")? })
        }
        "pack-quantized" if bits == 4 => match weights.bool("symmetric")? {
            Some(true) => Ok(Scheme::Packed),
            _ => Err(weights.wrong("symmetric", "true", "false")),
        },
        other => {
            let expected = "pack-quantized with 4 bits, or float-quantized with 8";
            Err(config.wrong("format", expected, format_args!("{other} with {bits}")))
        }
    }
}

/// The scheme of BitNet.
fn ternary(config: &Json) -> Result<Scheme> {
    if config.bool("use_rms_norm")? == Some(true) {
        return Err(config.wrong("use_rms_norm", "false", "true"));
    }
    let text = |key: &str, default| config.value.get(key).map_or(Some(default), Value::as_str);
    match (text("linear_class", "bitlinear"), text("quantization_mode", "offline")) {
        (Some("bitlinear"), _) => Ok(Scheme::Ternary { divides: true }),
        (Some("autobitlinear"), Some("offline")) => Ok(Scheme::Ternary { divides: false }),
        (Some("autobitlinear"), Some("online")) => {
            let others = config.get("modules_to_not_convert").and_then(Value::as_array);
            let is_output = |name: &&Value| name.as_str() == Some("lm_head");
            match others.into_iter().flatten().find(|name| !is_output(name)) {
                Some(name) => Err(config.wrong("modules_to_not_convert", "lm_head alone", name)),
                None => Ok(Scheme::RoundedToTernary),
            }
        }
        (Some("autobitlinear"), mode) => {
            Err(config.wrong("quantization_mode", "offline or online", mode.unwrap_or("no text")))
        }
        (class, _) => {
            Err(config.wrong("linear_class", "bitlinear or autobitlinear", class.unwrap_or("no text")))
        }
    }
}

/// A weight.
#[derive(Clone)]
pub(super) struct Part<'a> {
    shape: Vec<usize>,
    data: Data<'a>,
}

#[derive(Clone)]
enum Data<'a> {
    Plain(TensorView<'a>),
    /// Matrices whose columns come one after the other.
    ByColumns(TensorView<'a>),
    Fp8 {
        codes: &'a [u8],
        /// For each block, row by row.
        scales: Vec<f32>,
        block: [usize; 2],
    },
    Int4(Int4<'a>),
    Mxfp4 {
        /// Sixteen bytes a block, neighbours in a byte.
        codes: &'a [u8],
        exponents: &'a [u8],
    },
    /// Codes plus 1, of two bits: of a row in each quarter of the rows.
    Ternary {
        codes: &'a [u8],
        factor: f32,
    },
    /// Numbers that are multiplied by a scale, rounded to a code and multiplied by the factor.
    RoundedToTernary {
        view: TensorView<'a>,
        scale: f32,
        factor: f32,
    },
}

/// Codes of four bits: a number is its scale times its code less the group's zero.
#[derive(Clone)]
struct Int4<'a> {
    words: &'a [u8],
    packing: Packing,
    /// For each row, those of its groups.
    scales: Vec<f32>,
    zeros: Vec<u8>,
    groups: usize,
    /// The group of each column.
    group_of: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// Words of eight columns, row after row.
    Rows,
    /// Words of eight columns: those of all rows, then the next eight columns.
    Columns,
    /// Words of eight rows, for each column.
    AcrossRows,
}

impl<'a> Part<'a> {
    pub(super) fn plain(view: TensorView<'a>) -> Part<'a> {
        Part { shape: view.shape().to_vec(), data: Data::Plain(view) }
    }

    /// Plain matrices transposed. Folders have those of MXFP4 as files do.
    ///
    /// # Errors
    /// Other quantised weights, whose rows would not be those of the matrix.
    pub(super) fn transposed(mut self) -> Result<Part<'a>, String> {
        match (&self.data, &mut self.shape[..]) {
            (Data::Mxfp4 { .. }, _) => {}
            (Data::Plain(view), [.., rows, columns]) => {
                self.data = Data::ByColumns(view.clone());
                std::mem::swap(rows, columns);
            }
            (_, shape) => {
                return Err(format!(
                    "expected plain matrices, which are transposed, got {shape:?} of another kind"
                ));
            }
        }
        Ok(self)
    }

    /// Dimensions, outermost first.
    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements of a row. A vector is a matrix of one column, so that its elements are reordered like rows.
    pub(super) fn columns(&self) -> usize {
        if self.shape.len() < 2 { 1 } else { self.shape.last().copied().unwrap_or(0) }
    }

    /// The format in which the weight always is written, because it has the same codes and scales.
    pub(super) fn home(&self) -> Option<Format> {
        match self.data {
            Data::Mxfp4 { .. } => Some(Format::MXFP4),
            // Its quantiser finds the codes of ternary numbers.
            Data::Ternary { factor, .. } | Data::RoundedToTernary { factor, .. } => {
                let is_same = math::f16_to_f32(math::f32_to_f16(factor)) == factor;
                (is_same && Format::TQ2_0.row_bytes(self.columns()).is_some()).then_some(Format::TQ2_0)
            }
            _ => None,
        }
    }

    /// Reads rows of so many columns, which may be fewer than its own.
    pub(super) fn reader(&self, columns: usize) -> Result<RowReader<'_>> {
        let plain = match &self.data {
            Data::Plain(view) | Data::ByColumns(view) | Data::RoundedToTernary { view, .. } => {
                Some(element(view.dtype())?)
            }
            _ => None,
        };
        Ok(RowReader { part: self, columns, plain, ahead: RefCell::default() })
    }
}

/// Reads the rows of a weight.
pub(super) struct RowReader<'p> {
    part: &'p Part<'p>,
    columns: usize,
    plain: Option<(Element, usize)>,
    /// The first of some rows read together, and their elements.
    ahead: RefCell<(usize, Vec<f32>)>,
}

impl RowReader<'_> {
    /// Rows of all matrices.
    pub(super) fn rows(&self) -> usize {
        self.part.shape.iter().product::<usize>().checked_div(self.columns).unwrap_or(0)
    }

    /// Appends the numbers of a row.
    pub(super) fn read(&self, row: usize, values: &mut Vec<f32>) {
        let columns = self.columns;
        match (&self.part.data, self.plain) {
            (Data::Plain(view), Some((element, bytes))) => {
                let from = row * columns * bytes;
                let elements = view.data().get(from..from + columns * bytes).unwrap_or(&[]);
                values.extend(elements.chunks_exact(bytes).map(element));
            }
            (Data::ByColumns(view), Some((element, bytes))) => {
                // Those of a matrix are a column's elements.
                let [.., rows, _] = self.part.shape[..] else { return };
                let (matrix, row) = (row / rows.max(1), row % rows.max(1));
                let mut ahead = self.ahead.borrow_mut();
                let (first, ahead) = &mut *ahead;
                let group = row / AHEAD * AHEAD;
                if ahead.is_empty() || *first != matrix * rows + group {
                    let count = AHEAD.min(rows - group);
                    *first = matrix * rows + group;
                    ahead.clear();
                    ahead.resize(count * columns, f32::NAN);
                    for column in 0..columns {
                        let from = ((matrix * columns + column) * rows + group) * bytes;
                        let elements = view.data().get(from..from + count * bytes).unwrap_or(&[]);
                        for (n, bytes) in elements.chunks_exact(bytes).enumerate() {
                            ahead[n * columns + column] = element(bytes);
                        }
                    }
                }
                let from = (row - group) * columns;
                values.extend(ahead.get(from..from + columns).unwrap_or(&[]));
            }
            (Data::RoundedToTernary { view, scale, factor }, Some((element, bytes))) => {
                let from = row * columns * bytes;
                let elements = view.data().get(from..from + columns * bytes).unwrap_or(&[]);
                let code = |x: f32| (x * scale).round_ties_even().clamp(-1.0, 1.0);
                values.extend(elements.chunks_exact(bytes).map(|bytes| code(element(bytes)) * factor));
            }
            (Data::Ternary { codes, factor }, _) => {
                let rows = (self.rows() / TERNARY).max(1);
                let from = row % rows * columns;
                let codes = codes.get(from..from + columns).unwrap_or(&[]);
                let number = |&byte: &u8| (f32::from(byte >> (2 * (row / rows)) & 3) - 1.0) * factor;
                values.extend(codes.iter().map(number));
            }
            (Data::Plain(_) | Data::ByColumns(_) | Data::RoundedToTernary { .. }, None) => {}
            (Data::Fp8 { codes, scales, block: [rows, width] }, _) => {
                let across = columns.div_ceil(*width);
                let codes = codes.get(row * columns..(row + 1) * columns).unwrap_or(&[]);
                let scale = |column: usize| scales.get(row / rows * across + column / width);
                let number = |(column, &code): (usize, &u8)| e4m3(code) * scale(column).unwrap_or(&f32::NAN);
                values.extend(codes.iter().enumerate().map(number));
            }
            (Data::Int4(int4), _) => {
                values.extend((0..columns).map(|column| {
                    let (scale, zero) = int4.group(row, column);
                    scale * (f32::from(int4.code(row, column, self.rows(), columns)) - f32::from(zero))
                }));
            }
            (Data::Mxfp4 { .. }, _) => {
                let mut blocks = vec![0; Format::MXFP4.row_bytes(columns).unwrap_or(0)];
                let start = values.len();
                values.resize(start + columns, f32::NAN);
                if self.carry(row, Format::MXFP4, &mut blocks) {
                    // Lengths agree: both are of this row.
                    let _ = Format::MXFP4.dequantize(&blocks, &mut values[start..]);
                }
            }
        }
    }

    /// Writes the blocks of a row in a format that has the same codes and scales, and says whether there are such.
    pub(super) fn carry(&self, row: usize, format: Format, blocks: &mut [u8]) -> bool {
        let columns = self.columns;
        if !columns.is_multiple_of(BLOCK) {
            return false;
        }
        match (&self.part.data, format) {
            (Data::Int4(int4), Format::Q4_0) => {
                let rows = self.rows();
                for (n, block) in blocks.chunks_exact_mut(2 + BLOCK / 2).enumerate() {
                    let (scale, zero) = int4.group(row, n * BLOCK);
                    let bits = math::f32_to_f16(scale);
                    let group = int4.group_of.get(n * BLOCK);
                    let one_group = (1..BLOCK).all(|column| int4.group_of.get(n * BLOCK + column) == group);
                    if zero != MIDDLE || !one_group || math::f16_to_f32(bits) != scale {
                        return false;
                    }
                    block[..2].copy_from_slice(&bits.to_le_bytes());
                    for (i, byte) in block[2..].iter_mut().enumerate() {
                        let code = |column| int4.code(row, n * BLOCK + column, rows, columns);
                        *byte = code(i) | code(i + BLOCK / 2) << 4;
                    }
                }
                true
            }
            (Data::Mxfp4 { codes, exponents }, Format::MXFP4) => {
                let first = row * (columns / BLOCK);
                for (n, block) in blocks.chunks_exact_mut(1 + BLOCK / 2).enumerate() {
                    let from = (first + n) * (BLOCK / 2);
                    let (Some(&exponent), Some(pairs)) =
                        (exponents.get(first + n), codes.get(from..from + BLOCK / 2))
                    else {
                        return false;
                    };
                    let code = |i: usize| pairs[i / 2] >> (4 * (i % 2)) & 15;
                    block[0] = exponent;
                    for (i, byte) in block[1..].iter_mut().enumerate() {
                        *byte = code(i) | code(i + BLOCK / 2) << 4;
                    }
                }
                true
            }
            _ => false,
        }
    }
}

impl Int4<'_> {
    /// The scale and the zero of an element.
    fn group(&self, row: usize, column: usize) -> (f32, u8) {
        let group = self.group_of.get(column).map_or(0, |&group| group as usize);
        let at = row * self.groups + group;
        (self.scales.get(at).copied().unwrap_or(f32::NAN), self.zeros.get(at).copied().unwrap_or(0))
    }

    fn code(&self, row: usize, column: usize, rows: usize, columns: usize) -> u8 {
        match self.packing {
            Packing::Rows => {
                nibble(self.words, row * columns.div_ceil(CODES) + column / CODES, column % CODES)
            }
            Packing::Columns => nibble(self.words, column / CODES * rows + row, column % CODES),
            Packing::AcrossRows => {
                nibble(self.words, column * (rows / CODES) + row / CODES, AWQ_PLACE[row % CODES])
            }
        }
    }
}

/// Where AutoAWQ's words have the code of each of eight rows.
const AWQ_PLACE: [usize; CODES] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A code of a word of little-endian bytes; 0 beyond the end, which shapes exclude.
fn nibble(words: &[u8], word: usize, place: usize) -> u8 {
    words.get(word * 4 + place / 2).map_or(0, |byte| byte >> (4 * (place % 2)) & 15)
}

/// E4M3 without infinities: a sign, four bits of exponent with bias 7, three of fraction.
fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2f32.powi(-9),
        _ => (8.0 + fraction) * 2f32.powi(exponent - 10),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}

/// Converts the bytes of an element to its value.
type Element = fn(&[u8]) -> f32;

/// Returns the conversion of elements of a type, and the bytes of an element.
fn element(dtype: Dtype) -> Result<(Element, usize)> {
    Ok(match dtype {
        Dtype::F32 => (|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]), 4),
        Dtype::F16 => (|b| math::f16_to_f32(u16::from_le_bytes([b[0], b[1]])), 2),
        Dtype::BF16 => (|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16), 2),
        other => return Err(Error::Model(format!("expected F32, F16 or BF16, got {other:?}"))),
    })
}

/// All numbers of a tensor.
fn numbers(view: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let (element, bytes) = element(view.dtype()).map_err(|e| format!("its scales: {e}"))?;
    Ok(view.data().chunks_exact(bytes).map(element).collect())
}

/// The whole numbers of a tensor, as they are stored.
fn integers(view: &TensorView<'_>, what: &str) -> Result<Vec<i64>, String> {
    let data = view.data();
    match view.dtype() {
        Dtype::I32 => Ok(data.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect()),
        Dtype::I64 => Ok(data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect()),
        other => Err(format!("{what}: expected I32 or I64, got {other:?}")),
    }
}

/// The rows and columns of words of codes: some, so that neither is more than the file has bytes.
fn words(view: &TensorView<'_>, what: &str) -> Result<[usize; 2], String> {
    match (view.shape(), view.dtype()) {
        (&[rows, columns], Dtype::I32) if rows > 0 && columns > 0 => Ok([rows, columns]),
        (shape, dtype) => {
            Err(format!("{what}: expected a matrix of I32 with elements, got {shape:?} of {dtype:?}"))
        }
    }
}

fn expect(what: &str, expected: &[usize], got: &[usize]) -> Result<(), String> {
    if expected == got {
        Ok(())
    } else {
        Err(format!("{what}: expected the shape {expected:?}, got {got:?}"))
    }
}

fn fp8<'a>(
    view: &TensorView<'a>,
    scales: &TensorView<'_>,
    block: Option<[usize; 2]>,
) -> Result<Part<'a>, String> {
    let &[rows, columns] = view.shape() else {
        return Err(format!("expected a matrix, got the shape {:?}", view.shape()));
    };
    let given = numbers(scales)?;
    let block = match block {
        Some([height, width]) => {
            expect("its scales", &[rows.div_ceil(height), columns.div_ceil(width)], scales.shape())?;
            [height, width]
        }
        None if given.len() == 1 => [rows.max(1), columns.max(1)],
        None if given.len() == rows => [1, columns.max(1)],
        None => return Err(format!("expected 1 or {rows} scales, got {}", given.len())),
    };
    let data = Data::Fp8 { codes: view.data(), scales: given, block };
    Ok(Part { shape: view.shape().to_vec(), data })
}

fn packed_ternary<'a>(
    view: &TensorView<'a>,
    scale: &TensorView<'_>,
    divides: bool,
) -> Result<Part<'a>, String> {
    let (&[rows, columns], Dtype::U8) = (view.shape(), view.dtype()) else {
        let (shape, dtype) = (view.shape(), view.dtype());
        return Err(format!("expected a matrix of U8, four rows in one, got {shape:?} of {dtype:?}"));
    };
    let rows = rows.checked_mul(TERNARY).ok_or_else(|| format!("expected fewer rows, got {rows}"))?;
    let &[scale] = &numbers(scale)?[..] else {
        return Err(format!("its scale: expected 1 number, got {:?}", scale.shape()));
    };
    let factor = if divides { 1.0 / scale } else { scale };
    Ok(Part { shape: vec![rows, columns], data: Data::Ternary { codes: view.data(), factor } })
}

/// The factor is the mean magnitude (Ma et al. 2024), in the precision of the numbers; codes are found with the mean itself.
fn rounded_to_ternary<'a>(view: &TensorView<'a>) -> Result<Part<'a>, String> {
    let (element, bytes) = element(view.dtype()).map_err(|e| e.to_string())?;
    let magnitudes = view.data().chunks_exact(bytes).map(|bytes| f64::from(element(bytes).abs()));
    let mean = magnitudes.sum::<f64>() / (view.data().len() / bytes).max(1) as f64;
    let mean = mean.max(1e-5) as f32;
    let format = match view.dtype() {
        Dtype::BF16 => Format::BF16,
        Dtype::F16 => Format::F16,
        _ => Format::F32,
    };
    let mut factor = vec![0; bytes];
    format.quantize(&[mean], &mut factor).map_err(|e| e.to_string())?;
    let (factor, scale) = (element(&factor), 1.0 / mean);
    Ok(Part {
        shape: view.shape().to_vec(),
        data: Data::RoundedToTernary { view: view.clone(), scale, factor },
    })
}

/// The group of each column: as listed, or so many columns each.
fn group_of(order: Option<&TensorView<'_>>, columns: usize, groups: usize) -> Result<Vec<u32>, String> {
    let Some(order) = order else {
        if groups == 0 || !columns.is_multiple_of(groups) {
            return Err(format!("expected groups of one size in {columns} columns, got {groups}"));
        }
        let size = (columns / groups).max(1);
        return Ok((0..columns).map(|column| (column / size) as u32).collect());
    };
    let listed = integers(order, "its g_idx")?;
    let group = |&group: &i64| u32::try_from(group).ok().filter(|&group| (group as usize) < groups);
    let of: Option<Vec<u32>> = listed.iter().map(group).collect();
    of.filter(|of| of.len() == columns)
        .ok_or_else(|| format!("its g_idx: expected one of {groups} groups for each of {columns} columns"))
}

/// Turns numbers of each group into numbers of each row.
fn by_row<T: Copy>(of_groups: &[T], groups: usize, rows: usize) -> Vec<T> {
    (0..rows)
        .flat_map(|row| (0..groups).filter_map(move |group| of_groups.get(group * rows + row).copied()))
        .collect()
}

fn gptq<'a>(
    view: &TensorView<'a>,
    zeros: &TensorView<'_>,
    scales: &TensorView<'_>,
    order: Option<&TensorView<'_>>,
    stored_less: u8,
) -> Result<Part<'a>, String> {
    let [packed, rows] = words(view, "its codes")?;
    let extents = [rows, packed.saturating_mul(CODES)];
    let zero = |words: &[u8], at: usize, row: usize| nibble(words, at, row % CODES) + stored_less;
    with_zeros(view.data(), Packing::Columns, extents, zeros, zero, scales, order)
}

fn awq<'a>(
    view: &TensorView<'a>,
    zeros: &TensorView<'_>,
    scales: &TensorView<'_>,
) -> Result<Part<'a>, String> {
    let [columns, packed] = words(view, "its codes")?;
    let extents = [packed.saturating_mul(CODES), columns];
    let zero = |words: &[u8], at: usize, row: usize| nibble(words, at, AWQ_PLACE[row % CODES]);
    with_zeros(view.data(), Packing::AcrossRows, extents, zeros, zero, scales, None)
}

/// A weight of four bits whose groups have scales and zeros for each row; `zero` reads one of a word.
fn with_zeros<'a>(
    words_of_codes: &'a [u8],
    packing: Packing,
    [rows, columns]: [usize; 2],
    zeros: &TensorView<'_>,
    zero: impl Fn(&[u8], usize, usize) -> u8,
    scales: &TensorView<'_>,
    order: Option<&TensorView<'_>>,
) -> Result<Part<'a>, String> {
    let groups = scales.shape().first().copied().unwrap_or(0);
    expect("its scales", &[groups, rows], scales.shape())?;
    let across = rows.div_ceil(CODES);
    expect("its zeros", &[groups, across], &words(zeros, "its zeros")?)?;
    let of_groups: Vec<u8> = (0..groups)
        .flat_map(|group| (0..rows).map(move |row| (group * across + row / CODES, row)))
        .map(|(at, row)| zero(zeros.data(), at, row))
        .collect();
    let int4 = Int4 {
        words: words_of_codes,
        packing,
        scales: by_row(&numbers(scales)?, groups, rows),
        zeros: by_row(&of_groups, groups, rows),
        groups,
        group_of: group_of(order, columns, groups)?,
    };
    Ok(Part { shape: vec![rows, columns], data: Data::Int4(int4) })
}

fn packed<'a>(
    view: &TensorView<'a>,
    scales: &TensorView<'_>,
    shape: &TensorView<'_>,
    order: Option<&TensorView<'_>>,
) -> Result<Part<'a>, String> {
    let got = words(view, "its codes")?;
    let shape = integers(shape, "its shape")?;
    let extent = |at: usize| shape.get(at).and_then(|&extent| usize::try_from(extent).ok()).unwrap_or(0);
    let (rows, columns) = (extent(0), extent(1));
    expect("its codes", &[rows, columns.div_ceil(CODES)], &got)?;
    let groups = scales.shape().get(1).copied().unwrap_or(0);
    expect("its scales", &[rows, groups], scales.shape())?;
    let int4 = Int4 {
        words: view.data(),
        packing: Packing::Rows,
        scales: numbers(scales)?,
        zeros: vec![MIDDLE; rows.saturating_mul(groups)],
        groups,
        group_of: group_of(order, columns, groups)?,
    };
    Ok(Part { shape: vec![rows, columns], data: Data::Int4(int4) })
}

fn mxfp4<'a>(view: &TensorView<'a>, scales: &TensorView<'a>) -> Result<Part<'a>, String> {
    let bytes = [view.dtype(), scales.dtype()].iter().all(|&dtype| dtype == Dtype::U8);
    match view.shape() {
        &[ref outer @ .., blocks, 16] if bytes && !outer.is_empty() => {
            let count: Vec<usize> = outer.iter().copied().chain([blocks]).collect();
            expect("its scales", &count, scales.shape())?;
            let shape = outer.iter().copied().chain([blocks.saturating_mul(BLOCK)]).collect();
            Ok(Part { shape, data: Data::Mxfp4 { codes: view.data(), exponents: scales.data() } })
        }
        shape => Err(format!("expected blocks of 16 bytes, got the shape {shape:?} of {:?}", view.dtype())),
    }
}
