// x += sum over splits of y;  xn = weight * x / sqrt(mean(x^2) + eps), as int8 digits (Zhang & Sennrich 2019, eq. 4). f32;
// dim of any size, digits padded with zeros to a multiple of 32. One workgroup a token. Dispatch: (1, tokens). With `last`
// the only token is the pass's last one and its digits go to the place of token 0: for the head.

//#import state
//#import digits
//#import quantized
//#import quantize

override splits: u32;  // of y; 0: nothing to add
override dim: u32;     // llvmpipe compiles anew for every submit where a uniform says that a loop has 2 to 5 rounds

struct Params {
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

var<workgroup> lane_squares: array<f32, lanes>;
var<workgroup> squares: array<vec4<f32>, 8>;

fn y_sum4(token: u32, columns: vec4<u32>) -> vec4<f32> {
  var sum = vec4<f32>(0.0);
  for (var split = 0u; split < splits; split++) {
    let i = vec4<u32>((split * params.tokens + token) * dim) + columns;
    sum += vec4<f32>(y[i.x], y[i.y], y[i.z], y[i.w]);
  }
  return sum;
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let token = select(group.y, state.n_tokens - 1u, params.last != 0u);
  let first = token * dim;
  let n_blocks = (dim + 31u) / 32u;
  let once = n_blocks * 8u <= lanes;  // a lane has one quad at most: it keeps it, and loads all it needs at once
  var kept = vec4<f32>(0.0);
  var sum = 0.0;
  for (var quad = lane; quad < n_blocks * 8u; quad += lanes) {
    let columns = columns_of(quad, dim);
    let at = vec4<u32>(first) + columns;
    let v = vec4<f32>(x[at.x], x[at.y], x[at.z], x[at.w]) + y_sum4(token, columns);
    var w = vec4<f32>(0.0);
    if (once) { w = vec4<f32>(weight[columns.x], weight[columns.y], weight[columns.z], weight[columns.w]); }
    for (var k = 0u; k < 4u; k++) {
      if (4u * quad + k < dim) {
        x[at[k]] = v[k];
        sum += v[k] * v[k];
        kept[k] = v[k] * w[k];
      }
    }
  }
  lane_squares[lane] = sum;
  workgroupBarrier();
  if (lane < 32u) {
    for (var i = lane + 32u; i < lanes; i += 32u) { sum += lane_squares[i]; }
    squares[lane / 4u][lane % 4u] = sum;
  }
  workgroupBarrier();
  var sums = vec4<f32>(0.0);
  for (var i = 0u; i < min(8u, lanes / 4u); i++) { sums += squares[i]; }
  let inverse = inverseSqrt(dot(sums, vec4<f32>(1.0)) / f32(dim) + params.eps);
  for (var start = 0u; start < n_blocks * 8u; start += lanes) {
    let quad = start + lane;
    var v = kept * inverse;
    for (var k = 0u; k < 4u; k++) {
      let i = 4u * quad + k;
      if (!once && i < dim) { v[k] = x[first + i] * inverse * weight[i]; }
    }
    quantize4(v, lane, group.y, quad, n_blocks);
  }
}
