// Activations to int8 digits, four columns a lane, eight neighbouring lanes a block of 32. Beside it stands digits.wgsl.
// The importer provides  x_digits: array<u32>  (tokens, digits, 4-column groups)  and  x_scale: array<vec2<f32>>.
// For weights without loss x_digits takes the f32 themselves, (tokens, columns), and x_scale nothing.

override lanes: u32;  // of the workgroup; a multiple of 8

var<workgroup> block_max: array<f32, lanes>;
var<workgroup> block_sum: array<f32, lanes>;

// The columns of a quad. Past the end the last one stands again, whose load does no harm.
fn columns_of(quad: u32, dim: u32) -> vec4<u32> {
  return min(vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(dim - 1u));
}

// To be called by all lanes of the workgroup; `group` = column / 4; groups past the end carry v = 0 and write nothing.
fn quantize4(v: vec4<f32>, lane: u32, token: u32, group: u32, n_blocks: u32) {
  if (digits == FLOAT) {
    if (group < n_blocks * 8u) {
      let first = 4u * (token * n_blocks * 8u + group);
      for (var k = 0u; k < 4u; k++) { x_digits[first + k] = bitcast<u32>(v[k]); }
    }
    return;
  }
  let size = abs(v);
  workgroupBarrier();  // the last call's readers are done
  block_max[lane] = max(max(size.x, size.y), max(size.z, size.w));
  workgroupBarrier();
  let first = lane & ~7u;
  var largest = 0.0;
  for (var i = 0u; i < 8u; i++) { largest = max(largest, block_max[first + i]); }
  let scale = largest / 127.0;
  var rest = select(vec4<f32>(0.0), v / scale, scale > 0.0);
  var sum = 0.0;
  var unit = 1.0;
  let used = group < n_blocks * 8u;
  for (var digit = 0u; digit < digits; digit++) {
    let q = vec4<i32>(round(rest));
    if (used) { x_digits[((token * digits + digit) * n_blocks * 8u) + group] = pack4xI8(q); }
    sum += unit * f32(q.x + q.y + q.z + q.w);
    rest = (rest - vec4<f32>(q)) * 254.0;
    unit = unit / 254.0;
  }
  block_sum[lane] = sum;
  workgroupBarrier();
  if (used && (lane & 7u) == 0u) {
    sum = 0.0;
    for (var i = 0u; i < 8u; i++) { sum += block_sum[lane + i]; }
    x_scale[token * n_blocks + (group >> 3u)] = vec2<f32>(scale, scale * sum);
  }
}
