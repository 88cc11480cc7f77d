// Dot products of decoded weights with activations in int8 digits: the integer sums are exact. Beside it stand digits.wgsl
// and input.wgsl, or input_made.wgsl. The importer provides  params.n_blocks  and  params.offset: f32  (min_symbol << raw_bits).

const DIGIT = 1.0 / 254.0;

// Where the digits of 32 columns begin in in_digits.
fn digits_at(token: u32, digit: u32, block: u32) -> u32 {
  return ((token * digits + digit) * input_blocks() + input_block(block)) * 2u;
}

// min_symbol << raw; raw is at most raw_bits.
fn weight_offset(raw: u32) -> f32 { return params.offset / f32(1u << (raw_bits - raw)); }

// What 32 columns of a row add to its product with a token, the row's scale apart.
fn block_dot(a: Weights, b: Weights, token: u32, block: u32, offset: f32) -> f32 {
  var dot = 0.0;
  for (var digit = digits; digit > 0u; digit--) {
    let at = digits_at(token, digit - 1u, block);
    dot = dot * DIGIT + f32(dot16(a, in_digits[at]) + dot16(b, in_digits[at + 1u]));
  }
  return scaled(dot, token, block, offset);
}

fn scaled(dot: f32, token: u32, block: u32, offset: f32) -> f32 {
  let x = block_scale(token * input_blocks() + input_block(block));
  return dot * x.x + offset * x.y;
}

fn dot16(w: Weights, x: vec4<u32>) -> i32 {
  let dot = dot_bytes(w.high, x);
  if (raw_bits <= 2u) { return dot; }
  return (dot << raw_bits) + dot_bytes(w.low, x);
}

fn dot_bytes(w: vec4<u32>, x: vec4<u32>) -> i32 {
  return dot4I8Packed(w.x, x.x) + dot4I8Packed(w.y, x.y) + dot4I8Packed(w.z, x.z) + dot4I8Packed(w.w, x.w);
}

// No loop over digits: llvmpipe ends a lane's loops after some 65000 rounds in all, and rows have hundreds of outliers.
fn activation(token: u32, column: u32) -> f32 {
  let first = digits_at(token, 0u, 0u) + (column >> 4u);
  var x = digit_at(first, column);
  if (digits == 3u) {
    let group = 2u * input_blocks();
    x += DIGIT * (digit_at(first + group, column) + DIGIT * digit_at(first + 2u * group, column));
  }
  return x * block_scale(token * input_blocks() + input_block(column >> 5u)).x;
}

fn digit_at(group: u32, column: u32) -> f32 {
  return f32(extractBits(bitcast<i32>(in_digits[group][(column >> 2u) & 3u]), (column & 3u) * 8u, 8u));
}
