// h = silu(gate) * up (Shazeer 2020, eq. 5); gate and up are the halves of y. Beside it stand silu.wgsl and
// quantize.wgsl; the importer provides  fn y_sum4(token, columns) -> vec4<f32>.

fn gated4(token: u32, quad: u32, hidden_dim: u32) -> vec4<f32> {  // four columns
  let columns = columns_of(quad, hidden_dim);
  let v = silu(y_sum4(token, columns)) * y_sum4(token, vec4<u32>(hidden_dim) + columns);
  return select(vec4<f32>(0.0), v, vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(hidden_dim));
}
