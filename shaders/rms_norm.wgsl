// x += sum over splits of y, then the norm of x as int8 digits: see shared/norm.wgsl. One workgroup a token. Dispatch:
// (1, tokens). With `last` the only token is the pass's last one and its digits go to the place of token 0: for the head.

//#import state
//#import digits
//#import quantize
//#import norm

override splits: u32;  // of y; 0: nothing to add

struct Params {
  dim: u32,
  tokens: u32,
  last: u32,
  eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> y: array<f32>;  // (splits, tokens, dim)
@group(0) @binding(3) var<storage, read> weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> x: array<f32>;  // (tokens, dim)
@group(0) @binding(5) var<storage, read_write> x_digits: array<u32>;
@group(0) @binding(6) var<storage, read_write> x_scale: array<vec2<f32>>;

fn y_sum4(token: u32, columns: vec4<u32>) -> vec4<f32> {
  var sum = vec4<f32>(0.0);
  for (var split = 0u; split < splits; split++) {
    let i = vec4<u32>((split * params.tokens + token) * params.dim) + columns;
    sum += vec4<f32>(y[i.x], y[i.y], y[i.z], y[i.w]);
  }
  return sum;
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  norm(lane, select(group.y, state.n_tokens - 1u, params.last != 0u), group.y);
}
