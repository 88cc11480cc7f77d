// What lanes that share a row do about input in memory (input.wgsl): the squares tell of a norm's factor that it lacks.
// Beside it stand squares.wgsl and product.wgsl.

fn begin_input(split: u32, lane: u32) -> vec4<f32> { return vec4<f32>(share_of_squares(lane, 32u)); }
fn end_input(v: vec4<f32>, lane: u32) { if (lane < 32u) { shares[lane / 4u][lane % 4u] = v.x; } }
