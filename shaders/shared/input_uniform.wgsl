// input.wgsl by uniform memory, which a CPU loads in straight code.

const INPUT_OF_SPLIT = false;

@group(0) @binding(6) var<uniform> in_digits: array<vec4<u32>, 4096>;
@group(0) @binding(7) var<uniform> in_scale: array<vec4<f32>, 1024>;  // of two blocks each

fn input_blocks() -> u32 { return params.n_blocks; }
fn input_block(block: u32) -> u32 { return block; }

fn block_scale(i: u32) -> vec2<f32> {
  let at = 2u * (i & 1u);
  return vec2<f32>(in_scale[i >> 1u][at], in_scale[i >> 1u][at + 1u]);
}
