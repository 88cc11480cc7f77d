// Thirty-two lanes' shares of a vector's squares, and the factor of its norm that they make. Beside it stands norm_factor.wgsl.

var<workgroup> shares: array<vec4<f32>, 8>;

fn leave_share(lane: u32, sum: f32) { shares[lane / 4u][lane % 4u] = sum; }

// A barrier later.
fn shared_factor() -> f32 {
  var sums = vec4<f32>(0.0);
  for (var i = 0u; i < 8u; i++) { sums += shares[i]; }
  return norm_factor(dot(sums, vec4<f32>(1.0)));
}
