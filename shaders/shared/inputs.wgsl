// The activations that a matvec reads (dot.wgsl). On software adapters inputs_uniform.wgsl takes the place of this file where
// there are few enough.

@group(0) @binding(6) var<storage, read> in_digits: array<vec4<u32>>;  // (tokens, digits, groups of 16 columns)
@group(0) @binding(7) var<storage, read> in_scale: array<vec2<f32>>;   // (tokens, blocks): scale and sum of the block's x

fn block_scale(i: u32) -> vec2<f32> { return in_scale[i]; }
