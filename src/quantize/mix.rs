//! Mixes: which format each matrix of a file takes.
//!
//! The names, the rules and the numbers in files are those of llama.cpp (`llama-quant.cpp`), so that a file has
//! the same formats as one of llama.cpp's.

use halite_kernels::formats::Format::{self, *};

use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorRecord};

/// A mix: a common format, and rules for the matrices that take another one.
#[derive(Debug)]
pub struct Mix {
    /// Its name, such as `q4_k_m`.
    pub name: &'static str,
    /// Its number in files: `general.file_type`.
    pub file_type: u32,
    /// The format of most matrices.
    pub format: Format,
    rules: &'static [Rule],
    eight: Eight,
}

/// What the attention takes in mixtures of eight experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Eight {
    /// Q8_0 for keys and values.
    Inputs,
    /// Q8_0 for keys and values, Q5_K for its output.
    All,
    /// Q4_K for keys, Q5_K for its output, in mixes of about two bits. These count layers by their matrices.
    Low,
}

/// The first rule that holds gives the format.
type Rule = (Part, When, Where, Format);

/// What a matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Embedding,
    Head,
    Query,
    Key,
    /// The attention's values, also in one matrix with queries and keys.
    Value,
    AttentionOutput,
    Down,
    Gate,
    Up,
    Other,
}

const PARTS: usize = Part::Other as usize + 1;

#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// With importance of columns.
    Important,
    Unimportant,
    /// The architecture is `falcon`.
    Falcon,
    NotFalcon,
    EightExperts,
}

/// The layers of a rule.
#[derive(Debug, Clone, Copy)]
enum Where {
    Every,
    First(usize),
    FirstEighth,
    FirstSixteenth,
    /// The first and the last eighth, and every third one between.
    More,
    /// Between the first and the last eighth.
    Middle,
    /// Every one, if four or more query heads share keys and values.
    Shared,
    /// Every one, in such a model or in a mixture of four or more experts.
    SharedOrExperts,
}

use Eight::{All, Inputs, Low};
use Part::{AttentionOutput, Down, Embedding, Gate, Head, Key, Query, Up, Value};
use When::{Always, EightExperts, Falcon, Important, NotFalcon, Unimportant};
use Where::{Every, First, FirstEighth, FirstSixteenth, Middle, More, Shared, SharedOrExperts};

const fn mix(
    name: &'static str,
    file_type: u32,
    format: Format,
    eight: Eight,
    rules: &'static [Rule],
) -> Mix {
    Mix { name, file_type, format, rules, eight }
}

const TERNARY: &[Rule] = &[(Embedding, Always, Every, Q4_K)];
const IQ1: &[Rule] = &[
    (Head, Always, Every, Q5_K),
    (Embedding, Always, Every, Q2_K),
    (Value, Always, SharedOrExperts, Q4_K),
    (Value, Always, Every, Q2_K),
    (Down, Always, FirstEighth, Q2_K),
    (AttentionOutput, Always, Every, IQ2_XXS),
];
/// Those of IQ1, without the one for the attention's output.
const IQ2_SMALL: &[Rule] = IQ1.split_at(5).0;
const IQ2: &[Rule] = &[
    (Head, Always, Every, Q5_K),
    (Embedding, Always, Every, IQ3_S),
    (Value, Always, SharedOrExperts, Q4_K),
    (Value, Always, Every, IQ3_S),
    (Down, Always, FirstEighth, IQ3_S),
    (AttentionOutput, Always, Every, IQ3_S),
];
const IQ4: &[Rule] = &[(Value, Always, Shared, Q5_K), (Down, Unimportant, FirstEighth, Q5_K)];

