// What a matvec multiplies, in memory: in_digits and in_scale have all columns. In its place input_gated.wgsl makes them.

const INPUT_OF_SPLIT = false;

fn input_blocks() -> u32 { return params.n_blocks; }
fn input_block(block: u32) -> u32 { return block; }
fn begin_input(split: u32, lane: u32) -> vec4<f32> { return vec4<f32>(0.0); }
fn end_input(v: vec4<f32>, lane: u32) {}
