// funnel.wgsl for GPUs with 64-bit integers, whose compilers make one instruction of it.

fn funnel(high: u32, low: u32, bits: u32) -> u32 {  // bits 0..31
  return u32((((u64(high) << 32u) | u64(low)) << bits) >> 32u);
}

fn funnel_any(high: u32, low: u32, bits: u32) -> u32 { return funnel(high, low, bits); }
