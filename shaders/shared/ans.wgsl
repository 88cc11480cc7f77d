// The code: tANS over groups of weights, four weights at a time: two pairs and their raw bits, or one group of four.
// Format facts only; how the bits arrive is the business of stream.wgsl (Stream, advance, refill), which stands beside
// this file with funnel.wgsl. The importer provides table_entry(stream) -> u32, of the class's table the entry of the
// stream's state.
//
// Narrow classes may have fewer raw bits than others, see matrix.wgsl. So functions are given `raw`, always as an override, for
// loops that know it: is_narrow(row) says which loop is a row's.

override n_states: u32;      // 2^P, P = 11 or 12
override group_size: u32;    // weights that an entry decodes: 2 or 4
override raw_bits: u32;      // 0..4 low bits per weight that are stored as they are; none with groups of 4

// A table entry: symbols in bits 0..15, two of 8 bits or four of 4, the first lowest | 32 - nbits in 16..20 | base in
// 21..31. With 2^12 states base is even and stored halved.

fn max_nbits() -> u32 { return select(12u, 11u, n_states == 2048u); }

fn entry_base(entry: u32) -> u32 {
  if (n_states == 2048u) { return entry >> 21u; }
  return (entry >> 20u) & 0xFFEu;
}

// In its low five bits the bits of a word that are left when nbits are taken: 32 - nbits, at most 31. What is above counts
// for nothing, as shifts go by five bits.
fn entry_left(entry: u32) -> u32 { return entry >> 16u; }

// base + the first nbits bits of the window.
fn next_state(entry: u32, window: u32) -> u32 { return entry_base(entry) + (window >> (entry_left(entry) & 31u)); }

// Four symbols, one a byte, from the entries of two pairs.
fn symbol_bytes(pair0: u32, pair1: u32) -> u32 { return insertBits(pair0, pair1, 16u, 16u); }

// The same from the entry of a group of four.
fn spread_symbols(entry: u32) -> u32 {
  let symbols = entry & 0xFFFFu;
  let halves = (symbols | (symbols << 8u)) & 0x00FF00FFu;
  return (halves | (halves << 4u)) & 0x0F0F0F0Fu;
}

// The 4 * raw leading bits of the window, weight 0 lowest, spread to one field a byte.
fn raw_bytes(window: u32, raw: u32) -> u32 {
  if (raw == 0u) { return 0u; }
  let field = window >> ((32u - 4u * raw) & 31u);
  let halves = (field | (field << (16u - 2u * raw))) & (((1u << (2u * raw)) - 1u) * 0x10001u);
  return (halves | (halves << (8u - raw))) & (((1u << raw) - 1u) * 0x01010101u);
}

// Sixteen decoded weights: byte k of `high[j]` and `low[j]` belongs to column 4 j + k, and
// weight = (high << high_shift()) + low + (min_symbol << raw).
// With up to 2 raw bits a weight fits one signed byte (at most 127): `high` is all of it. Fewer registers, one dot product.
struct Weights {
  high: vec4<u32>,
  low: vec4<u32>,
}

fn high_shift() -> u32 { return select(0u, raw_bits, raw_bits > 2u); }

// Most bits between two refills, at most 128.
fn most_bits() -> u32 {
  let of_eight = 8u * raw_bits + 8u / group_size * max_nbits();
  return of_eight * select(1u, 2u, raw_bits <= 2u);
}

fn decode4(s: ptr<function, Stream>, raw: u32) -> vec2<u32> {  // bytes of `high`, of `low`
  if (group_size == 4u) {
    let entry = table_entry(s);
    (*s).state = next_state(entry, (*s).w0);
    advance(s, entry_left(entry));
    return vec2<u32>(spread_symbols(entry), 0u);
  }
  let low = raw_bytes((*s).w0, raw);
  let after_raw = (*s).w0 << ((4u * raw) & 31u);
  let pair0 = table_entry(s);
  (*s).state = next_state(pair0, after_raw);
  let left = entry_left(pair0) - 4u * raw;
  var pair1 = 0u;
  if (4u * raw + 2u * max_nbits() > 31u) {  // both pairs do not fit one word
    advance(s, left);
    pair1 = table_entry(s);
    (*s).state = next_state(pair1, (*s).w0);
    advance(s, entry_left(pair1));
  } else {
    pair1 = table_entry(s);
    (*s).state = next_state(pair1, after_raw << ((0u - entry_left(pair0)) & 31u));
    advance(s, left + entry_left(pair1));
  }
  let symbols = symbol_bytes(pair0, pair1);
  if (raw > 2u) { return vec2<u32>(symbols, low); }
  return vec2<u32>((symbols << raw) | low, 0u);
}

fn decode16(s: ptr<function, Stream>, raw: u32) -> Weights {
  let a = decode4(s, raw);
  let b = decode4(s, raw);
  if (raw > 2u) { refill(s); }
  let c = decode4(s, raw);
  let d = decode4(s, raw);
  refill(s);
  return Weights(vec4<u32>(a.x, b.x, c.x, d.x), vec4<u32>(a.y, b.y, c.y, d.y));
}
