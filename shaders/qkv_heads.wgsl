// What some families add between the product with qkv_proj and RoPE: the sum over splits of y, plus a bias, and each
// head of q and k through an RMSNorm of its own, v not: out = weight * x / sqrt(mean(x^2) + eps), x = y + bias.
// One workgroup = one head of q | k | v of one token. Dispatch: (n_heads + 2 n_kv_heads, tokens). f32.

override biased: bool;
override normed: bool;
override splits: u32;  // of y
override lanes: u32;   // a power of two

struct Params {
  n_heads: u32,
  n_kv_heads: u32,
  head_dim: u32,
  tokens: u32,
  eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> y: array<f32>;        // (splits, tokens, rows of q | k | v)
@group(0) @binding(2) var<storage, read> weights: array<f32>;  // bias (rows), then q_norm and k_norm, what there is
@group(0) @binding(3) var<storage, read_write> out: array<f32>;  // (tokens, rows of q | k | v)

var<workgroup> squares: array<f32, lanes>;

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let head = group.x;
  let rows = (params.n_heads + 2u * params.n_kv_heads) * params.head_dim;
  let first = head * params.head_dim;
  let token = group.y * rows;
  var sum = 0.0;
  for (var i = lane; i < params.head_dim; i += lanes) {
    var value = 0.0;
    for (var split = 0u; split < splits; split++) { value += y[split * params.tokens * rows + token + first + i]; }
    if (biased) { value += weights[first + i]; }
    out[token + first + i] = value;
    sum += value * value;
  }
  if (normed) {
    squares[lane] = sum;
    workgroupBarrier();
    for (var stride = lanes / 2u; stride > 0u; stride >>= 1u) {
      if (lane < stride) { squares[lane] += squares[lane + stride]; }
      workgroupBarrier();
    }
    if (head < params.n_heads + params.n_kv_heads) {
      let inverse = inverseSqrt(squares[0] / f32(params.head_dim) + params.eps);
      let norms = select(0u, rows, biased) + select(0u, params.head_dim, head >= params.n_heads);
      for (var i = lane; i < params.head_dim; i += lanes) { out[token + first + i] *= inverse * weights[norms + i]; }
    }
  }
}
