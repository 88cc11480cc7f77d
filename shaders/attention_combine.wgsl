// attn[t, head, d] = sum over splits of e^(max_s - max) partial_s / sum over splits of e^(max_s - max) sum_s, as int8 digits.
// Lane = four columns of the n_heads * head_dim. Dispatch: (ceil(n_blocks * 8 / lanes), tokens).

//#import state
//#import digits
//#import quantized
//#import quantize

override n_splits: u32;
override half_quads: u32;  // of a head's pairs, as in shared/cache.wgsl

struct Params {
  n_heads: u32,
  head_dim: u32,
  n_blocks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> partial: array<f32>;  // (tokens, n_heads, n_splits, 8 half_quads + 2)
@group(0) @binding(2) var<storage, read_write> x_digits: array<u32>;
@group(0) @binding(3) var<storage, read_write> x_scale: array<vec2<f32>>;

fn attention_at(token: u32, column: u32) -> f32 {
  let head = column / params.head_dim;
  let d = column % params.head_dim;
  let half = params.head_dim / 2u;
  let element = select(d, 4u * half_quads + d - half, d >= half);
  let stride = 8u * half_quads + 2u;
  let first = (token * params.n_heads + head) * n_splits * stride;
  var largest = partial[first + stride - 2u];
  for (var split = 1u; split < n_splits; split++) {
    largest = max(largest, partial[first + split * stride + stride - 2u]);
  }
  var value = 0.0;
  var total = 0.0;
  for (var split = 0u; split < n_splits; split++) {
    let at = first + split * stride;
    let weight = exp(partial[at + stride - 2u] - largest);
    value += weight * partial[at + element];
    total += weight * partial[at + stride - 1u];
  }
  return value / total;
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let quad = group.x * lanes + lane;
  var v = vec4<f32>(0.0);
  for (var k = 0u; k < 4u; k++) {
    if (4u * quad + k < params.n_heads * params.head_dim) { v[k] = attention_at(group.y, 4u * quad + k); }
  }
  quantize4(v, lane, group.y, quad, params.n_blocks);
}