/// All mixes.
#[rustfmt::skip]
pub static MIXES: &[Mix] = &[
    mix("f32", 0, F32, Inputs, &[]),
    mix("f16", 1, F16, Inputs, &[]),
    mix("bf16", 32, BF16, Inputs, &[]),
    mix("q8_0", 7, Q8_0, Inputs, &[]),
    mix("q4_0", 2, Q4_0, Inputs, &[(Down, Important, FirstEighth, Q4_1)]),
    mix("q4_1", 3, Q4_1, Inputs, &[]),
    mix("q5_0", 8, Q5_0, Inputs, &[(Down, Important, FirstEighth, Q5_1)]),
    mix("q5_1", 9, Q5_1, Inputs, &[]),
    mix("q2_k", 10, Q2_K, All, &[
        (Value, Always, Shared, Q4_K), (Value, Always, Every, Q3_K), (Down, Always, Every, Q3_K),
        (AttentionOutput, NotFalcon, Every, Q3_K),
    ]),
    mix("q2_k_s", 21, Q2_K, Inputs, &[(Value, Always, Shared, Q4_K), (Down, Always, FirstEighth, Q4_K)]),
    mix("q3_k_s", 11, Q3_K, All, &[]),
    mix("q3_k_m", 12, Q3_K, All, &[
        (Value, Always, First(2), Q5_K), (Value, Always, Every, Q4_K), (Down, Always, FirstSixteenth, Q5_K),
        (Down, NotFalcon, Every, Q4_K), (Down, Falcon, More, Q4_K), (AttentionOutput, NotFalcon, Every, Q4_K),
    ]),
    mix("q3_k_l", 13, Q3_K, Inputs, &[
        (Value, Always, Every, Q5_K), (Down, Falcon, Every, Q4_K), (Down, NotFalcon, Every, Q5_K),
        (AttentionOutput, Falcon, Every, Q4_K), (AttentionOutput, NotFalcon, Every, Q5_K),
    ]),
    mix("q4_k_s", 14, Q4_K, All, &[(Value, Always, First(4), Q5_K), (Down, NotFalcon, FirstEighth, Q5_K)]),
    mix("q4_k_m", 15, Q4_K, All, &[
        (Value, Always, More, Q6_K), (Down, Falcon, FirstSixteenth, Q6_K), (Down, Falcon, More, Q5_K),
        (Down, NotFalcon, More, Q6_K),
    ]),
    mix("q5_k_s", 16, Q5_K, Inputs, &[]),
    mix("q5_k_m", 17, Q5_K, Inputs, &[(Value, Always, More, Q6_K), (Down, Always, More, Q6_K)]),
    mix("q6_k", 18, Q6_K, Inputs, &[]),
    mix("iq1_s", 24, IQ1_S, Low, IQ1),
    mix("iq1_m", 31, IQ1_M, Low, IQ1),
    mix("iq2_xxs", 19, IQ2_XXS, Low, IQ2_SMALL),
    mix("iq2_xs", 20, IQ2_XS, Low, IQ2_SMALL),
    mix("iq2_s", 28, IQ2_XS, Low, IQ2),
    mix("iq2_m", 29, IQ2_S, Low, IQ2),
    mix("iq3_xxs", 23, IQ3_XXS, All, &[
        (Head, Always, Every, Q5_K), (Embedding, Always, Every, IQ3_S),
        (Value, Always, Shared, Q4_K), (Value, Unimportant, Every, IQ3_S),
        (Key, Always, Every, IQ2_S), (Query, Always, Every, IQ2_S),
        (Down, Unimportant, FirstEighth, Q4_K), (Down, Unimportant, Every, Q3_K),
        (AttentionOutput, NotFalcon, Every, IQ3_S),
    ]),
    mix("iq3_xs", 22, IQ3_S, All, &[
        (Value, Always, Shared, Q4_K), (Key, Always, Every, IQ3_XXS), (Query, Always, Every, IQ3_XXS),
        (Gate, Always, Middle, IQ3_XXS), (Up, Always, Middle, IQ3_XXS),
    ]),
    mix("iq3_s", 26, IQ3_S, All, &[(Value, Always, Shared, Q4_K)]),
    mix("iq3_m", 27, IQ3_S, All, &[
        (Value, Always, Every, Q4_K), (Down, Always, FirstEighth, Q4_K), (Down, EightExperts, More, Q4_K),
        (AttentionOutput, NotFalcon, Every, Q4_K),
    ]),
    mix("iq4_nl", 25, IQ4_NL, All, IQ4),
    mix("iq4_xs", 30, IQ4_XS, All, IQ4),
    mix("tq1_0", 36, TQ1_0, Inputs, TERNARY),
    mix("tq2_0", 37, TQ2_0, Inputs, TERNARY),
    mix("q1_0", 40, Q1_0, Inputs, &[]),
    mix("q2_0", 41, Q2_0, Inputs, TERNARY),
    mix("mxfp4_moe", MXFP4_MOE, MXFP4, Inputs, &[]),
];

const MXFP4_MOE: u32 = 38;

const ALIASES: &[(&str, &str)] =
    &[("q3_k", "q3_k_m"), ("q4_k", "q4_k_m"), ("q5_k", "q5_k_m"), ("mxfp4", "mxfp4_moe")];

