// Four columns a lane as int8 digits, eight neighbouring lanes a block of 32. Beside it stands digits.wgsl.

override lanes: u32;  // of the workgroup; a multiple of 8

var<workgroup> block_max: array<f32, lanes>;
var<workgroup> block_sum: array<f32, lanes>;

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
