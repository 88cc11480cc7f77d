// h = silu(gate) * up (Shazeer 2020, eq. 5), as int8 digits; gate and up are the halves of y, its splits still to be added.
// Lane = four columns of hidden_dim. Dispatch: (ceil(n_blocks * 8 / lanes), tokens).

//#import state
//#import quantize

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

fn row_sum(token: u32, row: u32) -> f32 {
  var sum = 0.0;
  for (var split = 0u; split < splits; split++) {
    sum += y[(split * params.tokens + token) * 2u * params.hidden_dim + row];
  }
  return sum;
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let quad = group.x * lanes + lane;
  var v = vec4<f32>(0.0);
  for (var k = 0u; k < 4u; k++) {
    let i = 4u * quad + k;
    if (i < params.hidden_dim) {
      let gate = row_sum(group.y, i);
      v[k] = gate / (1.0 + exp(-gate)) * row_sum(group.y, params.hidden_dim + i);
    }
  }
  quantize4(v, lane, group.y, quad, params.n_blocks);
}
