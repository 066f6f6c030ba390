//! A GGUF writer that writes what it is told to, right or wrong.

/// A metadata value as it stands in a file: its type id and its bytes.
#[derive(Clone)]
pub struct Value(pub u32, pub Vec<u8>);

macro_rules! from_number {
    ($($number:ty => $id:expr),*) => {
        $(impl From<$number> for Value {
            fn from(v: $number) -> Value {
                Value($id, v.to_le_bytes().to_vec())
            }
        })*
    };
}

from_number!(u8 => 0, i8 => 1, u16 => 2, i16 => 3, u32 => 4, i32 => 5, f32 => 6, u64 => 10, i64 => 11, f64 => 12);

impl From<bool> for Value {
    fn from(v: bool) -> Value {
        Value(7, vec![v.into()])
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Value {
        v.as_bytes().into()
    }
}

impl From<&[u8]> for Value {
    fn from(v: &[u8]) -> Value {
        Value(8, string(v))
    }
}

impl<T: Into<Value> + Clone> From<&Vec<T>> for Value {
    fn from(v: &Vec<T>) -> Value {
        let values: Vec<Value> = v.iter().cloned().map(Into::into).collect();
        let id = values.first().map_or(4, |v| v.0);
        array(id, values.len() as u64, &values.iter().flat_map(|v| v.1.clone()).collect::<Vec<_>>())
    }
}

/// An array of `count` values of a type, with these bytes.
pub fn array(id: u32, count: u64, bytes: &[u8]) -> Value {
    Value(9, [&id.to_le_bytes()[..], &count.to_le_bytes(), bytes].concat())
}

/// A text after its length.
pub fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

/// A tensor record and its data.
#[derive(Clone)]
pub struct Tensor {
    pub name: Vec<u8>,
    /// What the record says, if not the length of `dims`.
    pub n_dims: Option<u32>,
    pub dims: Vec<u64>,
    pub id: u32,
    /// What the record says, if not where the data are.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// A file to be written.
#[derive(Clone)]
pub struct File {
    pub version: u32,
    /// Where tensor data are put; writing the key is another matter.
    pub alignment: usize,
    pub entries: Vec<(Vec<u8>, Value)>,
    pub tensors: Vec<Tensor>,
    /// What the header says, if not the truth.
    pub entry_count: Option<u64>,
    pub tensor_count: Option<u64>,
}

impl File {
    pub fn new() -> File {
        let (entries, tensors) = (Vec::new(), Vec::new());
        File { version: 3, alignment: 32, entries, tensors, entry_count: None, tensor_count: None }
    }

    /// Adds an entry, whether or not the key is there.
    pub fn entry(mut self, key: impl AsRef<[u8]>, value: impl Into<Value>) -> File {
        self.entries.push((key.as_ref().to_vec(), value.into()));
        self
    }

    /// Replaces an entry, or adds it.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> File {
        let value = value.into();
        match self.entries.iter_mut().find(|(k, _)| k == key.as_bytes()) {
            Some((_, old)) => *old = value,
            None => self.entries.push((key.into(), value)),
        }
        self
    }

    pub fn without(mut self, key: &str) -> File {
        self.entries.retain(|(k, _)| k != key.as_bytes());
        self.tensors.retain(|t| t.name != key.as_bytes());
        self
    }

    /// Adds an F32 tensor of small numbers.
    pub fn tensor(self, name: impl AsRef<[u8]>, dims: &[u64]) -> File {
        let elements: u64 = dims.iter().product();
        let data = (0..elements).flat_map(|i| ((i % 7) as f32 / 8.0 - 0.375).to_le_bytes()).collect();
        self.tensor_of(name, dims, 0, data)
    }

    /// Adds a tensor of any type with these data.
    pub fn tensor_of(mut self, name: impl AsRef<[u8]>, dims: &[u64], id: u32, data: Vec<u8>) -> File {
        let (name, dims) = (name.as_ref().to_vec(), dims.to_vec());
        self.tensors.push(Tensor { name, n_dims: None, dims, id, offset: None, data });
        self
    }

