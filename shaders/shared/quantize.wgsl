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

struct Quantized {
  words: vec3<u32>,  // a word of four columns for each digit
  scale: f32,        // of the block
}

// How large a lane's four columns are. A barrier later they may be `quantized`.
fn share_size(v: vec4<f32>, lane: u32) {
  let size = abs(v);
  block_max[lane] = max(max(size.x, size.y), max(size.z, size.w));
}

// A barrier later `block_total` is known.
fn quantized(v: vec4<f32>, lane: u32) -> Quantized {
  let first = lane & ~7u;
  var largest = 0.0;
  for (var i = 0u; i < 8u; i++) { largest = max(largest, block_max[first + i]); }
  let scale = largest / 127.0;
  var rest = select(vec4<f32>(0.0), v / scale, scale > 0.0);
  var words = vec3<u32>(0u);
  var sum = 0.0;
  var unit = 1.0;
  for (var digit = 0u; digit < digits; digit++) {
    let q = vec4<i32>(round(rest));
    words[digit] = pack4xI8(q);
    sum += unit * f32(q.x + q.y + q.z + q.w);
    rest = (rest - vec4<f32>(q)) * 254.0;
    unit = unit / 254.0;
  }
  block_sum[lane] = sum;
  return Quantized(words, scale);
}

// The sum of a block's columns in units of its scale, for the first of its lanes.
fn block_total(lane: u32) -> f32 {
  var sum = 0.0;
  for (var i = 0u; i < 8u; i++) { sum += block_sum[lane + i]; }
  return sum;
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
  workgroupBarrier();  // the last call's readers are done
  share_size(v, lane);
  workgroupBarrier();
  let q = quantized(v, lane);
  let used = group < n_blocks * 8u;
  for (var digit = 0u; digit < digits; digit++) {
    if (used) { x_digits[((token * digits + digit) * n_blocks * 8u) + group] = q.words[digit]; }
  }
  workgroupBarrier();
  if (used && (lane & 7u) == 0u) {
    x_scale[token * n_blocks + (group >> 3u)] = vec2<f32>(q.scale, q.scale * block_total(lane));
  }
}
