// x += y;  xn = weight * x / sqrt(mean(x^2) + eps), as int8 digits (Zhang & Sennrich 2019, eq. 4). f32; dim of any size,
// digits padded with zeros to a multiple of 32. Beside it stands quantize.wgsl; the importer provides
// fn y_sum(token, i) -> f32,  x: array<f32>  (tokens, dim),  weight: array<f32>,  params.dim, params.eps.

var<workgroup> squares: array<f32, lanes>;

// To be called by all lanes of a workgroup; the digits go to the place of `out_token`.
fn norm(lane: u32, token: u32, out_token: u32) {
  let first = token * params.dim;
  let n_blocks = (params.dim + 31u) / 32u;
  var sum = 0.0;
  for (var quad = lane; quad < n_blocks * 8u; quad += lanes) {  // four columns: their loads are under way together
    for (var k = 0u; k < 4u; k++) {
      let i = 4u * quad + k;
      if (i < params.dim) {
        let value = x[first + i] + y_sum(token, i);
        x[first + i] = value;
        sum += value * value;
      }
    }
  }
  squares[lane] = sum;
  workgroupBarrier();
  if (lane < 8u) {
    for (var i = lane + 8u; i < lanes; i += 8u) { sum += squares[i]; }
    squares[lane] = sum;
  }
  workgroupBarrier();
  sum = 0.0;
  for (var i = 0u; i < 8u; i++) { sum += squares[i]; }
  let inverse = inverseSqrt(sum / f32(params.dim) + params.eps);
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
