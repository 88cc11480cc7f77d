// h = silu(gate) * up, as int8 digits: see shared/gated.wgsl; the splits of y are still to be added.
// Lane = four columns of hidden_dim. Dispatch: (ceil(n_blocks * 8 / lanes), tokens).

//#import state
//#import digits
//#import quantized
//#import quantize
//#import silu
//#import gated

override splits: u32;  // of y

struct Params {
  hidden_dim: u32,
  n_blocks: u32,
  tokens: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> y: array<f32>;  // (splits, tokens, 2 hidden_dim)
@group(0) @binding(2) var<storage, read_write> x_digits: array<u32>;
@group(0) @binding(3) var<storage, read_write> x_scale: array<vec2<f32>>;

fn y_sum4(token: u32, columns: vec4<u32>) -> vec4<f32> {
  var sum = vec4<f32>(0.0);
  for (var split = 0u; split < splits; split++) {
    let i = vec4<u32>((split * params.tokens + token) * 2u * params.hidden_dim) + columns;
    sum += vec4<f32>(y[i.x], y[i.y], y[i.z], y[i.w]);
  }
  return sum;
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let quad = group.x * lanes + lane;
  quantize4(gated4(group.y, quad, params.hidden_dim), lane, group.y, quad, params.n_blocks);
}
