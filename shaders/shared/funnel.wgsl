// The high word of two, shifted left together: one instruction where 64-bit integers are (funnel_wide.wgsl), four here.

fn funnel(high: u32, low: u32, bits: u32) -> u32 {  // bits 1..31
  return (high << bits) | (low >> ((0u - bits) & 31u));
}

fn funnel_any(high: u32, low: u32, bits: u32) -> u32 {  // bits 0..31
  return (high << bits) | ((low >> 1u) >> (~bits & 31u));
}
