// A workgroup of attention sees all pages of the cache that its rows see, and has their results.

fn pages_of(split: u32, first: u32, end: u32) -> vec2<u32> { return vec2(first, end); }

fn keep(split: u32, token: u32, head: u32, d: u32, o: f32, sum: f32, top: f32) { finish(token, head, d, o, sum, top); }
