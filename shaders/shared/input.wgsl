// What a matvec multiplies, in memory: all columns. In its place input_made.wgsl makes them, input_squares.wgsl takes them from a norm
// that has left its factor; and on software adapters input_uniform.wgsl takes them, where there are few enough.

const INPUT_OF_SPLIT = false;

@group(0) @binding(6) var<storage, read> in_digits: array<vec4<u32>>;  // (tokens, digits, 16-column groups)
@group(0) @binding(7) var<storage, read> in_scale: array<vec2<f32>>;   // (tokens, blocks): scale and sum of the block's x

fn input_blocks() -> u32 { return params.n_blocks; }
fn input_block(block: u32) -> u32 { return block; }
fn block_scale(i: u32) -> vec2<f32> { return in_scale[i]; }

// Nothing to make: see input_made.wgsl.
fn begin_input(split: u32, lane: u32) -> vec4<f32> { return vec4<f32>(0.0); }
fn end_input(v: vec4<f32>, lane: u32) {}

fn input_factor() -> f32 { return 1.0; }
