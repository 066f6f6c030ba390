// One slice is the whole sum.
fn add_slices(lane: u32, slice: u32, acc: vec4<f32>) -> vec4<f32> { return acc; }
