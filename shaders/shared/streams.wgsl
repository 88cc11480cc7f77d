// ans.wgsl and stream.wgsl for four rows of a lane, which are the components of vectors: all four have a look-up under way, as
// a CPU looks no further ahead than the next one of a row. Beside it stand both, words.wgsl, matrix.wgsl and table_rows.wgsl.

struct Streams {  // see Stream
  state: vec4<u32>,
  table: vec4<u32>,
  pos: vec4<u32>,
  used: vec4<u32>,
  next: vec4<u32>,
  a: Chunks,
  b: Chunks,
  w0: vec4<u32>,
  w1: vec4<u32>,
  w2: vec4<u32>,
  w3: vec4<u32>,
}

struct Chunks {  // words of each row's
  x: vec4<u32>,
  y: vec4<u32>,
  z: vec4<u32>,
  w: vec4<u32>,
}

struct Four {  // weights of each row: bytes of Weights.high, of Weights.low
  high: vec4<u32>,
  low: vec4<u32>,
}

fn chunks_at(i: vec4<u32>) -> Chunks {
  let a = chunk_at(i.x);
  let b = chunk_at(i.y);
  let c = chunk_at(i.z);
  let d = chunk_at(i.w);
  return Chunks(vec4<u32>(a.x, b.x, c.x, d.x), vec4<u32>(a.y, b.y, c.y, d.y),
                vec4<u32>(a.z, b.z, c.z, d.z), vec4<u32>(a.w, b.w, c.w, d.w));
}

fn open_streams(a: Row, b: Row, c: Row, d: Row, states: vec4<u32>) -> Streams {
  let bit = vec4<u32>(a.bit, b.bit, c.bit, d.bit);
  let chunk = bit >> vec4<u32>(7u);
  let next = chunk + INTERLEAVE;
  let tables = vec4<u32>(first_entry(a), first_entry(b), first_entry(c), first_entry(d));
  let zero = vec4<u32>(0u);
  var s = Streams(states, tables, bit & vec4<u32>(127u), zero, next, chunks_at(chunk), chunks_at(next), zero, zero, zero, zero);
  align_rows(&s);
  return s;
}

fn funnel_rows(high: vec4<u32>, low: vec4<u32>, shift: vec4<u32>) -> vec4<u32> {
  return (high << shift) | ((low >> vec4<u32>(1u)) >> (vec4<u32>(31u) - shift));
}

fn align_rows(s: ptr<function, Streams>) {
  let a = (*s).a;
  let b = (*s).b;
  let two = ((*s).pos & vec4<u32>(64u)) != vec4<u32>(0u);
  let one = ((*s).pos & vec4<u32>(32u)) != vec4<u32>(0u);
  let v1 = select(a.y, a.w, two);
  let v2 = select(a.z, b.x, two);
  let v3 = select(a.w, b.y, two);
  let v4 = select(b.x, b.z, two);
  let u1 = select(v1, v2, one);
  let u2 = select(v2, v3, one);
  let u3 = select(v3, v4, one);
  let bits = (*s).pos & vec4<u32>(31u);
  (*s).w0 = funnel_rows(select(select(a.x, a.z, two), v1, one), u1, bits);
  (*s).w1 = funnel_rows(u1, u2, bits);
  if (most_bits() > 64u) { (*s).w2 = funnel_rows(u2, u3, bits); }
  if (most_bits() > 96u) { (*s).w3 = funnel_rows(u3, select(v4, select(b.y, b.w, two), one), bits); }
}

fn advance_rows(s: ptr<function, Streams>, left: vec4<u32>) {
  let rest = left & vec4<u32>(31u);
  let taken = vec4<u32>(32u) - rest;
  (*s).w0 = ((*s).w0 << taken) | ((*s).w1 >> rest);
  (*s).w1 = ((*s).w1 << taken) | ((*s).w2 >> rest);
  (*s).w2 = ((*s).w2 << taken) | ((*s).w3 >> rest);
  (*s).w3 = (*s).w3 << taken;
  (*s).used += taken;
}

