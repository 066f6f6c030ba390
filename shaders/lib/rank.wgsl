// The order of numbers as that of integers: IEEE 754's total order, with NaN above all; 0 is below every number.

fn rank(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u { return 0xffffffffu; }
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn bits_of(rank: u32) -> u32 {
    if rank == 0xffffffffu { return 0x7fc00000u; }
    return select(~rank, rank & 0x7fffffffu, rank >= 0x80000000u);
}