/// Names of which no matrix is quantised: what is small, or read row by row, or chooses experts. Between stars, a
/// part of a name.
const LEFT: &[&str] = &[
    "*_norm.weight*",
    "*ffn_gate_inp.weight*",
    "*altup*",
    "*laurel*",
    "*per_layer_model_proj*",
    "position_embd.weight",
    "token_types.weight",
    "*ssm_conv1d*",
    "*shortconv.conv.weight*",
    "*indexer.k_proj.weight*",
    "*indexer.q_proj.weight*",
    "*time_mix_first.weight*",
    "*time_mix_w0.weight*",
    "*time_mix_w1.weight*",
    "*time_mix_w2.weight*",
    "*time_mix_v0.weight*",
    "*time_mix_v1.weight*",
    "*time_mix_v2.weight*",
    "*time_mix_a0.weight*",
    "*time_mix_a1.weight*",
    "*time_mix_a2.weight*",
    "*time_mix_g1.weight*",
    "*time_mix_g2.weight*",
    "*time_mix_decay_w1.weight*",
    "*time_mix_decay_w2.weight*",
    "*time_mix_lerp_fused.weight*",
    "*attn_rel_b.weight*",
    "*.position_embd*",
    "*.rel_pos*",
    "*.patch_embd*",
    "*.patch_merger*",
];

/// The format that takes the place of another one in rows that are not whole blocks of it.
const SHORTER: &[(Format, Format)] = &[
    (IQ1_S, IQ4_NL),
    (IQ1_M, IQ4_NL),
    (IQ2_XXS, IQ4_NL),
    (IQ2_XS, IQ4_NL),
    (IQ2_S, IQ4_NL),
    (IQ3_XXS, IQ4_NL),
    (IQ3_S, IQ4_NL),
    (IQ4_XS, IQ4_NL),
    (Q2_0, Q4_0),
    (Q2_K, Q4_0),
    (Q3_K, Q4_0),
    (TQ1_0, Q4_0),
    (TQ2_0, Q4_0),
    (Q4_K, Q5_0),
    (Q5_K, Q5_1),
    (Q6_K, Q8_0),
];

/// Returns the mix of a name, in any case.
pub fn mix_named(name: &str) -> Option<&'static Mix> {
    let name = name.to_lowercase();
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(&name[..], |(_, name)| name);
    MIXES.iter().find(|mix| mix.name == name)
}

/// Whether a mix may quantise a tensor.
pub(super) fn is_matrix(tensor: &TensorRecord) -> bool {
    let matches = |pattern: &&str| match pattern.strip_prefix('*') {
        Some(piece) => tensor.name.contains(piece.trim_end_matches('*')),
        None => tensor.name == **pattern,
    };
    let dims = tensor.dims.iter().rposition(|&dim| dim > 1).map_or(1, |last| last + 1);
    dims > 1 && tensor.name.ends_with("weight") && !LEFT.iter().any(matches)
}

/// What rules ask of a model.
#[derive(Debug)]
pub(super) struct Shape {
    falcon: bool,
    layers: usize,
    experts: u32,
    /// Query heads that share keys and values.
    shared: u32,
    /// A model of 70 billion parameters, whose values are an eighth of the queries.
    seventy: bool,
}

/// Architectures and layers of such models.
const SEVENTY: &[(&str, usize)] = &[("llama", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)];

/// More than any model has.
const MAX_LAYERS: usize = 1 << 16;

impl Shape {
    pub(super) fn of(gguf: &Gguf) -> Result<Shape> {
        let architecture = gguf.architecture()?;
        let key = |name: &str| format!("{architecture}.{name}");
        let layers = gguf.optional_u32(&key("block_count"))?.unwrap_or(0) as usize;
        if layers > MAX_LAYERS {
            return Err(Error::Model(format!("block_count: expected at most {MAX_LAYERS}, got {layers}")));
        }
        let first = |name: &str| {
            let all = gguf.optional_u32_per_layer(&key(name), layers)?;
            Ok::<_, Error>(all.and_then(|all| all.first().copied()))
        };
        let heads = first("attention.head_count")?.unwrap_or(0);
        let kv_heads = first("attention.head_count_kv")?.unwrap_or(heads);
        Ok(Shape {
            falcon: architecture == "falcon",
            layers,
            experts: gguf.optional_u32(&key("expert_count"))?.unwrap_or(0),
            shared: heads.checked_div(kv_heads).unwrap_or(0),
            seventy: SEVENTY.contains(&(architecture, layers))
                && (architecture != "llama" || heads != kv_heads),
        })
    }
}

