// Codes of activations to `codes`, as codes_stored.wgsl reads them.

fn keep_codes(half: u32, four: vec4<u32>) { codes[3u * (half / 2u) + half % 2u] = four; }
fn keep_about(part: u32, scale: u32, sums: u32) { codes[3u * part + 2u] = vec4(scale, sums, 0u, 0u); }