fn refill_rows(s: ptr<function, Streams>) {
  let pos = (*s).pos + (*s).used;
  let crossed = pos >= vec4<u32>(128u);
  (*s).pos = pos & vec4<u32>(127u);
  (*s).used = vec4<u32>(0u);
  let a = (*s).a;
  let b = (*s).b;
  (*s).a = Chunks(select(a.x, b.x, crossed), select(a.y, b.y, crossed), select(a.z, b.z, crossed), select(a.w, b.w, crossed));
  (*s).next += select(vec4<u32>(0u), vec4<u32>(INTERLEAVE), crossed);
  (*s).b = chunks_at((*s).next);
  align_rows(s);
}

fn table_entries(s: ptr<function, Streams>) -> vec4<u32> {
  let i = (*s).table + (*s).state;
  return vec4<u32>(entry_at(i.x), entry_at(i.y), entry_at(i.z), entry_at(i.w));
}

fn lefts(entries: vec4<u32>) -> vec4<u32> { return entries >> vec4<u32>(16u); }

fn next_states(entries: vec4<u32>, window: vec4<u32>) -> vec4<u32> {
  let shifted = window >> (lefts(entries) & vec4<u32>(31u));
  if (n_states == 2048u) { return (entries >> vec4<u32>(21u)) + shifted; }
  return ((entries >> vec4<u32>(20u)) & vec4<u32>(0xFFEu)) + shifted;
}

fn spread_rows(entries: vec4<u32>) -> vec4<u32> {
  let symbols = entries & vec4<u32>(0xFFFFu);
  let halves = (symbols | (symbols << vec4<u32>(8u))) & vec4<u32>(0x00FF00FFu);
  return (halves | (halves << vec4<u32>(4u))) & vec4<u32>(0x0F0F0F0Fu);
}

fn raw_bytes_rows(window: vec4<u32>, raw: u32) -> vec4<u32> {
  if (raw == 0u) { return vec4<u32>(0u); }
  let field = window >> vec4<u32>((32u - 4u * raw) & 31u);
  let halves = (field | (field << vec4<u32>(16u - 2u * raw))) & vec4<u32>(((1u << (2u * raw)) - 1u) * 0x10001u);
  return (halves | (halves << vec4<u32>(8u - raw))) & vec4<u32>(((1u << raw) - 1u) * 0x01010101u);
}

fn decode4_rows(s: ptr<function, Streams>, raw: u32) -> Four {
  if (group_size == 4u) {
    let entries = table_entries(s);
    (*s).state = next_states(entries, (*s).w0);
    advance_rows(s, lefts(entries));
    return Four(spread_rows(entries), vec4<u32>(0u));
  }
  let low = raw_bytes_rows((*s).w0, raw);
  let after_raw = (*s).w0 << vec4<u32>((4u * raw) & 31u);
  let pairs0 = table_entries(s);
  (*s).state = next_states(pairs0, after_raw);
  let left = lefts(pairs0) - 4u * raw;
  var pairs1 = vec4<u32>(0u);
  if (4u * raw + 2u * max_nbits() > 31u) {  // both pairs do not fit one word
    advance_rows(s, left);
    pairs1 = table_entries(s);
    (*s).state = next_states(pairs1, (*s).w0);
    advance_rows(s, lefts(pairs1));
  } else {
    pairs1 = table_entries(s);
    (*s).state = next_states(pairs1, after_raw << ((vec4<u32>(0u) - lefts(pairs0)) & vec4<u32>(31u)));
    advance_rows(s, left + lefts(pairs1));
  }
  let symbols = insertBits(pairs0, pairs1, 16u, 16u);
  if (raw > 2u) { return Four(symbols, low); }
  return Four((symbols << vec4<u32>(raw)) | low, vec4<u32>(0u));
}
