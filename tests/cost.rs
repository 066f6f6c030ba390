//! Counts of bytes and operations, against sums made by hand.

use halite::Model;
use halite::backend::Fusions;
use halite::cost::{Cost, Extent, Rates, op, step};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::passes::fuse;
use halite::program::{Op, Program};
use halite::synth::{Formats, Synth, shape};
use halite_testing::gguf::{File, gemma3, llama, mixture};

fn program_of(bytes: &[u8]) -> Program {
    let model = Model::from_source(Source::from_bytes("cost", bytes)).unwrap();
    model.program(ProgramOptions::default(), 256).unwrap()
}

fn program(file: File) -> Program {
    program_of(&file.bytes())
}

const DECODE: Extent = Extent { start: 5, tokens: 1, outputs: 1 };

#[test]
fn a_dense_step_reads_every_weight_once() {
    let p = program(llama());
    // Embedding 12 × 8, one layer of q 8 × 8, k and v 4 × 8, output 8 × 8, three of 16 × 8; three norms of 8. The table is
    // also the output matrix, so the head reads it whole, and the embedding one row more.
    let matrices = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 16 * 8;
    let cost = step(&p, &[DECODE]);
    assert_eq!(cost.weight_bytes, 4 * (matrices + 12 * 8 + 3 * 8 + 8));
    // Six positions are seen by two heads, each with keys and values of 4.
    assert_eq!(cost.float_ops, 2 * (matrices + 12 * 8) + 6 * 2 * (4 + 4) * 2);
    assert_eq!(cost.integer_ops, 0);
    // One KV head in F16: six positions read, one written.
    assert_eq!(cost.kv_bytes, (6 + 1) * (4 + 4) * 2);
    assert!(cost.activation_bytes > 0);

    let three = step(&p, &[Extent { start: 5, tokens: 3, outputs: 1 }]);
    assert_eq!(three.weight_bytes, cost.weight_bytes + 4 * 2 * 8, "two more rows of the table");
    assert_eq!(three.float_ops, 2 * (3 * matrices + 12 * 8) + (6 + 7 + 8) * 2 * (4 + 4) * 2);
    assert_eq!(three.kv_bytes, (8 + 3) * (4 + 4) * 2);

    let silent = step(&p, &[Extent { start: 5, tokens: 3, outputs: 0 }]);
    assert_eq!(three.weight_bytes - silent.weight_bytes, 4 * (12 * 8 + 8), "no head, no norm before it");
    assert_eq!(three.float_ops - silent.float_ops, 2 * 12 * 8);
    assert_eq!(step(&p, &[Extent { start: 0, tokens: 0, outputs: 0 }]), Cost::default());
}

#[test]
fn sequences_share_weights_but_not_the_cache() {
    let p = program(llama());
    let ends = [Extent { start: 5, tokens: 2, outputs: 1 }, Extent { start: 9, tokens: 1, outputs: 1 }];
    let [together, first, second] = [&ends[..], &ends[..1], &ends[1..]].map(|sequences| step(&p, sequences));
    assert_eq!(together.float_ops, first.float_ops + second.float_ops);
    assert_eq!(together.kv_bytes, first.kv_bytes + second.kv_bytes);
    assert_eq!(together.weight_bytes, first.weight_bytes + 4 * 8, "one more row of the table");
    assert_eq!(step(&p, &[]), Cost::default());
}

#[test]
fn only_experts_in_use_count() {
    let p = program(mixture());
    let experts = |tokens| {
        let (_, experts) = p.ops().find(|(_, op)| matches!(op, Op::Experts { .. })).unwrap();
        op(&p, experts, &[Extent { start: 0, tokens, outputs: 1 }])
    };
    let one = 3 * 16 * 8;
    assert_eq!(experts(1).weight_bytes, 2 * 4 * one);
    assert_eq!(experts(2).weight_bytes, 4 * 4 * one);
    assert_eq!(experts(7).weight_bytes, 4 * 4 * one, "there are four");
    assert_eq!(experts(7).float_ops, 7 * 2 * 2 * one);
}

#[test]
fn windows_limit_what_attention_sees() {
    let p = program(gemma3());
    let (_, attend) = p.ops().find(|(_, op)| matches!(op, Op::Attend { .. })).unwrap();
    for (start, tokens) in [(0, 1), (0, 16), (0, 17), (3, 40), (15, 1), (16, 1), (100, 5)] {
        let cost = op(&p, attend, &[Extent { start, tokens, outputs: 1 }]);
        // Position by position, by the definition of a window of 16.
        let first = |position: u32| (position + 1).saturating_sub(16);
        let seen: u32 = (start..start + tokens).map(|position| position + 1 - first(position)).sum();
        assert_eq!(cost.float_ops, u64::from(seen) * 2 * (4 + 4) * 2, "{tokens} tokens from {start}");
        let read = u64::from(start + tokens - first(start));
        assert_eq!(cost.kv_bytes, read * (4 + 4) * 2, "{tokens} tokens from {start}");
    }
}

#[test]
fn quantised_products_are_integer_operations() {
    let mut bytes = Vec::new();
    let formats = Formats::of(Format::Q4_0).output(Format::Q6_K);
    let synth = Synth::new(shape("tiny").unwrap(), formats, 0).unwrap();
    let elements = |name: &str| -> u64 {
        let named = synth.tensors().iter().filter(|t| t.name.contains(name) && t.dims.len() == 2);
        named.map(|t| t.dims.iter().product::<u64>()).sum()
    };
    let (products, table) = (elements("") - elements("token_embd"), elements("token_embd"));
    let all: u64 = synth.tensors().iter().map(|t| t.bytes).sum();
    synth.write(&mut bytes).unwrap();
    let p = program_of(&bytes);
    let cost = step(&p, &[DECODE]);
    assert_eq!(cost.integer_ops, 2 * products);
    assert_eq!(cost.weight_bytes, all - table / 32 * 18 + 256 / 32 * 18);
    // Two layers of four heads of 64.
    assert_eq!(cost.float_ops, 2 * 6 * 4 * (64 + 64) * 2);
    // Fusing changes what moves between ops, and nothing else.
    let fused = step(&fuse(&p, Fusions::ALL), &[DECODE]);
    assert!(fused.activation_bytes < cost.activation_bytes);
    assert_eq!(Cost { activation_bytes: 0, ..fused }, Cost { activation_bytes: 0, ..cost });
}

#[test]
fn the_slower_of_memory_and_arithmetic_decides() {
    let cost = Cost {
        weight_bytes: 600,
        kv_bytes: 400,
        activation_bytes: 1 << 40,
        integer_ops: 3000,
        float_ops: 50,
    };
    let rates = Rates { bytes_per_s: 1000.0, integer_ops_per_s: 6000.0, float_ops_per_s: 200.0 };
    assert_eq!(cost.least_seconds(&rates), 1.0);
    assert_eq!(cost.least_seconds(&Rates { bytes_per_s: 2000.0, ..rates }), 0.75);
}