    /// Changes the last tensor.
    pub fn last(mut self, change: impl FnOnce(&mut Tensor)) -> File {
        change(self.tensors.last_mut().unwrap());
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.entry_count.unwrap_or(self.entries.len() as u64).to_le_bytes());
        for (key, Value(id, bytes)) in &self.entries {
            out.extend(string(key));
            out.extend(id.to_le_bytes());
            out.extend(bytes);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            out.extend(string(&t.name));
            out.extend(t.n_dims.unwrap_or(t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(t.id.to_le_bytes());
            out.extend(t.offset.unwrap_or(offset).to_le_bytes());
            offset += t.data.len().next_multiple_of(self.alignment) as u64;
        }
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&t.data);
        }
        out
    }
}

/// A vocabulary of the SentencePiece kind: `<unk>`, `<s>`, `</s>`, some bytes, some pieces.
fn spm_tokens() -> Vec<&'static str> {
    vec![
        "<unk>",
        "<s>",
        "</s>",
        "<0x0A>",
        "<0x41>",
        "\u{2581}",
        "a",
        "b",
        "ab",
        "\u{2581}a",
        "\u{2581}ab",
        "<tag>",
    ]
}

/// The smallest sensible llama: one layer, twelve tokens, F32.
pub fn llama() -> File {
    let tokens = spm_tokens();
    let scores: Vec<f32> = (0..tokens.len()).map(|i| -(i as f32)).collect();
    let kinds = vec![2i32, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1, 4];
    let rows = tokens.len() as u64;
    let mut file = File::new()
        .entry("general.architecture", "llama")
        .entry("general.name", "tiny")
        .entry("llama.context_length", 64u32)
        .entry("llama.embedding_length", 8u32)
        .entry("llama.block_count", 1u32)
        .entry("llama.feed_forward_length", 16u32)
        .entry("llama.attention.head_count", 2u32)
        .entry("llama.attention.head_count_kv", 1u32)
        .entry("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .entry("llama.rope.dimension_count", 4u32)
        .entry("tokenizer.ggml.model", "llama")
        .entry("tokenizer.ggml.tokens", &tokens)
        .entry("tokenizer.ggml.scores", &scores)
        .entry("tokenizer.ggml.token_type", &kinds)
        .entry("tokenizer.ggml.bos_token_id", 1u32)
        .entry("tokenizer.ggml.eos_token_id", 2u32)
        .tensor("token_embd.weight", &[8, rows])
        .tensor("output_norm.weight", &[8]);
    for (name, dims) in [
        ("attn_norm", &[8][..]),
        ("attn_q", &[8, 8]),
        ("attn_k", &[8, 4]),
        ("attn_v", &[8, 4]),
        ("attn_output", &[8, 8]),
        ("ffn_norm", &[8]),
        ("ffn_gate", &[8, 16]),
        ("ffn_up", &[8, 16]),
        ("ffn_down", &[16, 8]),
    ] {
        file = file.tensor(format!("blk.0.{name}.weight"), dims);
    }
    file
}

/// A mixture-of-experts llama: four experts, two used.
pub fn mixture() -> File {
    let mut file = llama().entry("llama.expert_count", 4u32).entry("llama.expert_used_count", 2u32);
    for name in ["ffn_gate", "ffn_up", "ffn_down"] {
        file = file.without(&format!("blk.0.{name}.weight"));
    }
    file.tensor("blk.0.ffn_gate_inp.weight", &[8, 4])
        .tensor("blk.0.ffn_gate_exps.weight", &[8, 16, 4])
        .tensor("blk.0.ffn_up_exps.weight", &[8, 16, 4])
        .tensor("blk.0.ffn_down_exps.weight", &[16, 8, 4])
}

/// [`llama`]'s metadata under the keys of another family.
pub fn family(architecture: &str, file: File) -> File {
    let mut file = file.set("general.architecture", architecture);
    for (key, _) in &mut file.entries {
        if let Some(rest) = key.strip_prefix(b"llama.") {
            *key = [architecture.as_bytes(), b".", rest].concat();
        }
    }
    file
}

/// The smallest sensible Gemma 3: one windowed layer.
pub fn gemma3() -> File {
    let mut file = family("gemma3", llama())
        .entry("gemma3.attention.sliding_window", 16u32)
        .entry("gemma3.attention.key_length", 4u32);
    for (name, dims) in
        [("post_attention_norm", 8), ("post_ffw_norm", 8), ("attn_q_norm", 4), ("attn_k_norm", 4)]
    {
        file = file.tensor(format!("blk.0.{name}.weight"), &[dims]);
    }
    file
}

/// The smallest sensible Phi-3: fused weights, and factors for long and short contexts.
pub fn phi3() -> File {
    let mut file = family("phi3", llama()).entry("phi3.rope.scaling.original_context_length", 4u32);
    for name in ["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"] {
        file = file.without(&format!("blk.0.{name}.weight"));
    }
    let ones = || 1f32.to_le_bytes().repeat(2);
    file.tensor("blk.0.attn_qkv.weight", &[8, 16])
        .tensor("blk.0.ffn_up.weight", &[8, 32])
        .tensor_of("rope_factors_long.weight", &[2], 0, ones())
        .tensor_of("rope_factors_short.weight", &[2], 0, ones())
}

/// The smallest sensible GPT-2: learned positions, biases, no gates.
pub fn gpt2() -> File {
    let mut file = family("gpt2", llama())
        .without("gpt2.attention.layer_norm_rms_epsilon")
        .entry("gpt2.attention.layer_norm_epsilon", 1e-5f32)
        .without("blk.0.ffn_gate.weight")
        .tensor("position_embd.weight", &[8, 64]);
    for (name, len) in [("attn_q", 8), ("attn_k", 4), ("attn_v", 4), ("attn_norm", 8), ("ffn_up", 16)] {
        file = file.tensor(format!("blk.0.{name}.bias"), &[len]);
    }
    file
}

/// The smallest sensible gpt-oss: a windowed layer with sinks, and a mixture with biases.
pub fn gpt_oss() -> File {
    family("gpt-oss", mixture())
        .without("blk.0.ffn_norm.weight")
        .entry("gpt-oss.attention.sliding_window", 4u32)
        .entry("gpt-oss.rope.scaling.type", "yarn")
        .entry("gpt-oss.rope.scaling.factor", 32f32)
        .tensor("blk.0.post_attention_norm.weight", &[8])
        .tensor("blk.0.attn_sinks.weight", &[2])
        .tensor("blk.0.ffn_gate_exps.bias", &[16, 4])
        .tensor("blk.0.ffn_up_exps.bias", &[16, 4])
        .tensor("blk.0.ffn_down_exps.bias", &[8, 4])
}

/// The smallest sensible Granite: llama with a factor on the logits.
pub fn granite() -> File {
    family("granite", llama()).entry("granite.logit_scale", 8f32)
}

/// The smallest sensible Command R: llama with layer norms, and one norm for both blocks.
pub fn command_r() -> File {
    family("command-r", llama())
        .entry("command-r.attention.layer_norm_epsilon", 1e-5f32)
        .without("blk.0.ffn_norm.weight")
}

/// A byte-level vocabulary without a model around it.
pub fn bpe() -> File {
    let tokens = vec!["a", "b", "\u{120}", "1", "ab", "\u{120}ab", "<|end|>", "\u{120}a"];
    let kinds = vec![1u8, 1, 1, 1, 1, 1, 3, 1];
    let merges = vec!["a b", "\u{120} ab", "\u{120} a"];
    File::new()
        .entry("general.architecture", "llama")
        .entry("tokenizer.ggml.model", "gpt2")
        .entry("tokenizer.ggml.pre", "llama-bpe")
        .entry("tokenizer.ggml.tokens", &tokens)
        .entry("tokenizer.ggml.token_type", &kinds)
        .entry("tokenizer.ggml.merges", &merges)
        .entry("tokenizer.ggml.eos_token_id", 6u32)
}

/// A WordPiece vocabulary without a model around it.
pub fn wordpiece() -> File {
    let tokens = vec!["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u{2581}a", "b", "\u{2581},", "\u{2581}ab"];
    File::new()
        .entry("general.architecture", "bert")
        .entry("tokenizer.ggml.model", "bert")
        .entry("tokenizer.ggml.tokens", &tokens)
        .entry("tokenizer.ggml.token_type", &vec![3i32, 2, 3, 3, 1, 1, 1, 1])
        .entry("tokenizer.ggml.unknown_token_id", 1u32)
        .entry("tokenizer.ggml.cls_token_id", 2u32)
        .entry("tokenizer.ggml.seperator_token_id", 3u32)
}

/// A unigram vocabulary without a model around it; its charsmap makes `a` of `A`.
pub fn unigram() -> File {
    let tokens = vec!["<pad>", "</s>", "<unk>", "\u{2581}", "a", "b", "ab", "\u{2581}a", "<tag>"];
    // Units of a double array: the root, whose children are at 64 ^ byte; `A` at 1; its value at 1 ^ 2.
    let units = [64u32 << 10, 2 << 10 | 1 << 8 | 65, 0, 1 << 31];
    let charsmap: Vec<u8> =
        [16u32].iter().chain(&units).flat_map(|unit| unit.to_le_bytes()).chain(*b"a\0").collect();
    File::new()
        .entry("general.architecture", "t5")
        .entry("tokenizer.ggml.model", "t5")
        .entry("tokenizer.ggml.tokens", &tokens)
        .entry("tokenizer.ggml.scores", &vec![0f32, 0.0, 0.0, -2.0, -3.0, -3.0, -3.5, -4.0, 0.0])
        .entry("tokenizer.ggml.token_type", &vec![3i32, 3, 2, 1, 1, 1, 1, 1, 4])
        .entry("tokenizer.ggml.precompiled_charsmap", &charsmap)
}

/// One entry of every type, alone and as an array.
pub fn every_type() -> File {
    File::new()
        .entry("u8", 200u8)
        .entry("i8", -3i8)
        .entry("u16", 60_000u16)
        .entry("i16", -300i16)
        .entry("u32", 4_000_000_000u32)
        .entry("i32", -70_000i32)
        .entry("f32", 1.5f32)
        .entry("bool", true)
        .entry("string", "text")
        .entry("u64", u64::MAX)
        .entry("i64", i64::MIN)
        .entry("f64", 2.5f64)
        .entry("u8s", &vec![1u8, 255])
        .entry("i8s", &vec![-1i8, 1])
        .entry("u16s", &vec![1u16, 2, 3])
        .entry("i16s", &vec![-1i16])
        .entry("u32s", &vec![7u32, 8])
        .entry("i32s", &vec![-7i32, 8])
        .entry("f32s", &vec![0.5f32, -0.5])
        .entry("bools", &vec![true, false])
        .entry("strings", &vec!["", "two"])
        .entry("u64s", &vec![u64::MAX])
        .entry("i64s", &vec![i64::MIN])
        .entry("f64s", &vec![0.25f64])
        .entry("empty", &Vec::<u32>::new())
}

/// A Gemma 3 of two layers, the first of which looks back 16 positions, with weights that differ.
pub fn windowed() -> File {
    let mut file = gemma3()
        .set("gemma3.block_count", 2u32)
        .set("gemma3.context_length", 4096u32)
        .entry("gemma3.attention.sliding_window_pattern", 2u32);
    for tensor in file.tensors.clone() {
        if let Some(rest) = tensor.name.strip_prefix(b"blk.0.") {
            file.tensors.push(Tensor { name: [b"blk.1.", rest].concat(), ..tensor });
        }
    }
    let mut random = super::SplitMix(7);
    for value in file.tensors.iter_mut().flat_map(|t| t.data.as_chunks_mut::<4>().0) {
        *value = (random.below(200) as f32 / 100.0 - 1.0).to_le_bytes();
    }
    file
}
