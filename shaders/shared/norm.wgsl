// x += y;  xn = weight * x / sqrt(mean(x^2) + eps), as int8 digits (Zhang & Sennrich 2019, eq. 4). f32; dim of any size,
// digits padded with zeros to a multiple of 32. Beside it stands quantize.wgsl; the importer provides
// fn y_sum4(token, columns) -> vec4<f32>,  x: array<f32>  (tokens, dim),  weight: array<f32>,  params.dim, params.eps.

var<workgroup> squares: array<f32, lanes>;
var<workgroup> sums_of_squares: array<vec4<f32>, 8>;

// To be called by all lanes of a workgroup; the digits go to the place of `out_token`.
fn norm(lane: u32, token: u32, out_token: u32) {
  let first = token * params.dim;
  let n_blocks = (params.dim + 31u) / 32u;
  var sum = 0.0;
  for (var quad = lane; quad < n_blocks * 8u; quad += lanes) {
    let columns = columns_of(quad, params.dim);
    let at = vec4<u32>(first) + columns;
    let v = vec4<f32>(x[at.x], x[at.y], x[at.z], x[at.w]) + y_sum4(token, columns);
    for (var k = 0u; k < 4u; k++) {
      if (4u * quad + k < params.dim) {
        x[at[k]] = v[k];
        sum += v[k] * v[k];
      }
    }
  }
  squares[lane] = sum;
  workgroupBarrier();
  if (lane < 32u) {
    for (var i = lane + 32u; i < lanes; i += 32u) { sum += squares[i]; }
    sums_of_squares[lane / 4u][lane % 4u] = sum;
  }
  workgroupBarrier();
  var sums = vec4<f32>(0.0);
  for (var i = 0u; i < min(8u, lanes / 4u); i++) { sums += sums_of_squares[i]; }
  let inverse = inverseSqrt(dot(sums, vec4<f32>(1.0)) / f32(params.dim) + params.eps);
  for (var start = 0u; start < n_blocks * 8u; start += lanes) {
    let quad = start + lane;
    var v = vec4<f32>(0.0);
    for (var k = 0u; k < 4u; k++) {
      let i = 4u * quad + k;
      if (i < params.dim) { v[k] = x[first + i] * inverse * weight[i]; }
    }
    quantize4(v, lane, out_token, quad, n_blocks);
  }
}