/// The layer in a tensor's name.
fn layer(name: &str) -> Option<usize> {
    let digits = name.strip_prefix("blk.")?;
    digits[..digits.bytes().take_while(u8::is_ascii_digit).count()].parse().ok()
}

fn part(name: &str) -> Part {
    const NAMES: &[(&str, Part)] = &[
        ("attn_qkv.weight", Value),
        ("attn_kv_b.weight", Value),
        ("attn_v.weight", Value),
        ("attn_k.weight", Key),
        ("attn_q.weight", Query),
        ("attn_output.weight", AttentionOutput),
        ("ffn_up", Up),
        ("ffn_gate", Gate),
        ("ffn_down", Down),
    ];
    match name {
        "output.weight" => Head,
        "token_embd.weight" | "per_layer_token_embd.weight" => Embedding,
        _ => NAMES.iter().find(|(piece, _)| name.contains(piece)).map_or(Part::Other, |(_, part)| *part),
    }
}

/// Whether layer `layer` of `layers` takes more bits.
fn more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// Chooses the formats of a model's matrices, in their order.
pub(super) struct Chooser<'a> {
    mix: &'static Mix,
    shape: &'a Shape,
    /// Whether there is importance of columns.
    important: bool,
    /// Whether the embedding is the head, too.
    tied: bool,
    values: usize,
    /// Matrices so far, by part.
    seen: [usize; PARTS],
}

impl<'a> Chooser<'a> {
    /// `names` are those of all tensors.
    pub(super) fn new<'n>(
        mix: &'static Mix,
        shape: &'a Shape,
        important: bool,
        names: impl Iterator<Item = &'n str> + Clone,
    ) -> Self {
        let values = names.clone().filter(|name| part(name) == Value).count();
        let tied = !names.clone().any(|name| name == "output.weight");
        Chooser { mix, shape, important, tied, values, seen: [0; PARTS] }
    }

    /// The order in which tensors are chosen for: by layer, then by name.
    pub(super) fn order(name: &str) -> (Option<usize>, &str) {
        (layer(name), name)
    }

    fn rule(&self, part: Part, layer: usize, layers: usize) -> Option<Format> {
        let holds = |when: When, place: Where| {
            let now = match when {
                Always => true,
                Important => self.important,
                Unimportant => !self.important,
                Falcon => self.shape.falcon,
                NotFalcon => !self.shape.falcon,
                EightExperts => self.shape.experts == 8,
            };
            let here = match place {
                Every => true,
                First(count) => layer < count,
                FirstEighth => layer < layers / 8,
                FirstSixteenth => layer < layers / 16,
                More => more_bits(layer, layers),
                Middle => (layers / 8..7 * layers / 8).contains(&layer),
                Shared => self.shape.shared >= 4,
                SharedOrExperts => self.shape.shared >= 4 || self.shape.experts >= 4,
            };
            now && here
        };
        let mut rules = self.mix.rules.iter();
        rules.find(|rule| rule.0 == part && holds(rule.1, rule.2)).map(|rule| rule.3)
    }

    /// The format of the next matrix by the rules of the mix; its rows may not be whole blocks.
    pub(super) fn choose(&mut self, tensor: &TensorRecord) -> Format {
        let (common, eight) = (self.mix.format, self.shape.experts == 8);
        let part = part(&tensor.name);
        let cols = tensor.dims.first().copied().unwrap_or(0);
        if matches!(common.kind(), halite_kernels::formats::Kind::Float) {
            return common;
        }
        if part == Head || (part == Embedding && self.tied) {
            let whole = cols % common.block_len() as u64 == 0;
            let q8 = self.mix.file_type == MXFP4_MOE || self.shape.falcon || !whole || common == Q8_0;
            return if q8 { Q8_0 } else { self.rule(Head, 0, 0).unwrap_or(Q6_K) };
        }
        if self.mix.file_type == MXFP4_MOE {
            return if tensor.dims.get(2).is_some_and(|&experts| experts > 1) { MXFP4 } else { Q8_0 };
        }
        let seen = self.seen[part as usize];
        self.seen[part as usize] += 1;
        let low = self.mix.eight == Low;
        let by_name = self.shape.experts > 1 && !low;
        let (at, layers) = match part {
            Value => (seen, self.values),
            _ => (layer(&tensor.name).filter(|_| by_name).unwrap_or(seen), self.shape.layers),
        };
        let format = self.rule(part, at, layers).unwrap_or(common);
        match (part, format) {
            (Value, _) if eight && !low => Q8_0,
            (Value, Q3_K | Q4_K) if self.shape.seventy && !low => Q5_K,
            (Key, _) if eight => {
                if low {
                    Q4_K
                } else {
                    Q8_0
                }
            }
            (AttentionOutput, _) if eight && (low || !self.shape.falcon) => {
                if self.mix.eight == Inputs {
                    common
                } else {
                    Q5_K
                }
            }
            _ => format,
        }
    }
}

