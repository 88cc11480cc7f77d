// Weights that are f32 without loss: exponent fields come out of the stream, in place of symbols; sign and mantissa have
// fields of field_bits of their own. Beside it stand ans.wgsl, stream.wgsl and matrix.wgsl. The importer provides
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
  let exponents = decode16(s, raw_bits).high;
  var words = group_words(chunk, group);
  return Floats(
    floats4(exponents.x, fields4(&words, 0u)),
    floats4(exponents.y, fields4(&words, 4u)),
    floats4(exponents.z, fields4(&words, 8u)),
    floats4(exponents.w, fields4(&words, 12u)));
}

alias Words = array<u32, 13>;  // of sixteen fields, and one to shift from

// The words of columns 16 * group .. + 15, from bit 31 of the first one on.
fn group_words(chunk: u32, group: u32) -> Words {
  var words: Words;
  if (field_bits == 8u) {  // a group is a chunk
    let four = mantissas[chunk + 32u * group];
    words[0] = four.x;
    words[1] = four.y;
    words[2] = four.z;
    words[3] = four.w;
    return words;
  }
  let n_words = (field_bits + 1u) / 2u;
  for (var i = 0u; i < n_words; i++) { words[i] = field_word(chunk, group * field_bits / 2u + i); }
  if ((group & field_bits & 1u) == 1u) {  // it starts in the middle of a word
    for (var i = 0u; i < n_words; i++) { words[i] = (words[i] << 16u) | (words[i + 1u] >> 16u); }
  }
  return words;
}

// Fields i .. i + 3 of a group, each from bit 31 down; what is below is not theirs.
fn fields4(words: ptr<function, Words>, i: u32) -> vec4<u32> {
  return vec4<u32>(field_at(words, i * field_bits), field_at(words, (i + 1u) * field_bits),
                   field_at(words, (i + 2u) * field_bits), field_at(words, (i + 3u) * field_bits));
}

fn field_at(words: ptr<function, Words>, bit: u32) -> u32 {
  let position = bit & 31u;
  let field = (*words)[bit >> 5u] << position;
  if (position + field_bits <= 32u) { return field; }
  return field | ((*words)[(bit >> 5u) + 1u] >> (32u - position));
}

fn field_word(chunk: u32, i: u32) -> u32 { return mantissas[chunk + 32u * (i >> 2u)][i & 3u]; }

fn floats4(exponents: u32, fields: vec4<u32>) -> vec4<f32> {
  let exponent = vec4<u32>(exponents << 23u, exponents << 15u, exponents << 7u, exponents >> 1u) & vec4<u32>(EXPONENT);
  let mantissa = (fields >> vec4<u32>(8u)) & vec4<u32>(((1u << (field_bits - 1u)) - 1u) << (24u - field_bits));
  return bitcast<vec4<f32>>((fields & vec4<u32>(SIGN)) | exponent | mantissa);
}

// An outlier is column | exponent field that the stream has << 16 | the true one << 24; here as weights, in this order.
fn outlier_floats(chunk: u32, outlier: u32) -> vec2<f32> {
  let column = outlier_column(outlier);
  var words = group_words(chunk, column >> 4u);
  return floats4(outlier >> 16u, vec4<u32>(field_at(&words, (column & 15u) * field_bits))).xy;
}
