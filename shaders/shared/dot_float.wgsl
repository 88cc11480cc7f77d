// Dot products of f32 weights with f32 activations.
// The importer provides  x: array<vec4<f32>>  (tokens, 32-column blocks) and  params.n_blocks.

// What 16 columns of a row add to its product with a token.
fn group_dot(w: Floats, token: u32, group: u32) -> f32 {
  let at = token * 8u * params.n_blocks + 4u * group;
  return dot(w.a, x[at]) + dot(w.b, x[at + 1u]) + dot(w.c, x[at + 2u]) + dot(w.d, x[at + 3u]);
}

// What an outlier adds: `w` is the weight that the stream has, and the true one.
fn outlier_dot(w: vec2<f32>, token: u32, column: u32) -> f32 {
  let value = x[token * 8u * params.n_blocks + (column >> 2u)][column & 3u];
  return w.y * value - w.x * value;
}
