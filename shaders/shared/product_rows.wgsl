// Four rows of W times every token, for a lane that has them all to itself: no workgroup memory, no barrier.
// Beside it stand streams.wgsl, matrix.wgsl, sums.wgsl and dot.wgsl; the importer provides  fn store_y(i, value)  and
// params.rows, params.y_rows.

const LANES = 8u;  // one AVX2 vector
const ROWS = 4u;   // of a lane: the activations are loaded once for all of them

alias RowsSums = array<vec4<f32>, MOST_SUMS>;  // of each token: of each row

struct Sixteen { a: Four, b: Four, c: Four, d: Four }  // weights of each row

// Rows first, first + LANES, ... times a factor.
fn rows_product(first: u32, factor: f32) {
  let indices = first + LANES * vec4<u32>(0u, 1u, 2u, 3u);
  let states = vec4<u32>(entries[indices.x], entries[indices.y], entries[indices.z], entries[indices.w]);
  var s = open_streams(row_info[indices.x], row_info[indices.y], row_info[indices.z], row_info[indices.w], states);
  var sums: RowsSums;
  if (is_narrow(row_info[first])) {
    add_blocks(&sums, &s, narrow_raw_bits);
  } else {
    add_blocks(&sums, &s, raw_bits);
  }
  for (var r = 0u; r < ROWS; r++) {
    let index = indices[r];
    let row = row_info[index];
    var total: Sums;
    for (var t = 0u; t < tokens; t++) { total[t] = sums[t][r]; }
    let end = end_outlier(row);
    for (var k = row.first_outlier; k < end; k++) {
      let outlier = outliers[k];
      for (var t = 0u; t < tokens; t++) {
        total[t] += outlier_value(outlier, row_raw_bits(row)) * activation(t, outlier_column(outlier));
      }
    }
    if (index < params.rows) {
      for (var t = 0u; t < tokens; t++) {
        store_y(t * params.y_rows + matrix_row(row), total[t] * row_scale(row) * factor);
      }
    }
  }
}

fn add_blocks(sums: ptr<function, RowsSums>, s: ptr<function, Streams>, raw: u32) {
  let offset = weight_offset(raw);
  for (var block = 0u; block < params.n_blocks; block++) {
    if (tokens == 1u && digits == 1u) {
      let at = digits_at(0u, 0u, block);
      let dots = decode_and_dot16(s, raw, in_digits[at]);
      (*sums)[0] += scaled_rows(vec4<f32>(dots + decode_and_dot16(s, raw, in_digits[at + 1u])), 0u, block, offset);
    } else {
      let a = decode16_rows(s, raw);
      let b = decode16_rows(s, raw);
      for (var t = 0u; t < tokens; t++) {
        var dots = vec4<f32>(0.0);
        for (var digit = digits; digit > 0u; digit--) {
          let at = digits_at(t, digit - 1u, block);
          dots = dots * DIGIT + vec4<f32>(dot16_rows(a, in_digits[at]) + dot16_rows(b, in_digits[at + 1u]));
        }
        (*sums)[t] += scaled_rows(dots, t, block, offset);
      }
    }
  }
}

// As dot.wgsl has it of one row.
fn scaled_rows(dots: vec4<f32>, token: u32, block: u32, offset: f32) -> vec4<f32> {
  let x = block_scale(token * input_blocks() + input_block(block));
  return dots * x.x + vec4<f32>(offset * x.y);
}

// Each four are multiplied as soon as they are decoded, so that few weights wait outside of registers.
fn decode_and_dot16(s: ptr<function, Streams>, raw: u32, x: vec4<u32>) -> vec4<i32> {
  var dots = dot4_rows(decode4_rows(s, raw), x.x);
  dots += dot4_rows(decode4_rows(s, raw), x.y);
  if (raw > 2u) { refill_rows(s); }
  dots += dot4_rows(decode4_rows(s, raw), x.z);
  dots += dot4_rows(decode4_rows(s, raw), x.w);
  refill_rows(s);
  return dots;
}

fn decode16_rows(s: ptr<function, Streams>, raw: u32) -> Sixteen {
  let a = decode4_rows(s, raw);
  let b = decode4_rows(s, raw);
  if (raw > 2u) { refill_rows(s); }
  let c = decode4_rows(s, raw);
  let d = decode4_rows(s, raw);
  refill_rows(s);
  return Sixteen(a, b, c, d);
}

fn dot16_rows(w: Sixteen, x: vec4<u32>) -> vec4<i32> {
  return dot4_rows(w.a, x.x) + dot4_rows(w.b, x.y) + dot4_rows(w.c, x.z) + dot4_rows(w.d, x.w);
}

fn dot4_rows(w: Four, x: u32) -> vec4<i32> {
  let dots = dot_bytes_rows(w.high, x);
  if (raw_bits <= 2u) { return dots; }
  return (dots << vec4<u32>(raw_bits)) + dot_bytes_rows(w.low, x);
}

// Of bytes 0..127 and -127..127 four products by two of words: of w0 + 2^16 w2 and x2 + 2^16 x0 the product has w0 x0 + w2 x2 in its
// high half, to which the low one is rounded. A CPU has nothing better here.
fn dot_bytes_rows(w: vec4<u32>, x: u32) -> vec4<i32> {
  let v = bitcast<i32>(x);
  let even = ((v << 24u) >> 8u) + ((v << 8u) >> 24u);
  let odd = (((v << 16u) >> 24u) << 16u) + (v >> 24u);
  let halves = vec4<u32>(0x00FF00FFu);
  let a = bitcast<vec4<i32>>(w & halves) * even + 0x8000;
  let b = bitcast<vec4<i32>>((w >> vec4<u32>(8u)) & halves) * odd + 0x8000;
  return (a >> vec4<u32>(16u)) + (b >> vec4<u32>(16u));
}
