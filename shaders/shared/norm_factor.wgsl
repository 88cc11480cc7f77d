// The factor of a norm, 1 / sqrt(mean(x^2) + eps), that the digits which a matvec reads were left without (then.wgsl).
// The importer provides  squares: array<vec4<f32>>, of each block of 32 columns the sum, then zeros,
// params.norm_dim: u32  (0: nothing is missing)  and  params.norm_eps: f32.

// A lane's share of all squares: each of n lanes takes some.
fn share_of_squares(lane: u32, n: u32) -> f32 {
  var sums = vec4<f32>(0.0);
  if (params.norm_dim > 0u && lane < n) {
    for (var i = lane; i < arrayLength(&squares); i += n) { sums += squares[i]; }
  }
  return dot(sums, vec4<f32>(1.0));
}

fn norm_factor(sum: f32) -> f32 {
  if (params.norm_dim == 0u) { return 1.0; }
  return inverseSqrt(sum / f32(params.norm_dim) + params.norm_eps);
}