/// Whether a matrix is of no use in a format unless the importance of its columns is known.
pub(super) fn needs_importance(mix: &Mix, name: &str, format: Format) -> bool {
    // Of these matrices, importance is rarely known.
    let rarely = matches!(part(name), Head | Embedding);
    match format {
        IQ1_S | IQ2_XXS | IQ2_XS => true,
        IQ1_M | IQ2_S | IQ3_XXS => !rarely,
        Q2_K => mix.name == "q2_k_s" && !rarely,
        _ => false,
    }
}

/// `format`, or the one that takes its place where rows of `cols` are not whole blocks.
pub(super) fn fitting(format: Format, cols: u64) -> Format {
    let fits = |format: Format| cols.is_multiple_of(format.block_len() as u64);
    if fits(format) {
        return format;
    }
    let shorter = SHORTER.iter().find(|row| row.0 == format).map_or(format, |row| row.1);
    if fits(shorter) { shorter } else { F16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halite_kernels::formats::Layout;

    fn format(name: &str) -> Format {
        Format::from_name(&name.to_uppercase()).unwrap()
    }

    #[test]
    fn formats_are_those_of_llama_cpp() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantize/mixes.txt");
        let text = std::fs::read_to_string(path).unwrap();
        let (mut shape, mut tensors, mut checked) = (None, Vec::new(), 0);
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[1] {
                "model" => {
                    let number = |i: usize| words[i].parse::<u32>().unwrap();
                    let (layers, heads, kv_heads) = (number(3) as usize, number(4), number(5));
                    shape = Some(Shape {
                        falcon: words[2] == "falcon",
                        layers,
                        experts: number(6),
                        shared: heads / kv_heads,
                        seventy: words[2] == "llama" && layers == 80 && heads != kv_heads,
                    });
                }
                "names" => {
                    tensors = words[2..]
                        .iter()
                        .map(|word| {
                            let (name, dims) = word.split_once(':').unwrap();
                            let dims = dims.split('x').map(|dim| dim.parse().unwrap()).collect();
                            let (format, layout) = (F32, Layout::Rows);
                            TensorRecord { name: name.into(), dims, format, layout, bytes: 0..0 }
                        })
                        .collect();
                    let sorted = tensors.is_sorted_by(|a: &TensorRecord, b| {
                        Chooser::order(&a.name).0 <= Chooser::order(&b.name).0
                    });
                    assert!(sorted, "{}", words[0]);
                }
                name => {
                    let mix = mix_named(name).unwrap();
                    assert_eq!((mix.file_type.to_string(), mix.format), (words[2].into(), format(words[3])));
                    let others: std::collections::HashMap<usize, Format> = words[4..]
                        .iter()
                        .map(|word| {
                            let (at, name) = word.split_once(':').unwrap();
                            (at.parse().unwrap(), format(name))
                        })
                        .collect();
                    let names = tensors.iter().map(|t| &t.name[..]);
                    let mut chooser = Chooser::new(mix, shape.as_ref().unwrap(), false, names);
                    for (at, tensor) in tensors.iter().enumerate() {
                        let want = others.get(&at).copied().unwrap_or(mix.format);
                        let got = match is_matrix(tensor) {
                            true => fitting(chooser.choose(tensor), tensor.dims[0]),
                            false => F32,
                        };
                        assert_eq!(got, want, "{} {name} {}", words[0], tensor.name);
                        checked += 1;
                    }
                }
            }
        }
        assert!(checked > 10_000);
    }

    #[test]
    fn names_are_known_in_any_case() {
        assert_eq!(mix_named("Q4_K_M").map(|mix| mix.name), Some("q4_k_m"));
        assert_eq!(mix_named("q5_k").map(|mix| mix.name), Some("q5_k_m"));
        assert!(mix_named("iq5_k").is_none());
        for mix in MIXES {
            assert!(std::ptr::eq(mix_named(mix.name).unwrap(), mix));
        }
    }
}
