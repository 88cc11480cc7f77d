// Dot products of decoded weights with activations that are int8 digits: x = scale (d0 + d1 / 254 + d2 / 254^2),
// one scale for 32 columns. One digit is the int8 mode; three carry 23 bits below the block's largest value, no less
// than f32 rounding leaves of a sum, and are the exact mode. The integer sums are exact in both.
// Beside it stands sums.wgsl. The importer provides  x_digits: array<vec4<u32>>  (tokens, digits, 16-column groups),  x_scale: array<vec2<f32>>
// (tokens, blocks): scale and sum of the block's x,  and  params.n_blocks, params.offset  (min_symbol << raw_bits).

override digits: u32;  // 1 or 3

const DIGIT = 1.0 / 254.0;

// Decode 32 columns of a lane's rows once, use them for every token.
fn accumulate_block(streams: ptr<function, array<Stream, MAX_ROWS>>, block: u32,
                    sums: ptr<function, array<Sums, MAX_ROWS>>) {
  var a: array<Weights, MAX_ROWS>;
  var b: array<Weights, MAX_ROWS>;
  for (var r = 0u; r < rows_per_lane; r++) {
    var s = (*streams)[r];
    a[r] = decode16(&s);
    b[r] = decode16(&s);
    (*streams)[r] = s;
  }
  for (var t = 0u; t < tokens; t++) {
    var dot = array<f32, MAX_ROWS>();  // spelled out: without it naga does not zero it again in the next round
    for (var digit = digits; digit > 0u; digit--) {
      let at = ((t * digits + digit - 1u) * params.n_blocks + block) * 2u;
      let x0 = x_digits[at];
      let x1 = x_digits[at + 1u];
      for (var r = 0u; r < rows_per_lane; r++) {
        dot[r] = dot[r] * DIGIT + f32(dot16(a[r], x0) + dot16(b[r], x1));
      }
    }
    let x = x_scale[t * params.n_blocks + block];
    for (var r = 0u; r < rows_per_lane; r++) { (*sums)[r][t] += dot[r] * x.x + f32(params.offset) * x.y; }
  }
}

fn dot16(w: Weights, x: vec4<u32>) -> i32 {
  let dot = dot_bytes(w.high, x);
  if (raw_bits <= 2u) { return dot; }
  return (dot << raw_bits) + dot_bytes(w.low, x);
}

fn dot_bytes(w: vec4<u32>, x: vec4<u32>) -> i32 {
  return dot4I8Packed(w.x, x.x) + dot4I8Packed(w.y, x.y) + dot4I8Packed(w.z, x.z) + dot4I8Packed(w.w, x.w);
}

fn add_outliers(row: Row, sums: Sums) -> Sums {
  var total = sums;
  let end = end_outlier(row);
  for (var k = row.first_outlier; k < end; k++) {
    let outlier = outliers[k];
    for (var t = 0u; t < tokens; t++) {
      total[t] += outlier_value(outlier) * activation(t, outlier_column(outlier));
    }
  }
  return total;
}

// No loop over digits: llvmpipe ends a lane's loops after some 65000 rounds in all, and rows have hundreds of outliers.
fn activation(token: u32, column: u32) -> f32 {
  let first = token * digits * 2u * params.n_blocks + (column >> 4u);
  var x = digit_at(first, column);
  if (digits == 3u) {
    let group = 2u * params.n_blocks;
    x += DIGIT * (digit_at(first + group, column) + DIGIT * digit_at(first + 2u * group, column));
  }
  return x * x_scale[token * params.n_blocks + (column >> 5u)].x;
}

fn digit_at(group: u32, column: u32) -> f32 {
  return f32(extractBits(bitcast<i32>(x_digits[group][(column >> 2u) & 3u]), (column & 3u) * 8u, 8u));
}
