// Of a vector's squares, where a norm has left its factor to the matvec (then.wgsl), a lane's share: each of n lanes takes some.
// The importer provides  squares: array<vec4<f32>>, of each block of 32 columns the sum, then zeros,  and  params.norm_dim.

fn share_of_squares(lane: u32, n: u32) -> f32 {
  var sums = vec4<f32>(0.0);
  if (params.norm_dim > 0u && lane < n) {
    for (var i = lane; i < arrayLength(&squares); i += n) { sums += squares[i]; }
  }
  return dot(sums, vec4<f32>(1.0));
}
