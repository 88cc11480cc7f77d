// The code: tANS over groups of weights, four weights at a time: two pairs and their raw bits, or one group of four.
// Format facts only; how the bits arrive is the business of stream.wgsl (Stream, advance, refill), which stands beside
// this file with funnel.wgsl. The importer provides table_entry(stream) -> u32, of the class's table the entry of the
// stream's state.

override n_states: u32;      // 2^P, P = 11 or 12
override group_size: u32;    // weights that an entry decodes: 2 or 4
override raw_bits: u32;      // 0..4 low bits per weight that are stored as they are; none with groups of 4
override wide_symbols: bool; // symbols of two have 8 bits (a float's exponent), not 5

// A table entry: x in bits 0..P - 1 | 16 bits of symbols, two of 8 or four of 4, the first lowest | nbits.

fn entry_nbits(entry: u32) -> u32 { return entry >> select(28u, 27u, n_states == 2048u); }

// x, then the next nbits bits of the stream; the leading one of x leaves the state on the left.
fn next_state(entry: u32, window: u32) -> u32 {
  return funnel(entry, window, entry_nbits(entry)) & (n_states - 1u);
}

// Of an entry, with its symbols in bits 11..26.
fn symbols_at_11(entry: u32) -> u32 { return select(entry >> 1u, entry, n_states == 2048u); }

// Four symbols, one a byte, from the entries of two pairs; shifted left by raw_bits, if these are at most 2.
fn symbol_bytes(pair0: u32, pair1: u32) -> u32 {
  let a = symbols_at_11(pair0);
  let b = symbols_at_11(pair1);
  if (wide_symbols) { return ((a >> 11u) & 0xFFFFu) | ((b << 5u) & 0xFFFF0000u); }
  // Symbols of 5 bits are the upper parts of bytes 1 and 2: a byte permutation, and away with what is below them.
  let bytes = ((a >> 8u) & 0xFFFFu) | ((b << 8u) & 0xFFFF0000u);
  return (bytes & 0xF8F8F8F8u) >> (3u - select(raw_bits, 0u, raw_bits > 2u));
}

// The same from the entry of a group of four.
fn spread_symbols(entry: u32) -> u32 {
  let symbols = (symbols_at_11(entry) >> 11u) & 0xFFFFu;
  let halves = (symbols | (symbols << 8u)) & 0x00FF00FFu;
  return (halves | (halves << 4u)) & 0x0F0F0F0Fu;
}

// The 4 * raw_bits leading bits of the window, weight 0 lowest, spread to one field a byte.
fn raw_bytes(window: u32) -> u32 {
  if (raw_bits == 0u) { return 0u; }
  let field = window >> ((32u - 4u * raw_bits) & 31u);
  let halves = (field | (field << (16u - 2u * raw_bits))) & (((1u << (2u * raw_bits)) - 1u) * 0x10001u);
  return (halves | (halves << (8u - raw_bits))) & (((1u << raw_bits) - 1u) * 0x01010101u);
}

// Sixteen decoded weights: byte k of `high[j]` and `low[j]` belongs to column 4 j + k, and
// weight = (high << high_shift()) + low + (min_symbol << raw_bits).
// With up to 2 raw bits a weight fits one signed byte (at most 127): `high` is all of it. Fewer registers, one dot product.
struct Weights {
  high: vec4<u32>,
  low: vec4<u32>,
}

fn high_shift() -> u32 { return select(0u, raw_bits, raw_bits > 2u); }

fn weight_at(w: Weights, column: u32) -> u32 {  // without min_symbol
  let shift = (column & 3u) * 8u;
  let high = (w.high[column >> 2u] >> shift) & 255u;
  return (high << high_shift()) + ((w.low[column >> 2u] >> shift) & 255u);
}

fn decode4(s: ptr<function, Stream>) -> vec2<u32> {  // bytes of `high`, of `low`
  if (group_size == 4u) {
    let entry = table_entry(s);
    (*s).state = next_state(entry, (*s).w0);
    advance(s, entry_nbits(entry));
    return vec2<u32>(spread_symbols(entry), 0u);
  }
  let low = raw_bytes((*s).w0);
  let after_raw = (*s).w0 << ((4u * raw_bits) & 31u);
  let pair0 = table_entry(s);
  (*s).state = next_state(pair0, after_raw);
  let used = 4u * raw_bits + entry_nbits(pair0);
  var pair1 = 0u;
  if (4u * raw_bits + 2u * select(12u, 11u, n_states == 2048u) > 31u) {  // both pairs do not fit one word
    advance(s, used);
    pair1 = table_entry(s);
    (*s).state = next_state(pair1, (*s).w0);
    advance(s, entry_nbits(pair1));
  } else {
    pair1 = table_entry(s);
    (*s).state = next_state(pair1, after_raw << entry_nbits(pair0));
    advance(s, used + entry_nbits(pair1));
  }
  let symbols = symbol_bytes(pair0, pair1);
  if (raw_bits > 2u) { return vec2<u32>(symbols, low); }
  return vec2<u32>(symbols | low, 0u);
}

fn decode16(s: ptr<function, Stream>) -> Weights {
  let a = decode4(s);
  let b = decode4(s);
  if (raw_bits > 2u) { refill(s); }  // at most 80 bits since the last one
  let c = decode4(s);
  let d = decode4(s);
  refill(s);  // at most 128 bits since the last one
  return Weights(vec4<u32>(a.x, b.x, c.x, d.x), vec4<u32>(a.y, b.y, c.y, d.y));
}
