// A workgroup of attention sees one of `step_splits` runs of the pages that its rows see, and leaves the rest to merge.wgsl.

fn pages_of(split: u32, first: u32, end: u32) -> vec2<u32> {
    let each = (end - first + step_splits() - 1u) / step_splits();
    let start = min(first + split * each, end);
    return vec2(start, min(start + each, end));
}

fn keep(split: u32, token: u32, head: u32, d: u32, o: f32, sum: f32, top: f32) {
    let at = split_place(split, token, head);
    splits[at + d] = o;
    if d == 0u {
        splits[at + VALUE_DIM] = top;
        splits[at + VALUE_DIM + 1u] = sum;
    }
}
