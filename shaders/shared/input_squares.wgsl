// input.wgsl of one token that a norm has left without its factor: with the squares of which that is made. Beside it stands
// shares.wgsl.

const INPUT_OF_SPLIT = false;

@group(0) @binding(6) var<storage, read> in_digits: array<vec4<u32>>;  // (digits, 16-column groups)
@group(0) @binding(7) var<storage, read> in_scale: array<vec2<f32>>;   // (blocks,): scale and sum of the block's x
@group(0) @binding(9) var<storage, read> squares: array<vec4<f32>>;    // (blocks / 4,): sums of x^2, then zeros

fn input_blocks() -> u32 { return params.n_blocks; }
fn input_block(block: u32) -> u32 { return block; }
fn block_scale(i: u32) -> vec2<f32> { return in_scale[i]; }

// The lane's share of squares, loaded before anything that has to be waited for.
fn begin_input(split: u32, lane: u32) -> vec4<f32> {
  var sums = vec4<f32>(0.0);
  if (lane < 32u) {
    for (var i = lane; i < (params.n_blocks + 3u) / 4u; i += 32u) { sums += squares[i]; }
  }
  return sums;
}

fn end_input(v: vec4<f32>, lane: u32) {
  if (lane < 32u) { leave_share(lane, dot(v, vec4<f32>(1.0))); }
}

// A barrier after end_input.
fn input_factor() -> f32 { return shared_factor(); }
