// The factor of a norm, 1 / sqrt(mean(x^2) + eps), that the digits which a matvec multiplies were left without: it is known
// once the whole vector is. The importer provides  params.norm_dim: u32  (0: nothing is missing)  and  params.norm_eps: f32.

fn norm_factor(sum: f32) -> f32 {
  if (params.norm_dim == 0u) { return 1.0; }
  return inverseSqrt(sum / f32(params.norm_dim) + params.norm_eps);
}
