// Weights that are f32 without loss: exponent fields come out of the stream, in place of symbols; sign and mantissa have
// fields of field_bits of their own. Beside it stand ans.wgsl, a stream and matrix.wgsl. The importer provides
// outliers: array<u32>,  mantissas: array<vec4<u32>>  in which the 16-byte chunks of the 32 rows of a tile alternate,
// and  params.row_chunks, those of a row.

override field_bits: u32;  // 1..24: sign, then leading bits of the mantissa

const SIGN = 0x80000000u;
const EXPONENT = 0x7F800000u;

struct Floats {  // of sixteen columns
  a: vec4<f32>,
  b: vec4<f32>,
  c: vec4<f32>,
  d: vec4<f32>,
}

// Where the fields of row `index` start: its first chunk.
fn first_chunk(index: u32) -> u32 { return (index >> 5u) * params.row_chunks * 32u + (index & 31u); }

// Columns 16 * group .. + 15, to which the stream must have come; outliers have wrong exponents still.
fn decode_floats(s: ptr<function, Stream>, chunk: u32, group: u32) -> Floats {
  let exponents = decode16(s).high;
  return Floats(
    floats4(exponents.x, fields4(chunk, 4u * group)),
    floats4(exponents.y, fields4(chunk, 4u * group + 1u)),
    floats4(exponents.z, fields4(chunk, 4u * group + 2u)),
    floats4(exponents.w, fields4(chunk, 4u * group + 3u)));
}

// The fields of columns 4 * quad .. + 3, each from bit 31 down; what is below is not theirs.
fn fields4(chunk: u32, quad: u32) -> vec4<u32> {
  if (field_bits == 8u) {
    return vec4<u32>(field_word(chunk, quad)) << vec4<u32>(0u, 8u, 16u, 24u);
  }
  return vec4<u32>(field(chunk, 4u * quad), field(chunk, 4u * quad + 1u), field(chunk, 4u * quad + 2u),
                   field(chunk, 4u * quad + 3u));
}

fn field(chunk: u32, column: u32) -> u32 {
  let bit = column * field_bits;
  let position = bit & 31u;
  var bits = field_word(chunk, bit >> 5u) << position;
  if (position + field_bits > 32u) { bits |= field_word(chunk, (bit >> 5u) + 1u) >> (32u - position); }
  return bits;
}

fn field_word(chunk: u32, i: u32) -> u32 { return mantissas[chunk + 32u * (i >> 2u)][i & 3u]; }

fn floats4(exponents: u32, fields: vec4<u32>) -> vec4<f32> {
  let exponent = vec4<u32>(exponents << 23u, exponents << 15u, exponents << 7u, exponents >> 1u) & vec4<u32>(EXPONENT);
  let mantissa = (fields >> vec4<u32>(8u)) & vec4<u32>(((1u << (field_bits - 1u)) - 1u) << (24u - field_bits));
  return bitcast<vec4<f32>>((fields & vec4<u32>(SIGN)) | exponent | mantissa);
}

// An outlier is column | exponent field that the stream has << 16 | the true one << 24; here as weights, in this order.
fn outlier_floats(chunk: u32, outlier: u32) -> vec2<f32> {
  return floats4(outlier >> 16u, vec4<u32>(field(chunk, outlier_column(outlier)))).xy;
}
