//! The measuring loops do the work that they say.
#![cfg(feature = "std")]

use halite_kernels::isa::Cpu;
use halite_kernels::pool::Pool;
use halite_kernels::roofline::{Dot, Fma, READ_BYTES, Read, dots_per_s, flops_per_s, read_bytes_per_s};

#[test]
fn loops_count_their_work() {
    let buffer = vec![[1u8; READ_BYTES]; 11];
    for cpu in Cpu::NAMES.iter().filter_map(|name| Cpu::from_name(name)) {
        assert_eq!(cpu.run(Read { runs: &buffer, passes: 3 }), 3 * 8 * READ_BYTES as u64);
        let (fma, dot) = (cpu.run(Fma { passes: 7 }), cpu.run(Dot { passes: 7 }));
        // In each of sixteen lanes, 2 operations of a multiply-add and 8 of four products.
        assert!(fma > 0 && fma % (7 * 16 * 2) == 0 && dot == 4 * fma, "{}: {fma} {dot}", cpu.name());
    }
}

#[test]
fn rates_are_of_this_world() {
    let (cpu, pool) = (Cpu::detect(), Pool::new(2).unwrap());
    let buffer = vec![1u8; 1 << 16];
    let rates = [read_bytes_per_s(cpu, &pool, &buffer), flops_per_s(cpu, &pool), dots_per_s(cpu, &pool)];
    assert!(rates.iter().all(|rate| (1e5..1e15).contains(rate)), "{rates:?}");
    assert_eq!(read_bytes_per_s(cpu, &pool, &[]), 0.0);
}
