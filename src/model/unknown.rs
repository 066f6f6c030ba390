//! What a file of an unsupported family has, from its header: blocks that no supported family has, and the family that
//! is most like it.

use std::collections::BTreeSet;

use super::architectures;
use crate::gguf::Gguf;

/// Blocks that no supported family has, by the parts of tensor names that show them.
const BLOCKS: &[(&str, &[&str])] = &[
    ("sparse attention by an indexer", &["indexer"]),
    ("RWKV time mixing", &["time_mix_key", "time_mix_w1", "channel_mix_key"]),
    ("encoder and decoder with cross-attention", &["cross_attn_q"]),
    ("relative position bias", &["attn_rel_b"]),
    ("classification head", &["cls"]),
];

/// Supported families and what is typical of them, the most special first: parts of tensor names that are all there.
const LIKE: &[(&str, &[&str])] = &[
    ("kimi-linear", &["ssm_f_a"]),
    ("qwen35", &["ssm_beta"]),
    ("qwen3next", &["ssm_ba"]),
    ("bitnet", &["attn_sub_norm"]),
    ("lfm2", &["shortconv"]),
    ("deepseek2", &["attn_kv_a_mqa", "ffn_gate_exps"]),
    ("minicpm3", &["attn_kv_a_mqa"]),
    ("granitehybrid", &["ssm_in", "ssm_d", "ffn_gate"]),
    ("nemotron_h_moe", &["ssm_in", "ffn_up_shexp"]),
    ("nemotron_h", &["ssm_in", "ffn_up"]),
    ("plamo2", &["ssm_x", "attn_qkv"]),
    ("mamba", &["ssm_x"]),
    ("mamba2", &["ssm_in", "ssm_d"]),
    ("gemma3n", &["altup_router"]),
    ("gemma4", &["per_layer_model_proj"]),
    ("gpt-oss", &["attn_sinks", "ffn_gate_exps"]),
    ("gemma3", &["post_ffw_norm", "attn_q_norm", "ffn_gate"]),
    ("gemma2", &["post_ffw_norm", "ffn_norm"]),
    ("olmo2", &["post_ffw_norm", "attn_q_norm"]),
    ("qwen2moe", &["ffn_gate_inp_shexp"]),
    ("granitemoe", &["ffn_up_shexp"]),
    ("qwen3moe", &["ffn_gate_exps", "attn_q_norm"]),
    ("llama", &["ffn_gate_exps"]),
    ("nomic-bert", &["layer_output_norm", "ffn_gate"]),
    ("bert", &["layer_output_norm"]),
    ("qwen3", &["attn_q_norm", "ffn_gate"]),
    ("phi3", &["attn_qkv", "ffn_up"]),
    ("llama", &["ffn_gate", "attn_q"]),
    ("starcoder2", &["ffn_up", "attn_q"]),
];

/// The parts of names: what stands between dots, without layers.
fn parts(gguf: &Gguf) -> BTreeSet<&str> {
    gguf.tensors().flat_map(|tensor| tensor.record.name.split('.')).collect()
}

/// Describes a file in half a sentence; empty if nothing can be told.
pub(super) fn describe(gguf: &Gguf, architecture: &str) -> String {
    let parts = parts(gguf);
    let has = |names: &[&str]| names.iter().any(|name| parts.contains(name));
    let blocks: Vec<&str> = BLOCKS.iter().filter(|(_, names)| has(names)).map(|(block, _)| *block).collect();
    // Families of one maker are named alike: the longest beginning that is more than a letter or two.
    let alike = |name: &str| name.bytes().zip(architecture.bytes()).take_while(|(a, b)| a == b).count();
    let named = architectures().map(|name| (alike(name), name)).filter(|(length, _)| *length >= 4);
    let other = |name: &str| std::cmp::Reverse(name.len().abs_diff(architecture.len()));
    let named = named.max_by_key(|(length, name)| (*length, other(name))).map(|(_, name)| name);
    let built =
        LIKE.iter().find(|(_, names)| names.iter().all(|name| parts.contains(name))).map(|(name, _)| *name);
    let missing = match blocks.as_slice() {
        [] => String::new(),
        blocks => format!("; no supported family has its {}", listed(blocks)),
    };
    let near = match (named, built) {
        (Some(a), Some(b)) if a != b => format!("; the nearest ones are {a} by name and {b} by its tensors"),
        (Some(near), _) | (_, Some(near)) => format!("; the nearest one is {near}"),
        (None, None) => String::new(),
    };
    missing + &near
}

/// Joins with commas, and "and" before the last.
fn listed(all: &[&str]) -> String {
    match all {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCKS, LIKE, parts};
    use crate::gguf::Gguf;
    use crate::model::architectures;
    use halite_testing::golden;

    /// What is told as missing is not there in any supported family, and the nearest ones are supported.
    #[test]
    fn no_supported_family_has_these_blocks() {
        let committed = std::fs::read_dir("tests/data/golden").unwrap();
        let files = committed.map(|entry| entry.unwrap().path()).chain(golden::families());
        let mut count = 0;
        for path in files.filter(|path| path.extension().is_some_and(|e| e == "gguf")) {
            let gguf = Gguf::open(&path).unwrap();
            for (block, names) in BLOCKS {
                let found = names.iter().find(|name| parts(&gguf).contains(*name));
                assert_eq!(found, None, "{}: {block}", path.display());
            }
            count += 1;
        }
        assert!(count > 0);
        for (name, _) in LIKE {
            assert!(architectures().any(|known| known == *name), "{name}");
        }
    }
}
