// Codes that another shader has made: `codes` holds, for each row of activations and each 32 of its K values, eight words of
// codes, then their scale, then their sums.

fn prepare(local: u32, row: u32) {}

fn load_input(row: u32, part: u32) -> Codes {
    let at = 3u * (row * (K / 32u) + part);
    let about = codes[at + 2u].xy;
    return Codes(codes[at], codes[at + 1u], bitcast<f32>(about.x), unpack_sums(about.y));
}
