// funnel.wgsl by 64-bit integers. Shifts take their amount modulo 64: no mask, which would be an instruction more.

fn leading(word: u32, shift: u32) -> u32 { return funnel(0u, word, shift); }

fn funnel(high: u32, low: u32, shift: u32) -> u32 {
  return u32((((u64(high) << 32u) | u64(low)) << (shift & 63u)) >> 32u);
}
