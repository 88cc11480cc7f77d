// x += sum over splits of y;  xn = weight * x / sqrt(mean(x^2) + eps), as int8 digits (Zhang & Sennrich 2019, eq. 4).
// One workgroup a token. Dispatch: (1, tokens). f32; dim of any size, digits padded with zeros to a multiple of 32.
// With `last` the only token is the pass's last one and its digits go to the place of token 0: for the head.

//#import state
//#import quantize

override splits: u32;  // of y; 0: nothing to add

struct Params {
  dim: u32,
  n_blocks: u32,
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

var<workgroup> squares: array<f32, lanes>;

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let token = select(group.y, state.n_tokens - 1u, params.last != 0u);
  let first = token * params.dim;
  var sum = 0.0;
  for (var i = lane; i < params.dim; i += lanes) {
    var value = x[first + i];
    for (var split = 0u; split < splits; split++) {
      value += y[(split * params.tokens + token) * params.dim + i];
    }
    x[first + i] = value;
    sum += value * value;
  }
  squares[lane] = sum;
  storageBarrier();  // the quads below cross lanes
  workgroupBarrier();
  for (var stride = lanes / 2u; stride > 0u; stride >>= 1u) {
    if (lane < stride) { squares[lane] += squares[lane + stride]; }
    workgroupBarrier();
  }
  let inverse = inverseSqrt(squares[0] / f32(params.dim) + params.eps);
  for (var start = 0u; start < params.n_blocks * 8u; start += lanes) {
    let quad = start + lane;
    var v = vec4<f32>(0.0);
    for (var k = 0u; k < 4u; k++) {
      let i = 4u * quad + k;
      if (i < params.dim) { v[k] = x[first + i] * inverse * weight[i]; }
    }
    quantize4(v, lane, group.y, quad, params.n_blocks);
  }
}
