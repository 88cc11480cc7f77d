// h = silu(gate) * up (Shazeer 2020, eq. 5); gate and up are the halves of y. The importer provides
// fn y_sum(token, i) -> f32.

fn gated4(token: u32, quad: u32, hidden_dim: u32) -> vec4<f32> {  // four columns
  var v = vec4<f32>(0.0);
  for (var k = 0u; k < 4u; k++) {
    let i = 4u * quad + k;
    if (i < hidden_dim) {
      let gate = y_sum(token, i);
      v[k] = gate / (1.0 + exp(-gate)) * y_sum(token, hidden_dim + i);
    }
  }
  return v;
}
